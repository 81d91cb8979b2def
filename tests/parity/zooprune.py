"""ZOO-Prune against its released code, transcribed: sensitivity of the projector, and the tokens taken."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.functional import gelu, linear

from tests.parity._files import Golden, npz_cases
from vlm_prune.contract.views import FeaturesView
from vlm_prune.policies import zooprune
from vlm_prune.policies.zooprune import ZOOPrune, low_rank, sensitive_and_diverse, sensitivity

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    part, dtype = golden.meta["part"], DTYPES[golden.meta["dtype"]]
    if part == "select_tokens_sads":
        check_choice(golden["features"].to(dtype), golden["scores"].to(dtype), golden["order"])
    elif part.startswith("sensitivity_llava15"):
        check_tile(golden, dtype)
    else:
        check_tiles(golden, dtype)


def check_choice(features: torch.Tensor, scores: torch.Tensor, order: torch.Tensor) -> None:
    """The recorded order; the default as well where its arithmetic is the same."""
    taken = sensitive_and_diverse(features[None], scores[None], len(order), official=True)
    assert torch.equal(taken[0], order)
    if features.dtype == torch.float32:
        assert torch.equal(sensitive_and_diverse(features[None], scores[None], len(order))[0], order)


def projector(
    golden: Golden, dtype: torch.dtype, rank: int | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The recorded one, of two layers, each cut to ``rank`` if there is one."""
    w0, b0, w2, b2 = (golden[name].to(dtype) for name in ("w0_weight", "w0_bias", "w2_weight", "w2_bias"))

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if rank is None:
            return linear(x, weight, bias)
        first, second = low_rank(weight, rank)
        return linear(linear(x, first), second, bias)

    return lambda x: layer(gelu(layer(x, w0, b0)), w2, b2)


def check_tile(golden: Golden, dtype: torch.dtype) -> None:
    x, u, step = golden["pre_features"][None], golden["u"], golden.meta["h"]
    exact = sensitivity(x.double(), u.double(), projector(golden, torch.float64), step)
    torch.testing.assert_close(exact[0], golden["scores_fp64"], rtol=1e-6, atol=1e-9)
    single = sensitivity(x.float(), u.float(), projector(golden, torch.float32), step)
    torch.testing.assert_close(single[0].double(), golden["scores_fp64"], rtol=5e-3, atol=0)
    half = sensitivity(x.to(dtype), u.to(dtype), projector(golden, dtype), step)
    torch.testing.assert_close(half[0].float(), golden["scores"].float(), rtol=0.2, atol=0)
    check_choice(golden["projected"].to(dtype), golden["scores"].to(dtype), golden["order"])
    assert golden["order"].sort().values.tolist() == golden["keep"].tolist()


def check_tiles(golden: Golden, dtype: torch.dtype) -> None:
    """Tiles by themselves; newlines between the rows of the canvas are no candidates."""
    x, u, step = golden["pre_features"].to(dtype), golden["u"].to(dtype), golden.meta["h"]
    scores = sensitivity(x, u, projector(golden, dtype, golden.meta["rank"]), step)
    torch.testing.assert_close(scores.flatten(), golden["scores"], rtol=5e-3, atol=0)
    label, keep = golden["frame_label"], golden.meta["k_frame"]
    order = []
    for tile in range(golden.meta["crops"]):
        rows = (label == tile).nonzero()[:, 0]
        features, recorded = golden["projected"][rows].to(dtype), golden["scores_with_newlines"][rows]
        for official in (True, False):
            taken = sensitive_and_diverse(features[None], recorded[None], keep, official)[0]
            assert torch.equal(rows[taken], golden["order"].view(-1, keep)[tile])
        order.append(rows[taken])
    assert torch.equal(torch.cat(order), golden["order"])
    if golden.meta["rank"] == min(golden["w2_weight"].shape):
        check_policy(golden, x)


def check_policy(golden: Golden, x: torch.Tensor) -> None:
    """The policy as the engine asks it, with the recorded directions; the whole projector is not of lower rank."""
    for compat in ("official", None):
        keep = golden.meta["k_frame"]
        view = FeaturesView(
            x, (1, x.shape[1]), keep, torch.zeros(len(x)), None, {}, projector(golden, x.dtype)
        )
        with patch.object(zooprune, "random_directions", return_value=golden["u"]):
            index = ZOOPrune(directions=len(golden["u"]), compat=compat).encode_final(view).index
        rows = [(golden["frame_label"] == tile).nonzero()[:, 0] for tile in range(len(x))]
        kept = torch.cat([rows[tile][index[tile]] for tile in range(len(x))])
        assert torch.equal(kept.sort().values, golden["order"].sort().values)
