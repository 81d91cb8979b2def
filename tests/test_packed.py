"""What packed towers bring with them: images of mixed sizes, videos, windows, M-RoPE, deepstack. See `tests.packed`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models import LAYOUTS, PACKED, make, prompt, shared
from tests.packed import FRAMES, IMAGE, MERGE, PATCH, SIZES, VIDEO, VIDEO_LAYOUTS
from tests.policy_table import EVICTING, TABLE, options
from tests.reference import POLICIES, budget, expect
from vlm_prune import PolicyError, prune, pruned, unprune
from vlm_prune.encode.packed_state import window_order
from vlm_prune.encode.shrink import grid_places, shrink
from vlm_prune.encode.stage import content_key
from vlm_prune.policies.baselines import Random
from vlm_prune.policies.fastv import FastV
from vlm_prune.versions import cache_of

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
MIXED = [(2, -1, 4), (1, -1, 2, -2, 3), (-1, 9)]
families = pytest.mark.parametrize("family", PACKED)
slow = pytest.mark.slow
videos = pytest.mark.parametrize("layout", VIDEO_LAYOUTS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generate(model, inputs, **more):
    return model.generate(**inputs, max_new_tokens=4, suppress_tokens=[IMAGE, VIDEO], **more)


# --- videos ---


@families
@videos
@pytest.mark.parametrize(
    "policy", ["flowcut", *(pytest.param(p, marks=slow) for p in POLICIES if p != "flowcut")]
)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_live_rows_of_videos(pad, policy, layout, family):
    model, batch = shared(family), prompt(family, VIDEO_LAYOUTS[layout], pad)
    _, short = expect(model, batch, policy)
    with short.given(model):
        want = model(**short.inputs).logits
    with pruned(model, policy, **budget(policy)):
        logits = model(**batch.inputs).logits
    for b, rows in enumerate(short.rows):
        torch.testing.assert_close(logits[b, rows], want[b, -len(rows) :], **CLOSE)
        dropped = ((batch.ids[b] == IMAGE) | (batch.ids[b] == VIDEO)).index_fill(0, torch.tensor(rows), False)
        assert not logits[b, dropped].any()


@families
@videos
def test_prompts_with_videos_in_a_batch_and_alone(layout, family):
    model, batch = shared(family), prompt(family, VIDEO_LAYOUTS[layout])
    with pruned(model, "flowcut", ratio=0.4):
        tokens = generate(model, batch.inputs)[:, batch.ids.shape[1] :]
        beams = generate(model, batch.inputs, num_beams=3)[:, batch.ids.shape[1] :]
        for b, row in enumerate(batch.rows()):
            assert generate(model, row.inputs)[0, row.ids.shape[1] :].tolist() == tokens[b].tolist()
            assert (
                generate(model, row.inputs, num_beams=3)[0, row.ids.shape[1] :].tolist() == beams[b].tolist()
            )


@families
def test_a_frame_is_a_tile_of_its_own(family):
    model, batch = shared(family), prompt(family, VIDEO_LAYOUTS["video"])
    with pruned(model, "uniform", tokens=3):
        model(**batch.inputs)
        assert model.pruning.receipt.grids == [(2, 4), (2, 4)]
        assert [len(units) for units in model.pruning.receipt.kept] == [3, 3]


@families
@pytest.mark.parametrize("composition", ["flowcut", "uniform+fastv"])
def test_images_and_videos_share_a_receipt(composition, family):
    model, batch = shared(family), prompt(family, [(2, -1, 1, "video", 2, -1, 4)])
    settings = {"fastv": {"k": 1}} if "+" in composition else {}
    with pruned(model, composition, ratio=0.4, **settings):
        for call in (model, lambda **inputs: generate(model, inputs)):
            call(**batch.inputs)
            receipt = model.pruning.receipt
            assert receipt.grids == [(4, 4), (2, 6), (2, 4), (2, 4)]
            assert [len(units) for units in receipt.kept] == receipt.targets == [6, 5, 3, 3]
            text = int((batch.ids != IMAGE).sum() - (batch.ids == VIDEO).sum())
            held = [sum(map(len, layer)) + text for layer in receipt.decoder_units]
            assert held == receipt.decoder_tokens
            assert receipt.tower_ms > 0
            assert receipt.flops < receipt.flops_dense
            assert len(receipt.tower_units) == len(model.model.visual.blocks)
            assert str(receipt).count("\n") == 6 - (composition != "flowcut")


# --- every policy ---


@slow  # tests/test_support.py does much of it in seconds
@families
@pytest.mark.parametrize("policy", [*sorted(TABLE), "flowcut+vhr", "visionzip+fastv"])
def test_every_policy_on_mixed_sizes_in_a_batch_and_alone(policy, family):
    model, batch, more = shared(family), prompt(family, MIXED), options(policy)
    stock = model(**batch.inputs).logits
    with pruned(model, **more):
        output = model(**batch.inputs)
        receipt = model.pruning.receipt
        tokens = generate(model, batch.inputs)[:, batch.ids.shape[1] :]
        grids, alone = receipt.grids, []
        for b, row in enumerate(batch.rows()):
            single = model(**row.inputs).logits[0]
            torch.testing.assert_close(output.logits[b, batch.mask[b].bool()], single, atol=3e-4, rtol=1e-3)
            alone += model.pruning.receipt.kept
            assert generate(model, row.inputs)[0, row.ids.shape[1] :].tolist() == tokens[b].tolist()
    assert receipt.kept == alone
    assert grids == [(rows // 2, columns // 2) for rows, columns in [*SIZES, SIZES[0]]]
    assert output.logits.isfinite().all()
    if policy in TABLE and TABLE[policy].holds == "tile":
        wanted = [round(0.3 * rows * columns) for rows, columns in grids]
        assert [len(units) for units in alone] == receipt.targets == wanted
    # a prefill that only its cache is pruned after is the stock one
    assert torch.equal(output.logits, stock) == (policy in ("none", *EVICTING))
    assert torch.equal(model(**batch.inputs).logits, stock)


@families
def test_tokens_are_counted_for_each_image(family):
    model, batch = shared(family), prompt(family, MIXED)
    with pruned(model, "flowcut", tokens=13):
        model(**batch.inputs)
        assert [len(units) for units in model.pruning.receipt.kept] == [13, 13, 12, 13, 13]
        printed = str(model.pruning.receipt)
    assert "of 16, 15, 12, 15, 16 visual tokens per image (planned 13, 13, 12, 13, 13)" in printed
    assert "no CLS token in this tower: attention of the mean query" in printed


@families
def test_the_tower_computes_less(family):
    model, batch = shared(family), prompt(family, MIXED)
    with pruned(model, "flowcut", ratio=0.25):
        model(**batch.inputs)
        receipt = model.pruning.receipt
    assert receipt.tower_tokens[0] == 64
    assert receipt.tower_tokens[-1] == 16
    assert sum(receipt.tower_segments[0]) == sum(rows * columns for rows, columns in [*SIZES, SIZES[0]])
    assert sum(receipt.tower_segments[-1]) == 4 * sum(receipt.targets)
    assert receipt.flops < receipt.flops_dense


# --- inside the decoder ---


def walk(model, short, stays, cut):
    """Last hidden states, layer by layer: rows that are not in ``stays`` ``(rows,)`` end after layer ``cut``."""
    decoder, hidden, places = model.model.language_model, short.embeds, short.positions[1:]
    visual, deep = short.visual[0], short.deepstack
    for number, layer in enumerate(decoder.layers):
        length = hidden.shape[1]
        mask = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_embeddings=decoder.rotary_emb(hidden, places),
            position_ids=None,
        )
        if number < len(deep):
            hidden = hidden.clone()
            hidden[0, visual] += deep[number]
        if number == cut:
            if deep:
                deep = [x[stays[visual]] for x in deep]
            hidden, places, visual = hidden[:, stays], places[..., stays], visual[stays]
    return decoder.norm(hidden)


@families
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("composition", ["fastv", "uniform+fastv"])
def test_rows_dropped_between_decoder_layers(composition, k, family):
    """Prefill and steps, with M-RoPE positions and with deepstack features that are still to come."""
    model, batch = shared(family), prompt(family, [(3, -1, 2, -1, 5)])
    settings = {"k": k} if composition == "fastv" else {"fastv": {"k": k}}
    ratio = 0.4 if composition == "fastv" else budget("uniform")["ratio"]
    _, short = expect(model, batch, "none" if composition == "fastv" else "uniform")
    with pruned(model, composition, ratio=ratio, **settings):
        logits = model(**batch.inputs).logits[0]
        alive = logits.any(-1)
        tokens = generate(model, batch.inputs, return_dict_in_generate=True, output_logits=True)
    stays = alive[short.rows[0]]
    assert int((~stays).sum()) > 0
    want = model.lm_head(walk(model, short, stays, k - 1))[0]
    torch.testing.assert_close(logits[alive], want, **CLOSE)
    step, row = short, torch.ones(1, dtype=torch.bool)
    for number, token in enumerate(tokens.sequences[0, batch.ids.shape[1] :]):
        last = model.lm_head(walk(model, step, stays, k - 1))[0, -1]
        torch.testing.assert_close(tokens.logits[number][0], last, **CLOSE)
        step.embeds = torch.cat([step.embeds, model.get_input_embeddings()(token[None, None])], 1)
        step.positions = torch.cat([step.positions, step.positions[..., -1:] + 1], -1)
        step.visual = torch.cat([step.visual, ~row[None]], 1)
        stays = torch.cat([stays, row])


@families
def test_fastv_keeps_what_the_last_row_attends_to(family):
    """Guards the test above: the policy sees queries and keys that M-RoPE turned."""
    model, batch = shared(family), prompt(family, [(3, -1, 5)])
    seen = []

    @dataclass(frozen=True)
    class Watching(FastV):
        def prefill(self, view):
            seen.append(view.attention)
            return super().prefill(view)

    model.set_attn_implementation("eager")
    handle = model.model.language_model.layers[0].self_attn.register_forward_hook(
        lambda module, args, output: seen.append(output[1])
    )
    try:
        with pruned(model, [Watching(k=1)], ratio=0.5):
            logits = model(**batch.inputs).logits[0]
    finally:
        handle.remove()
        model.set_attn_implementation("sdpa")
    paid = seen[0][0].mean(0)[-1]
    image = batch.ids[0] == IMAGE
    best = paid[image].topk(8).indices.sort().values
    assert logits[image].any(-1).nonzero()[:, 0].tolist() == best.tolist()


# --- attention over packed sequences ---


@families
@pytest.mark.parametrize("when", ["before", "after"])
def test_variable_length_flash_attention(when, family, monkeypatch):
    """It is given one sequence and the places where images, frames or windows end."""
    calls = []

    def fake_flash(
        module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **kwargs
    ):
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if cu_seq_lens_q is None:
            return sdpa(module, query, key, value, attention_mask, **kwargs)
        lengths = cu_seq_lens_q.diff().tolist()
        calls.append(lengths)
        assert cu_seq_lens_q.dtype == torch.int32
        assert sum(lengths) == query.shape[2]
        assert max(lengths) <= max_length_q
        assert min(lengths) > 0
        kwargs = {name: x for name, x in kwargs.items() if name not in ("cu_seq_lens_k", "max_length_k")}
        parts = [x.split(lengths, 2) for x in (query, key, value)]
        return torch.cat([sdpa(module, *qkv, None, **kwargs)[0] for qkv in zip(*parts, strict=True)], 1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", fake_flash)
    model, batch = make(family), prompt(family, MIXED)
    with pruned(model, "flowcut", ratio=0.3):
        want, kept = model(**batch.inputs).logits, model.pruning.receipt.kept
    blocks = len(model.model.visual.blocks)
    if when == "before":
        model.model.visual.config._attn_implementation_internal = "flash_attention_2"
    prune(model, "flowcut", ratio=0.3)
    model.model.visual.config._attn_implementation_internal = "flash_attention_2"
    logits = model(**batch.inputs).logits
    assert model.pruning.receipt.kept == kept
    torch.testing.assert_close(logits, want, **CLOSE)
    assert len(calls) == (blocks if when == "before" else 1)  # or else block by block, sequence by sequence
    unprune(model)


def test_window_order_is_that_of_stock_code():
    get_vision_window_index = pytest.importorskip("transformers.vision_utils").get_vision_window_index

    for rows, columns in [(4, 4), (3, 5), (5, 3), (1, 7), (9, 8)]:
        grid = torch.tensor([[1, 2 * rows, 2 * columns]])
        stock, _ = get_vision_window_index(grid, spatial_merge_size=2, window_size=16, patch_size=4)
        assert torch.equal(window_order((rows, columns), 2, torch.device("cpu")), stock)


# --- FlowCut as released ---


def test_released_flowcut_treats_each_image_as_if_it_were_alone():
    model, batch = shared("qwen2_vl"), prompt("qwen2_vl", MIXED)
    with pruned(model, "flowcut", tokens=4, compat="official"):
        output = model(**batch.inputs)
        receipt = model.pruning.receipt
        assert receipt.kept == [list(range(8))] * 5  # twice the budget, in the first places of the image
        left = ((batch.ids == IMAGE) & output.logits.any(-1)).sum(-1)
        assert left.tolist() == [4, 12, 4]
        tokens = generate(model, batch.inputs)[:, batch.ids.shape[1] :]
        for b, row in enumerate(batch.rows()):
            single = model(**row.inputs).logits[0]
            torch.testing.assert_close(output.logits[b, batch.mask[b].bool()], single, atol=3e-4, rtol=1e-3)
            assert generate(model, row.inputs)[0, row.ids.shape[1] :].tolist() == tokens[b].tolist()
    lengths = [layer.keys.shape[2] for layer in cache_of(output).layers]
    assert lengths[0] == lengths[1] > lengths[2] == lengths[3]


def test_released_flowcut_leaves_the_tower_alone_where_twice_the_budget_fits():
    model, batch = shared("qwen2_vl"), prompt("qwen2_vl", [(3, -1, 5)])
    with pruned(model, "flowcut", tokens=8, compat="official"):
        output = model(**batch.inputs)
        assert set(model.pruning.receipt.tower_tokens) == {64}
        assert model.pruning.receipt.kept == [list(range(16))]
        assert int(((batch.ids == IMAGE) & output.logits.any(-1)).sum()) == 8


# --- smaller images ---


def cut(picture):
    """Patches of a picture ``(3, height, width)``, as processors make them."""
    rows, columns = (n // PATCH for n in picture.shape[1:])
    order = [
        (r + i, c + j)
        for r in range(0, rows, MERGE)
        for c in range(0, columns, MERGE)
        for i in range(MERGE)
        for j in range(MERGE)
    ]
    boxes = [picture[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH] for r, c in order]
    return torch.stack([box[:, None].expand(-1, FRAMES, -1, -1).flatten() for box in boxes])


@families
def test_downsample_shows_the_tower_smaller_images(family):
    model, generator = shared(family), torch.Generator().manual_seed(3)
    pictures = [torch.randn(3, 32, 32, generator=generator), torch.randn(3, 16, 48, generator=generator)]
    patches = torch.cat([cut(picture) for picture in pictures])
    sizes = torch.tensor([[1, 8, 8], [1, 4, 12]])
    small = [shrink(pictures[0][None], 16, 16)[0], shrink(pictures[1][None], 8, 24)[0]]
    grids = torch.tensor([[1, 4, 4], [1, 2, 6]])
    want = model.model.get_image_features(torch.cat([cut(x) for x in small]), grids)
    with pruned(model, "downsample", ratio=0.25):
        ours = model.model.get_image_features(patches, sizes)
        assert model.pruning.receipt.kept == [grid_places((4, 4), (2, 2)), grid_places((2, 6), (1, 3))]
    for a, b, count in zip(ours.pooler_output, want.pooler_output, (16, 12), strict=True):
        assert len(a) == count
        torch.testing.assert_close(a[~a[:, 0].isnan()], b, **CLOSE)
    for layer, expected in zip(
        getattr(ours, "deepstack_features", []), getattr(want, "deepstack_features", []), strict=True
    ):
        for a, b in zip(layer, expected, strict=True):
            torch.testing.assert_close(a[~a[:, 0].isnan()], b, **CLOSE)


# --- what is refused ---

REFUSED = {
    "compact": (PACKED, {"policy": "flowcut", "positions": "compact"}, "place in the image"),
    "released": (["qwen2_5_vl", "qwen3_vl"], {"policy": "flowcut", "compat": "official"}, "qwen2_vl only"),
}


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for case, row in REFUSED.items() for family in row[0]]
)
def test_refused(family, case):
    model, batch = shared(family), prompt(family, LAYOUTS["single"])
    stock = model(**batch.inputs).logits
    _, arguments, says = REFUSED[case]
    with pytest.raises(PolicyError, match=says):
        prune(model, **arguments)
    assert torch.equal(model(**batch.inputs).logits, stock)


def test_content_keys_tell_images_apart():
    tiles = [v.patches for row in prompt("qwen2_vl", MIXED).visuals for v in row]
    assert len({int(content_key(patches[None])) for patches in tiles}) == len(tiles)


# --- made by stock processors ---


@families
def test_pixels_that_policies_see_are_those_of_the_image(family):
    """The processor cuts an image into patches, two by two; policies that look at pixels see the image again."""
    noise = np.random.default_rng(3).integers(0, 256, (32, 48, 3), np.uint8)
    images = [Image.fromarray(noise), Image.fromarray(noise[:24, :40])]
    sizes = {"shortest_edge": 64, "longest_edge": 10**6}
    settings = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": FRAMES, "size": sizes}
    processor = Qwen2VLImageProcessor(**settings, do_resize=False)
    made = processor(images=images, return_tensors="pt")
    counts = (made["image_grid_thw"].prod(-1) // MERGE**2).tolist()
    ids = [5, *[62, *[IMAGE] * counts[0], 63], 7, *[62, *[IMAGE] * counts[1], 63], 9]
    ids = torch.tensor([ids])
    seen = []

    @dataclass(frozen=True)
    class Watching(Random):
        def encode_final(self, view):
            seen.append(view)
            return super().encode_final(view)

    model = shared(family)
    with pruned(model, [Watching()], ratio=0.5):
        model(input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), **made)
        assert [len(units) for units in model.pruning.receipt.kept] == [round(n / 2) for n in counts]
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (processor.image_mean, processor.image_std))
    for view, image in zip(seen, images, strict=True):
        picture = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(view.pixels, (picture - mean) / std, atol=1e-5, rtol=1e-5)
