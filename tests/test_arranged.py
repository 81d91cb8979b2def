"""Images of several tiles: what the language model gets, row by row, against images put together by hand."""

from __future__ import annotations

import pytest
import torch

from tests.arranged import ARRANGED, IMAGE, SIDE, VIDEO, arranged_prompt
from tests.models import PAD, make, shared
from tests.reference import POLICIES, RATIO, budget, expect
from vlm_prune import BudgetError, UnsupportedCallError, prune, pruned, unprune

CLOSE = {"atol": 3e-4, "rtol": 1e-3}
LAYOUTS = {
    "single": [(3, -1, 5)],
    "sizes": [(2, -1, 4), (1, -2, 3), (4, -3, 2)],
    "several-images": [(2, -2, 1, -1, 4), (1, -3, 3)],
    "row-without-image": [(2, -3, 4), (9,), (45,)],
}
families = pytest.mark.parametrize("family", ARRANGED)
policies = pytest.mark.parametrize("policy", POLICIES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generate(model, inputs, **more):
    fixed = {"max_new_tokens": 4, "suppress_tokens": [IMAGE, VIDEO], "do_sample": False, "pad_token_id": PAD}
    return model.generate(**inputs, **fixed, **more)


@families
@policies
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("positions", "pad"), [("compact", "left"), ("original", "right")])
def test_live_rows_are_those_of_the_shortened_prompt(policy, family, layout, positions, pad):
    model, batch = shared(family), arranged_prompt(family, LAYOUTS[layout], pad)
    kept, short = expect(model, batch, policy, positions)
    want = model(**short.inputs).logits
    with pruned(model, policy, positions=positions, **budget(policy)):
        logits = model(**batch.inputs).logits
        assert model.pruning.receipt.kept == kept.units
    for b, rows in enumerate(short.rows):
        torch.testing.assert_close(logits[b, rows], want[b, -len(rows) :], **CLOSE)
        dropped = (batch.ids[b] == IMAGE).index_fill(0, torch.tensor(rows), False)
        assert not logits[b, dropped].any()


@families
@policies
def test_generate_gives_what_it_gives_for_the_shortened_prompt(policy, family):
    model, batch = shared(family), arranged_prompt(family, LAYOUTS["sizes"])
    _, short = expect(model, batch, policy)
    want = {beams: generate(model, short.inputs, num_beams=beams) for beams in (1, 3)}
    with pruned(model, policy, **budget(policy)):
        for beams, tokens in want.items():
            output = generate(model, batch.inputs, num_beams=beams)
            assert torch.equal(output[:, batch.ids.shape[1] :], tokens)


@families
@pytest.mark.parametrize("policy", ["flowcut", "agilepruner", "uniform", "fastv", "vflowopt", "vhr"])
def test_a_batch_gives_what_its_rows_give_alone(policy, family):
    settings = {"fastv": {"k": 1}, "vflowopt": {"t": 1.0, "m": 2.0}, "vhr": {"layers": (1, 2)}}.get(
        policy, {}
    )
    share = {} if policy == "vhr" else {"ratio": RATIO}
    model, batch = shared(family), arranged_prompt(family, LAYOUTS["sizes"])
    with pruned(model, policy, **share, **settings):
        together, kept = model(**batch.inputs).logits, model.pruning.receipt.kept
        alone = []
        for b, row in enumerate(batch.rows()):
            single = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], single, **CLOSE)
            alone += model.pruning.receipt.kept
        assert alone == kept


@families
@pytest.mark.parametrize("policy", ["flowcut", "uniform"])
def test_keeping_everything_and_unpruning_are_bit_identical(policy, family):
    model, batch = make(family), arranged_prompt(family, LAYOUTS["several-images"])
    stock, tokens = model(**batch.inputs).logits, generate(model, batch.inputs)
    own = sorted(vars(model.model))
    prune(model, policy, ratio=1.0)
    assert torch.equal(model(**batch.inputs).logits, stock)
    assert torch.equal(generate(model, batch.inputs), tokens)
    unprune(model)
    prune(model, policy, ratio=RATIO)
    model(**batch.inputs)
    unprune(model)
    assert torch.equal(model(**batch.inputs).logits, stock)
    assert sorted(vars(model.model)) == own


@families
@pytest.mark.parametrize("policy", ["flowcut", "agilepruner", "divprune", "random", "uniform"])
@pytest.mark.parametrize("tokens", [1, 17, 60])
def test_a_budget_per_image_holds_over_all_its_tiles(policy, tokens, family):
    model, batch = shared(family), arranged_prompt(family, LAYOUTS["sizes"])
    with pruned(model, policy, tokens=tokens, per="image"):
        together = model(**batch.inputs).logits
        receipt = model.pruning.receipt
        for b, row in enumerate(batch.rows()):
            single = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], single, **CLOSE)
            assert sum(map(len, model.pruning.receipt.kept)) == tokens
        assert sum(map(len, receipt.kept)) == 3 * tokens


OWN = {
    "vflowopt": ("vflowopt", {"t": 1.0, "m": 2.0, "tokens": 60, "per": "image"}),
    "flowcut": ("flowcut", {"tokens": 15, "per": "image"}),
    # as released for LLaVA-NeXT it cuts each tile to half the budget of its image
    "official": ("flowcut", {"ratio": 0.2, "compat": "official"}),
}


@pytest.mark.parametrize(
    ("case", "family"),
    [
        *((case, family) for family in ARRANGED for case in ("vflowopt", "flowcut")),
        ("official", "llava_next"),
    ],
)
def test_images_of_five_tiles_and_of_four_have_each_their_own_targets(case, family):
    model, batch = shared(family), arranged_prompt(family, [(2, -1, 4), (4, -3, 2), (9,)])
    policy, settings = OWN[case]
    with pruned(model, policy, **settings):
        together, receipt = model(**batch.inputs).logits, model.pruning.receipt
        assert len(set(receipt.targets)) > 1
        alone = []
        for b, row in enumerate(batch.rows()[:2]):
            single = model(**row.inputs).logits[0]
            torch.testing.assert_close(together[b, batch.mask[b].bool()], single, **CLOSE)
            alone.append(model.pruning.receipt)
        assert receipt.targets == [target for one in alone for target in one.targets]
        assert receipt.kept == [kept for one in alone for kept in one.kept]


def test_tiles_compete_for_a_budget_per_image():
    """A dull tile gets less than its even share."""
    model, batch = shared("llava_next"), arranged_prompt("llava_next", LAYOUTS["single"])
    with pruned(model, "flowcut", tokens=40, per="image"):
        model(**batch.inputs)
        assert len({len(tile) for tile in model.pruning.receipt.kept}) > 1


def test_what_cannot_choose_late_says_so():
    model, batch = shared("llava_onevision"), arranged_prompt("llava_onevision", [(3, -1, 5)])
    with (
        pruned(model, "visionzip", ratio=RATIO),
        pytest.raises(UnsupportedCallError, match="visionzip chooses"),
    ):
        model(**batch.inputs)
    small = arranged_prompt("llava_onevision", [(3, -1, 5, -1)])
    with pruned(model, "visionzip", ratio=RATIO):
        assert model(**small.inputs).logits.isfinite().all()
    with pytest.raises(BudgetError, match="per='tiles'"):
        prune(model, per="tiles")
    with pytest.raises(BudgetError, match="internvl passes tiles to its tower"):
        prune(shared("internvl"), per="image")


def videos(family, count=2, frames=3):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, frames, 3, 4 * SIDE, 4 * SIDE, generator=generator)
    length = frames * (SIDE // 2) ** 2 + (family == "llava_onevision")
    ids = torch.tensor([[5, *[VIDEO] * length, 7 + b, 8] for b in range(count)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}


VIDEOS = ["llava_next_video", "llava_onevision"]


@pytest.mark.parametrize("family", VIDEOS)
@pytest.mark.parametrize("policy", ["flowcut", "uniform", "random", "agilepruner", "divprune"])
def test_videos_frame_by_frame(policy, family):
    """The kept rows are rows of the stock features, as many of each frame as wanted, and generate goes on from them."""
    model, inputs = shared(family), videos(family)
    ids, cells = inputs["input_ids"], (SIDE // 2) ** 2
    stock = model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
    with pruned(model, policy, tokens=4):
        logits, receipt = model(**inputs).logits, model.pruning.receipt
        assert [len(frame) for frame in receipt.kept] == [4] * 6
        assert receipt.grids == [(SIDE // 2, SIDE // 2)] * 6
        output = generate(model, inputs)
        once = [generate(model, {k: v[b : b + 1] for k, v in inputs.items()}) for b in range(2)]
        assert output.tolist() == torch.cat(once).tolist()
        kept = receipt.kept
    table = model.get_input_embeddings()
    for b in range(2):
        live = [1 + f * cells + unit for f in range(3) for unit in kept[3 * b + f]]
        last = [1 + 3 * cells] if family == "llava_onevision" else []
        rows = [0, *live, *last, ids.shape[1] - 2, ids.shape[1] - 1]
        if policy != "flowcut" or family == "llava_onevision":  # FlowCut's tower computes other features
            embeds = table(ids[b]).clone()
            seen = stock[b].flatten(0, -2)
            if last and len(seen) == 3 * cells:  # transformers 5.4 adds the newline later
                seen = torch.cat([seen, model.model.image_newline[None]])
            embeds[ids[b] == VIDEO] = seen
            want = model(inputs_embeds=embeds[rows][None]).logits[0]
            torch.testing.assert_close(logits[b, rows], want, **CLOSE)
        dropped = torch.ones(ids.shape[1], dtype=torch.bool).index_fill(0, torch.tensor(rows), False)
        assert not logits[b, dropped].any()


@pytest.mark.parametrize("family", VIDEOS)
def test_images_and_videos_in_one_batch(family):
    model, batch, clip = shared(family), arranged_prompt(family, LAYOUTS["single"]), videos(family, count=1)
    length = max(batch.ids.shape[1], clip["input_ids"].shape[1])

    def pad(x):
        return torch.nn.functional.pad(x, (length - x.shape[1], 0))

    inputs = {**batch.inputs, "pixel_values_videos": clip["pixel_values_videos"]}
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([pad(batch.inputs[name]), pad(clip[name])])
    for policy in ("flowcut", "fastv"):
        with pruned(model, policy, ratio=RATIO, **({"k": 1} if policy == "fastv" else {})):
            together = model(**inputs).logits
            for b, alone in enumerate((batch.inputs, clip)):
                single = model(**alone).logits[0]
                torch.testing.assert_close(together[b, -len(single) :], single, **CLOSE)


def test_flowcut_as_released_on_llava_next():
    """Half the budget leaves the tower for every tile, no newlines; the decoder goes on with exactly the budget."""
    model, batch = shared("llava_next"), arranged_prompt("llava_next", LAYOUTS["sizes"])
    text = (batch.mask.bool() & (batch.ids != IMAGE)).sum(-1)
    with pruned(model, "flowcut", tokens=20, compat="official"):
        output, receipt = model(**batch.inputs), model.pruning.receipt
        assert receipt.tower_tokens[-1] == 10 + 1
        assert {len(receipt.kept[0]), len(receipt.kept[5]), len(receipt.kept[8])} == {10}
        entered = [sum(len(tile) for tile in receipt.kept[i:j]) for i, j in ((0, 5), (5, 8), (8, 12))]
        assert receipt.decoder_tokens == [max(entered[b] + int(text[b]) for b in range(3))] * 2 + [
            20 + int(text.max())
        ]
        visual = (output.logits.any(-1) & (batch.ids == IMAGE)).sum(-1)
        assert visual.tolist() == [20, 20, 20]
        assert model.pruning.config["per"] == "image"
