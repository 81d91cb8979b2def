"""FlowCut against its released code: scores, counts, the whole tower, and complete models of three families."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tests.parity._files import Golden, npz_cases
from tests.parity._given import embeds_model
from vlm_prune import prune
from vlm_prune.adapters.llava_next import _next_images
from vlm_prune.call import stream
from vlm_prune.call.assembly import read_packing
from vlm_prune.call.encode_call import current_encode, encoding
from vlm_prune.contract.views import AttentionView
from vlm_prune.policies.flowcut import FlowCutDecoder, drop_counts, information_score, value_magnitude
from vlm_prune.policies.scores import global_attention, global_similarity
from vlm_prune.versions import CACHE, cache_of

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    CHECKS[golden.meta["kind"]](golden)


def check_score(golden: Golden) -> None:
    for i in range(golden.meta["n"]):
        magnitude = golden[f"value_{i}"].abs().sum(-1)
        ours = information_score(golden[f"attn_{i}"], golden[f"semantic_{i}"], magnitude)
        torch.testing.assert_close(ours, golden[f"score_{i}"])


def check_count(golden: Golden) -> None:
    for case, _, tokens, remaining, target, expected in golden["table"].tolist():
        attention = golden[f"attn_{case:03d}"]
        counts = drop_counts(attention, [tokens] * len(attention), target, remaining, batch_max=True)
        assert set(counts) == {expected}, f"row {case}"


def check_attention(golden: Golden) -> None:
    """What one CLIP attention layer reports: CLS row, similarity to CLS, head-mean values."""
    for i in range(golden.meta["n"]):
        hidden, heads = golden[f"hidden_{i}"], int(golden[f"heads_{i}"])
        batch, tokens, width = hidden.shape
        w = golden.prefixed(f"w{i}/")
        query, key, value = (
            torch.nn.functional.linear(hidden, w[f"{p}_proj.weight"], w[f"{p}_proj.bias"])
            .view(batch, tokens, heads, width // heads)
            .transpose(1, 2)
            for p in "qkv"
        )
        view = AttentionView(query, key, value, (width // heads) ** -0.5, has_cls=True)
        official = golden[f"attn_weights_{i}"].mean(1)[:, 0, 1:]
        torch.testing.assert_close(global_attention(view), official, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            global_similarity(view), golden[f"semantic_{i}"][:, 1:], atol=1e-5, rtol=1e-4
        )
        magnitude = golden[f"value_mean_{i}"].abs().sum(-1)
        torch.testing.assert_close(value_magnitude(value), magnitude, atol=1e-5, rtol=1e-4)


def llava(vision: dict, text: dict | None = None, **config) -> LlavaForConditionalGeneration:
    """A stock LLaVA; where the case has no language model, a minimal one."""
    text = text or {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text.setdefault("num_attention_heads", 2)
    llava_config = LlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **vision),
        text_config=LlamaConfig(**text),
        **config,
    )
    return LlavaForConditionalGeneration(llava_config).eval()


def close(ours: torch.Tensor, official: torch.Tensor) -> None:
    torch.testing.assert_close(ours, official, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def check_tower(golden: Golden) -> None:
    meta = golden.meta
    strategy = {"patch": "default", "cls_patch": "full"}[meta["select_feature"]]
    model = llava(
        meta["clip_config"],
        vision_feature_layer=meta["mm_vision_select_layer"],
        vision_feature_select_strategy=strategy,
    )
    pixels = golden["pixel_values"]
    model.to(pixels.dtype)
    model.model.vision_tower.load_state_dict(golden.prefixed("w/"), strict=False)
    cls = int(strategy == "full")
    tokens = meta["target_num"] // 2 if "anyres" in meta["image_aspect_ratio"] else meta["target_num"]
    units = model.model.vision_tower.config.image_size // model.model.vision_tower.config.patch_size
    prune(model, "flowcut", tokens=min(tokens, units**2 + cls), compat="official")

    with encoding(model.pruning):  # a tower called by itself is a stock one
        output = model.model.vision_tower(pixels, output_hidden_states=True)
    features = output.hidden_states[meta["mm_vision_select_layer"]][:, 1 - cls :]
    live = ~features[..., 0].isnan()
    batch = len(pixels)
    close(features[live].view(batch, -1, features.shape[-1]), golden["features"])
    kept = torch.stack([row.nonzero()[:, 0] for row in live])[:, cls:] - cls
    official = golden["final_keep"]
    if official.shape[1] == units**2 + 1:  # nothing was cut: the released code then counts CLS too
        official = official[:, :-1]
    assert torch.equal(kept, official)
    close(output.last_hidden_state, golden["last_hidden_state"])

    model.model.get_image_features(pixels)
    assert model.pruning.receipt.kept == official.tolist()
    assert model.pruning.receipt.tower_tokens == golden["tokens_in"].tolist()

    check_masked(model, lambda: model.model.get_image_features(pixels))


def check_masked(model: torch.nn.Module, call: Callable[[], object]) -> None:
    """A tower that masks what it drops keeps what one keeps that cuts, layer by layer."""
    cut = model.pruning.receipt
    model.pruning._encoder.still = True
    call()
    masked = model.pruning.receipt
    assert masked.tower_masked == (len(set(cut.tower_tokens)) > 2)
    assert masked.kept == cut.kept
    assert masked.tower_units == cut.tower_units
    model.pruning._encoder.still = None


PINPOINTS = [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]
"""The released code's sizes of grids, as (height, width) in its order, which settles ties."""


def llava_next(vision: dict, text: dict, **config) -> LlavaNextForConditionalGeneration:
    """A stock LLaVA-NeXT."""
    next_config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **vision),
        text_config=LlamaConfig(**text),
        image_grid_pinpoints=PINPOINTS,
        **config,
    )
    return LlavaNextForConditionalGeneration(next_config).eval()


@torch.no_grad()
def check_arrangement(golden: Golden) -> None:
    """The order of kept tokens of several tiles, and what is left of them without padding."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**vision, "vocab_size": 32, "num_hidden_layers": 1}
    base = llava_next({**vision, "image_size": 336, "patch_size": 14}, text).model
    for case, width, height, columns, rows, _, count in golden["table"].tolist():
        keep, features = golden[f"keep_{case}"], golden[f"feat_{case}"]
        tiles = stream.open_holes(features, keep, 576, None)
        small = torch.zeros(1, 576, features.shape[2])
        for name, size in (
            (f"ordered_unpad_{case}", (height, width)),
            (f"ordered_nopad_{case}", (336 * rows, 336 * columns)),  # fills its tiles
        ):
            images = _next_images(base, {"image_sizes": torch.tensor([size])})
            [packed] = images.pack(torch.cat([small, tiles]), torch.full((features.shape[2],), torch.nan))
            [packing] = read_packing(images, (24, 24), joint=False)
            grid = packed[576:]
            assert torch.equal(grid[~grid[:, 0].isnan()], golden[name]), name
            assert torch.equal(packed[:, 0].isnan()[packing.newline], packing.newline[packing.newline])
        assert len(golden[f"ordered_unpad_{case}"]) == count


@torch.no_grad()
def check_model(golden: Golden) -> None:
    """A complete LLaVA-1.5 or LLaVA-NeXT."""
    meta, images, several = golden.meta, golden["images"], golden["images"].dim() == 5
    # one id more, for the placeholder that official code writes as -200
    image_token = meta["llm_config"]["vocab_size"]
    text = {**meta["llm_config"], "vocab_size": image_token + 1, "eos_token_id": None}
    model = (llava_next if several else llava)(meta["vision_config"], text, image_token_id=image_token)
    load_official(model, golden.prefixed("w/"), image_token)
    call = {"pixel_values": images}
    if several:
        call["image_sizes"] = golden["image_sizes"].flip(-1)  # official code says (width, height)
    features = model.model.get_image_features(**call, return_dict=True).pooler_output
    count = len(features[0])
    prune(model, "flowcut", tokens=meta["target_num"], compat="official")

    official_ids = golden["input_ids"]
    row = [t for i in official_ids[0].tolist() for t in ([image_token] * count if i == -200 else [i])]
    ids = torch.tensor([row])
    output = model(input_ids=ids, **call)
    live = output.logits[0].abs().sum(-1) > 0
    close(output.logits[:, live, :image_token], golden["logits"])
    assert [layer.keys.shape[2] for layer in cache_of(output).layers] == golden["kv_len_per_layer"].tolist()
    kept, official = model.pruning.receipt.kept, golden["vision_keep"].tolist()
    if several:  # the receipt counts what is left without padding
        assert kept[0] == official[0]
        assert all(set(ours) <= set(theirs) for ours, theirs in zip(kept, official, strict=True))
        assert sum(map(len, kept)) == golden["inputs_embeds"].shape[1] - official_ids.shape[1] + 1
    else:
        assert kept == official

    if not several:
        check_masked(model, lambda: model(input_ids=ids, **call))
    expected = golden["greedy_ids"][0, 1:].tolist()  # the first id stands for the prompt
    generated = model.generate(
        input_ids=ids, **call, max_new_tokens=len(expected), do_sample=False, suppress_tokens=[image_token]
    )
    assert generated[0, len(row) :].tolist() == expected


def load_official(model: torch.nn.Module, weights: dict[str, torch.Tensor], image_token: int) -> None:
    """Weights under the released code's names; the placeholder's own rows are zero in the head."""
    tower, projector = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."
    names = {"0": "linear_1", "2": "linear_2"}
    state = model.state_dict()
    for name, value in weights.items():
        if name.startswith(tower):
            target = "model.vision_tower." + name.removeprefix(tower)
        elif name.startswith(projector):
            layer, kind = name.removeprefix(projector).split(".")
            target = f"model.multi_modal_projector.{names[layer]}.{kind}"
        elif name in ("lm_head.weight", "model.image_newline"):
            target = name
        else:
            target = "model.language_model." + name.removeprefix("model.")
        if target in state and state[target].shape != value.shape:
            state[target][: len(value)] = value
        elif target in state:
            state[target] = value
        else:
            assert "rotary" in target or "position_ids" in target, target
    state["lm_head.weight"][image_token:] = 0
    model.load_state_dict(state)


@torch.no_grad()
def check_decoder(golden: Golden) -> None:
    """The cut inside the language model: which rows stay, what layers compute, and two decoding steps."""
    meta, embeds = golden.meta, golden["inputs_embeds"]
    start, count, target = meta["visual_start"], meta["visual_num"], meta["target_num"]
    for name, value in meta["llama_config"].items():
        golden.arrays[ALIASES.get(name, name)] = np.asarray(value)
    del golden.arrays[
        "w/embed_tokens.weight"
    ]  # embeddings are given, and the test's model has a vocabulary of its own
    model, call = embeds_model(golden, embeds, start, count)
    prune(model, [FlowCutDecoder(positions="compact")], tokens=min(target, count))
    output = model.model(**call, use_cache=True)
    live = output.last_hidden_state.abs().sum(-1) > 0
    close(
        output.last_hidden_state[live].view_as(golden["prefill_last_hidden"]), golden["prefill_last_hidden"]
    )
    kept = torch.stack([row.nonzero()[:, 0] for row in live[:, start : start + count]])
    if "keep" in golden:
        assert torch.equal(kept, golden["keep"])
    cache = cache_of(output)
    assert [layer.keys.shape[2] for layer in cache.layers] == golden["kv_len_per_layer"].tolist()
    for step in range(2):
        if f"decode_embed_{step}" not in golden:
            continue
        output = model.model(inputs_embeds=golden[f"decode_embed_{step}"], **{CACHE: cache}, use_cache=True)
        close(output.last_hidden_state, golden[f"decode_hidden_{step}"])


@torch.no_grad()
def check_qwen(golden: Golden) -> None:
    """A complete Qwen2-VL: the patches that survive each block, the features, the decoder's cut, the logits."""
    meta, weights = golden.meta, golden.prefixed("w/")
    text = dict(meta["text_config"])
    ids = {
        name: text.pop(name) for name in list(text) if name.endswith("_token_id") or name.startswith("tie_")
    }
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta", 1000000.0)}
    config = Qwen2VLConfig(
        text_config={**text, "pad_token_id": None, "eos_token_id": None},
        vision_config=meta["vision_config"],
        **ids,
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    names = {
        n if n.startswith("lm_head") else n.replace("model.", "model.language_model.", 1) if n.startswith("model.")
        else f"model.{n}": w
        for n, w in weights.items()
    }  # fmt: skip
    missing, unexpected = model.load_state_dict(names, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "inv_freq" not in name], missing
    target = meta["target_num"]
    call = {"input_ids": golden["input_ids"], "pixel_values": golden["pixel_values"]}
    call |= {"image_grid_thw": golden["grid_thw"], "position_ids": golden["position_ids"]}
    units = int(golden["grid_thw"].prod()) // 4
    features = model.model.get_image_features(golden["pixel_values"], golden["grid_thw"]).pooler_output[0]
    if len(golden["visual_features"]) == units:
        close(features, golden["visual_features"])

    prune(model, "flowcut", tokens=target, compat="official")
    survivors: dict[int, list[int]] = {}
    encoder = model.pruning._encoder
    for number, block in enumerate(model.model.visual.blocks):

        def note(*_: object, number: int = number) -> None:
            survivors[number] = current_encode().state.alive.tolist()

        block.register_forward_hook(note)
    assert encoder.single_patches
    output = model(**call)
    for name, keep in golden.prefixed("vit_keep_").items():
        assert survivors[int(name)] == keep.tolist(), f"block {name}"
    features = model.model.get_image_features(golden["pixel_values"], golden["grid_thw"]).pooler_output[0]
    close(features[~features[:, 0].isnan()], golden["visual_features"])

    live = output.logits[0].abs().sum(-1) > 0
    close(output.logits[:, live], golden["logits"])
    first = int((golden["input_ids"][0] == ids["image_token_id"]).nonzero()[0])
    kept = live[first : first + units].nonzero()[:, 0]
    assert kept.tolist() == golden["llm_keep"][0].tolist()
    cache = cache_of(output)
    assert [layer.keys.shape[2] for layer in cache.layers] == golden["kv_len_per_layer"].tolist()


ALIASES = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "rms_eps",
}
"""Names of a Llama's config in other golden files."""

CHECKS = {
    "anyres": check_arrangement,
    "llm": check_decoder,
    "qwen2vl": check_qwen,
    "unit_score": check_score,
    "unit_ratio": check_count,
    "unit_attn": check_attention,
    "clip": check_tower,
    "e2e": check_model,
}
