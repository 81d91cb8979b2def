"""One model called in every way stock code allows: in threads, in parts, with other backends and dtypes."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache

from tests.models import EVERY, IMAGE, LAYOUTS, PACKED, prompt, shared
from tests.packed import skip_unless_it_counts_on
from tests.reference import CASES, POLICIES, budget, expect
from vlm_prune import UnsupportedCallError, pruned
from vlm_prune.versions import CACHE, cache_of, takes_encoded

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
families = pytest.mark.parametrize("family", EVERY)
cutting = pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
cases = pytest.mark.parametrize(("policy", "family", "positions"), CASES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@cases
def test_threads_do_not_disturb_each_other(policy, family, positions):
    model = shared(family)
    batches = [
        prompt(family, rows, seed=s)
        for s, rows in enumerate([[(3, -1, 4)], [(2, -1, 1), (4, -2, 3)], [(5,)]])
    ]
    results: dict[int, list] = {}
    start = threading.Barrier(len(batches))

    def work(number):
        start.wait()
        results[number] = []
        with torch.no_grad():
            for _ in range(6):
                tokens = model.generate(**batches[number].inputs, max_new_tokens=3)
                logits = model(**batches[number].inputs).logits
                receipt = model.pruning.receipt
                results[number].append(
                    (tokens, logits, receipt and (receipt.kept, receipt.tiles, receipt.batch))
                )

    with pruned(model, policy, positions=positions, **budget(policy)):
        want = []
        for batch in batches:
            tokens, logits = model.generate(**batch.inputs, max_new_tokens=3), model(**batch.inputs).logits
            receipt = model.pruning.receipt
            want.append((tokens, logits, (receipt.kept, receipt.tiles, receipt.batch)))
        want[2] = (*want[2][:2], None)  # a thread that saw no image has no receipt
        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, expected in enumerate(want):
        assert len(results[number]) == 6
        for tokens, logits, receipt in results[number]:
            assert torch.equal(tokens, expected[0])
            assert torch.equal(logits, expected[1])
            assert receipt == expected[2]


@families
@cutting
def test_hidden_states_have_full_length(policy, family):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    _, short = expect(model, batch, policy)
    with short.given(model):
        want = model(**short.inputs, output_hidden_states=True).hidden_states
    with pruned(model, policy, **budget(policy)):
        states = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(want)
    for ours, theirs in zip(states, want, strict=True):
        assert ours.shape[:2] == batch.ids.shape
        assert ours.isfinite().all()
        for b, rows in enumerate(short.rows):
            torch.testing.assert_close(ours[b, rows], theirs[b, -len(rows) :], **CLOSE)


@cases
@pytest.mark.parametrize("options", [{"use_cache": False}, {"return_dict": False}, {"logits_to_keep": 3}])
def test_options_of_a_forward(options, policy, family, positions):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, policy, positions=positions, **budget(policy)):
        want, output = model(**batch.inputs).logits, model(**batch.inputs, **options)
    logits = output[0]
    torch.testing.assert_close(logits, want[:, -logits.shape[1] :])
    assert logits.shape[1] == options.get("logits_to_keep", batch.ids.shape[1])
    if "return_dict" in options:
        assert type(output) is tuple
    else:
        assert (cache_of(output) is None) == ("use_cache" in options)


@cases
def test_features_encoded_beforehand(policy, family, positions):
    """`get_image_features` first, the forward later: the output object, or only its tensors, with holes inside."""
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    other = prompt(family, LAYOUTS["single"], seed=9)
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = model(**batch.inputs).logits
        kept = model.pruning.receipt.kept
        encoded = model.get_image_features(**batch.media)
        model(**other.inputs)  # a call in between
        given = {name: x for name, x in batch.inputs.items() if name != "pixel_values"}
        if takes_encoded(model):
            assert torch.equal(model(**given, mm_encoder_outputs={"image": encoded}).logits, want)
        else:
            with pytest.raises(UnsupportedCallError, match="encoded beforehand"):
                model(**given, mm_encoder_outputs={"image": encoded})
        if family in PACKED:  # which cannot tell from embeddings where in an image they belong
            return
        rest = {"attention_mask": batch.mask}
        features = torch.cat(list(encoded.pooler_output)).view(-1, want.shape[-1] // 2)
        assert features.isnan().any()
        embeds = model.get_input_embeddings()(batch.ids)
        embeds = embeds.masked_scatter((batch.ids == IMAGE)[..., None], features)
        torch.testing.assert_close(model(inputs_embeds=embeds, **rest).logits, want)
        tokens = model.generate(**batch.inputs, max_new_tokens=4)
        new = model.generate(inputs_embeds=embeds, **rest, max_new_tokens=4)
        assert torch.equal(new, tokens[:, batch.ids.shape[1] :])
        assert model.pruning.receipt.kept == kept


@cases
def test_interleaved_calls(policy, family, positions):
    """Two conversations decoded in turns, each with its own cache."""
    model = shared(family)
    skip_unless_it_counts_on(model, family)
    batches = [prompt(family, [(3, -1, 4)], seed=4), prompt(family, [(2, -1, 2)], seed=5)]
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = [
            model.generate(**batch.inputs, max_new_tokens=4)[0, batch.ids.shape[1] :] for batch in batches
        ]
        caches = [DynamicCache(), DynamicCache()]
        tokens: list[list[int]] = [[], []]
        for _ in range(4):
            for n, batch in enumerate(batches):
                inputs = batch.inputs if not tokens[n] else {"input_ids": torch.tensor([tokens[n][-1:]])}
                tokens[n].append(int(model(**inputs, **{CACHE: caches[n]}).logits[0, -1].argmax()))
    assert tokens == [row.tolist() for row in want]


@cases
def test_images_are_not_kept_alive(policy, family, positions):
    model = shared(family)
    with pruned(model, policy, positions=positions, **budget(policy)):
        batch = prompt(family, LAYOUTS["ragged"])
        inputs = batch.inputs
        pixels = weakref.ref(inputs["pixel_values"])
        output = model(**inputs), model.generate(**inputs, max_new_tokens=2)
        del batch, inputs, output
        gc.collect()
        assert pixels() is None
        assert model.pruning.receipt.kept


@cases
def test_inference_mode(policy, family, positions):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    labels = batch.ids.clone()
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = model(**batch.inputs, labels=labels)
        with torch.inference_mode():
            ours = model(**batch.inputs, labels=labels)
            model.generate(**batch.inputs, max_new_tokens=3)
    assert torch.equal(ours.logits, want.logits)
    assert torch.equal(ours.loss, want.loss)
