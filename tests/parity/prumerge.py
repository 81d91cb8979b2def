"""PruMerge and PruMerge+ against their released code: scores, kept tokens, the rest, and the merged rows."""

from pathlib import Path

import torch

from tests.parity._files import Golden, npz_cases
from vlm_prune.contract.views import AttentionView, FeaturesView, TowerView
from vlm_prune.policies.prumerge import PruMerge, cls_scores, outliers, released_order

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    meta, dtype = golden.meta, getattr(torch, golden.meta["dtype"])
    half = dtype != torch.float32
    close = {"atol": 2e-2, "rtol": 2e-2} if half else {"atol": 1e-4, "rtol": 1e-4}
    features, keys, query = (golden[name].to(dtype) for name in ("features", "keys", "q_cls"))
    units, idx, kept = meta["n"], golden["idx"], golden["idx"].shape[1]

    score = cls_scores(query, keys)[:, 1:]
    torch.testing.assert_close(
        score.float(), golden["cls_attn"].float(), rtol=1e-5, atol=1e-3 if half else 1e-7
    )
    if meta["adaptive"]:
        assert int(outliers(golden["cls_attn"].reshape(1, -1))) == round(
            meta["reduction_ratio"] * score.numel()
        )
    order = released_order(idx, units)
    assert torch.equal(order[:, kept:], golden["complement"])

    official = PruMerge(plus=meta["method"] == "prumerge+", adaptive=meta["adaptive"], compat="official")
    assert torch.equal(official.first(score, kept + 1), idx)
    answer = asked(official, features, keys, query, kept + 1)
    assert answer.index.tolist() == [list(range(kept + 1))] * len(idx)
    torch.testing.assert_close(answer.rows.float(), golden["output"].float(), **close)

    mended = asked(PruMerge(plus=official.plus, adaptive=official.adaptive), features, keys, query, kept + 1)
    check_mended(golden, mended, score, **close)


def asked(policy: PruMerge, features: torch.Tensor, keys: torch.Tensor, query: torch.Tensor, target: int):
    """The policy's answer as the engine gets it; the layer has two heads."""
    batch, tokens, channels = keys.shape
    query = torch.cat([query[:, None], torch.zeros_like(keys[:, 1:])], 1)
    query, heads = (x.view(batch, tokens, 2, channels // 2).transpose(1, 2) for x in (query, keys))
    attention = AttentionView(query, heads, heads, (channels // 2) ** -0.5, has_cls=True)
    number = torch.arange(tokens - 1).expand(batch, -1)
    seen = TowerView(23, 22, target, (1, tokens - 1), number, features[:, 1:], attention)
    assert policy.encode(seen) is None
    content = torch.zeros(batch, dtype=torch.int64)
    before = features.clone()
    answer = policy.encode_final(
        FeaturesView(features[:, 1:], (1, tokens - 1), target, content, None, seen.carry)
    )
    assert torch.equal(before, features)
    return answer


def check_mended(golden: Golden, answer, score, **close: float) -> None:
    """The same tokens and rows in raster order, where the released code takes the same ones."""
    units, idx = golden.meta["n"], golden["idx"]
    for tile, ids in enumerate(answer.tolist()):
        rows = (
            answer.rows[tile, : len(ids)] if answer.valid is None else answer.rows[tile, answer.valid[tile]]
        )
        assert ids == sorted(set(ids))
        if golden.meta["method"] == "prumerge+" or (golden.meta["adaptive"] and len(idx) > 1):
            assert len(ids) == answer.index.shape[1]
            continue
        official = idx[tile].tolist()
        rest = [i for i in range(units) if i not in official]
        extra = max(rest, key=lambda i: (score[tile, i].item(), -i))
        assert ids == sorted([*official, extra])
        order = [*official, extra]
        expected = golden["output"][tile, [order.index(i) for i in ids]]
        torch.testing.assert_close(rows.float(), expected.float(), **close)
