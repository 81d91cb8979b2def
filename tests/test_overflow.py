"""Features that are not finite reach the caller as from the stock model, or raise; none is dropped unseen."""

import pytest
import torch

from vlm_prune import PruningError, pruned
from vlm_prune.call import stream
from vlm_prune.kernels import hole

from .models import LAYOUTS, make, prompt, tower
from .policy_table import RATIO, TABLE

FAMILIES = ["llava", "internvl", "qwen2_vl", "llava_next", "llava_onevision"]
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def broken(model, batch, kind):
    """A call of ``model`` in which something is not finite."""
    inputs = dict(batch.inputs)
    name = next(name for name in ("pixel_values", "pixel_values_videos") if name in inputs)
    if kind == "projector":
        part = getattr(model.model, "multi_modal_projector", None)
        part = model.model.visual.merger if part is None else part
        weight = [w for w in part.parameters() if w.dim() > 1][-1]
        weight.data.fill_(1e38).mul_(10)
        return inputs
    pixels = inputs[name].clone()
    pixels.view(-1)[7] = BAD[kind]
    return {**inputs, name: pixels}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["nan", "inf", "projector"])
def test_no_policy_swallows_an_overflow(family, kind):
    seen = 0
    for policy, row in TABLE.items():
        model, batch = make(family), prompt(family, LAYOUTS["single"])
        inputs = broken(model, batch, kind)
        with torch.no_grad():
            assert model(**inputs).logits[0, -1].isnan().all()
            try:
                with pruned(
                    model, policy, **row.settings, **({} if row.holds == "all" else {"ratio": RATIO})
                ):
                    logits = model(**inputs).logits
            except PruningError:  # a choice that cannot be made of NaN, or that the family does not have
                continue
        assert logits[0, -1].isnan().all(), policy
        seen += 1
    assert seen > 0.7 * len(TABLE)


@pytest.mark.parametrize("policy", ["uniform", "flowcut", "divprune"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_one_bad_tile_of_an_image_with_one_budget(family, policy):
    """NaN ranks last, so the good tiles would win all of the budget."""
    model, batch = make(family), prompt(family, LAYOUTS["single"])
    with torch.no_grad(), pruned(model, policy, ratio=0.3, per="image"):
        assert not model(**batch.inputs).logits.isnan().any()
        assert model(**broken(model, batch, "nan")).logits[0, -1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hole_survives_what_stock_code_does_and_nothing_else_is_one(dtype):
    rows = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[0, 0], rows[0, 1], rows[1, 1], rows[1, 2, 0] = torch.nan, torch.inf, -torch.inf, torch.nan
    index = torch.tensor([[0, 2, 4], [1, 2, 3]])
    full = stream.open_holes(rows, index, 5, None)
    holes = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()
    assert torch.equal(stream.find_holes(full), holes)
    assert torch.equal(full.gather(1, index[..., None].expand_as(rows)).nan_to_num(7), rows.nan_to_num(7))
    assert full[holes].isnan().any(-1).all()  # whoever takes one for features gets NaN
    for target in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(stream.find_holes(full.to(target)), holes)
    assert torch.equal(stream.find_holes(full * 0.125), holes)
    place = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    embeds = torch.zeros(2, 6, 40, dtype=dtype).masked_scatter(place[..., None], full)
    assert torch.equal(stream.find_holes(embeds), torch.zeros_like(place).masked_scatter(place, holes))
    assert torch.equal(
        stream.find_holes(full.flip(0).repeat_interleave(3, 0)), holes.flip(0).repeat_interleave(3, 0)
    )
    assert torch.equal(stream.find_holes(stream.punch(rows, ~holes[:, :3])), holes[:, :3])
    assert not stream.find_holes(torch.stack([rows[0, 0], rows[0, 1], rows[1, 1], -hole(rows)])[None]).any()


def test_embeddings_given_by_the_caller():
    """Features that overflowed elsewhere, in a call of which nothing is known but its embeddings."""
    model, batch = make("llava"), prompt("llava", LAYOUTS["single"])
    with torch.no_grad(), pruned(model, "uniform", ratio=0.3):
        features = model.get_image_features(**batch.media).pooler_output
        features = torch.cat(list(features)).view(-1, 32)
        embeds = model.get_input_embeddings()(batch.ids)
        mask = (batch.ids == 60)[..., None]
        good = embeds.masked_scatter(mask, features)
        torch.testing.assert_close(model(inputs_embeds=good).logits, model(**batch.inputs).logits)
        kept = (~stream.find_holes(features[None]))[0].nonzero()[0, 0]
        features[kept] = torch.nan
        assert model(inputs_embeds=embeds.masked_scatter(mask, features)).logits[0, -1].isnan().all()


def spoil(part, row):
    """Let a ``row`` of what ``part`` returns overflow, as single tokens do in float16."""

    def overflow(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[..., row, :] = torch.inf
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return part.register_forward_hook(overflow)


def linear_in(part):
    return [m for m in part.modules() if isinstance(m, torch.nn.Linear)][-1]


SLOW = [("llava_next", "tile"), ("llava_next", "image"), ("qwen2_5_vl", "tile")]


@pytest.mark.parametrize("place", ["projector", "last layer", "inner layer"])
@pytest.mark.parametrize(
    ("family", "per"), [("llava", "tile"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_tokens_that_overflowed_alone_are_not_dropped_unseen(family, place, per):
    """Wherever a policy chooses among rows of which one has overflowed, the answer shows it."""
    seen = 0
    for policy, row in TABLE.items():
        model, batch = make(family), prompt(family, LAYOUTS["single"])
        vision = tower(model)
        layers = next(m for m in vision.modules() if isinstance(m, torch.nn.ModuleList))
        part = {"last layer": linear_in(layers[-2]), "inner layer": linear_in(layers[2])}.get(place)
        if place == "projector":
            part = linear_in(getattr(model.model, "multi_modal_projector", vision))
        settings = {**row.settings, **({} if row.holds == "all" else {"ratio": RATIO}), "per": per}
        computed = []
        spoil(part, 2)
        part.register_forward_hook(lambda m, a, out, seen=computed: seen.append(bool(out.isinf().any())))
        try:
            with torch.no_grad(), pruned(model, policy, **settings):
                logits = model(**batch.inputs).logits
        except PruningError:  # the family does not have that place, or that budget
            continue
        assert any(computed), policy
        assert logits[0, -1].isnan().all(), policy
        seen += 1
    assert seen > 0.7 * len(TABLE)
