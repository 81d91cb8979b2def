"""VHR against the reference computed from the paper's formulas: heads, scaling, and a language model."""

from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import LlamaForCausalLM

from tests.parity._files import Golden, npz_cases
from tests.parity._modulated import Driver, stock_model
from vlm_prune.policies.vhr import (
    VHR,
    head_divergence,
    reinforce,
    surging_heads,
    text_activation,
    vision_aware_heads,
)

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    if "cfg" in golden:
        check_model(golden)
        check_lock_step(golden)
    else:
        check_heads(golden)


def check_heads(golden: Golden) -> None:
    with_image, without = golden["head_out_image"], golden["head_out_text"]
    divergence, activation = head_divergence(with_image, without), text_activation(without)
    torch.testing.assert_close(divergence.double(), golden["vhd"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(activation.double(), golden["ta"], atol=1e-5, rtol=1e-5)
    assert torch.equal(surging_heads(divergence, activation), golden["outlier"])
    selected = vision_aware_heads(with_image, without)
    assert torch.equal(selected, golden["selected"])
    population = vision_aware_heads(with_image, without, unbiased=False)
    assert torch.equal(population, golden["selected_population_std"])
    plain = vision_aware_heads(with_image, without, drop_surging=False)
    assert torch.equal(plain, golden["selected_no_outlier_drop"])
    assert torch.equal(plain, golden["selected_thirdparty_rule"])

    rows = golden["oproj_in"]
    scaled = reinforce(rows.unflatten(-1, (selected.shape[1], -1)), selected, float(golden["alpha"]))
    torch.testing.assert_close(scaled.flatten(-2), golden["oproj_in_scaled"])


def image_mask(golden: Golden) -> torch.Tensor:
    embeds, start = golden["inputs_embeds"], int(golden["image_begin"])
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, start : start + int(golden["vis_len"])] = True
    return visual


def check_model(golden: Golden) -> None:
    """Variant A: the pass without the image is not reinforced."""
    model, embeds = stock_model(LlamaForCausalLM, golden), golden["inputs_embeds"]
    close(Driver(model)(embeds).logits, golden["logits_base"])
    text = Driver(model)
    text(golden["text_embeds"])

    policy = VHR(alpha=float(golden["alpha"]), layers=tuple(golden["layers"].tolist()))
    run = Driver(model, policy, image_mask(golden), text_only=text.heads)
    close(run(embeds).logits, golden["logits_A_prefill"])
    for name, expected in golden.prefixed("selA_layer").items():
        assert torch.equal(run.state[int(name)]["vhr_heads"], expected), f"layer {name}"
    for name, expected in golden.prefixed("head_text_A_layer").items():
        close(text.heads[int(name)], expected)
    for name, expected in golden.prefixed("head_img_A_layer").items():
        close(run.heads[int(name)], expected)
    for step, expected in zip(golden["decode_embeds"], golden["logits_A_decode"], strict=True):
        close(run(step).logits, expected)


def check_lock_step(golden: Golden) -> None:
    """Variant B: both branches are reinforced, each layer with the same heads. One batch: with and without image."""
    embeds, text = golden["inputs_embeds"], golden["text_embeds"]
    fill, selected = embeds.shape[1] - text.shape[1], {}
    both = torch.cat([embeds, pad(text, (0, 0, fill, 0))])
    mask = torch.ones(both.shape[:2], dtype=torch.long)
    mask[len(embeds) :, :fill] = 0

    class LockStep(VHR):
        def modulate(self, view):
            with_image, without = view.output[:, -1].chunk(2)
            heads = selected[view.layer] = vision_aware_heads(with_image, without)
            return reinforce(view.output, torch.cat([heads, heads]), self.alpha)

    policy = LockStep(alpha=float(golden["alpha"]), layers=tuple(golden["layers"].tolist()))
    visual = torch.zeros(both.shape[:2], dtype=torch.bool)
    logits = Driver(stock_model(LlamaForCausalLM, golden), policy, visual)(both, mask).logits
    close(logits[: len(embeds)], golden["logits_B_prefill"])
    for name, expected in golden.prefixed("selB_layer").items():
        assert torch.equal(selected[int(name)], expected), f"layer {name}"


def close(ours: torch.Tensor, official: torch.Tensor) -> None:
    torch.testing.assert_close(ours, official, atol=5e-5, rtol=1e-5)
