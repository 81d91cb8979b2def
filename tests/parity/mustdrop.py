"""MustDrop against its released code: merging, filter, vision tower, the decoder's cuts, and complete models.

The released code lays the crops of a LLaVA-NeXT image out flat, in the order of the batch, without newlines and without
taking padding off. That is the prompt of a stock LLaVA with one image a crop, and is compared as such.

Decoding is compared where nothing was dropped. Otherwise the released code gives new tokens the position F (rows
left) in layers whose cached keys stand at their positions before the trim, which is not reproduced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.parity._files import Golden, npz_cases
from tests.parity._given import VISUAL, embeds_model, load_llm
from vlm_prune import prune
from vlm_prune.call.encode_call import RIDE, encoding
from vlm_prune.policies.dual_attention import dual_attention_filter, key_set
from vlm_prune.policies.mustdrop import KEY, MustDrop
from vlm_prune.policies.window_merge import (
    batch_minimum,
    merge_as_released,
    released_order,
    window_cells,
    window_similarity,
)
from vlm_prune.versions import CACHE, cache_of

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    CHECKS[case.stem.split("_")[0]](golden)


def dtype_of(golden: Golden) -> torch.dtype:
    return getattr(torch, str(golden.arrays["torch_dtype"]).removeprefix("torch."))


def check_merge(golden: Golden) -> None:
    dtype = dtype_of(golden)
    hidden = golden["hidden_states"].to(dtype)[:, 1:]
    side, window = round(hidden.shape[1] ** 0.5), tuple(golden["window"].tolist())
    threshold = float(golden["threshold"])
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-3}

    cells = window_cells((side, side), window, hidden.device)
    similarity = window_similarity(hidden, cells, dtype)
    torch.testing.assert_close(similarity, golden["similarity_map"].float(), **close)
    windows = batch_minimum(similarity, threshold)
    assert windows.shape[1] == int(golden["r"])
    assert torch.equal(windows, golden["merged_window_idx"])
    order = released_order(windows, cells, side * side)
    r, per_window = windows.shape[1], cells.shape[1]
    assert torch.equal(order[:, :r], golden["dst_idx"])
    assert torch.equal(order[:, r:], golden["unm_idx"])
    sources = cells[windows][..., :-1].flatten(1)
    assert torch.equal(sources.sort().values, golden["src_idx"].sort().values)

    keep = merge_as_released(hidden, cells, threshold)
    assert (keep is None) == (r == 0)
    rows = hidden if keep is None else keep.rows
    torch.testing.assert_close(rows.float(), golden["merged_hidden"].float()[:, 1:], **close)
    size = torch.ones_like(order)
    size[:, :r] = per_window
    assert torch.equal(size, golden["size"][:, 1:, 0].long())
    made_of = torch.zeros(len(order), order.shape[1], side * side, dtype=torch.bool)
    made_of.scatter_(2, order[..., None], True)
    made_of[:, :r].scatter_(2, cells[windows], True)
    assert torch.equal(made_of, golden["source"][:, 1:, 1:])


def check_filter(golden: Golden) -> None:
    start, count, text = (int(golden[n]) for n in ("v_token_start", "img_seq", "text_seq"))
    attention = golden["attn"].to(dtype_of(golden))
    block = attention[:, :, start + count : start + count + text, start : start + count].mean(1)
    total, peak = block.sum(1), block.amax(1)
    torch.testing.assert_close(total[0].float(), golden["attn_sum"].float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(peak[0].float(), golden["attn_max"].float())
    limits = float(golden["global_thr"]), float(golden["individual_thr"])
    keep = dual_attention_filter(total, peak, torch.ones_like(total, dtype=torch.bool), *limits)
    assert torch.equal(~keep[0], golden["candidate_mask"])
    assert torch.equal(keep[0].nonzero()[:, 0], golden["important_indices"])


def clip_weights(golden: Golden, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix("vision_model."): x for name, x in golden.prefixed(prefix).items()}


@torch.no_grad()
def check_vision(golden: Golden) -> None:
    config = {n: int(golden[n]) for n in ("hidden_size", "intermediate_size", "image_size", "patch_size")}
    vision = CLIPVisionConfig(
        **config, num_hidden_layers=int(golden["num_layers"]), num_attention_heads=int(golden["heads"])
    )
    text = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    tower = model.model.vision_tower
    missing = tower.load_state_dict(clip_weights(golden, "w/"), strict=False).missing_keys
    assert all("position_ids" in name for name in missing)
    prune(model, MustDrop(compat="official"))

    with encoding(model.pruning):  # a tower called by itself is a stock one
        output = tower(golden["pixel_values"], output_hidden_states=True)
    consumed = len(output.hidden_states) - 2
    for name, official in golden.prefixed("hidden_states_").items():
        if int(name) not in (consumed, len(output.hidden_states) - 1):
            torch.testing.assert_close(output.hidden_states[int(name)], official, atol=1e-4, rtol=1e-4)
    features = output.hidden_states[consumed][:, 1:]
    live = ~features[..., 0].isnan()
    official = golden["features"]
    assert live.sum(-1).tolist() == [official.shape[1]] * len(official)
    torch.testing.assert_close(features[live].view_as(official), official, atol=1e-4, rtol=1e-4)
    keys = getattr(output, RIDE).carry[KEY].view(len(official), -1) > 0
    assert torch.equal(keys.nonzero()[:, 1].view(len(keys), -1), golden["key_set"].sort().values)
    ratio = MustDrop().key_ratio
    assert torch.equal(key_set(golden["cls_attn"], ratio), keys[:, : official.shape[1]])


@dataclass(frozen=True)
class KeysGiven(MustDrop):
    """MustDrop whose key set comes from the case, as no tower ran; notes what it dropped."""

    def prefill(self, view):
        if view.layer == self.prefill_layers(view.depth)[0]:
            flags = torch.zeros_like(view.visual, dtype=torch.float32)
            flags[:, view.visual[0].nonzero()[:, 0][KEYS[0]]] = 1.0
            view.carry[KEY] = flags
            SEEN.clear()
        keep = super().prefill(view)
        visual = view.visual[0]
        SEEN.append((keep[0][visual].nonzero()[:, 0], view.carry[KEY][0][visual & keep[0]].nonzero()[:, 0]))
        return keep


KEYS: list[torch.Tensor] = []
SEEN: list[tuple[torch.Tensor, torch.Tensor]] = []


@contextmanager
def keys(official: torch.Tensor) -> Iterator[None]:
    KEYS.append(official)
    try:
        yield
    finally:
        KEYS.clear()


def check_stages(golden: Golden) -> None:
    """The tokens kept and the key set at each cut, in the coordinates of what stood there before it."""
    assert len(SEEN) == len([name for name in golden.arrays if name.endswith("_kept_rel")])
    for number, (kept, key) in enumerate(SEEN):
        assert torch.equal(kept, golden[f"stage{number}_kept_rel"]), f"stage {number}"
        assert torch.equal(key, golden[f"stage{number}_key_rel"]), f"stage {number}"


@torch.no_grad()
def check_prefill(golden: Golden) -> None:
    start, count = int(golden["v_token_start"]), int(golden["img_seq"])
    model, inputs = embeds_model(golden, golden["inputs_embeds"], start, count)
    limits = float(golden["global_thr"]), float(golden["individual_thr"])
    policy = KeysGiven(compat="official", positions="compact", thresholds=limits, merge_threshold=2.0)
    assert policy.prefill_layers(int(golden["num_layers"])) == golden["pruning_layers"].tolist()
    prune(model, policy)
    with keys(golden["key_set_in"]):
        output = model(**inputs)
    check_stages(golden)
    rows = golden["final_token_abs"]
    torch.testing.assert_close(
        output.logits[:, rows, :VISUAL], golden["prefill_logits"], atol=1e-4, rtol=1e-4
    )
    assert model.pruning.receipt.decoder_tokens == golden["layer_input_len"].tolist()
    layers = cache_of(output).layers
    assert [layer.keys.shape[2] for layer in layers] == golden["cache_len_after_prefill"].tolist()
    for number, layer in enumerate(layers):
        for ours, name in ((layer.keys, "k"), (layer.values, "v")):
            torch.testing.assert_close(ours, golden[f"cache_{name}_{number:02d}"], atol=1e-4, rtol=1e-4)
    if len(rows) < inputs["inputs_embeds"].shape[1]:
        return
    for token, official in zip(golden["decode_tokens"], golden["decode_logits"], strict=True):
        output = model(input_ids=token.view(1, 1), **{CACHE: cache_of(output)})
        torch.testing.assert_close(output.logits[0, -1, :VISUAL], official, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def check_model(golden: Golden) -> None:
    images = golden["images"].flatten(end_dim=-4)  # (1, crops, 3, side, side) for LLaVA-NeXT
    weights = golden.prefixed("w/")
    tower = {n: x for n, x in weights.items() if n.startswith("vision_tower.")}
    projector = {n: x for n, x in weights.items() if n.startswith("model.mm_projector.")}
    model = model_like(images, tower, weights)
    load_llm(model, {n: x for n, x in weights.items() if n not in tower and n not in projector})
    names = {"0": "linear_1", "2": "linear_2"}
    state = {n.removeprefix("model.mm_projector."): x for n, x in projector.items()}
    model.model.multi_modal_projector.load_state_dict({names[n[0]] + n[1:]: x for n, x in state.items()})
    model.model.vision_tower.load_state_dict(
        {n.removeprefix("vision_tower.vision_model."): x for n, x in tower.items()}, strict=False
    )
    limits = float(golden["global_thr"]), float(golden["individual_thr"])
    prune(model, MustDrop(compat="official", positions="compact", thresholds=limits))

    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    crops, every = len(images), len(images) * side * side
    ids = [t for i in golden["input_ids"][0].tolist() for t in ([VISUAL] * every if i == -200 else [i])]
    output = model.model(input_ids=torch.tensor([ids]), pixel_values=images)
    start, count = int(golden["v_token_start"]), int(golden["img_seq"])
    rows = golden["final_token_abs"]
    crop, within = (rows - start) // (count // crops), (rows - start) % (count // crops)
    visual = (rows >= start) & (rows < start + count)
    behind = torch.where(rows < start, rows, rows + every - count)
    rows = torch.where(visual, start + crop * side * side + within, behind)
    hidden = output.last_hidden_state
    torch.testing.assert_close(hidden[:, rows], golden["prefill_final_hidden"], atol=2e-4, rtol=1e-4)
    assert (hidden[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == rows.tolist()
    receipt = model.pruning.receipt
    # the released meter counts a layer's visual tokens after the cut after it
    text = len(ids) - every
    counts = [n - text for n in receipt.decoder_tokens]
    assert [*counts[1:], counts[-1]] == golden["num_token_per_layer"].tolist()
    assert cache_of(output).layers[0].keys.shape[2] == int(golden["cache_len_layer0"])
    first = model.lm_head(hidden[:, -1])[0, :VISUAL].argmax()
    assert int(first) == int(golden["generated"][0, 1])  # the first id stands for the prompt


def model_like(
    images: torch.Tensor, tower: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> LlavaForConditionalGeneration:
    """A LLaVA whose sizes are read off the weights; all recorded models have 2 heads in the tower, 4 in the decoder."""
    prefix = "vision_tower.vision_model."
    patch = tower[prefix + "embeddings.patch_embedding.weight"]
    vision = CLIPVisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=tower[prefix + "encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum("layer_norm1.weight" in n for n in tower),
        num_attention_heads=2,
        image_size=images.shape[-1],
        patch_size=patch.shape[-1],
    )
    text = LlamaConfig(
        vocab_size=VISUAL + 1,
        hidden_size=weights["lm_head.weight"].shape[1],
        intermediate_size=weights["model.layers.0.mlp.up_proj.weight"].shape[0],
        num_hidden_layers=sum("mlp.up_proj.weight" in n for n in weights),
        num_attention_heads=4,
        rms_norm_eps=1e-5,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=VISUAL)
    ).eval()


CHECKS = {
    "merge": check_merge,
    "filter": check_filter,
    "vision": check_vision,
    "prefill": check_prefill,
    "e2e": check_model,
}
