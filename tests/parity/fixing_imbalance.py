"""PAINT against its released code: the two token sets, and a language model whose logits are lifted."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.parity._files import Golden, npz_cases
from tests.parity._modulated import Driver, stock_model
from vlm_prune.policies.paint import LOCAL, SUMMARY, Paint, local_tokens, summary_tokens

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    if "cfg" in golden:
        check_model(golden)
    else:
        check_selection(golden)


def cls_row(golden: Golden, layer: str) -> torch.Tensor:
    """Attention of CLS to the patches, summed over heads: ``(1, patches)``."""
    patches = int(golden["num_vision_tokens"])
    name = f"cls_row_{layer}"
    row = golden[name] if name in golden else golden[f"vit_attn_{layer}"][:, :, 0]
    return row[:, :, -patches:].sum(1)


def check_selection(golden: Golden) -> None:
    last = cls_row(golden, "penultimate")
    summary = summary_tokens(last, official=True)
    local = local_tokens(cls_row(golden, "first"), float(golden["local_token_ratio"])) & ~summary
    assert local[0].nonzero()[:, 0].tolist() == golden["top_tokens_sorted"].tolist()
    assert summary[0].nonzero()[:, 0].tolist() == sorted(golden["bottom_tokens"].tolist())
    if "get_top_ratio" in golden:
        check_ratio(int(summary_tokens(last).sum()), last.shape[1], golden["get_top_ratio"].item())


def check_ratio(count: int, tokens: int, recorded: float) -> None:
    """The recorded share is that of ``count`` tokens.

    The count is a whole number and has to be equal. Its share is one division, in single or in double precision, so it
    is right to within one rounding of the former, half of 2^-23; the neighbouring counts are far outside of that.
    """
    assert round(recorded * tokens) == count
    assert recorded == pytest.approx(count / tokens, rel=2**-24, abs=0)


def check_model(golden: Golden) -> None:
    embeds = golden["inputs_embeds"]
    start, end = int(golden["img_start"]), int(golden["img_end"])
    marks = {name: torch.zeros(embeds.shape[:2], dtype=torch.bool) for name in ("visual", LOCAL, SUMMARY)}
    marks["visual"][:, start:end] = True
    marks[LOCAL][:, start + golden["top_tokens"].long()] = True
    marks[SUMMARY][:, start + golden["bottom_tokens"].long()] = True
    policy = Paint(
        alpha=float(golden["alpha"]),
        beta=float(golden["beta"]),
        first_layer=int(golden["start_layer"]),
        end_layer=int(golden["end_layer"]),
        boost_prefill=not int(golden["use_cfg_at_prefill"]),
        compat="official",
    )
    model = stock_model(LlamaForCausalLM, golden)
    run = Driver(model, policy if int(golden["use_attn"]) else None, marks.pop("visual"), marks)
    close(run(embeds).logits, golden["logits_prefill"])
    for step, expected in zip(golden["decode_embeds"], golden["logits_decode"], strict=True):
        close(run(step).logits, expected)


def close(ours: torch.Tensor, official: torch.Tensor) -> None:
    torch.testing.assert_close(ours, official, atol=5e-5, rtol=1e-5)
