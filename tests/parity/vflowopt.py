"""VFlowOpt against its released code: entropy, importance map, recycling, decoder masks, ratio search."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from tests.parity._files import Golden, npz_cases
from tests.parity._given import Projector, Tower, load_llm
from vlm_prune import prune
from vlm_prune.contract.policy import Keep
from vlm_prune.contract.views import AttentionView, ModulateView, PrefillView
from vlm_prune.eval.learn.search import Search
from vlm_prune.eval.learn.tune import search_space
from vlm_prune.policies.importance import calibrated_attention, entropy_share, patch_entropy, wrapped_grey
from vlm_prune.policies.recycle import Cells, recycle_official
from vlm_prune.policies.scores import top_mask
from vlm_prune.policies.shares import average_share, literal_counts, solve_last
from vlm_prune.policies.vflowopt import AVERAGE, MAP, VFlowOpt
from vlm_prune.versions import cache_of

CROP = 27  # rows and columns of tokens per crop in the released code
PUBLISHED_CUTS, PUBLISHED_DEPTH = (9, 18), 28


def cases(folder: Path) -> list[Path]:
    """All cases; the decoder's weights are not one."""
    return [path for path in npz_cases(folder) if path.stem != "llm_weights"]


def check(case: Path) -> None:
    golden, kind = Golden(case), case.stem.split("_")[0]
    if kind == "bo":
        kind = "trace" if "asked" in golden else "solve"
    CHECKS[kind](golden)
    if kind == "llm":
        check_model(golden, case.parent)


def check_entropy(golden: Golden) -> None:
    pixels = golden["pixel_values"]
    if not pixels.numel():  # left out of large cases
        pixels = ((golden["image_uint8"].permute(2, 0, 1)[None] / 255) - 0.5) / 0.5
    pixels = pixels.to(getattr(torch, str(golden.arrays["dtype"])))
    rows, columns = golden["entropies"].shape[-2:]
    ours = patch_entropy(wrapped_grey(pixels), (rows, columns))
    torch.testing.assert_close(ours, golden["entropies"].flatten(1), atol=2e-6, rtol=0)
    share = entropy_share(ours, (rows, columns))
    torch.testing.assert_close(share[0], golden["softmax_entropy"], atol=1e-8, rtol=1e-5)


def check_importance(golden: Golden) -> None:
    """The attention map as logits: with keys that are unit vectors, queries are the logits."""
    attention = golden["attn_weights"]
    batch, heads, tokens, _ = attention.shape
    key = torch.eye(tokens).expand(batch, heads, -1, -1)
    view = AttentionView(attention.clamp(min=1e-38).log(), key, key, 1.0, has_cls=False)
    ours = calibrated_attention(view, float(golden["t"]), fallback=False)
    if alpha := float(golden["alpha_v"]):
        entropy = golden["entropies"]
        ours = ours + alpha * entropy_share(entropy.flatten(1), entropy.shape[-2:])
    official = golden["importance_map"]
    torch.testing.assert_close(ours, official, atol=1e-7, rtol=1e-5, equal_nan=True)
    mended = calibrated_attention(view, float(golden["t"]))
    assert not mended.isnan().any()


def check_stage_1(golden: Golden) -> None:
    if "to_keep_mask" in golden:
        check_recycling(golden)
    elif "pre_map" in golden:
        check_video(golden)
    else:
        check_crops(golden)


def check_recycling(golden: Golden) -> None:
    """One image in crops: the base crop and the grid of local ones are grouped apart."""
    features, scores = golden["pre_feat"][None], golden["pre_map"][None]
    local = int(golden["local_w"])
    grids = [(CROP, CROP), ((scores.shape[1] - CROP**2) // local, local)]
    share, side = float(golden["vit_r"]), float(golden["vit_m"])
    keep = recycle_official(features, scores, grids, share, side)
    assert torch.equal(keep.index[0], golden["kept_indices"])
    # weights of both signs almost cancel in some group: what they multiply grows, and so does the last bit
    close = {"atol": 1e-2, "rtol": 1e-3} if (scores < 0).any() else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(keep.rows[0], golden["out_feat"], equal_nan=True, **close)
    torch.testing.assert_close(scores[0, keep.index[0]], golden["pruned_map"], equal_nan=True)
    assert len(keep.index[0]) == int(golden["image_token_length"])

    groups = golden["group_flat"].split(golden["group_len"].tolist())
    ours = Cells.of(grids, side).number
    numbers = [ours[group].unique().tolist() for group in groups]
    assert len({n for (n,) in numbers}) == len(groups) == int(golden["n_groups"])


def check_crops(golden: Golden) -> None:
    """Several images: the same number of tokens of each, nothing recycled."""
    scores = golden["crop_maps"]
    tokens = scores.shape[1]
    keep = Keep.top(scores, tokens - round(tokens * (1 - float(golden["vit_r"]))))
    rows = [golden["crop_features"][i, index] for i, index in enumerate(keep.index)]
    torch.testing.assert_close(torch.stack(rows), golden["out_feat"])
    assert torch.equal(keep.index, torch.stack([row.nonzero()[:, 0] for row in golden["mask"]]))


def check_video(golden: Golden) -> None:
    """A video: the most important tokens of all frames, nothing recycled."""
    scores = golden["pre_map"][None]
    tokens = scores.shape[1]
    keep = Keep.top(scores, tokens - round(tokens * (1 - float(golden["vit_r"]))))
    mask = golden["mask"].flatten()
    assert torch.equal(keep.index[0], mask.nonzero()[:, 0])
    torch.testing.assert_close(golden["pre_feat"][keep.index[0]], golden["out_feat"].flatten(0, -2))


def check_decoder(golden: Golden) -> None:
    """The tokens kept at each cut. That layers in between compute them is the engine's part."""
    length, start, images = golden["inputs_embeds"].shape[1], int(golden["start"]), int(golden["n_img"])
    scores = torch.zeros(1, length)
    scores[0, start : start + images] = golden["vit_map"]
    scores = scores.nan_to_num(nan=torch.inf)  # sorted last in the released code
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[0, start : start + images] = True
    alive = torch.arange(length)
    for stage, ratio in enumerate(golden["ratios"].tolist()):
        count, _ = literal_counts(visual.sum(-1), ratio, 1.0)
        mask = top_mask(scores, count, visual) | ~visual
        official = golden[f"stage{stage}_keep_mask"]
        assert int(mask.sum()) == int(official.sum())
        if not torch.equal(mask[0], official):  # equal values, of which the released code drops any
            assert torch.equal(scores[0, mask[0]].sort().values, scores[0, official].sort().values)
            mask = official[None]
        scores, visual, alive = scores[mask][None], visual[mask][None], alive[mask[0]]
        assert torch.equal(alive, golden[f"stage{stage}_kept_abs_positions"])
    assert torch.equal(alive, golden["final_position_ids"][0])


@dataclass(frozen=True)
class Recorded(VFlowOpt):
    """VFlowOpt with the map of a golden case instead of a tower's."""

    scores: tuple[float, ...] = ()

    def modulate(self, view: ModulateView) -> torch.Tensor | None:
        view.carry[MAP] = view.visual
        return super().modulate(view)

    def prefill(self, view: PrefillView) -> torch.Tensor | None:
        if MAP not in view.carry:
            blank = view.hidden.new_zeros(view.visual.shape)
            view.carry[MAP] = blank.masked_scatter(view.visual, torch.tensor(self.scores))
            view.carry[AVERAGE] = view.visual.float()
        return super().prefill(view)


def official_ranks(golden: Golden) -> list[float]:
    """The map as ranks, ties broken and NaN placed as the released code happened to do."""
    start, images = int(golden["start"]), int(golden["n_img"])
    survived = np.zeros(images)
    for stage in range(len(golden["ratios"])):
        alive = golden[f"stage{stage}_kept_abs_positions"].numpy() - start
        survived[alive[(alive >= 0) & (alive < images)]] += 1
    scores = np.nan_to_num(golden["vit_map"].double().numpy(), nan=np.inf)
    ranks = np.empty(images)
    ranks[np.lexsort((survived, scores))] = np.arange(images)
    return ranks.tolist()


@torch.no_grad()
def check_model(golden: Golden, folder: Path) -> None:
    """The recorded decoder, pruned by the engine: last states, logits and the KV rows of each layer."""
    cuts, ratios = golden["layers"].tolist(), golden["ratios"].tolist()
    if len(cuts) > 2 or cuts[0] < 1:
        return  # VFlowOpt has two cuts, after the first layer
    settings = json.loads((folder / "llm_config.json").read_text())
    vocabulary = settings["vocab_size"]
    text = Qwen2Config(
        **{**settings, "vocab_size": vocabulary + 1, "eos_token_id": None, "bos_token_id": None}
    )
    embeds, start, images = golden["inputs_embeds"], int(golden["start"]), int(golden["n_img"])
    vision = CLIPVisionConfig(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        patch_size=1,
        image_size=2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=vocabulary, vision_feature_layer=-1,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    weights = dict(np.load(folder / "llm_weights.npz"))
    load_llm(model, {name: torch.from_numpy(value) for name, value in weights.items()})
    model.config.vision_config.image_size = (1, images)
    model.model.vision_tower = Tower(model.config.vision_config)
    model.model.multi_modal_projector = Projector(embeds[:, start : start + images])
    given = embeds.clone()
    given[:, start : start + images] = model.get_input_embeddings().weight[vocabulary]

    depth = settings["num_hidden_layers"]
    if len(cuts) == 1:
        cuts, ratios = cuts * 2, [*ratios, 1.0]
    policy = Recorded(
        r_v=1.0,
        r_1=ratios[0],
        r_2=ratios[1],
        layers=(cuts[0] / depth, cuts[1] / depth),
        scores=tuple(official_ranks(golden)),
        compat="official",
    )
    prune(model, policy, ratio=1.0)
    inputs = {"inputs_embeds": given, "pixel_values": torch.zeros(1, 3, 1, images)}
    states = model.model(**inputs)
    live = states.last_hidden_state[0].abs().sum(-1) > 0
    torch.testing.assert_close(states.last_hidden_state[0, live], golden["last_hidden"], atol=1e-5, rtol=1e-4)
    held = [layer.keys.shape[2] for layer in cache_of(states).layers]
    assert held == golden["kv_len_per_layer"].tolist()
    logits = model(**inputs).logits[0, -1, :vocabulary]
    torch.testing.assert_close(logits, golden["last_logits"], atol=1e-5, rtol=1e-4)
    cosine = torch.cosine_similarity(states.last_hidden_state[0, -1], golden["full_last_hidden_token"], dim=0)
    assert float(cosine) == pytest.approx(float(golden["last_token_cosine_vs_full"]), abs=1e-5)


def check_solve(golden: Golden) -> None:
    target = float(golden["target_average"])
    for r_v, r_1, r_2, gap in golden["ratio_v_ratio1_ratio2_gap"].tolist():
        ours = solve_last(target, r_v, r_1, PUBLISHED_CUTS, PUBLISHED_DEPTH)
        assert ours == pytest.approx(r_2, abs=1e-12)
        held = average_share(r_v, r_1, ours, PUBLISHED_CUTS, PUBLISHED_DEPTH)
        assert target - held == pytest.approx(gap, abs=1e-12)


def check_trace(golden: Golden) -> None:
    """The released search asks for the same points. Later ones depend on the last bits of a Gaussian process."""
    pytest.importorskip("skopt")
    target = 0.25
    search = Search(search_space(target, PUBLISHED_CUTS, PUBLISHED_DEPTH))
    told = range(search.initial + 1)
    values = golden["value"].tolist()
    asked, ratios, gaps = (golden[name].tolist() for name in ("asked", "ratios", "constraint_gap"))
    for i, (point, (r_v, r_1, r_2), gap) in enumerate(zip(asked, ratios, gaps, strict=True)):
        ours = solve_last(target, r_v, r_1, PUBLISHED_CUTS, PUBLISHED_DEPTH)
        assert ours == pytest.approx(r_2, abs=1e-12)
        held = average_share(r_v, r_1, ours, PUBLISHED_CUTS, PUBLISHED_DEPTH)
        assert abs(target - held) == pytest.approx(gap, abs=1e-12)
        if i in told:
            exact = 1e-12 if i < search.initial else 1e-6
            assert search.ask() == pytest.approx(point, abs=exact), f"call {i}"
            search.tell(point, values[i])
    best = max(told, key=values.__getitem__)
    assert search.best == (asked[best], values[best])


CHECKS = {
    "entropy": check_entropy,
    "importance": check_importance,
    "stage1": check_stage_1,
    "llm": check_decoder,
    "solve": check_solve,
    "trace": check_trace,
}
