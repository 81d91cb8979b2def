"""``vlm-prune inspect``: one image, layer by layer, for every policy and kind of family."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.processors import llava_next, llava_onevision, qwen2_vl
from tests.run_folders import EVIL
from tests.test_report import Page
from vlm_prune.cli import app
from vlm_prune.eval.measure import prompt_text
from vlm_prune.eval.models import load_model
from vlm_prune.eval.report.drawing import picture
from vlm_prune.eval.report.inspection import inspect, own_settings, write_page
from vlm_prune.eval.scenes import make_scene
from vlm_prune.registry import POLICIES, policy_class

PROMPT = "Please describe this image in detail."


@pytest.fixture(scope="module")
def llava():
    return load_model("tiny-llava")


@pytest.fixture(scope="module")
def photo():
    return make_scene(2026, (160, 128)).image


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_looked_at(policy, llava, photo, tmp_path):
    settings = own_settings(policy, "tiny-llava")
    found = inspect(*llava, photo, PROMPT, policy, settings, name="tiny-llava", max_new_tokens=2)
    counts = [stage.count for stage in found.stages]
    assert counts == sorted(counts, reverse=True)
    assert found.stages[-1].where.startswith("language model")
    acts = policy_class(policy).stages
    if not policy_class(policy).prunes:
        assert counts == [256, 256]
        assert any("drops nothing" in remark for remark in found.remarks) == (policy != "none")
    elif acts == ("decode",):  # what leaves the cache went through all layers
        assert counts == [256, 256]
        assert any("KV cache" in remark for remark in found.remarks)
    elif policy != "dyvte":  # whose gates may keep everything
        assert counts[-1] < 256
    page = Page(write_page(found, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert sum(tag == "svg" for tag, _ in page.elements) == 1 + len(found.stages)
    assert not hasattr(llava[0], "pruning")


def test_flowcut_layer_by_layer(llava, photo):
    model, processor = llava
    found = inspect(model, processor, photo, PROMPT, "flowcut", {"tokens": 32}, max_new_tokens=40)
    receipt = found.receipt
    assert [stage.where for stage in found.stages][-1] == "language model, layers 0–7"  # noqa: RUF001
    assert found.stages[-1].units == receipt.kept
    assert [s.count + 1 for s in found.stages if s.where.startswith("vision")] == sorted(
        set(receipt.tower_tokens), reverse=True
    )
    inputs = processor(images=[photo], text=[prompt_text(processor, PROMPT)], return_tensors="pt")
    stock = model.generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert found.before == processor.batch_decode(stock, skip_special_tokens=True)[0].strip()
    assert found.stages[0].boxes == [(16, 0, 144, 128)]  # the processor crops the middle square


def test_tiles_and_thumbnail(tmp_path):
    image = make_scene(3, (256, 128)).image
    found = inspect(*load_model("tiny-internvl"), image, EVIL, "uniform", {"tokens": 16}, max_new_tokens=2)
    assert [len(units) for units in found.stages[-1].units] == [16, 16, 16]
    text = write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert EVIL in "".join(page.texts)
    assert [tag for tag, _ in page.elements].count("script") == 0
    views = [a["viewbox"] for tag, a in page.elements if tag == "svg" and "viewbox" in a]
    assert set(views) == {"0 0 256 128"}
    assert len(views) == 2 * len(found.stages)
    assert len(re.findall('class="seams"', text)) == len(found.stages)
    drawings = re.findall(r"<svg class.*?</svg>", text, re.S)
    assert len(drawings) == len(views)
    for svg in drawings:
        ElementTree.fromstring(svg)


def test_padding_and_newlines_of_llava_next():
    """An image of 200 x 128 in 2 x 2 tiles: 18 pixels of the canvas are padding, above and below."""
    image = make_scene(3, (200, 128)).image
    found = inspect(*llava_next(), image, PROMPT, "fastv", {"ratio": 0.3, "k": 1}, max_new_tokens=2)
    assert found.stages[0].boxes == [
        (0, 0, 200, 128), (0, -36, 100, 64), (100, -36, 200, 64), (0, 64, 100, 164), (100, 64, 200, 164),
    ]  # fmt: skip
    tower, entered, last = found.stages
    assert [len(units) for units in tower.units] == [64] * 5
    # of eight rows of patches, three are padding and never reach the language model
    upper, lower = list(range(24, 64)), list(range(40))
    assert entered.units == [list(range(64)), upper, upper, lower, lower]
    assert 0 < last.count < entered.count
    drawn = picture(image, last.boxes, last.grids, last.units)
    assert (drawn[2, 2] == 255).all()  # padding


def test_the_resized_grid_of_llava_onevision():
    """After the tower, the grid of all tiles together is resized to one of the whole image."""
    image = make_scene(3, (200, 128)).image
    found = inspect(*llava_onevision(), image, PROMPT, "fastv", {"ratio": 0.3, "k": 1}, max_new_tokens=2)
    tower, entered, last = found.stages
    assert len(tower.boxes) == len(tower.grids) == 5
    assert entered.boxes == last.boxes == [(0, 0, 200, 128)] * 2
    assert entered.grids == [(8, 8), (8, 14)]
    assert (tower.count, entered.count) == (320, 176)
    assert 0 < last.count < entered.count


def test_an_image_at_its_own_resolution():
    image = make_scene(3, (200, 128)).image
    found = inspect(*qwen2_vl(), image, PROMPT, "flowcut", {"ratio": 0.4}, max_new_tokens=2)
    for stage in found.stages:
        assert (stage.boxes, stage.grids) == ([(0, 0, 200, 128)], [(5, 7)])
    assert [found.stages[0].count, found.stages[-1].count] == [35, 14]


def test_pictures_fade_what_was_dropped():
    image = Image.new("RGB", (120, 80), (200, 30, 30))
    drawn = picture(image, [(20, 0, 100, 80)], [(4, 4)], [[0, 1]]).astype(int)
    height, width = drawn.shape[:2]

    def redness(x, y):
        pixel = drawn[int(y / 80 * height), int(x / 120 * width)]
        return pixel[0] - pixel[1:].mean()

    assert [round(redness(x, y)) for x, y in ((30, 10), (50, 10), (70, 10), (30, 30), (10, 10))] == [
        170,
        170,
        0,
        0,
        0,
    ]
    assert np.ptp(drawn[5, 5] - drawn[height - 30, width // 2]) == 0
    # what the tower never saw is hatched, what was dropped is not
    assert np.ptp(drawn[:, : width // 8, 0]) > 0
    assert np.ptp(drawn[-30:-10, width // 2 : width // 2 + 20, 0]) == 0


def call(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_command(photo, tmp_path):
    photo.save(tmp_path / "photo.jpg")
    page, drawing = tmp_path / "out" / "page.html", tmp_path / "out" / "drawing.png"
    result = call(
        "--image", tmp_path / "photo.jpg", "--prompt", PROMPT, "--policy", "flowcut+vhr", "--ratio", 0.25,
        "--set", "flowcut.compat=official", "--max-new-tokens", 4, "--out", page, "--out", drawing,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "unpruned: " in result.output
    assert "kept 64 of 256 visual tokens" in result.output
    assert "Attention is edited as well" in result.output
    assert page.stat().st_size > 5_000
    with Image.open(drawing) as drawn:
        assert drawn.width > drawn.height


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--image": "nothing.jpg"}, "nothing.jpg"),
        ({"--image": __file__}, "not an image"),
        ({"--policy": "flowcutt"}, 'Did you mean "flowcut"?'),
        ({"--model": "nowhere/at-all"}, "tiny-llava"),
        ({"--out": "page.pdf"}, ".html or .png"),
        ({"--set": "compat"}, "write name=value"),
        ({"--tokens": "999"}, "256"),
    ],
)
def test_command_says_what_is_wrong(changes, message, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    photo.save(tmp_path / "photo.jpg")
    options = {"--image": str(tmp_path / "photo.jpg"), "--policy": "flowcut", **changes}
    result = call(*[word for pair in options.items() for word in pair])
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert "Traceback" not in result.output
