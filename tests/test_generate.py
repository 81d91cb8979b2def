"""All of ``generate``: every decoding method gives what the stock model gives for the shortened prompt."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from tests.models import IMAGE, LAYOUTS, PACKED, PAD, VOCAB, Prompt, make, prompt, repeatable, shared
from tests.packed import VIDEO
from tests.policy_table import options
from tests.reference import CASES, budget, expect
from vlm_prune import UnsupportedCallError, pruned
from vlm_prune.versions import CACHE, CHUNKS_BRING_IMAGES, cache_of

cases = pytest.mark.parametrize(("policy", "family", "positions"), CASES)

METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "several-samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 9},
    "beams": {"num_beams": 3},
    "beams-returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
    "beam-sampling": {"num_beams": 2, "do_sample": True},
    "early-stop": {"eos_token_id": list(range(0, VOCAB, 5)), "max_new_tokens": 12},
    "no-cache": {"use_cache": False},
}


def generate(model, inputs, **options):
    torch.manual_seed(7)
    # a random model may say <image>, which stock code would take for a placeholder without features
    fixed = {"max_new_tokens": 6, "pad_token_id": PAD, "suppress_tokens": [IMAGE, VIDEO]}
    return model.generate(**inputs, **fixed | options)


@cases
@pytest.mark.parametrize("method", METHODS)
def test_decoding_method(method, policy, family, positions):
    model, options = shared(family), METHODS[method]
    batch = prompt(family, repeatable(model, family))
    with torch.no_grad():
        _, short = expect(model, batch, policy, positions)
    with short.given(model):
        want = generate(model, short.inputs, **{**options, "use_cache": True})
    with pruned(model, policy, positions=positions, **budget(policy)):
        output = generate(model, batch.inputs, **options)
    repeats = len(output) // len(batch.ids)
    assert torch.equal(output[:, : batch.ids.shape[1]], batch.ids.repeat_interleave(repeats, 0))
    assert torch.equal(output[:, batch.ids.shape[1] :], want)


@cases
def test_scores_and_hidden_states_of_every_step(policy, family, positions):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    options = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
        "output_hidden_states": True,
    }
    with torch.no_grad():
        _, short = expect(model, batch, policy, positions)
    with short.given(model):
        want = generate(model, short.inputs, **options)
    with pruned(model, policy, positions=positions, **budget(policy)):
        ours = generate(model, batch.inputs, **options)
    assert torch.equal(ours.sequences[:, batch.ids.shape[1] :], want.sequences)
    for a, b in zip(ours.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    for step, (a, b) in enumerate(zip(ours.hidden_states, want.hidden_states, strict=True)):
        assert len(a) == len(b)
        for ha, hb in zip(a, b, strict=True):
            assert ha.shape[1] == (batch.ids.shape[1] if step == 0 else 1)
            torch.testing.assert_close(ha[:, -1], hb[:, -1], atol=2e-4, rtol=1e-4)


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@cases
def test_streamer_sees_prompt_and_tokens(policy, family, positions):
    model, batch, streamer = shared(family), prompt(family, LAYOUTS["single"]), Collect()
    with pruned(model, policy, positions=positions):
        output = generate(model, batch.inputs, streamer=streamer)
    assert streamer.tokens == output[0].tolist()
    assert streamer.ended


@cases
def test_own_decoding_loop(policy, family, positions):
    """Prefill and single steps by hand, without position ids, a cache made by the caller, right padding."""
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"], pad="right")
    with torch.no_grad():
        _, short = expect(model, batch, policy, positions)
        with short.given(model):
            want = generate(model, short.inputs)
        last = batch.mask.sum(-1) - 1
        with pruned(model, policy, positions=positions, **budget(policy)):
            cache, mask, tokens = DynamicCache(), batch.mask, []
            logits = model(**batch.inputs, **{CACHE: cache}).logits[torch.arange(len(last)), last]
            # the last position so far: with M-RoPE, an image advances it by its longer side
            ends = short.positions[1, :, -1] if family in PACKED else last
            for step in range(6):
                logits[:, [IMAGE, VIDEO]] = -torch.inf
                tokens.append(logits.argmax(-1))
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                logits = model(
                    input_ids=tokens[-1][:, None],
                    attention_mask=mask,
                    position_ids=(ends + 1 + step)[:, None],
                    **{CACHE: cache},
                ).logits[:, -1]
    assert torch.stack(tokens, 1).tolist() == want.tolist()


def repetitive(family: str) -> Prompt:
    """A prompt whose end repeats, so that prompt lookup proposes candidates in the very first step."""
    batch = prompt(family, [(3, -1, 9)])
    batch.ids[0, -9:] = torch.tensor([11, 12, 13, 14, 11, 12, 13, 11, 12])
    return batch


@cases
def test_prompt_lookup(policy, family, positions):
    model, batch = shared(family), repetitive(family)
    # an end of text that is never said: in transformers 5.4, prompt lookup asks for one
    options = {"max_new_tokens": 14, "eos_token_id": VIDEO}
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = generate(model, batch.inputs, **options)
        output = generate(model, batch.inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(output, want)


@pytest.fixture
def _quiet():
    """Assisted decoding of transformers warns of a deprecated call that it makes itself."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@cases
@pytest.mark.usefixtures("_quiet")
def test_assistant_model(policy, family, positions):
    """A stock twin proposes tokens. It is not given the image, so some are taken and most rejected and cropped."""
    model, batch, helper = shared(family), repetitive(family), make(family)
    helper.generation_config.num_assistant_tokens = 4
    helper.generation_config.assistant_confidence_threshold = 0
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = generate(model, batch.inputs, max_new_tokens=14)
        assert torch.equal(generate(model, batch.inputs, max_new_tokens=14, assistant_model=helper), want)
        with pruned(helper, policy, positions=positions, **budget(policy)):
            assert torch.equal(generate(model, batch.inputs, max_new_tokens=14, assistant_model=helper), want)


@cases
@pytest.mark.skipif(not CHUNKS_BRING_IMAGES, reason="stock code drops images in chunked prefill")
@pytest.mark.parametrize("size", [1, 4, 7, 64])
def test_chunked_prefill(size, policy, family, positions):
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = generate(model, batch.inputs)
        assert torch.equal(generate(model, batch.inputs, prefill_chunk_size=size), want)


@pytest.mark.skipif(not CHUNKS_BRING_IMAGES, reason="stock code drops images in chunked prefill")
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl"])
@pytest.mark.parametrize("policy", ["fastv", "mustdrop", "vhr"])
def test_chunked_prefill_is_refused_to_decoders_also_where_the_image_fits_a_chunk(policy, family):
    model, batch = shared(family), prompt(family, [(2, -1, 9)])
    with pruned(model, **options(policy)):
        want = generate(model, batch.inputs)
        with pytest.raises(UnsupportedCallError, match="Leave prefill_chunk_size out"):
            generate(model, batch.inputs, prefill_chunk_size=batch.ids.shape[1] - 7)
        assert torch.equal(generate(model, batch.inputs), want)


@pytest.mark.skipif(not CHUNKS_BRING_IMAGES, reason="stock code drops images in chunked prefill")
@pytest.mark.parametrize("size", [5, 17, 25, 31])
@pytest.mark.parametrize("rows", [("video", -1, 5), (-1, "video", 5)], ids=["video-first", "image-first"])
@pytest.mark.parametrize("family", PACKED)
def test_chunked_prefill_of_an_image_and_a_video(family, rows, size):
    model, batch = shared(family), prompt(family, [rows])
    with pruned(model, "flowcut", ratio=0.4):
        want = generate(model, batch.inputs)
        assert torch.equal(generate(model, batch.inputs, prefill_chunk_size=size), want)


@cases
@pytest.mark.skipif(CHUNKS_BRING_IMAGES, reason="images reach the chunks of a prompt")
def test_chunked_prefill_that_would_drop_images(policy, family, positions):
    model, batch = shared(family), prompt(family, LAYOUTS["single"])
    with pruned(model, policy, positions=positions, **budget(policy)):
        want = generate(model, batch.inputs)
        with pytest.raises(UnsupportedCallError, match="Leave prefill_chunk_size out, or upgrade"):
            generate(model, batch.inputs, prefill_chunk_size=7)
        assert torch.equal(generate(model, batch.inputs), want)


@cases
def test_batch_operations_on_the_cache(policy, family, positions):
    """Rows of the cache are reordered, repeated and selected as those of a stock cache are."""
    model, batch = shared(family), prompt(family, LAYOUTS["ragged"])
    step = {"input_ids": torch.full((3, 1), 7), "position_ids": batch.mask.sum(-1, keepdim=True)}
    mask = torch.cat([batch.mask, batch.mask.new_ones(3, 1)], 1)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad(), pruned(model, policy, positions=positions, **budget(policy)):
        places = (batch.mask.cumsum(-1) - 1).clamp(min=0)

        def prefill():
            return cache_of(model(**batch.inputs, position_ids=places))

        want = model(**step, attention_mask=mask, **{CACHE: prefill()}).logits
        moves = {
            "reorder_cache": (order, order),
            "batch_select_indices": (order, order),
            "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
        }
        for name, (argument, rows) in moves.items():
            cache = prefill()
            getattr(cache, name)(argument)
            moved = {key: value[rows] for key, value in step.items()}
            got = model(**moved, attention_mask=mask[rows], **{CACHE: cache}).logits
            torch.testing.assert_close(got, want[rows])
