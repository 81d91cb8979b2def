"""SCOPE against its released code: picking order, final cover, and the tokens handed on."""

from pathlib import Path

import torch

from tests.parity._files import Golden, npz_cases
from vlm_prune.contract.views import AttentionView, FeaturesView, TowerView
from vlm_prune.policies.scope import SCOPE, salient_cover

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    dtype = DTYPES[golden.meta.get("dtype", "f32")]
    if "hidden_states" in golden:
        return check_tower(golden, dtype)
    features, saliency = golden["features"].to(dtype), golden["saliency"].to(dtype)
    assert torch.equal(golden["attention"].to(dtype).sum(1), saliency)
    keep, alpha, combine = golden.meta["K"], golden.meta["alpha"], golden.meta["combined"]
    order, cover = salient_cover(features, saliency, keep, alpha, combine, official=True)
    assert_picked(golden, order, dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 2e-2}
    torch.testing.assert_close(cover.float(), golden["final_cover"].float(), **tolerance)
    if dtype == torch.float32:  # nothing to mend in these
        assert_picked(golden, salient_cover(features, saliency, keep, alpha, combine)[0], dtype)
    for compat in ("official", None) if dtype == torch.float32 else ("official",):
        policy = SCOPE(alpha=alpha, combine=combine, compat=compat)
        assert torch.equal(kept(policy, features, saliency, keep), golden["keep"])


def assert_picked(golden: Golden, order: torch.Tensor, dtype: torch.dtype) -> None:
    """The recorded order; in half precision the recorded set, since sums are rounded by backend."""
    if dtype == torch.float32:
        assert torch.equal(order, golden["order"])
    assert torch.equal(order.sort(-1).values, golden["keep"])


def kept(policy: SCOPE, features: torch.Tensor, saliency: torch.Tensor, keep: int) -> torch.Tensor:
    """The policy as the engine asks it, saliency noted."""
    batch, units, _ = features.shape
    carry = {"cls_attention": saliency}
    view = FeaturesView(features, (1, units), keep, torch.zeros(batch, dtype=torch.int64), None, carry)
    return policy.encode_final(view).index


def check_tower(golden: Golden, dtype: torch.dtype) -> None:
    """From the attention of CLS to the tokens handed on. The released budget is shared out among tiles."""
    features, row = golden["hidden_states"].to(dtype)[:, 1:], golden["cls_row"].to(dtype)
    keep = golden.meta["T_total"] // golden.meta["B"]
    assert keep == golden.meta["K_per_crop"]
    order, _ = salient_cover(features, row.sum(1), keep, official=True)
    if dtype == torch.float32:
        assert torch.equal(order, golden["all_indices_1based"] - 1)
    for compat in ("official", None) if dtype == torch.float32 else ("official",):
        policy, view = SCOPE(compat=compat), tower_view(features, row)
        policy.encode(view)
        index = kept(policy, features, view.carry["cls_attention"], keep)
        handed_on = features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))
        assert torch.equal(handed_on, golden["features_out"].to(dtype))


def tower_view(features: torch.Tensor, row: torch.Tensor) -> TowerView:
    """A layer whose CLS attends as recorded: ``row`` ``(batch, heads, patches)``, what is missing to 1 goes to CLS."""
    rest = (1 - row.sum(-1, keepdim=True)).clamp(min=1e-12)
    logits = torch.cat([rest, row], -1).log()[..., None]
    attention = AttentionView(torch.ones_like(logits), logits, logits, 1.0, has_cls=True)
    units = torch.arange(features.shape[1]).expand(len(features), -1)
    return TowerView(3, 3, 1, (1, features.shape[1]), units, features, attention)
