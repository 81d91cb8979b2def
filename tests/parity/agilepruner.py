"""AgilePruner against its released code: ranks, thresholds, picks, and the tokens handed on."""

import math
from pathlib import Path

import torch

from tests.parity._files import Golden, npz_cases
from vlm_prune.contract.views import FeaturesView
from vlm_prune.policies.agilepruner import AgilePruner, adaptive_tau, effective_rank, pick
from vlm_prune.policies.scores import cosine_distance

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    dtype = getattr(torch, str(golden.arrays["dtype"]))
    features, attention = golden["features"].to(dtype)[None], golden["attentions"].to(dtype).mean(0)
    assert torch.equal(attention.float(), golden["attn_mean"])
    if "sorted_by_attention" not in golden:
        return check_policy(golden, features, attention, attention)
    check_steps(golden, features)
    # how the released sort orders equal scores is up to the device: distinct scores that stand for the recorded order
    order = golden["sorted_by_attention"]
    assert torch.equal(attention[order], attention.sort(descending=True).values)
    ranked = torch.empty(len(order)).scatter(0, order, torch.arange(len(order), 0.0, -1.0))
    as_recorded = torch.equal(attention.argsort(descending=True), order)
    return check_policy(golden, features, attention if as_recorded else ranked, ranked)


def check_steps(golden: Golden, features: torch.Tensor) -> None:
    """Each function of the released code by itself, in the released arithmetic and in ours."""
    units, keep, order = features.shape[1], int(golden["T"]), golden["sorted_by_attention"][None]
    erank = effective_rank(features, exact=False)
    torch.testing.assert_close(erank[0], golden["erank_input"].float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(erank[0], golden["clean_erank_input"].float(), rtol=1e-3, atol=0)
    exact = golden["recon_erank_centered_svd_f64"]
    torch.testing.assert_close(effective_rank(features)[0], exact, rtol=1e-4, atol=0)
    kept = features.float() - features.float().mean(1, keepdim=True) if golden["input_mutated"] else features
    selected = effective_rank(kept[:, golden["index_mask"]], exact=False)
    torch.testing.assert_close(selected[0], golden["erank_selected"].float(), rtol=1e-3, atol=0)

    recorded = golden["erank_input"].double()[None] / 90
    tau = adaptive_tau(recorded, units, 0.01, 0.25)
    torch.testing.assert_close(tau[0], golden["tau_by_rank"], rtol=1e-6, atol=0)
    if not math.isnan(static := golden["static_tau"].item()):
        tau = torch.full_like(tau, static)

    distance = cosine_distance(kept, features.dtype)
    if "distance" in golden:
        torch.testing.assert_close(distance[0].float(), golden["distance"], rtol=0, atol=1e-6)
    assert torch.equal(pick(order, distance, tau, keep)[0], golden["selected_in_order"])
    clean = pick(order, cosine_distance(features, features.dtype), tau, keep)
    assert torch.equal(clean[0], golden["clean_selected_in_order"])


def check_policy(
    golden: Golden, features: torch.Tensor, attention: torch.Tensor, ranked: torch.Tensor
) -> None:
    """The policy as the engine asks it: as released (scores ``attention``), and mended (scores ``ranked``)."""
    units, keep = features.shape[1], int(golden["T"])
    static = golden["static_tau"].item()
    tau = None if math.isnan(static) else static
    before = features.clone()

    def ask(policy: AgilePruner, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view = FeaturesView(
            features, (1, units), keep, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3, 1, 1),
            {"cls_attention": scores[None]},
        )  # fmt: skip
        answer = policy.encode_final(view)
        assert torch.equal(features, before), "the features themselves are never changed"
        if answer is None:
            return torch.arange(units), features[0]
        index = answer.index[0]
        return index, features[0, index] if answer.rows is None else answer.rows[0]

    index, rows = ask(AgilePruner(tau=tau, compat="official"), attention)
    assert torch.equal(index, golden["kept_sorted"])
    torch.testing.assert_close(rows.float(), golden["features_returned"][index], rtol=0, atol=1e-6)

    # the recorded rank carries rounding noise of up to 4 %: have the thresholds start from the same figure
    noise = golden["clean_erank_input"].item() / effective_rank(features).item() if keep < units else 1.0
    index, rows = ask(AgilePruner(tau=tau, erank_avg=90.0 / noise), ranked)
    assert len(index) == keep
    assert torch.equal(rows, features[0, index])
    if "clean_selected_in_order" in golden:
        # distances in half precision fall on the other side of a threshold now and then
        same = torch.isin(index, golden["clean_selected_in_order"]).float().mean()
        assert same == 1 or (same >= 0.85 and features.dtype != torch.float32)
