"""VisPruner against its released code: important tokens, the rounds, the tokens kept, and the order of tiles."""

from pathlib import Path

import torch

from tests.parity._files import Golden, npz_cases
from vlm_prune.contract.views import FeaturesView
from vlm_prune.policies.vispruner import VisPruner, choose, looked_up

cases = npz_cases
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def check(case: Path) -> None:
    golden = Golden(case)
    dtype = DTYPES[golden.meta.get("dtype", "f32")]
    features, heads = golden["features"].to(dtype), golden["attention"].to(dtype)
    attention, kept = heads.mean(1), golden["keep"]
    share, keep = golden.meta["important_ratio"], kept.shape[1]
    if "attn_mean" in golden:
        assert torch.equal(attention.float(), golden["attn_mean"].float())

    important, diverse = choose(attention, features, keep, share, official=True)
    if "important" in golden:
        assert torch.equal(important, golden["important"])
    if "diverse_in_order" in golden:
        assert torch.equal(diverse, golden["diverse_in_order"])
    assert torch.equal(torch.cat([important, diverse], 1).sort().values, kept)
    check_policy(golden, features, attention, kept)
    if "order_global" in golden:
        check_order(golden, kept)


def check_policy(golden: Golden, features: torch.Tensor, attention: torch.Tensor, kept: torch.Tensor) -> None:
    """The policy in both modes, for all tiles together and for each alone."""
    before, share = features.clone(), golden.meta["important_ratio"]
    for compat in ("official", None):
        policy = VisPruner(important_share=share, compat=compat)
        together = policy.encode_final(view(features, attention, kept.shape[1])).index
        for tile in range(len(features)):
            alone = policy.encode_final(view(features[[tile]], attention[[tile]], kept.shape[1])).index
            assert torch.equal(alone[0], together[tile])
        if compat or not golden.meta.get("tie_dependent"):
            assert torch.equal(together, kept)
        assert together.shape == kept.shape
        assert (together.diff(dim=-1) > 0).all()
    assert torch.equal(features, before)
    exact = torch.nn.functional.cosine_similarity(
        features.double()[:, :5, None], features.double()[:, None], dim=-1
    )
    first, everyone = (torch.arange(n).expand(len(features), -1) for n in (5, features.shape[1]))
    torch.testing.assert_close(looked_up(features)(first, everyone).double(), exact, atol=1e-5, rtol=0)


def view(features: torch.Tensor, attention: torch.Tensor, keep: int) -> FeaturesView:
    batch, units = attention.shape
    return FeaturesView(
        features, (1, units), keep, torch.zeros(batch, dtype=torch.int64), None, {"cls_attention": attention}
    )


def check_order(golden: Golden, kept: torch.Tensor) -> None:
    """The thumbnail's tokens, then those of the other tiles by the rows of the whole picture."""
    columns, rows = golden.meta["grid_wh"]
    side = golden.meta["side"]
    units, tiles = side * side, torch.arange(1, rows * columns + 1).view(rows, columns)
    number = tiles[:, :, None, None] * units + torch.arange(units).view(side, side)
    picture = number.permute(0, 2, 1, 3).flatten()
    chosen = kept + torch.arange(len(kept))[:, None] * units
    order = torch.cat([chosen[0], picture[torch.isin(picture, chosen)]])
    assert torch.equal(order, golden["order_global"])
