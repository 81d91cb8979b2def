"""VAR against its released code: sinks, heads, redistribution, and a language model with all three."""

from pathlib import Path

import torch
from transformers import LlamaModel

from tests.parity._files import Golden, npz_cases
from tests.parity._modulated import Driver, stock_model
from vlm_prune.policies.sinks import sink_score
from vlm_prune.policies.var import SINKS, VAR, redistribute, select_heads

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    if "cfg" in golden:
        check_model(golden)
    else:
        check_functions(golden)


def check_functions(golden: Golden) -> None:
    attention = golden["attn"]
    start, end = int(golden["image_begin"]), int(golden["image_begin"]) + int(golden["vis_len"])
    score = sink_score(golden["hidden_states"], golden["sink_dims"].long()[None])
    sinks = score > float(golden["tau"])
    assert sinks[0].nonzero()[:, 0].tolist() == golden["sink_indices"].tolist()

    visual = torch.zeros_like(sinks)
    visual[:, start:end] = True
    heads = select_heads(attention, sinks, visual, float(golden["rho"]), float(golden["summ"]), official=True)
    assert heads.nonzero().tolist() == golden["head_coords"].tolist()

    if int(golden["output_token_count"]) < 0:  # a prompt, not a row of a generated token
        heads[:, :, :end] = False
    edited = redistribute(attention, sinks, visual, heads, 1 - float(golden["p"]))
    torch.testing.assert_close(edited, golden["attn_out"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(edited.sum(-1), attention.sum(-1))


def check_model(golden: Golden) -> None:
    embeds, start = golden["inputs_embeds"], int(golden["image_begin"])
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, start : start + int(golden["vis_len"])] = True
    policy = VAR(
        tau=float(golden["tau"]),
        max_sink_share=float(golden["rho"]),
        min_visual_mass=float(golden["summ"]),
        move=1 - float(golden["p"]),
        sink_dims=tuple(golden["sink_dims"].tolist()),
        compat="official",
    )
    active = bool(golden["var_active"])
    run = Driver(stock_model(LlamaModel, golden), policy if active else None, visual)
    close(run(embeds).last_hidden_state, golden["last_hidden_prefill"])
    for name, expected in golden.prefixed("sink_indices_layer").items():
        kept = run.kept.get(int(name), {}).get(SINKS, visual[:, :0])
        assert kept[0].nonzero()[:, 0].tolist() == expected.tolist(), f"layer {name}"
    for step, expected in zip(golden["decode_embeds"], golden["last_hidden_decode"], strict=True):
        close(run(step).last_hidden_state, expected)


def close(ours: torch.Tensor, official: torch.Tensor) -> None:
    torch.testing.assert_close(ours, official, atol=2e-5, rtol=1e-5)
