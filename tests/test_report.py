"""The report holds what the run says, loads nothing, and shows hostile texts as texts."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.run_folders import ANSWER, EVIL, MODELS, POLICIES, QUESTION, make_folder
from vlm_prune.cli import app
from vlm_prune.eval.report import write_report
from vlm_prune.eval.report.charts import INKS, Chart, Point, page_svg
from vlm_prune.eval.report.overlay import outside, plates, veil
from vlm_prune.eval.report.pareto import pareto_front
from vlm_prune.eval.report.results import budget_text
from vlm_prune.eval.report.samples import kept_bits, spread

# --- the Pareto front ---


@pytest.mark.parametrize(
    ("costs", "values", "front"),
    [
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
        ([3, 2, 1], [3, 1, 2], [2, 0]),
        ([1, 1, 2], [5, 6, 6], [1]),
        ([2, 2], [1, 1], [0]),
        ([], [], []),
    ],
)
def test_front(costs, values, front):
    assert pareto_front(costs, values) == front


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_front_is_what_nothing_beats(points):
    front = pareto_front([c for c, _ in points], [v for _, v in points])
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)}
    assert {points[i] for i in front} == best
    assert len(front) == len(best)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


# --- pictures ---


def covered(path: str) -> set[tuple[float, float]]:
    """Corners of the unit cells that the rectangles of a veil cover."""
    found = set()
    for x, y, width, height in re.findall(r"M(\S+) (\S+)h(\S+)v(\S+)H\S+?z", path):
        found |= {(float(x) + i, float(y)) for i in range(round(float(width)))}
        assert float(height) == 1
    return found


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_veil_covers_what_was_dropped(rows, columns, data):
    kept = data.draw(st.sets(st.integers(0, rows * columns - 1)))
    dropped = {(i % columns + 3.0, i // columns + 2.0) for i in range(rows * columns) if i not in kept}
    assert covered(veil((3, 2, 3 + columns, 2 + rows), (rows, columns), kept)) == dropped


def test_nothing_dropped_nothing_veiled():
    assert veil((0, 0, 8, 8), (2, 2), None) == veil((0, 0, 8, 8), (2, 2), range(4)) == ""


@pytest.mark.parametrize(
    ("boxes", "shown"),
    [
        pytest.param([(0, 0, 100, 50)], [((0, 0, 100, 50), [0], False)], id="stretched"),
        pytest.param([(25, 0, 75, 50)], [((0, 0, 100, 50), [0], False)], id="cropped"),
        pytest.param([(0, -25, 100, 75)], [((0, -25, 100, 75), [0], False)], id="padded"),
        pytest.param(
            [(0, 0, 50, 50), (50, 0, 100, 50), (0, 0, 100, 50)],
            [((0, 0, 100, 50), [0, 1], False), ((0, 0, 100, 50), [2], True)],
            id="thumbnail-last",
        ),
        pytest.param(
            [(0, -25, 100, 75), (0, 0, 50, 50), (50, 0, 100, 50)],
            [((0, 0, 100, 50), [1, 2], False), ((0, -25, 100, 75), [0], True)],
            id="thumbnail-first-and-padded",
        ),
        pytest.param(
            [(0, 0, 100, 50)] * 2, [((0, 0, 100, 50), [0], False), ((0, 0, 100, 50), [1], False)], id="frames"
        ),
    ],
)
def test_tiles_find_their_places(boxes, shown):
    assert [(p.view, p.tiles, p.thumbnail) for p in plates(boxes, (100, 50))] == shown


def test_what_no_tile_shows_is_outside():
    assert outside([(0, 0, 100, 50)], (0, 0, 100, 50)) == ""
    assert outside([(25, 0, 75, 50)], (0, 0, 100, 50)) == "M0 0H100V50H0zM25 0H75V50H25z"


@pytest.mark.parametrize(
    ("kept", "grid", "bits"), [([0, 5], (2, 3), "84"), ([3], (1, 4), "1"), ([], (1, 1), "0")]
)
def test_sets_of_patches_are_written_as_digits(kept, grid, bits):
    assert kept_bits(kept, grid) == bits


@pytest.mark.parametrize(
    ("count", "limit", "chosen"), [(3, 9, [0, 1, 2]), (9, 3, [0, 3, 6]), (7, 2, [0, 3]), (4, 0, [])]
)
def test_samples_are_spread_evenly(count, limit, chosen):
    assert spread(count, limit) == chosen


# --- figures ---


def some_points(count=5):
    return [
        Point(i % 2, f"p{i % 2} {EVIL}", 2.0**i, i / 9, f"t{i} {EVIL}", hollow=i == 3) for i in range(count)
    ]


def test_figures_are_svg_with_the_colours_of_the_page():
    points = [*some_points(), Point(2, "none", 64.0, 0.9, "all")]
    chart = Chart(points, EVIL, EVIL, log=True, reference=0.9)
    svg = page_svg(chart, "f0")
    root = ElementTree.fromstring(svg)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("f0-") for name in ids)
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set()
    used = {look.variable for look in chart.looks.values()} | {"var(--ink)", "var(--muted)", "var(--band)"}
    assert used <= set(INKS.values())
    assert all(variable in svg for variable in used)
    assert set(re.findall(r'(?:url\(|href=")(#[^")]*)', svg)) <= {f"#{name}" for name in ids}
    titles = [e.text for e in root.iter() if e.tag.endswith("}title")]
    assert {p.title for p in points} <= set(titles)
    assert any(e.text == EVIL for e in root.iter())  # the axis's name, not read as a formula
    assert svg == page_svg(chart, "f0")


def test_a_name_that_is_a_colour_stays_a_name():
    svg = page_svg(Chart([Point(0, "#1c1b19", 1.0, 1.0, "#1c1b19")], "#66635c", "up"), "f")
    texts = {e.text for e in ElementTree.fromstring(svg).iter()}
    assert {"#1c1b19", "#66635c"} <= texts


# --- the page ---


class Page(HTMLParser):
    """Elements, attributes and texts of a page, read as a browser's tokeniser reads them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.scripts, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        (self.scripts if self.inside == "script" else self.texts).append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The hostile run's folder, its report as text and as elements, and the data inside."""
    folder = make_folder(tmp_path_factory.mktemp("runs") / "run <b>&amp;")
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    return folder, text, page, json.loads(page.scripts[0])


def test_the_page_loads_nothing(report):
    _, text, page, _ = report
    for tag, attributes in page.elements:
        assert (
            tag not in ("link", "iframe", "object", "embed", "base", "form")
            or attributes.get("rel") == "icon"
        )
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert re.findall(r"@import|url\((?!#)", text) == []


def test_hostile_texts_stay_texts(report):
    _, text, page, data = report
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert [tag for tag, _ in page.elements].count("img") == 0
    shown = "".join(page.texts)
    assert "run <b>&amp;: visual-token pruning" in shown
    assert shown.count(EVIL) > 10
    assert "{{7*7}}" in shown  # nothing is evaluated
    assert "</script><script>" not in text
    task = data["tasks"][0]
    assert task["samples"][0]["question"] == QUESTION
    assert task["answers"][0]["given"][0]["text"] == ANSWER
    assert data["entries"][1]["policy"] == f"cut {EVIL}"


def test_the_table_has_every_setting(report):
    _, _, page, _ = report
    rows = [a for tag, a in page.elements if tag == "tr" and "data-model" in a]
    assert [row["data-model"] for row in rows] == [model for model in MODELS for _ in POLICIES]
    shown = "".join(page.texts)
    for figure in ("0.900", "0.800", "0.700", "30.0", "3.00", "0.600–0.900"):  # noqa: RUF001
        assert figure in shown


def test_figures_and_fronts(report):
    _, _, page, _ = report
    # two models, two tasks, three costs, of which the first is drawn for a desk and for a phone
    assert Counter(a["class"] for _, a in page.elements if a.get("class", "").startswith("chart")) == {
        "chart wide": 4, "chart tall": 4, "chart small": 8,
    }  # fmt: skip
    captions = re.findall(r"Front by [a-zA-Z ]+", "".join(page.texts))
    assert captions == ["Front by tokens", "Front by prefill time", "Front by KV cache"] * 4


def test_failures_warnings_and_config_are_told(report):
    _, _, page, _ = report
    shown = "".join(page.texts)
    assert f"{EVIL}, {EVIL}, 64 tokens, {EVIL}: {EVIL}" in shown
    assert f"3 answers say neither {EVIL}" in shown
    assert f"# {EVIL}\nmodels: []" in shown


def test_samples_share_what_is_equal(report):
    _, _, _, data = report
    assert len(data["images"]) == 2
    assert all(image["source"].startswith("data:image/") for image in data["images"])
    assert len(data["layouts"]) == 2
    assert [len(plate["tiles"]) for plate in data["layouts"][1]] == [2, 1]
    assert [plate["thumbnail"] for plate in data["layouts"][1]] == [False, True]
    captions = data["tasks"][1]
    assert captions["samples"][0]["label"] == f"cat, {EVIL}"
    first = captions["answers"][0]["given"][0]
    start, end, named = first["marks"][0]
    assert first["text"][start:end] == "dog"
    assert named == f"dog {EVIL}"


def test_a_run_without_speed_or_unpruned_cells(tmp_path):
    folder = make_folder(tmp_path / "run", speed=False, policies=("inside",))
    (folder.path / "failed.json").unlink()
    page = Page(write_report(folder, tmp_path / "else.html", samples=2).read_text(encoding="utf-8"))
    shown = "".join(page.texts)
    charts = [a["class"] for _, a in page.elements if a.get("class", "").startswith("chart")]
    assert charts == ["chart wide", "chart tall"] * 4
    assert "no speed task" in shown
    assert "no answer to compare with" in shown
    assert "2 of 4 samples of pope" in shown
    assert "Remarks" not in shown


@pytest.mark.parametrize("left", [None, b"", b"broken", 40, -30])
def test_images_that_are_gone_or_broken_are_named(left, tmp_path):
    folder = make_folder(tmp_path / "run", speed=False)
    path = folder.path / "images" / "1.png"
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(left if isinstance(left, bytes) else content[:left])
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert [image["missing"] for image in json.loads(page.scripts[0])["images"]] == ["", "images/1.png"]
    assert "Images that could not be read" in "".join(page.texts)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"ratio": 0.125}, "12.5 %"),
        ({"tokens": 64}, "64 tokens"),
        ({"tokens": 64, "per": "image"}, "64 tokens per image"),
        ({}, "–"),  # noqa: RUF001
    ],
)
def test_budgets_as_people_write_them(budget, text):
    assert budget_text(budget) == text


def test_cells_with_other_samples_are_refused(tmp_path):
    folder = make_folder(tmp_path / "run", speed=False)
    path = folder.cell("0.1.pope") / "samples.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=r"samples of 0\.1\.pope are others"):
        write_report(folder)


def test_without_samples(tmp_path):
    text = write_report(make_folder(tmp_path / "run", speed=False), samples=0).read_text(encoding="utf-8")
    assert "data:image" not in text
    assert 'id="samples"' not in text


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command(tmp_path):
    folder = make_folder(tmp_path / "run")
    result = call("report", folder.path)
    assert result.exit_code == 0, result.output
    assert (folder.path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda path: (path / "results.json").unlink(), [], "results.json does not exist"),
        (lambda path: (path / "results.json").write_text("[]"), [], "no finished cell"),
        (
            lambda path: (path / "cells/0.1.pope/samples.jsonl").unlink(),
            [],
            "samples.jsonl is gone or not whole",
        ),
        (
            lambda path: (path / "cells/0.1.pope/samples.jsonl").write_text("{}\n" * 3),
            [],
            "samples.jsonl is not whole. Run the config again",
        ),
        (lambda path: None, ["--samples", "-1"], "choose 0 or more"),
    ],
)
def test_command_says_what_is_wrong(spoil, arguments, message, tmp_path):
    folder = make_folder(tmp_path / "run")
    spoil(folder.path)
    result = call("report", folder.path, *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
