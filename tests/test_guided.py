"""Guided decoding against a stock model that is asked again from the start for each token."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from tests.models import IMAGE, TEXT, make, prompt
from tests.policy_checks import CLOSE, RAGGED, generate, tiny
from vlm_prune import PolicyError, UnsupportedCallError, prune, pruned, unprune
from vlm_prune.eval.census.prompts import prompt as some_prompt
from vlm_prune.eval.census.shrink import tiny_model
from vlm_prune.policies.contrast import contrasted, implausible
from vlm_prune.policies.dola import DoLa, divergence, layer_choice
from vlm_prune.policies.pai import PAI
from vlm_prune.policies.vcd import VCD, diffusion_signal
from vlm_prune.versions import CACHE, cache_of

VCD_SETTINGS = {"alpha": 0.7, "beta": 0.05, "noise_step": 600}
families = pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl", "llava_next"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def noised(media, step):
    """A prompt's media with VCD's image by the formula: a packed one image after image, others tile after tile."""
    kept = 1.0
    for number in range(step + 1):
        share = 1 / (1 + math.exp(6 - 12 * number / 999))
        kept *= 1 - (share * (0.005 - 0.00001) + 0.00001)

    def one(x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return math.sqrt(kept) * x + math.sqrt(1 - kept) * noise

    pixels = media["pixel_values"]
    if pixels.dim() == 2:
        new = torch.cat([one(x) for x in pixels.split(media["image_grid_thw"].prod(-1).tolist())])
    else:
        new = torch.stack([one(tile) for tile in pixels.flatten(0, -4)]).view_as(pixels)
    return {**media, "pixel_values": new}


def types(row, ids):
    return {"mm_token_type_ids": (ids == IMAGE).int()} if "mm_token_type_ids" in row.inputs else {}


def about(row, media):
    """What a stock model says after any tokens that begin with the prompt ``row``, of ``media``."""
    rest = {name: x for name, x in media.items() if name != "mm_token_type_ids"}

    def ask(model, ids):
        each = [model(input_ids=one[None], **rest, **types(row, one[None])).logits[:, -1] for one in ids]
        return torch.cat(each)

    return ask


def text_alone(model, ids):
    """What a stock model says to the text of each sequence."""
    each = []
    for sequence in ids:
        text = sequence[sequence != IMAGE][None]
        each.append(model(input_ids=text, position_ids=torch.arange(text.shape[1])[None]).logits[:, -1])
    return torch.cat(each)


class Naive(LogitsProcessor):
    """Asks a stock model for both sides of the contrast, with all tokens so far at once."""

    def __init__(self, model, one, other, alpha, beta):
        self.model, self.one, self.other, self.alpha, self.beta = (
            copy.deepcopy(model),
            one,
            other,
            alpha,
            beta,
        )

    def __call__(self, ids, scores):
        first, second = self.one(self.model, ids), self.other(self.model, ids)
        new = (1 + self.alpha) * first - self.alpha * second
        likely = first.softmax(-1)
        new[likely < self.beta * likely.amax(-1, keepdim=True)] = -torch.inf
        new = new.log_softmax(-1)
        new[:, IMAGE] = -torch.inf
        return new


def assert_contrast(model, row, settings, other, alpha, how):
    """A guided model says what the naive contrast with ``other`` does."""
    kwargs = {"output_scores": True, **DECODINGS[how]}
    processors = LogitsProcessorList([Naive(model, about(row, row.media), other, alpha, 0.05)])
    torch.manual_seed(3)
    theirs = generate(model, row.inputs, logits_processor=processors, **kwargs)
    torch.manual_seed(3)
    with pruned(model, **settings):
        ours = generate(model, row.inputs, **kwargs)
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, two in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(one.log_softmax(-1), two.log_softmax(-1), **CLOSE)


DECODINGS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
}


@pytest.mark.parametrize("how", DECODINGS)
@families
def test_vcd_is_the_contrast_with_a_noised_image(family, how):
    model = tiny(family)
    for row in prompt(family, RAGGED).rows()[:2]:
        other = about(row, noised(row.media, 600))
        assert_contrast(model, row, {"policy": "vcd", **VCD_SETTINGS}, other, 0.7, how)


@pytest.mark.parametrize("how", DECODINGS)
@families
def test_pai_is_the_contrast_with_the_text_alone(family, how):
    settings = {"policy": "pai", "alpha": 0, "gamma": 1.6, "beta": 0.05}
    for row in prompt(family, RAGGED).rows()[:2]:
        assert_contrast(tiny(family), row, settings, text_alone, 0.6, how)


def naive_dola(model, hidden, logits, layers, beta):
    """Released DoLa, for the last row of one sequence."""
    last = logits[0, -1].softmax(-1)
    best, chosen = -1.0, None
    for layer in layers:
        early = model.lm_head(hidden[layer][0, -1]).softmax(-1)
        mean = (last + early) / 2
        distance = ((mean * (mean / last).log()).sum() + (mean * (mean / early).log()).sum()) / 2
        if distance > best:
            best, chosen = distance, early
    new = last.log() - chosen.log()
    return new.masked_fill(last < beta * last.max(), -torch.inf)


@families
def test_dola_is_the_contrast_with_the_furthest_early_layer(family):
    model = tiny(family)
    for row in prompt(family, RAGGED).rows():
        stock = model(**row.inputs, output_hidden_states=True)
        theirs = naive_dola(model, stock.hidden_states, stock.logits, (0, 1, 2), 0.1)
        with pruned(model, "dola", layers=(0, 1, 2)):
            ours = model(**row.inputs)
            shown = model(**row.inputs, output_hidden_states=True)
        assert ours.hidden_states is None
        assert len(shown.hidden_states) == len(stock.hidden_states)
        torch.testing.assert_close(ours.logits[0, -1].log_softmax(-1), theirs.log_softmax(-1), **CLOSE)


@families
@pytest.mark.parametrize("policy", ["divprune", "fastv"])
def test_the_second_pass_is_pruned_like_the_first(family, policy):
    """Both sides of the contrast are what the pruned model says, asked independently."""
    model, settings = tiny(family), {"k": 1} if policy == "fastv" else {}
    batch = prompt(family, RAGGED)
    for row in batch.rows()[:2]:
        with pruned(model, policy, ratio=0.4, **settings):
            first, kept = model(**row.inputs).logits, model.pruning.receipt
            second = model(**{**row.inputs, **noised(row.media, 600)}).logits
        with pruned(model, f"{policy}+vcd", ratio=0.4, **{policy: settings}, vcd={**VCD_SETTINGS, "beta": 0}):
            ours = model(**row.inputs).logits
            receipt = model.pruning.receipt
        torch.testing.assert_close(ours[:, -1], 1.7 * first[:, -1] - 0.7 * second[:, -1], **CLOSE)
        assert receipt.kept == kept.kept
        assert receipt.flops == pytest.approx(2 * kept.flops, rel=0.02)  # newlines go with what is dropped
        assert receipt.guide_kv_bytes == pytest.approx(receipt.kv_bytes, rel=0.1)
        assert "second pass" in str(receipt)


def test_rows_before_the_image_and_sequences_without_one_are_stock():
    model, batch = tiny("llava"), prompt("llava", [(2, -1, 4), (9,), (45,)])
    stock = model(**batch.inputs).logits
    for policy in ("vcd", "pai", "dola"):
        with pruned(model, policy, **({"alpha": 0} if policy == "pai" else {})):
            ours = model(**batch.inputs).logits
            tokens = generate(model, batch.inputs).sequences
            texts = prompt("llava", [(9,)])
            alone = model(**texts.inputs).logits
        assert torch.equal(ours[1:], stock[1:])
        start = batch.ids.shape[1] - 4
        assert torch.equal(ours[0, : start - 1], stock[0, : start - 1])
        assert ours[0, start:].isinf().any()
        assert alone.isfinite().all()
        assert torch.equal(tokens[1:], generate(model, batch.inputs).sequences[1:])


@pytest.mark.parametrize("policy", ["vcd", "pai", "dola"])
def test_drafts_and_the_steps_that_they_save_agree(policy):
    model, row = tiny("llava"), prompt("llava", [(3, -1, 5)])
    with pruned(model, f"divprune+{policy}", ratio=0.5):
        plain = generate(model, row.inputs, max_new_tokens=12).sequences
        drafted = generate(model, row.inputs, max_new_tokens=12, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(drafted, plain)


@pytest.mark.parametrize("policy", ["vcd", "pai"])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_an_image_after_a_turn_of_text_and_turns_after_it(policy, family):
    """Turns with one cache say what one prompt says, wherever the image comes."""
    model = tiny(family)
    row = prompt(family, [(6, -1, 5)])
    settings = {"alpha": 0.0, "gamma": 1.5} if policy == "pai" else {"alpha": 0.5}
    with pruned(model, policy, beta=0, **settings):
        whole = model(**row.inputs).logits
        cache, start = DynamicCache(), 0
        for end in (4, row.ids.shape[1] - 3, row.ids.shape[1]):
            ids = row.ids[:, start:end]
            media = {k: x for k, x in row.media.items() if k != "mm_token_type_ids"} if IMAGE in ids else {}
            part = {"input_ids": ids, "attention_mask": row.mask[:, :end], **media, **types(row, ids)}
            output = model(**part, **{CACHE: cache})
            cache, start = cache_of(output), end
    torch.testing.assert_close(output.logits, whole[:, -3:], **CLOSE)


def test_a_cache_takes_its_second_pass_along():
    model, row = tiny("llava"), prompt("llava", [(3, -1, 5)])
    more = torch.tensor([[7, 9]])
    mask = torch.ones(1, row.ids.shape[1] + 2, dtype=torch.long)
    with pruned(model, "vcd", beta=0):
        cache = cache_of(model(**row.inputs))
        twin = copy.deepcopy(cache)
        one = model(input_ids=more, attention_mask=mask, **{CACHE: cache}).logits
        other = model(input_ids=more, attention_mask=mask, **{CACHE: twin}).logits
        cache.crop(-2)
        again = model(input_ids=more, attention_mask=mask, **{CACHE: cache}).logits
        whole = model(input_ids=torch.cat([row.ids, more], 1), attention_mask=mask, **row.media).logits
    assert torch.equal(one, other)
    torch.testing.assert_close(again, one, **CLOSE)
    torch.testing.assert_close(one, whole[:, -2:], **CLOSE)


def test_guiding_without_a_cache():
    model, row = tiny("llava"), prompt("llava", [(3, -1, 5)])
    for policy in ("vcd", "pai", "dola"):
        with pruned(model, policy):
            cached = generate(model, row.inputs).sequences
            assert torch.equal(generate(model, row.inputs, use_cache=False).sequences, cached)


@pytest.mark.parametrize("policy", ["vcd", "pai", "dola"])
def test_a_deep_copy_is_guided_by_itself(policy):
    model, row = make("llava"), prompt("llava", [(3, -1, 5)])
    stock = model(**row.inputs).logits
    prune(model, policy)
    ours, twin = model(**row.inputs).logits, copy.deepcopy(model)
    unprune(model)
    for weight in model.parameters():
        weight.zero_()
    assert torch.equal(twin(**row.inputs).logits, ours)
    unprune(twin)
    assert torch.equal(twin(**row.inputs).logits, stock)


def test_embeddings_and_pixels_are_guided_as_ids_are():
    model, row = tiny("llava"), prompt("llava", [(3, -1, 5)])
    embeds = model.get_input_embeddings()(row.ids)
    for policy in ("vcd", "pai", "dola"):
        with pruned(model, policy, beta=0):
            logits = model(inputs_embeds=embeds, attention_mask=row.mask, **row.media).logits
            torch.testing.assert_close(logits, model(**row.inputs).logits, **CLOSE)


def test_refusals():
    model, row = make("llava"), prompt("llava", [(3, -1, 5)])
    with pytest.raises(PolicyError, match="both guide decoding"):
        prune(model, "vcd+dola")
    with pytest.raises(PolicyError, match="has 3 layers"):
        prune(model, "dola", layers=(1, 3))
    with pruned(model, "vcd"):
        with pytest.raises(UnsupportedCallError, match="prefill_chunk_size"):
            generate(model, row.inputs, prefill_chunk_size=8)
        with pytest.raises(UnsupportedCallError, match="inputs_embeds"):
            model(inputs_embeds=torch.randn(1, 5, 32))
        with pytest.raises(UnsupportedCallError, match="logits_to_keep"):
            model(**row.inputs, logits_to_keep=torch.tensor([1, 2]))
        with pytest.raises(UnsupportedCallError, match="return_dict"):
            model(**row.inputs, return_dict=False)
        assert model(**row.inputs).logits.isinf().any()  # the refusals left nothing behind


@pytest.mark.parametrize(
    ("policy", "setting"),
    [
        (VCD, {"noise_step": 1000}),
        (VCD, {"beta": 2}),
        (PAI, {"gamma": 0.5}),
        (DoLa, {"layers": "middle"}),
        (DoLa, {"layers": ()}),
    ],
)
def test_settings_are_checked(policy, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        policy(**setting)


def test_the_pieces():
    one, other = torch.tensor([[2.0, 1.0, -3.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    assert contrasted(one, other, 0.5).tolist() == [[3.0, 1.0, -5.0]]
    assert implausible(one, 0.5).tolist() == [[False, True, True]]
    assert not implausible(one, 0).any()
    assert diffusion_signal(0) == pytest.approx(1 - (0.00499 / (1 + math.exp(6)) + 0.00001))
    assert float(divergence(one, one)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(one, other)) == pytest.approx(float(divergence(other, one)))
    assert layer_choice("high", 32, False) == tuple(range(16, 32, 2))
    assert layer_choice("low", 32, True) == tuple(range(2, 16, 2))
    assert layer_choice("high", 80, False) == tuple(range(60, 80, 2))
    assert layer_choice("low", 1, True) == (0,)
    assert TEXT.stop < IMAGE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "smolvlm", "mistral3", "qwen3_5", "glm4v", "paligemma"])
def test_families_of_which_less_is_known(family):
    """Sliding windows, linear attention, blocks of image tokens: the contrast is that of two independent calls."""
    model = tiny_model(family)
    inputs = some_prompt(model)
    first = model(**inputs).logits[:, -1]
    second = model(**{**inputs, **noised(inputs, 600)}).logits[:, -1]
    with pruned(model, "vcd", alpha=0.7, beta=0, noise_step=600):
        torch.testing.assert_close(model(**inputs).logits[:, -1], 1.7 * first - 0.7 * second, **CLOSE)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    if family in ("gemma3", "qwen3_5"):
        with pytest.raises(PolicyError, match="It can in layers of full attention only"):
            prune(model, "pai")
        return
    with pruned(model, "none"):
        tokens = torch.tensor(model.pruning._anatomy.image_tokens)
    text = inputs["input_ids"][~torch.isin(inputs["input_ids"], tokens)][None]
    types = {name: torch.zeros_like(text) for name in ("token_type_ids",) if name in inputs}
    alone = model(input_ids=text, position_ids=torch.arange(text.shape[1])[None], **types).logits[:, -1]
    with pruned(model, "pai", alpha=0, gamma=1.7, beta=0):
        torch.testing.assert_close(model(**inputs).logits[:, -1], 1.7 * first - 0.7 * alone, **CLOSE)
