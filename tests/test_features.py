"""Families of which only the features are known: the general adapter, and every promise on a few of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from vlm_prune import PruningError, prune, pruned, unprune
from vlm_prune.adapters.features import anatomy, calls_method, tile_sizes
from vlm_prune.contract.policy import Place, ScorerPolicy
from vlm_prune.contract.views import TowerView
from vlm_prune.encode.features import FeatureEncoder
from vlm_prune.errors import UnsupportedCallError, UnsupportedModelError
from vlm_prune.eval.census.prompts import KINDS, prompt
from vlm_prune.eval.census.shrink import IMAGE, PAD, PATCH, SIDE, tiny_model
from vlm_prune.versions import CACHE, cache_of

FAMILIES = ["mistral3", "hunyuan_vl", "got_ocr2", "blip-2", "idefics2"]
"""Pixtral's tower, newlines with M-RoPE, a tower like SAM's, learned positions after query tokens, filled-up tiles."""

TOWERS = ["gemma3", "paligemma", "deepseek_vl", "idefics3", "cohere2_vision", "ovis2"]
"""SigLIP's tower with all its places: squares pooled to tokens and an outside mask, a prefix, an aligner; padded tiles
and a pixel shuffle, one inside the projector with sliding windows, soft visual words."""

RATIO = 0.4
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@cache
def model_of(family: str) -> nn.Module:
    return tiny_model(family)


def together(prompts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Prompts as a batch, padded on the left. The stock HunYuan-VL numbers a batch's images through: not there."""
    length = max(p["input_ids"].shape[1] for p in prompts)
    batch = {}
    for name in prompts[0]:
        parts = [p[name] for p in prompts]
        if name in ("input_ids", "attention_mask", *KINDS):
            fill = PAD if name == "input_ids" else 0
            parts = [torch.nn.functional.pad(x, (length - x.shape[1], 0), value=fill) for x in parts]
        elif (
            parts[0].shape[0] == 1 and len({x.shape[1] for x in parts}) > 1
        ):  # tiles of each prompt, filled up
            most = max(x.shape[1] for x in parts)
            parts = [
                torch.nn.functional.pad(x, (*[0, 0] * (x.dim() - 2), 0, most - x.shape[1])) for x in parts
            ]
        batch[name] = torch.cat(parts)
    return batch


BATCHES = [
    *(
        (name, policy)
        for name in FAMILIES
        if name != "hunyuan_vl"
        for policy in ("uniform", "divprune", "random")
    ),
    *((name, policy) for name in TOWERS for policy in ("uniform", "flowcut", "visionzip")),
    *((name, "downsample") for name in ("gemma3", "idefics3", "cohere2_vision")),
]


@pytest.mark.parametrize(("family", "policy"), BATCHES)
def test_a_batch_gives_what_its_rows_give_alone(family, policy):
    model = model_of(family)
    singles = [prompt(model, images, seed) for images, seed in ((1, 3), (2, 4), (3, 5))]
    batch = together(singles)
    with pruned(model, policy, ratio=RATIO):
        logits = model(**batch).logits
        kept = model.pruning.receipt.kept
        alone = []
        for row, single in enumerate(singles):
            expected = model(**single).logits[0]
            alone += model.pruning.receipt.kept
            there = batch["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row, there], expected, atol=2e-4, rtol=1e-3)
    assert kept == alone
    assert len(kept) == 6
    assert all(0 < len(units) < 100 for units in kept)


@families
def test_beams_and_drafts_of_a_prompt_with_two_images(family):
    model, inputs = model_of(family), prompt(model_of(family), 2)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    with pruned(model, "uniform", ratio=RATIO):
        beams = model.generate(**inputs, **greedy, num_beams=3)
        assert beams.shape == (1, inputs["input_ids"].shape[1] + 5)
        expected = model.generate(**inputs, **greedy)
        assert torch.equal(model.generate(**inputs, **greedy, use_cache=False), expected)


@families
def test_the_receipt_counts_what_entered_the_decoder(family):
    model, inputs = model_of(family), prompt(model_of(family), 2)
    with pruned(model, "uniform", ratio=RATIO):
        model(**inputs)
        receipt = model.pruning.receipt
    dense = sum(rows * columns for rows, columns in receipt.grids)
    assert dense == (inputs["input_ids"] == IMAGE).sum()
    left = sum(map(len, receipt.kept))
    assert left == sum(receipt.targets) < dense
    assert set(receipt.decoder_tokens) == {inputs["input_ids"].shape[1] - dense + left}


@families
def test_training_reaches_the_tower(family):
    model, inputs = tiny_model(family).train(), prompt(model_of(family), 1)
    prune(model, "uniform", ratio=RATIO)
    with torch.enable_grad():
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        model(**inputs, labels=labels).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if p.grad is not None and "vi" in name]
    assert grads
    assert all(g.isfinite().all() for g in grads)


@families
def test_policies_that_look_into_the_tower_are_refused(family):
    model = model_of(family)
    for policy in ("flowcut", "visionzip", "downsample"):
        with pytest.raises(UnsupportedModelError, match=f"{policy} looks into the vision tower"):
            prune(model, policy)
    assert not hasattr(model, "pruning")


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_computes_less_after_a_cut(family):
    model, inputs = model_of(family), prompt(model_of(family), 2)
    with pruned(model, "flowcut", ratio=RATIO):
        model(**inputs)
        receipt = model.pruning.receipt
    patches = (SIDE // PATCH) ** 2
    per_unit = patches // receipt.units
    assert receipt.tower_tokens[0] == patches
    assert receipt.tower_tokens[-1] == receipt.planned * per_unit


@dataclass(frozen=True)
class Loudest(ScorerPolicy):
    """Keeps the units of largest norm after the tower's second layer."""

    name: ClassVar[str] = "loudest"
    place: ClassVar[Place] = "tower"

    def layer(self, depth: int) -> int:
        return 1

    def score(self, view: TowerView) -> torch.Tensor:
        return view.per_unit(view.hidden.norm(dim=-1))


def _projected(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Units ``(1, units, patches * channels)`` as the stock projector's parts make tokens of them."""
    base = model.model
    if hasattr(base, "connector"):
        return base.connector.modality_projection(rows)
    if hasattr(base, "visual_embeddings_table"):
        words = base.vision_tower.head_norm(base.vision_tower.head_linear(rows)).softmax(-1)
        return words @ base.visual_embeddings_table.weight[: words.shape[-1]]
    x, gate = base.multi_modal_projector.linear_1(rows).chunk(2, dim=-1)
    return base.multi_modal_projector.linear_2(torch.nn.functional.silu(gate) * x)


@pytest.mark.parametrize(("family", "merge"), [("idefics3", 2), ("cohere2_vision", 2), ("ovis2", 1)])
def test_a_cut_tower_is_a_loop_over_its_layers(family, merge):
    model, inputs, entered = model_of(family), prompt(model_of(family), 1), []
    tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
    tower = getattr(tower, "transformer", tower)
    layers, norm = tower.encoder.layers, getattr(tower, "post_layernorm", None) or tower.rms_norm
    handle = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model.model.get_image_features(inputs["pixel_values"])
    handle.remove()
    side = SIDE // PATCH
    number = torch.arange(side * side).view(side // merge, merge, side // merge, merge)
    patches = number.transpose(1, 2).reshape(-1, merge * merge)
    hidden = entered[0]
    for layer in layers[:2]:
        hidden = layer(hidden, None)
    loud = hidden[0].norm(dim=-1)[patches].sum(-1)
    units = loud.topk(round(RATIO * len(patches))).indices.sort().values
    hidden = hidden[:, patches[units].flatten()]
    for layer in layers[2:]:
        hidden = layer(hidden, None)
    expected = _projected(model, norm(hidden).view(1, len(units), -1))[0]
    with pruned(model, Loudest(), ratio=RATIO):
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        assert model.pruning.receipt.kept == [units.tolist()]
    torch.testing.assert_close(features[units], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ["flowcut", "visionzip"])
def test_padded_patches_are_not_attended_after_a_cut(policy):
    """The whole mask of stock code no longer fits; what is left of it has to hold in every implementation."""
    model, inputs = tiny_model("idefics3"), prompt(model_of("idefics3"), 2)
    inputs["pixel_attention_mask"][0, 1, SIDE // 2 :] = 0
    answers, changed = [], {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][0, 1, :, SIDE // 2 :] += 1
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with pruned(model, policy, ratio=RATIO):
            answers.append(model(**inputs).logits)
            kept = model.pruning.receipt.kept
            model(**changed)
            assert model.pruning.receipt.kept[0] == kept[0]
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-3)


def test_a_tower_of_one_size_refuses_smaller_images():
    with pytest.raises(UnsupportedModelError, match="one size only"):
        prune(model_of("ovis2"), "downsample")
    with pytest.raises(UnsupportedModelError, match="calls the projector"):
        prune(model_of("cohere2_vision"), "zooprune")


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("policy", ["uniform", "flowcut"])
def test_the_tower_computes_what_it_would_for_the_kept_patches(family, policy):
    """What enters the decoder is the stock features of the kept units, or of a tower without the others."""
    model, inputs = model_of(family), prompt(model_of(family), 1)
    stock = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    with pruned(model, policy, ratio=RATIO):
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        kept = model.pruning.receipt.kept[0]
    assert (~features[:, 0].isnan()).nonzero()[:, 0].tolist() == kept
    if policy == "uniform":
        torch.testing.assert_close(features[kept], stock[kept], atol=1e-5, rtol=1e-4)


def test_the_feature_method_is_given_back():
    model = model_of("mistral3")
    stock = type(model.model).get_image_features
    prune(model, "uniform")
    assert "get_image_features" in vars(model.model)
    unprune(model)
    assert model.model.get_image_features.__func__ is stock


def test_a_model_that_loses_its_holes_is_found_out(monkeypatch):
    """Were features smoothed on their way, dropped rows would come back."""
    model, inputs = tiny_model("mistral3"), prompt(model_of("mistral3"), 1)
    original = FeatureEncoder.choose

    def smoothed(self: Any, *args: Any) -> Any:
        call, features = original(self, *args)
        return call, [x.nan_to_num() for x in features]

    monkeypatch.setattr(FeatureEncoder, "choose", smoothed)
    prune(model, "uniform", ratio=RATIO)
    with pytest.raises(UnsupportedCallError, match="none is missing at the decoder's entry"):
        model(**inputs)


def test_a_model_that_encodes_by_another_method_is_found_out(monkeypatch):
    model, inputs = tiny_model("mistral3"), prompt(model_of("mistral3"), 1)
    prune(model, "uniform", ratio=RATIO)
    stock = type(model.model).get_image_features
    monkeypatch.setattr(model.model, "get_image_features", lambda *a, **k: stock(model.model, *a, **k))
    with pytest.raises(UnsupportedCallError, match="does not encode by its feature method"):
        model(**inputs)


def test_a_class_that_never_calls_its_feature_method_is_refused():
    class Silent(nn.Module):
        config = model_of("mistral3").config
        get_decoder = lambda self: model_of("mistral3").get_decoder()  # noqa: E731
        base_model = property(lambda self: self)

        def get_image_features(self, pixel_values):
            return self.get_image_features(pixel_values)

        def forward(self, input_ids):
            return input_ids

    with pytest.raises(UnsupportedModelError, match="nothing in Silent calls its get_image_features"):
        anatomy(Silent())
    assert calls_method(type(model_of("mistral3").model), "get_image_features")


@pytest.mark.parametrize("family", ["mllama", "florence2", "git", "chameleon", "kosmos-2"])
def test_other_ways_in_are_refused_with_their_sentence(family):
    with pytest.raises(PruningError) as refusal:
        prune(tiny_model(family), "uniform")
    assert "has no adapter" not in str(refusal.value)
    assert len(str(refusal.value).split()) > 8


@pytest.mark.parametrize(
    ("given", "shapes", "grids"),
    [
        ({"image_grid_thw": [[1, 4, 6], [1, 8, 4]]}, [(14,)], [(2, 3), (4, 2)]),
        ({"image_grid_thw": [[2, 4, 6]]}, [(12,)], [(2, 3), (2, 3)]),
        ({"image_grid_thw": [[1, 4, 4]]}, [(7,)], [(1, 7)]),  # newlines among them
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, [(12,)], [(2, 2)] * 3),
        ({"pixel_values": torch.ones(1, 3, 3, 8, 8)}, [(12,)], [(2, 2)] * 3),
        ({"pixel_values": torch.ones(2, 3, 3, 8, 8)}, [(12,), (12,)], [(2, 2)] * 6),
        (
            {"pixel_values": torch.eye(2).view(2, 2, 1, 1, 1).expand(2, 2, 3, 8, 8)},
            [(4,), (4,)],
            [(2, 2)] * 2,
        ),
        ({"image_grid_hw": [[4, 6], [8, 4]]}, [(6,), (8,)], [(2, 3), (4, 2)]),
        ({}, [(4,), (5,)], [(2, 2), (1, 5)]),
        ({}, [(2, 9)], [(3, 3), (3, 3)]),
        ({}, [(2, 3, 5)], [(3, 5), (3, 5)]),
    ],
)
def test_tiles_are_read_off_inputs_and_shapes(given, shapes, grids):
    given = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in given.items()}
    assert tile_sizes(given, shapes) == grids


def test_llava_with_a_pixtral_tower_prunes_images_of_two_sizes():
    """The LLaVA adapter knows CLIP's and SigLIP's tower; of another one the features are known."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**sizes, patch_size=PATCH, image_size=SIDE, head_dim=8),
        text_config=LlamaConfig(**sizes, vocab_size=128),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, *[IMAGE] * 64, 7, *[IMAGE] * 32, 8, 9]])
    pixels = {
        "pixel_values": torch.randn(2, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([[32, 32], [16, 32]]),
    }
    stock = model(input_ids=ids, **pixels).logits
    with pruned(model, "uniform", ratio=0.25):
        assert model(input_ids=ids, **pixels).logits.isfinite().all()
        assert [len(units) for units in model.pruning.receipt.kept] == [16, 8]
        assert set(model.pruning.receipt.decoder_tokens) == {5 + 24}
    assert torch.equal(model(input_ids=ids, **pixels).logits, stock)


def every(*left_out: str) -> pytest.MarkDecorator:
    """All families of this file, one of them in the quick suite."""
    names = [name for name in (*TOWERS, *FAMILIES) if name not in left_out]
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "family", [pytest.param(x, marks=() if x == "idefics3" else slow) for x in names]
    )


@every()
def test_a_static_cache_and_bf16_answer_as_they_do_unpruned(family):
    """Greedy tokens of a pruned model are those of a dynamic cache; in bf16 the answer is finite and restored."""
    model, inputs, greedy = (
        tiny_model(family),
        prompt(model_of(family), 2),
        {"max_new_tokens": 4, "do_sample": False},
    )
    with pruned(model, "uniform", ratio=RATIO):
        expected = model.generate(**inputs, **greedy)
        assert torch.equal(model.generate(**inputs, **greedy, cache_implementation="static"), expected)
    model = model.bfloat16()
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    stock = model(**half).logits
    with pruned(model, "divprune", ratio=RATIO):
        assert model(**half).logits.isfinite().all()
    assert torch.equal(model(**half).logits, stock)


# PaliGemma's whole prompt sees itself, so that a turn is something else there; BLIP-2 takes none without an image
@every("paligemma", "blip-2")
def test_a_later_turn_is_what_the_whole_conversation_gives(family):
    model, inputs = model_of(family), prompt(model_of(family), 1)
    more = torch.tensor([[7, 8, 9, 11]])
    ids = torch.cat([inputs["input_ids"], more], 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole |= {n: torch.nn.functional.pad(inputs[n], (0, 4)) for n in KINDS if n in inputs}
    with pruned(model, "uniform", ratio=RATIO):
        expected = model(**whole).logits[:, -4:]
        first = model(**inputs, use_cache=True)
        later = {n: whole[n][:, -4:] for n in KINDS if n in inputs}
        answer = model(
            input_ids=more, attention_mask=torch.ones_like(ids), **{CACHE: cache_of(first)}, **later
        ).logits
    torch.testing.assert_close(answer, expected, atol=5e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks by that name
@every()
def test_lora_on_a_pruned_model(family):
    model, inputs = tiny_model(family), prompt(model_of(family), 1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    stock = adapted(**inputs).logits
    prune(adapted, "uniform", ratio=RATIO)
    with torch.enable_grad():
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        adapted(**inputs, labels=labels).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name and p.grad is not None]
    assert any(g.abs().sum() > 0 for g in grads)
    unprune(adapted)
    assert torch.equal(adapted(**inputs).logits, stock)
