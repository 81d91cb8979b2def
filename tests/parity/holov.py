"""HoloV against its released code: scores and quotas of runs, the tokens in their order, zero rows, a whole tower."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.parity._files import Golden, npz_cases
from vlm_prune import pruned
from vlm_prune.contract.views import FeaturesView
from vlm_prune.policies.holov import HoloV, choose, choose_as_released, quotas

cases = npz_cases


def check(case: Path) -> None:
    golden = Golden(case)
    CHECKS[golden.meta["kind"]](golden)


def check_choice(
    features: torch.Tensor, attention: torch.Tensor, runs: int, kept: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The functions and the policy in both modes; returns the scores of the runs."""
    before, keep = features.clone(), kept.shape[1]
    ours, made, scores = choose_as_released(features, attention, runs, keep)
    assert torch.equal(ours, kept)
    assert torch.equal(made, rows)
    for tile in range(len(features)):
        assert torch.equal(
            choose_as_released(features[[tile]], attention[[tile]], runs, keep)[0], kept[[tile]]
        )

    view = FeaturesView(
        features, (1, features.shape[1]), min(keep, features.shape[1]), torch.zeros(len(features), dtype=torch.int64),
        None, {"cls_attention": attention},
    )  # fmt: skip
    if keep <= features.shape[1]:
        answer = HoloV(runs=runs, compat="official").encode_final(view)
        assert torch.equal(answer.rows, rows)
    mended = HoloV(runs=runs).encode_final(view)
    assert torch.equal(mended.index, choose(attention, runs, view.target))
    assert mended.index.shape == (len(features), view.target)
    assert (mended.index.diff(dim=-1) > 0).all()
    assert torch.equal(features, before)
    if features.shape[1] >= 2 * runs:  # runs of a single token have another weight in the released code
        for official, index in zip(kept, mended.index, strict=True):
            real = official[official >= 0]
            assert torch.isin(real, index).all()  # what else is kept came out of the surplus
    return scores


def check_llava(golden: Golden) -> None:
    dtype = getattr(torch, golden.meta["dtype"])
    features, kept = golden["image_tokens"].to(dtype), golden["kept_in_order"]
    scores = check_choice(
        features, golden["attention"], int(golden["num_patches"]), kept, golden["out"].to(dtype)
    )
    close = 1e-3 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(scores, golden["patch_scores"], rtol=close, atol=0)
    assert torch.equal(quotas(scores, kept.shape[1]), golden["allocated"])


def check_qwen(golden: Golden) -> None:
    """The choice inside the block that the released code prunes."""
    start, count = golden.meta["image_token_start"], golden.meta["image_token_len"]
    block, keep = golden["inputs_embeds"][:, start : start + count], int(golden["keep_num"])
    kept = golden["final_position"][None]
    check_choice(block, golden["attention"][None], int(golden["num_patches"]), kept, golden["new_tokens"])
    after = golden["inputs_embeds_after"]
    assert torch.equal(after[:, start : start + keep], block[:, kept[0]])
    assert torch.equal(after[:, start + keep :], golden["inputs_embeds"][:, start + count :])


def check_anyres(golden: Golden) -> None:
    """All tokens of an image as one sequence, as stock code puts them together without newlines."""
    tokens, source = golden["arranged_tokens"], golden["token_source"]
    rows = golden["llm_image_tokens"][None]
    kept, made, _ = choose_as_released(
        tokens, golden["arranged_attention"], int(golden["num_patches"]), int(golden["T"])
    )
    assert torch.equal(made, rows)
    flat = golden["features"].flatten(0, 1)
    assert torch.equal(tokens[0, kept[0, kept[0] >= 0]], flat[source[source >= 0]])
    check_choice(tokens, golden["arranged_attention"], int(golden["num_patches"]), kept, rows)


@torch.no_grad()
def check_tower(golden: Golden) -> None:
    vision = CLIPVisionConfig(**golden.meta["vision"])
    projector = golden.prefixed("w/projector/")
    text = LlamaConfig(
        vocab_size=32, hidden_size=len(projector["2.weight"]), intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    model.model.multi_modal_projector.load_state_dict(
        {{"0": "linear_1", "2": "linear_2"}[n[0]] + n[1:]: x for n, x in projector.items()}
    )
    weights = {n.removeprefix("vision_model."): x for n, x in golden.prefixed("w/vision/").items()}
    missing = model.model.vision_tower.load_state_dict(weights, strict=False).missing_keys
    assert all("position_ids" in name for name in missing)

    kept, out = golden["kept_in_order"], golden["out"]
    policy = HoloV(runs=int(golden["num_patches"]), compat="official")
    with pruned(model, policy, tokens=int(golden["T"])):
        features = model.get_image_features(golden["pixel_values"]).pooler_output
    for tile, rows in zip(features, out, strict=True):
        torch.testing.assert_close(tile[~tile[:, 0].isnan()], rows, atol=1e-5, rtol=1e-4)
    check_choice(golden["projected"], golden["cls_attention"], int(golden["num_patches"]), kept, out)


CHECKS = {"llava": check_llava, "qwen": check_qwen, "anyres": check_anyres, "tower": check_tower}
