"""Pictures show what the receipt says, tiles in their places."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from tests.models import make, prompt
from vlm_prune import pruned, viz
from vlm_prune.eval.scenes import make_scene
from vlm_prune.eval.tiny.configs import build_internvl


class Normalisation:
    image_mean, image_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def tile(size: int = 16) -> viz.Pixels:
    return np.random.default_rng(0).integers(0, 200, (size, size, 3), dtype=np.uint8)


def test_kept_cells_stay_and_dropped_cells_lose_their_colour():
    image, kept = tile(), [0, 5, 15]
    faded = viz.fade(image, kept, (4, 4))
    for cell in range(16):
        top, left = cell // 4 * 4, cell % 4 * 4
        where = slice(top, top + 4), slice(left, left + 4)
        if cell in kept:
            assert (faded[where] == image[where]).all()
        else:
            assert (faded[where] == faded[where][..., :1]).all()
            assert faded[where].min() > 200


@pytest.mark.parametrize("grid", [(3, 5), (16, 16), (24, 24)])
def test_grids_need_not_divide_the_picture(grid):
    faded = viz.fade(tile(40), range(grid[0] * grid[1]), grid)
    assert (faded == tile(40)).all()


@pytest.mark.parametrize(
    ("tiles", "size", "layout"),
    [
        (1, (640, 480), (1, 1)),
        (3, (256, 128), (1, 2)),
        (3, (128, 256), (2, 1)),
        (5, (256, 256), (2, 2)),
        (7, (600, 400), (2, 3)),
        (13, (400, 300), (3, 4)),
    ],
)
def test_layout_follows_the_shape_of_the_image(tiles, size, layout):
    assert viz.tile_layout(tiles, *size) == layout


@pytest.mark.parametrize("size", [(128, 128), (256, 128), (128, 384), (256, 256)])
def test_tiles_of_internvl_are_put_together_again(size):
    image = make_scene(3, size).image
    processor = build_internvl()[1].image_processor
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    tiles = viz.denormalise(pixels, processor.image_mean, processor.image_std)
    picture = viz.mosaic(tiles, viz.tile_layout(len(tiles), *size), gap=0)
    difference = picture[: size[1], : size[0]].astype(int) - np.asarray(image)
    assert abs(difference).max() <= 1


def test_thumbnail_stands_to_the_right():
    tiles = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    picture = viz.mosaic(tiles, (1, 2), gap=2)
    assert picture.shape == (4, 20, 3)
    assert [int(picture[0, x, 0]) for x in (0, 5, 6, 10, 16)] == [10, 255, 20, 255, 30]


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 tiles do not fill 1 rows of 2"):
        viz.mosaic(np.zeros((4, 2, 2, 3), np.uint8), (1, 2))


@pytest.mark.parametrize(("family", "tiles"), [("llava", 1), ("internvl", 3)])
def test_panels_show_the_receipt(family, tiles, tmp_path):
    model, inputs = make(family), prompt(family, [(2, -tiles, 3)]).inputs
    with pruned(model, "uniform", tokens=4), torch.no_grad():
        model(**inputs)
        panel = viz.Panel.from_receipt(
            model.pruning.receipt,
            inputs,
            Normalisation,
            (2 * 32, 32) if tiles > 1 else (24, 24),
            "what it says " * 30,
        )
    units = 36 if family == "llava" else 16
    assert panel.title == f"{4 * tiles} of {units * tiles}"
    path = viz.save_kept([("one", [panel, panel]), ("two", [panel])], tmp_path / "new" / "kept.png")
    with Image.open(path) as picture:
        assert picture.width > picture.height / 2
        assert picture.mode == "P"
    assert plt.get_fignums() == []
