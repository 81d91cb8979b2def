"""CDPruner against its released code: relevance, picks with their gains, kept sets, and what reaches the decoder."""

from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.parity._files import Golden, npz_cases
from vlm_prune.policies.cdpruner import greedy_volume, patch_embeds, relevance, text_windows

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
MEANINGFUL = 1e-4
"""A gain below it is rounding noise, with which the released code goes on until it divides by zero."""

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    kind = golden.meta["kind"]
    features = tower(golden) if kind == "tower" else golden["features"]
    features = features.to(getattr(torch, golden.meta.get("features_dtype", "float32")))
    ours = relevance(golden["image_embeds"], golden["text_embeds"], joint=True)
    torch.testing.assert_close(ours, golden["relevance"], **CLOSE)
    check_picks(golden, features, ours, official=True)
    if features.dtype == torch.float32:  # nothing to mend in these but the range of relevance
        check_picks(golden, features, ours, official=False)
    if len(features) == 1:
        assert torch.equal(relevance(golden["image_embeds"], golden["text_embeds"]), ours)
    if kind == "anyres":
        check_anyres(golden, features)


def check_picks(golden: Golden, features: torch.Tensor, quality: torch.Tensor, official: bool) -> None:
    keep = min(int(golden["T"]), features.shape[1])
    order, gain = greedy_volume(features, quality, keep, official)
    released = gain if golden.meta["kind"] == "anyres" else golden["pick_gain"]  # it records none
    meant = (released > MEANINGFUL).cumprod(-1).bool()
    torch.testing.assert_close(gain[meant], released[meant], rtol=1e-3, atol=1e-5)
    assert torch.equal(order[meant], golden["pick_order"][meant])
    assert all(len(set(row)) == keep for row in order.tolist()), "exactly the budget, nothing twice"
    if meant.all():
        assert torch.equal(order.sort(-1).values, kept(golden, keep))


def kept(golden: Golden, keep: int) -> torch.Tensor:
    mask = golden["index_mask"]
    return mask.nonzero()[:, 1].view(len(mask), keep)


def check_anyres(golden: Golden, features: torch.Tensor) -> None:
    """The base tile's tokens, then those of the others line by line of the whole picture."""
    keep, side = int(golden["T"]), golden.meta["side"]
    columns, rows = golden["grid_wh"].tolist()
    ours = relevance(golden["image_embeds"], golden["text_embeds"], joint=True)
    order, _ = greedy_volume(features, ours, keep, official=True)
    mask = torch.zeros(features.shape[:2], dtype=torch.bool).scatter(1, order, True)
    number = torch.arange(mask.numel()).view(len(features), side, side)
    canvas = number[1:].view(rows, columns, side, side).transpose(1, 2).flatten()
    source = torch.cat([number[0].flatten(), canvas])
    source = source[mask.flatten()[source]]
    assert torch.equal(source, golden["token_source"])
    assert torch.equal(features.flatten(0, 1)[source], golden["llm_image_tokens"].to(features.dtype))


def tower(golden: Golden) -> torch.Tensor:
    """From pixels and token ids to embeddings and projected features, with stock CLIP modules."""
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**golden.meta["vision"])).eval()
    vision.load_state_dict(golden.prefixed("w/vision/"))
    text = CLIPTextModelWithProjection(CLIPTextConfig(**golden.meta["text"])).eval()
    text.load_state_dict(golden.prefixed("w/text/"))
    ids, mask = text_windows(golden["token_ids"], golden.meta["max_position_embeddings"])
    assert len(ids) == golden.meta["segments"]
    with torch.no_grad():
        seen = vision.vision_model(golden["pixel_values"], output_hidden_states=True)
        features = seen.hidden_states[golden.meta["select_layer"]][:, 1:]
        torch.testing.assert_close(features, golden["tower_features"], rtol=1e-4, atol=1e-5)
        image = patch_embeds(features, vision.vision_model.post_layernorm, vision.visual_projection)
        asked = text(input_ids=ids, attention_mask=mask).text_embeds
        torch.testing.assert_close(image, golden["image_embeds"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(asked, golden["text_embeds"], rtol=1e-4, atol=1e-5)
        w = golden.prefixed("w/projector/")
        hidden = torch.nn.functional.gelu(features @ w["0.weight"].T + w["0.bias"])
        projected = hidden @ w["2.weight"].T + w["2.bias"]
    torch.testing.assert_close(projected, golden["projected"], rtol=1e-4, atol=1e-5)
    return golden["projected"]
