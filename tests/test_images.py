"""Images as cameras, scanners and instruments write them: upright, scaled, named; and runs in which some are broken."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.processors import qwen2_vl
from vlm_prune.cli import app
from vlm_prune.eval.images import image_size, load_image, upright_rgb
from vlm_prune.eval.learn.data import examples
from vlm_prune.eval.lmms.prompts import open_image
from vlm_prune.eval.measure import model_inputs, prompt_text
from vlm_prune.eval.models import model_path
from vlm_prune.eval.runs import RunFolder, run
from vlm_prune.eval.runs.images import Picture
from vlm_prune.eval.runs.yaml_file import parse_config

weights = pytest.mark.skipif(
    not (model_path("tiny-llava") / "model.safetensors").exists(),
    reason="the package was installed without the weights of the test models",
)

CORNERS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [255, 0, 255]]], np.uint8
)
"""Two rows of three colours, upright."""

STORED = {
    1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1],
    5: CORNERS.swapaxes(0, 1), 6: np.rot90(CORNERS), 7: CORNERS[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(CORNERS, -1),
}  # fmt: skip
"""EXIF orientation -> how the pixels lie in the file."""


@pytest.fixture(params=STORED)
def turned(request, tmp_path):
    """A photo that is stored in one of the eight ways."""
    image = Image.fromarray(np.ascontiguousarray(STORED[request.param]))
    exif = image.getexif()
    exif[0x0112] = request.param
    path = tmp_path / "photo.png"
    image.save(path, exif=exif)
    return path


def test_every_reader_turns_photos_upright(turned, tmp_path):
    content = turned.read_bytes()
    (tmp_path / "rows.jsonl").write_text('{"image": "photo.png", "question": "?", "answer": "a"}')
    picture = Picture.of("photo.png", tmp_path, "here")
    bare = Picture.of({"bytes": content, "path": "photo.png"}, None, "here")
    with Image.open(turned) as opened:
        held = Picture.of(opened, None, "here")
    kept = RunFolder(tmp_path).image({"image": {"path": bare.keep(tmp_path)}})
    with Image.open(turned) as opened:
        of_tasks = [open_image(opened), open_image(str(turned)), open_image({"bytes": content})]
    (example,) = examples(tmp_path / "rows.jsonl", "m", 1, 0)
    read = [load_image(turned), load_image(content), picture.load(), bare.load(), held.load()]
    for image in (*read, kept, *of_tasks, example.image):
        assert np.array_equal(np.asarray(image), CORNERS)
    assert {picture.size, bare.size, held.size, image_size(turned)} == {(3, 2)}


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GREY = (255 * RAMP).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        ((65535 * RAMP).round().astype(np.uint16), "png"),
        ((65535 * RAMP).round().astype(np.uint16), "tiff"),
        ((65535 * RAMP).round().astype(np.int32), "tiff"),
        ((255 * RAMP).round().astype(np.int32), "tiff"),
        ((1e6 * RAMP - 3e5).astype(np.int32), "tiff"),
        (RAMP.astype(np.float32), "tiff"),
        ((255 * RAMP).astype(np.float32), "tiff"),
        ((65535 * RAMP).astype(np.float32), "tiff"),
        ((2 * RAMP - 1).astype(np.float32), "tiff"),
    ],
    ids=lambda value: getattr(value, "dtype", value),
)
def test_more_than_eight_bits_are_scaled(values, ending, tmp_path):
    path = tmp_path / f"image.{ending}"
    Image.fromarray(values).save(path)
    found = np.asarray(load_image(path)).astype(int)
    assert np.abs(found - GREY[..., None]).max() <= 1
    assert found.min() == 0
    assert found.max() == 255


def test_a_dark_scan_stays_dark_and_an_even_image_is_no_error():
    dark = np.full((4, 4), 6554, np.uint16)
    assert np.unique(np.asarray(upright_rgb(Image.fromarray(dark)))) == [26]
    assert np.unique(np.asarray(upright_rgb(Image.fromarray(np.full((4, 4), -3.0, np.float32))))) == [0]
    with pytest.raises(ValueError, match="a pixel is not finite"):
        upright_rgb(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.write_text("no image"), "it is not an image that Pillow knows"),
        (lambda path: path.write_bytes(b""), "it is not an image that Pillow knows"),
        (
            lambda path: Image.fromarray(np.full((2, 2), np.inf, np.float32)).save(path, "TIFF"),
            "a pixel is not finite",
        ),
    ],
)
def test_errors_name_the_file(make, reason, tmp_path):
    path = tmp_path / "photo.png"
    make(path)
    with pytest.raises(ValueError, match=f"image .*photo.png cannot be read: {reason}"):
        load_image(path)
    (tmp_path / "rows.jsonl").write_text('{"image": "photo.png", "question": "?", "answer": "a"}')
    with pytest.raises(
        ValueError, match=rf"image photo.png \(.*rows.jsonl, record 1\) cannot be read: {reason}"
    ):
        examples(tmp_path / "rows.jsonl", "m", 1, 0)
    if path.is_file():
        with pytest.raises(ValueError, match=f"photo.png cannot be read: {reason}"):
            open_image({"bytes": path.read_bytes() or b" ", "path": "photo.png"})


def test_a_processor_that_refuses_an_image_is_an_error_that_names_it():
    _, processor = qwen2_vl()
    images = [Image.new("RGB", size) for size in ((64, 64), (2000, 1))]
    texts = [prompt_text(processor, "What?")] * 2
    with pytest.raises(
        ValueError, match=r"Qwen2VLProcessor cannot take image b.png of 2000 x 1 pixels: .*ratio"
    ):
        model_inputs(processor, images, texts, ["a.png", "b.png"], padding=True)


@weights
@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (1, 1)])
def test_odd_shapes_can_be_looked_at(size, tmp_path):
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "odd.png")
    out = [tmp_path / "page.html", tmp_path / "page.out.png"]
    options = ["--image", tmp_path / "odd.png", "--max-new-tokens", 1, "--out", out[0], "--out", out[1]]
    result = CliRunner().invoke(app, ["inspect", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert all(path.exists() for path in out)


# --- runs ---

ROWS = 6
TASKS = """\
models: [tiny-llava]
policies: [{policy: flowcut, ratios: [0.25]}, none]
batch_size: 4
on_bad_image: skip
tasks:
  - {task: pope, data: &rows {jsonl: ROWS, images: IMAGES}, max_new_tokens: 2}
  - {task: chair, data: *rows, max_new_tokens: 2}
  - {task: vqa, data: *rows, max_new_tokens: 2}
  - {task: speed, data: *rows, rounds: 1, prompts: 2, max_new_tokens: 1}
output: OUT
"""


@pytest.fixture
def data(tmp_path):
    """Two rows each of six images: number 0 is no image, 1 is cut off, 2 is not there."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(ROWS):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "0.png").write_text("nothing")
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").unlink()
    rows = [
        {"id": n, "image": f"{n % ROWS}.png", "question": "?", "answer": "yes", "objects": ["dog"]}
        for n in range(2 * ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = TASKS.replace("ROWS", str(tmp_path / "rows.jsonl")).replace("IMAGES", str(folder))
    return folder, text.replace("OUT", str(tmp_path / "run")), whole


def execute(text: str) -> tuple[run.Run, str]:
    screen = io.StringIO()
    return run.execute(
        parse_config(text, "run.yaml"), Console(file=screen, width=200), text
    ), screen.getvalue()


@weights
def test_bad_images_are_skipped_and_counted(data, tmp_path, monkeypatch):
    folder, text, whole = data
    done, screen = execute(text)
    assert not done.failed
    assert "skipped samples of 3 images, see skipped.json; first image " in screen
    assert f"{folder}/0.png ({tmp_path}/rows.jsonl, row 1) cannot be read: it is not an image" in screen
    rows = RunFolder(tmp_path / "run").rows()
    assert [(row["kind"], row["n"], row["skipped"]) for row in rows[:4]] == [
        ("pope", 6, 6), ("chair", 6, 6), ("vqa", 6, 6), ("speed", 2, 0),
    ]  # fmt: skip
    assert rows[0]["warnings"][0].startswith("6 of 12 samples are skipped, first: image ")
    records = RunFolder(tmp_path / "run").samples(rows[0]["cell"])
    assert [record["id"] for record in records] == ["3", "4", "5", "9", "10", "11"]
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert [*skipped] == [f"tiny-llava, {task}" for task in ("pope", "chair", "vqa")]
    assert [
        sum(why in line for line in skipped["tiny-llava, vqa"]) for why in ("0.png", "1.png", "2.png")
    ] == [2, 2, 2]
    assert (
        "6 questions (6 skipped) and 6 captions (6 skipped)" in (tmp_path / "run" / "results.md").read_text()
    )
    assert "6 of 12 samples are skipped" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")

    # an image that was mended is asked about, the others are not asked again
    (folder / "1.png").write_bytes(whole)
    asked: list[str] = []
    ask = run.ask
    monkeypatch.setattr(
        run, "ask", lambda model, batch, *rest: asked.extend(s.id for s in batch) or ask(model, batch, *rest)
    )
    again, screen = execute(text)
    assert (
        "6 finished cells are not whole and are done again; first 6 samples were skipped, 4 are now" in screen
    )
    assert sorted(asked) == sorted(["1", "7"] * 6)
    assert {row["skipped"] for row in again.finished_rows() if row["kind"] != "speed"} == {4}

    # as the file says without the key: one clear error before a model is loaded, then failed cells
    strict = text.replace("on_bad_image: skip\n", "")
    with pytest.raises(ValueError, match=r"row 3: there is no image .*2\.png"):
        execute(strict)
    (folder / "2.png").write_bytes(whole)
    failed, _ = execute(strict)
    assert all("0.png" in problem["error"] for problem in failed.failed.values())
    assert len(failed.failed) == 8


@weights
def test_a_task_without_a_good_image_is_an_error(data):
    folder, text, _ = data
    for path in folder.iterdir():
        path.write_text("nothing")
    with pytest.raises(
        ValueError, match=r"task pope: none of its 12 images can be read, first: image .*0\.png"
    ):
        execute(text[: text.index("  - {task: chair")] + text[text.index("output") :])
