"""Faults that people met: pruned caches on their way, prompts in chunks or cut off, labels that a trainer counted."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy

from vlm_prune import BudgetError, UnsupportedCallError, UnsupportedModelError, prune, pruned, unprune
from vlm_prune.registry import policy_class
from vlm_prune.versions import CACHE, CHUNKS_BRING_IMAGES, cache_of

from .models import LAYOUTS, fingerprint, make, peaky, prompt
from .packed import packed_prompt, qwen3_moe
from .policy_table import IN_DECODER, TABLE
from .policy_table import options as pruning

POLICIES = {"uniform": {}, "fastv": {"k": 1}, "vhr": {"layers": (1, 2)}}


def options(policy):
    return POLICIES[policy] if policy == "vhr" else {"ratio": 0.3, **POLICIES[policy]}


def in_tower():
    """Policies that look into the vision tower, where that has five layers."""
    return [name for name in TABLE if len(policy_class(name)(**TABLE[name].settings).tower_layers(3))]


def through_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


def through_a_file(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_a_file])
def test_a_pruned_cache_can_be_kept(policy, way):
    """As prefix caching does: the same model, or one pruned later, goes on with what was saved."""
    model, batch = make("llava"), prompt("llava", LAYOUTS["ragged"])
    text = torch.full((len(batch.ids), 2), 7)
    mask = torch.cat([batch.mask, torch.ones_like(text)], 1)
    with torch.no_grad():
        prune(model, policy, **options(policy))
        saved = way(cache := cache_of(model(**batch.inputs, use_cache=True)))
        want = model(input_ids=text, attention_mask=mask, **{CACHE: cache}).logits
        again = way(saved)
        assert torch.equal(model(input_ids=text, attention_mask=mask, **{CACHE: saved}).logits, want)
        unprune(model)
        prune(model, policy, **options(policy))
        assert torch.equal(model(input_ids=text, attention_mask=mask, **{CACHE: again}).logits, want)


@pytest.mark.parametrize("policy", ["uniform", "fastv"])
def test_only_a_pruned_model_goes_on_with_a_pruned_cache(policy):
    model, stock, batch = make("llava"), make("llava"), prompt("llava", LAYOUTS["single"])
    text, length = torch.tensor([[5, 6]]), batch.ids.shape[1]
    with torch.no_grad():
        prune(model, policy, **options(policy))
        cache = cache_of(model(**batch.inputs, use_cache=True))
        for taker in (stock, stock.model.language_model):
            with pytest.raises(UnsupportedCallError, match="not pruned, or no longer"):
                taker(input_ids=text, **{CACHE: cache})
        assert cache.get_seq_length() == length
        want = model(input_ids=text, **{CACHE: copy.deepcopy(cache)}).logits
        with pytest.raises(UnsupportedCallError, match="not pruned, or no longer"):
            stock(input_ids=text, **{CACHE: copy.deepcopy(cache)})
        with pruned(stock, policy, **options(policy)):
            assert torch.equal(stock(input_ids=text, **{CACHE: copy.deepcopy(cache)}).logits, want)
        with pruned(stock, "divprune"):  # which has no hooks on single layers
            if policy == "uniform":
                assert torch.equal(stock(input_ids=text, **{CACHE: cache}).logits, want)
            else:
                with pytest.raises(UnsupportedCallError, match="each decoder layer has different tokens"):
                    stock(input_ids=text, **{CACHE: cache})


@pytest.mark.skipif(not CHUNKS_BRING_IMAGES, reason="this version of transformers takes images out of chunks")
@pytest.mark.parametrize("policy", ["uniform", "flowcut", "divprune"])
@pytest.mark.parametrize("layout", [[(3, -1)], [(3, -1), (4, -1, 5)], [(2, -1, 6), (3, -1)]])
@pytest.mark.parametrize("size", [1, 4, 7, 16])
def test_a_prompt_in_chunks_may_end_with_a_dropped_one(policy, layout, size):
    model, batch = make("llava"), prompt("llava", layout)
    with torch.no_grad(), pruned(model, policy, tokens=2):
        how = {
            "max_new_tokens": 3,
            "return_dict_in_generate": True,
            "output_logits": True,
            "do_sample": False,
        }
        whole = model.generate(**batch.inputs, **how)
        chunks = model.generate(**batch.inputs, **how, prefill_chunk_size=size)
    torch.testing.assert_close(torch.stack(chunks.logits), torch.stack(whole.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_next", "llava_onevision", "qwen2_vl"])
@pytest.mark.parametrize("policy", ["uniform", "flowcut", "fastv"])
def test_a_prompt_cut_off_inside_an_image(family, policy):
    model, batch = make(family), prompt(family, LAYOUTS["single"])
    inputs = dict(batch.inputs)
    end = int((batch.ids[0] == batch.ids[0].mode().values).nonzero()[-1, 0]) - 3
    computed = []
    tower = getattr(model.model, "vision_tower", None)
    tower = model.model.visual if tower is None else tower
    with torch.no_grad(), pruned(model, policy, **({"k": 1} if policy == "fastv" else {})):
        model(**inputs)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = inputs[name][:, :end]
        layers = next(m for n, m in tower.named_modules() if n.endswith(("layers.0", "layer.0", "blocks.0")))
        handle = layers.register_forward_hook(lambda *_: computed.append(1))
        with pytest.raises(UnsupportedCallError, match=r"placeholders, but .* need \d+"):
            model(**inputs)
        handle.remove()
    assert not computed


@pytest.mark.parametrize("policy", ["dyvte"])
@pytest.mark.parametrize("layout", [[(-1,)], [(-1,), (3, -1, 5)]])
def test_a_prompt_of_which_nothing_would_be_left(policy, layout):
    model, batch = make("llava"), prompt("llava", layout)
    with torch.no_grad(), pruned(model, policy, exit_layer=1):
        with pytest.raises(UnsupportedCallError, match=r"nothing is left after decoder layer 1.*dyvte"):
            model(**batch.inputs)
        assert not model(**prompt("llava", [(3, -1, 5)]).inputs).logits.isnan().any()


@pytest.mark.parametrize("policy", ["visionzip", "mustdrop", "downsample"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_budget_per_image_that_a_policy_cannot_keep(family, policy):
    model = make(family)
    with pytest.raises(BudgetError, match=f'per="image": {policy}.*flowcut'):
        prune(model, policy, ratio=0.3, per="image")
    assert not hasattr(model, "pruning")
    with pruned(model, policy, ratio=0.3):
        pass


@pytest.mark.parametrize("mode", ["one batch", "accumulated", "mean"])
@pytest.mark.parametrize("policy", ["uniform", "fastv"])
def test_loss_of_labels_that_a_trainer_counted(policy, mode):
    """Labels on image tokens, as TRL's collator leaves them: the loss is the mean over those that are left."""
    model, batch = make("llava"), prompt("llava", LAYOUTS["single"])
    counted = (batch.ids[:, 1:] != -100).sum() * (2 if mode == "accumulated" else 1)
    with torch.no_grad(), pruned(model, policy, **options(policy)):
        counts = {} if mode == "mean" else {"num_items_in_batch": counted}
        output = model(**batch.inputs, labels=batch.ids, **counts)
        unit = model.pruning.receipt.decoder_units[-1][0]
        first = int((batch.ids[0] == 60).nonzero()[0, 0])
        live = [i for i, token in enumerate(batch.ids[0].tolist()) if token != 60 or i - first in unit]
        want = cross_entropy(output.logits[0, live][:-1], batch.ids[0, live][1:])
    torch.testing.assert_close(output.loss * (2 if mode == "accumulated" else 1), want)
    assert output.loss.dtype == want.dtype


def test_a_tower_on_flex_attention_is_refused_before_it_computes():
    model, batch = make("llava"), prompt("llava", LAYOUTS["single"])
    computed = []
    with torch.no_grad(), pruned(model, "flowcut", ratio=0.3):
        want = model(**batch.inputs).logits
        handle = model.model.vision_tower.get_input_embeddings().register_forward_hook(
            lambda *_: computed.append(1)
        )
        model.set_attn_implementation({"vision_config": "flex_attention"})
        with pytest.raises(UnsupportedCallError, match=r'flex attention.*"vision_config": "sdpa"'):
            model(**batch.inputs)
        handle.remove()
        assert not computed
        model.set_attn_implementation({"vision_config": "sdpa"})
        assert torch.equal(model(**batch.inputs).logits, want)


@pytest.mark.parametrize("policy", in_tower())
def test_a_tower_on_flex_attention_is_refused_when_pruning_starts(policy):
    model = make("llava")
    model.set_attn_implementation({"vision_config": "flex_attention"})
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=rf"flex attention, and {policy} acts between its layers"):
        prune(model, **pruning(policy))
    assert fingerprint(model) == before
    with pruned(model, "uniform", ratio=0.3):  # which has nothing to mask there
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_packed_towers_and_decoders_work_on_flex_attention():
    """Each image of a packed tower is attended to by itself, so nothing has to be masked."""
    model, batch = peaky(qwen3_moe()), packed_prompt("qwen3_vl", LAYOUTS["ragged"])
    real = batch.mask.bool()
    for policy in (*in_tower(), "fastv", "pyramiddrop", "vhr"):
        logits = {}
        for attention in ("sdpa", "flex_attention"):
            model.set_attn_implementation(attention)
            with torch.no_grad(), pruned(model, **pruning(policy)):
                logits[attention] = model(**batch.inputs).logits[real]
        torch.testing.assert_close(logits["flex_attention"], logits["sdpa"], atol=1e-4, rtol=1e-4, msg=policy)


@pytest.mark.parametrize("policy", [name for name in IN_DECODER if name != "dyvte"])
def test_prompts_of_images_alone(policy):
    """Whoever asks the text asks the last row in its place, also where an earlier cut has dropped that."""
    model, layouts = make("llava"), ([(-2,)], [(-1,), (-1,)], [(-2,), (3, -1, 2)])
    with torch.no_grad(), pruned(model, **pruning(policy)):
        for layout in layouts:
            batch = prompt("llava", layout)
            logits = model(**batch.inputs).logits[:, -1]
            alone = torch.cat([model(**row.inputs).logits[:, -1] for row in batch.rows()])
            torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
