"""DART against its authors' code: pivots, their order, what is kept, and a language model that is pruned."""

from pathlib import Path

import numpy as np
import torch

from tests.parity._files import Golden, npz_cases
from tests.parity._given import VISUAL, embeds_model
from vlm_prune import pruned
from vlm_prune.contract.views import AttentionView, PrefillView
from vlm_prune.policies.dart import DART, key_norms, least_alike, pivots, released_order, released_share
from vlm_prune.versions import cache_of

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    meta = golden.meta
    pivots_of = meta["pivot_image_token"] + meta["pivot_text_token"]
    share = released_share(meta["reduction_ratio"], meta["image_token_length"], pivots_of)
    assert share == int(golden["token_topk"])
    if meta["kind"] == "llm":
        return check_model(golden, share * pivots_of)
    state = golden["last_layer_state"].to(getattr(torch, meta["dtype"]))
    keys = golden["key_states"].to(state.dtype)
    visual = visual_rows(golden, state.shape[:2])
    check_steps(golden, state, keys, visual)
    keep = ask(policy(golden), state, keys, visual, share * pivots_of)
    assert torch.equal(kept(keep, visual), golden["kept"])
    alone = [
        ask(policy(golden), *(x[b : b + 1] for x in (state, keys, visual)), share * pivots_of)
        for b in range(len(state))
    ]
    assert torch.equal(torch.cat(alone), keep)
    check_default(golden, state, keys, visual)


def policy(golden: Golden, compat: str | None = "official") -> DART:
    meta = golden.meta
    image, text = meta["pivot_image_token"], meta["pivot_text_token"]
    return DART(k=meta.get("K", 2), image_pivots=image, text_pivots=text, compat=compat)


def visual_rows(golden: Golden, shape: torch.Size) -> torch.Tensor:
    start = golden.meta["image_token_start_index"]
    visual = torch.zeros(shape, dtype=torch.bool)
    visual[:, start : start + golden.meta["image_token_length"]] = True
    return visual


def kept(keep: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    assert keep[~visual].all()
    return (keep & visual).nonzero()[:, 1].view(len(keep), -1)


def ask(
    policy: DART, state: torch.Tensor, keys: torch.Tensor, visual: torch.Tensor, target: int
) -> torch.Tensor:
    """The policy as the engine asks it; the recorded state is normed already."""
    attention = AttentionView(keys, keys, keys, 1.0, has_cls=False)
    count = visual.sum(-1)
    return policy.prefill(
        PrefillView(1, 4, state, visual, None, count, torch.full_like(count, target), attention, {})
    )


def check_steps(golden: Golden, state: torch.Tensor, keys: torch.Tensor, visual: torch.Tensor) -> None:
    norms, meta = key_norms(keys, keys.dtype), golden.meta
    image, _ = pivots(norms, visual, meta["pivot_image_token"])
    behind = torch.arange(visual.shape[1]) >= meta["image_token_start_index"] + meta["image_token_length"]
    text, _ = pivots(norms, behind.expand_as(visual), meta["pivot_text_token"])
    assert torch.equal(image, golden["pivot_image"])
    assert torch.equal(text, golden["pivot_text"])
    order = golden["pivot_order"]
    assert [released_order(row) for row in torch.cat([image, text], 1).tolist()] == order.tolist()
    candidates = visual.scatter(1, image, False)
    count = golden["token_topk"].expand_as(order)
    for dtype in (None, state.dtype):
        taken = least_alike(state, order, count, candidates, dtype)
        assert torch.equal(kept(taken | ~candidates, visual), golden["kept"])


def check_default(golden: Golden, state: torch.Tensor, keys: torch.Tensor, visual: torch.Tensor) -> None:
    """Another order of pivots and exactly the budget: of it, what the recorded pivots alone fix."""
    target = golden["kept"].shape[1] + 1
    keep = kept(ask(policy(golden, None), state, keys, visual, target), visual)
    assert keep.shape == (len(state), target)
    for b in range(len(state)):
        assert torch.isin(golden["pivot_image"][b], keep[b]).all()


def check_model(golden: Golden, target: int) -> None:
    """A stock language model, pruned, against the released decoder with the same weights."""
    meta, embeds = golden.meta, golden["inputs_embeds"]
    named = {
        "hidden_size": "hidden",
        "intermediate_size": "intermediate",
        "num_layers": "layers",
        "num_heads": "heads",
        "num_kv_heads": "kv_heads",
        "rms_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    }
    golden.arrays.update({ours: np.array(meta[theirs]) for ours, theirs in named.items()})
    start, count = meta["image_token_start_index"], meta["image_token_length"]
    model, call = embeds_model(golden, embeds, start, count)
    assert model.config.image_token_id == VISUAL
    with torch.no_grad():
        full = model(**call, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(full, golden["full_last_hidden"], atol=1e-4, rtol=1e-4)
        with pruned(model, policy(golden), tokens=target):
            out = model(**call, output_hidden_states=True)
            rows = out.hidden_states[-1].any(-1)[0].nonzero()[:, 0]
            held = [layer.keys.shape[2] for layer in cache_of(out).layers]
    assert rows.tolist() == golden["positions_after"][0].tolist()
    assert [i for i in rows.tolist() if start <= i < start + count] == golden["kept"].tolist()
    torch.testing.assert_close(out.hidden_states[-1][:, rows], golden["last_hidden"], atol=1e-4, rtol=1e-4)
    assert held == golden["rows_per_layer"].tolist()
