"""Policies over the frames of a video: whole videos against loops, on families that tell which frames form one."""

from __future__ import annotations

import pytest
import torch

from tests.models import prompt, shared
from tests.packed import IMAGE, VIDEO, VIDEO_LAYOUTS, Visual
from tests.reference_encode import divprune_units
from tests.reference_packed import PackedKept, _pick, packed_shorten
from tests.reference_video import dycoke_units, fastvid_rows, vidcom2_counts, vidcom2_units
from tests.test_arranged import generate, videos
from vlm_prune import pruned
from vlm_prune.contract.views import FeaturesView
from vlm_prune.encode.features import frames_of
from vlm_prune.errors import UnsupportedCallError
from vlm_prune.eval.census.shrink import tiny_model
from vlm_prune.policies.dycoke import DyCoke, frame_budgets
from vlm_prune.policies.fastvid import FastVID, anchors_of, compress, segment_lengths
from vlm_prune.policies.vidcom2 import VidCom2

CLOSE = {"atol": 3e-4, "rtol": 1e-3}
LOOPS = {
    "vidcom2": vidcom2_units,
    "dycoke": dycoke_units,
    "divprune": lambda x, keep: sorted(divprune_units(x.flatten(0, 1), keep)),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def clip(frames=6, tokens=10, channels=9, seed=0):
    """Frames that resemble each other, but for one half way."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, channels, generator=generator) + 0.5 * torch.randn(
        frames, tokens, channels, generator=generator
    )
    x[frames // 2] += 2 * torch.randn(tokens, channels, generator=generator)
    return x


def view(x, target, **more):
    frames, tokens, _ = x.shape
    return FeaturesView(
        x.flatten(0, 1)[None], (1, frames * tokens), target, torch.zeros(1).long(), None, more, frames=frames
    )


# --- on numbers ---


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [1, 5, 17, 30, 59])
def test_vidcom2_is_its_loop(keep, seed):
    x = clip(seed=seed).double()
    assert VidCom2().select(view(x, keep)).index[0].tolist() == vidcom2_units(x, keep)


def test_vidcom2_as_released_keeps_what_the_frames_say():
    x = clip().double()
    counts, both = vidcom2_counts(x, 0.5)
    keep = VidCom2(compat="official").select(view(x, 30))
    mask = keep.mask(60).view(6, 10)
    assert mask.sum(-1).tolist() == counts
    assert len(set(counts)) > 1, "no frame is like no other"
    for f, line in enumerate(both):
        assert max(v for v, kept in zip(line, mask[f], strict=True) if kept) <= min(
            [v for v, kept in zip(line, mask[f], strict=True) if not kept], default=9e9
        )


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_dycoke_is_its_loop(frames):
    x = clip(frames).double()
    for keep in range(1, 10 * frames + 1, 3):
        assert DyCoke().select(view(x, keep)).index[0].tolist() == dycoke_units(x, keep)


def test_dycoke_of_less_than_first_frames_hold_thins_these():
    assert frame_budgets(6, 10, 7) == [4, 0, 0, 0, 3, 0]
    kept = DyCoke().select(view(clip(), 7)).index[0].tolist()
    assert kept == [2, 4, 7, 9, 43, 46, 49]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("frames", "keep"), [(1, 4), (6, 24), (9, 31), (12, 60)])
@pytest.mark.parametrize("settings", [{}, {"segments": 2, "alike": -1.0, "every": 3}])
def test_fastvid_is_its_loop(settings, frames, keep, seed):
    x = clip(frames, seed=seed).double()
    attention = torch.rand(frames, 10, generator=torch.Generator().manual_seed(seed)).double()
    got = FastVID(**settings).encode_final(view(x, keep, cls_attention=attention.flatten()[None]))
    units, rows = fastvid_rows(x, attention.tolist(), keep, **settings)
    assert got.index[0].tolist() == units
    assert len(units) == keep
    torch.testing.assert_close(got.rows[0], rows)


def test_fastvid_takes_more_frames_where_anchors_have_no_room():
    assert anchors_of(range(8), 4, 40, 10) == ([1, 3, 5, 7], 2)
    assert anchors_of(range(3, 5), 4, 3, 10) == ([4], 4)
    x = clip(8)
    place, rows = compress(x, torch.rand(8, 10), [8], 79, 0.9, 4, 0.6)
    assert len(place.unique()) == len(rows) == 79
    assert rows.isfinite().all()


def test_segments_end_where_frames_differ():
    x = torch.ones(5, 2, 4)
    x[3:] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert segment_lengths(x.flatten(0, 1)[None], 5, 1, 0.9) == [[3, 2]]
    assert segment_lengths(x.flatten(0, 1)[None], 5, 3, 0.9) == [[1, 2, 2]]
    assert segment_lengths(x.flatten(0, 1)[None], 5, 9, 0.9) == [[1] * 5]


@pytest.mark.parametrize("kind", ["ones", "zeros", "twins"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", [VidCom2(), DyCoke(), FastVID()], ids=lambda policy: policy.name)
def test_ties_and_zeros_keep_the_budget(policy, dtype, kind):
    x = {"ones": torch.ones(4, 6, 8), "zeros": torch.zeros(4, 6, 8)}.get(kind)
    x = torch.randn(4, 3, 8).repeat(1, 2, 1) if x is None else x
    for keep in (1, 7, 23):
        got = policy.encode_final(view(x.to(dtype), keep, cls_attention=torch.full((1, 24), 0.1)))
        assert len(set(got.index[0].tolist())) == keep
        assert got.rows is None or (got.rows.isfinite().all() and got.rows.dtype == dtype)


# --- in models whose tower is called with all frames ---


def packed_loops(model, batch, policy, ratio=0.5, tokens=None):
    """What is kept of each frame, and its features, from the stock features of whole videos."""
    kept = PackedKept([], [], [])
    for visual in (v for row in batch.visuals for v in row):
        found = [_pick(model, tile, range(tile.units[0] * tile.units[1])) for tile in visual.tiles]
        x, units = torch.stack([features for _, features, _ in found]), len(found[0][0])
        target = max(1, round(ratio * units)) * len(found)
        target = target if tokens is None else min(tokens, units * len(found))
        if policy == "fastvid":
            attention = [tower_attention(model, tile) for tile in visual.tiles]
            chosen, rows = fastvid_rows(x, attention, target)
        else:
            chosen = LOOPS[policy](x, target)
            rows = x.flatten(0, 1)[chosen]
        for f, (_, _, deep) in enumerate(found):
            mine = [i for i, unit in enumerate(chosen) if unit // units == f]
            here = [chosen[i] - f * units for i in mine]
            kept.units.append(here)
            kept.features.append(rows[mine])
            kept.deepstack.append([layer[here] for layer in deep])
    return kept


def tower_attention(model, tile: Visual):
    """Attention of the mean query in the last block to each unit of a frame, in the order of the features."""
    seen = []
    block = model.model.visual.blocks[-1]
    handle = block.attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output))
    turned = []
    second = block.attn.register_forward_pre_hook(
        lambda module, args, kwargs: turned.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    model.model.visual(tile.patches, grid_thw=torch.tensor([tile.size]))
    handle.remove()
    second.remove()
    query, key, _ = seen[0].unflatten(-1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
    cos, sin = turned[0]

    def turn(x):
        first, last = x.chunk(2, -1)
        return x * cos + torch.cat([-last, first], -1) * sin

    query, key = turn(query), turn(key)
    paid = (query.mean(1, keepdim=True) @ key.mT * key.shape[-1] ** -0.5).softmax(-1)[:, 0].mean(0)
    return paid.view(-1, 4).sum(-1).tolist()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("policy", ["vidcom2", "dycoke", "fastvid"])
@pytest.mark.parametrize("layout", VIDEO_LAYOUTS)
def test_whole_videos_of_packed_towers(layout, policy, family):
    model, batch = shared(family), prompt(family, VIDEO_LAYOUTS[layout])
    if family == "qwen2_5_vl" and policy == "fastvid":
        pytest.skip("units are sorted by window; tests/test_encode_policies.py compares what attention says")
    kept = packed_loops(model, batch, policy, 0.5)
    short = packed_shorten(model, batch, kept)
    with short.given(model):
        want = model(**short.inputs).logits
    with pruned(model, policy, ratio=0.5):
        logits = model(**batch.inputs).logits
        tokens = model.generate(**batch.inputs, max_new_tokens=3, suppress_tokens=[IMAGE, VIDEO])
        for b, row in enumerate(batch.rows()):
            single = model(**row.inputs).logits[0]
            torch.testing.assert_close(logits[b, batch.mask[b].bool()], single, **CLOSE)
            alone = model.generate(**row.inputs, max_new_tokens=3, suppress_tokens=[IMAGE, VIDEO])
            assert alone[0, row.ids.shape[1] :].tolist() == tokens[b, batch.ids.shape[1] :].tolist()
    for b, rows in enumerate(short.rows):
        torch.testing.assert_close(logits[b, rows], want[b, -len(rows) :], **CLOSE)
        dropped = ((batch.ids[b] == IMAGE) | (batch.ids[b] == VIDEO)).index_fill(0, torch.tensor(rows), False)
        assert not logits[b, dropped].any()


@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision"])
@pytest.mark.parametrize("policy", ["vidcom2", "dycoke", "fastvid"])
@pytest.mark.parametrize(
    ("budget", "each"), [({"tokens": 4}, 12), ({"ratio": 0.5}, None), ({"tokens": 5, "per": "image"}, 5)]
)
def test_whole_videos_of_arranged_frames(budget, each, policy, family):
    model, inputs = shared(family), videos(family)
    stock = model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
    with pruned(model, policy, **budget):
        logits, receipt = model(**inputs).logits, model.pruning.receipt
        output = generate(model, inputs)
        beams = generate(model, inputs, num_beams=3)
        for b in range(2):
            one = {k: v[b : b + 1] for k, v in inputs.items()}
            torch.testing.assert_close(model(**one).logits[0], logits[b], **CLOSE)
            assert torch.equal(generate(model, one)[0], output[b])
            assert torch.equal(generate(model, one, num_beams=3)[0], beams[b])
    rows, columns = receipt.grids[0]
    cells = rows * columns
    each = 3 * round(cells / 2) if each is None else each
    for b in range(2):
        kept = [f * cells + unit for f in range(3) for unit in receipt.kept[3 * b + f]]
        assert len(kept) == each
        if policy in LOOPS:
            x = stock[b].flatten(0, -2)[: 3 * cells].view(3, cells, -1)
            assert kept == LOOPS[policy](x, each)


def test_frames_of_a_video_that_is_dull_give_to_the_others():
    model, inputs = shared("llava_next_video"), videos("llava_next_video", frames=4)
    inputs["pixel_values_videos"][:, 1:] = inputs["pixel_values_videos"][:, :1]
    with pruned(model, "dycoke", ratio=0.5):
        model(**inputs)
        counts = [len(frame) for frame in model.pruning.receipt.kept[:4]]
    assert counts[0] > max(counts[1:])


def test_which_frames_form_a_video():
    pixels = torch.zeros(2, 3, 3, 4, 4)
    assert frames_of({"pixel_values_videos": pixels}, 6) == [3, 3]
    assert frames_of({"pixel_values_videos": pixels}, 5) == [1] * 5
    sizes = {"pixel_values_videos": pixels[0], "video_grid_thw": torch.tensor([[4, 2, 2], [1, 2, 2]])}
    assert frames_of(sizes, 5) == [4, 1]
    assert frames_of({"pixel_values": pixels}, 6) == [1] * 6


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("per", ["image", "video"])
def test_frames_of_a_video_compete_for_one_budget(per, family):
    model, batch = shared(family), prompt(family, VIDEO_LAYOUTS["videos-and-images"])
    kept = packed_loops(model, batch, "divprune", tokens=7)
    short = packed_shorten(model, batch, kept)
    with short.given(model):
        want = model(**short.inputs).logits
    with pruned(model, "divprune", tokens=7, per=per):
        logits = model(**batch.inputs).logits
    for b, rows in enumerate(short.rows):
        torch.testing.assert_close(logits[b, rows], want[b, -len(rows) :], **CLOSE)
        dropped = ((batch.ids[b] == IMAGE) | (batch.ids[b] == VIDEO)).index_fill(0, torch.tensor(rows), False)
        assert not logits[b, dropped].any()


def test_what_sees_frames_one_by_one_refuses_a_budget_of_a_video():
    model, batch = shared("qwen2_5_vl"), prompt("qwen2_5_vl", VIDEO_LAYOUTS["video"])
    for policy in ("flowcut", "fastv", "cdpruner"):
        with (
            pruned(model, policy, ratio=0.5, per="video"),
            pytest.raises(UnsupportedCallError, match="frames of a video one by one"),
        ):
            model(**batch.inputs)


def test_the_general_adapter_shares_a_budget_over_frames():
    """Features alone are known. This model encodes videos by its method for images: tokens are chosen once."""
    base = (model := tiny_model("video_llama_3")).model
    generator = torch.Generator().manual_seed(0)
    given = {
        "pixel_values_videos": torch.randn(2 * 64, 48, generator=generator),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
        "video_merge_sizes": torch.tensor([2]),
    }
    (stock,) = base.get_video_features(**given, return_dict=True).pooler_output
    with pruned(model, "divprune", tokens=7, per="video"):
        (features,) = base.get_video_features(**given, return_dict=True).pooler_output
        assert sum(map(len, model.pruning.receipt.kept)) == sum(model.pruning.receipt.targets) == 7
    kept = (~features[:, 0].isnan()).nonzero()[:, 0].tolist()
    assert kept == sorted(divprune_units(stock, 7))
    torch.testing.assert_close(features[kept], stock[kept])
    with pruned(model, "divprune", tokens=5):
        base.get_video_features(**given)
        kept = model.pruning.receipt.kept
    assert kept == [sorted(divprune_units(frame, 5)) for frame in stock.view(2, 16, -1)]
