"""The report in headless Chromium: on a desk, on a phone, in the dark and in print; and its controls work."""

from __future__ import annotations

import numpy as np
import pytest

from tests.browser import ask, look, needs_chromium, pages, quoted
from tests.run_folders import EVIL, MODELS, make_crowd, make_folder
from vlm_prune.eval.report import write_report
from vlm_prune.eval.report.looks import PLACES
from vlm_prune.registry import POLICIES

pytestmark = [needs_chromium, pytest.mark.chromium]

WIDTHS = pytest.mark.parametrize("width", [360, 400, 768, 1280, 1300])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_folder(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """Thirty-five policies at three budgets."""
    names = [*POLICIES, "flowcut (official)", *PLACES]
    folder = make_crowd(tmp_path_factory.mktemp("runs") / "crowd", list(dict.fromkeys(names))[:35])
    return write_report(folder, samples=0)


CHOOSE = """
const pick = (id, value) => {
  const select = document.getElementById(id);
  select.value = value;
  select.dispatchEvent(new Event("change"));
};
const option = (id, words) => [...document.getElementById(id).options].find((o) => o.text.startsWith(words)).value;
const box = (selector) => {
  const found = document.querySelector(selector).getBoundingClientRect();
  return [found.left, found.top, found.width, found.height];
};
const text = (id) => document.getElementById(id).textContent;
"""


@WIDTHS
def test_nothing_sticks_out(page, width):
    seen = ask(
        page,
        """
        const wide = [...document.querySelectorAll("body *")].filter((e) =>
          !e.closest(".scroll, svg, .hidden") && e.getBoundingClientRect().right > innerWidth + 1);
        return [document.documentElement.scrollWidth, wide.map((e) => e.outerHTML.slice(0, 80))];
        """,
        width,
    )
    assert seen[0] <= width
    assert seen[1] == []


def test_hostile_texts_do_nothing(page):
    title, images, shown = ask(
        page, CHOOSE + 'return [document.title, document.images.length, text("words")];'
    )
    assert title == "run: visual-token pruning"
    assert images == 0
    assert EVIL in shown


@pytest.mark.parametrize(("dark", "least", "most"), [(False, 240, 256), (True, 0, 40)], ids=["light", "dark"])
def test_colours_follow_the_reader(page, dark, least, most):
    seen = look(page, 900, 900, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    paper = float(np.median(seen.reshape(-1, 3), 0).mean())
    assert least <= paper < most
    assert abs(seen.astype(int) - int(paper)).max() > 120  # and there is ink on it


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize(
    ("model", "entry", "lit"),
    [
        # the middle square of the image, 4 x 4 patches, of which the first two are kept; beside it, what was cropped
        (MODELS[0], "cut", {(30, 10): "kept", (50, 10): "kept", (70, 10): "dropped", (10, 10): "unseen"}),
        # two tiles of 2 x 2 patches, the upper rows kept
        (MODELS[1], "cut", {(15, 20): "kept", (45, 20): "kept", (75, 20): "kept", (90, 60): "dropped"}),
        (MODELS[0], "none", {(30, 10): "kept", (90, 70): "kept", (10, 10): "unseen"}),
        # dropped inside the decoder, all but the first
        (MODELS[0], "inside", {(30, 10): "kept", (50, 10): "later", (90, 70): "later"}),
    ],
    ids=["cropped", "tiles", "unpruned", "inside"],
)  # fmt: skip
def test_kept_patches_shine_and_dropped_ones_fade(page, model, entry, lit, width, tmp_path):
    steps = (
        CHOOSE
        + f"""
        pick("model", {quoted(model)}); pick("entry", option("entry", "{entry}"));
        document.documentElement.style.scrollBehavior = "auto";
        document.querySelectorAll("header, #trade-offs, #table").forEach((e) => e.remove());
    """
    )
    box = ask(
        page,
        steps + 'return box("#pictures .plate");',
        width,
    )
    shown = tmp_path / "shown.html"
    shown.write_text(page.read_text(encoding="utf-8") + f"<script>{steps}</script>", encoding="utf-8")
    pixels = look(shown, width, 1000)
    for (x, y), state in lit.items():
        row, column = round(box[1] + y * box[3] / 80), round(box[0] + x * box[2] / 120)
        colour = pixels[row, column].astype(int)
        redness = colour[0] - colour[1:].mean()
        low, high = {"kept": (150, 200), "later": (60, 110), "dropped": (15, 45), "unseen": (3, 15)}[state]
        assert low < redness < high, f"{state} at {x}, {y}: {colour}"


def test_samples_turn_and_compare(page):
    first, second, answers, count, only = ask(
        page,
        CHOOSE
        + """
        pick("task", "1");
        pick("entry", option("entry", "cut"));
        const first = [text("count"), text("kept"), text("words"), document.querySelectorAll("#words mark").length];
        document.getElementById("next").click();
        const second = text("count");
        const answers = [...document.querySelectorAll("#answers tr")].map((row) => row.cells[3].textContent);
        document.querySelectorAll("#answers tr")[0].click();
        const chosen = text("kept");
        document.getElementById("changed").click();
        return [first, second, answers, chosen, text("count")];
        """,
    )
    assert first[0] == "1 of 4"
    assert "2 of 16 visual tokens" in first[1]
    assert "In the image" in first[2]
    assert "Answer of the unpruned model" in first[2]
    assert first[3] == 2  # the unpruned answer and the pruned one name a dog
    assert second == "2 of 4"
    assert len(answers) == 3
    assert "(not in the image)" in answers[0]
    assert "16 of 16" in count
    assert only == "none"  # the unpruned answer is the unpruned answer


def test_the_table_sorts_and_filters(page):
    found = ask(
        page,
        """
        const rows = () => [...document.querySelectorAll("#cells tbody tr")].filter((r) => !r.hidden);
        const column = (i) => rows().map((r) => r.cells[i].dataset.value);
        const heads = [...document.querySelectorAll("#cells thead button")];
        const head = heads.find((one) => one.textContent.startsWith("accuracy"));
        const place = Number(head.dataset.column);
        head.click();
        const down = column(place), one = head.closest("th").ariaSort;
        head.click();
        const up = column(place), two = head.closest("th").ariaSort;
        const box = document.getElementById("filter");
        box.value = "prefill 50"; box.dispatchEvent(new Event("input"));
        return [down, up, one, two, rows().length];
        """,
    )
    down, up = [float(v) for v in found[0]], [float(v) for v in found[1]]
    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    assert found[2:4] == ["descending", "ascending"]
    assert found[4] == 2


def test_a_policy_lights_up_in_the_figures(page):
    lit = ask(
        page,
        """
        document.querySelectorAll(".chips button")[1].click();
        return [...document.querySelectorAll("svg .lit")].map((e) => e.getAttribute("class"));
        """,
    )
    assert lit
    assert all("s1" in classes.split() for classes in lit)


@pytest.mark.parametrize("width", [360, 1280])
def test_figures_are_drawn(page, width):
    """Axes, dots and names of every panel have a size, and the text can be read."""
    sizes = ask(
        page,
        """
        const shown = [...document.querySelectorAll(".chart svg")].filter((svg) => svg.getBoundingClientRect().width);
        return shown.map((svg) => {
          const label = svg.querySelector("text").getBoundingClientRect();
          return [svg.getBoundingClientRect().width, svg.querySelectorAll(".point").length, label.height];
        });
        """,
        width,
    )
    assert len(sizes) == 12
    for panel, dots, text in sizes:
        assert panel > 250
        assert dots == 3
        assert text > 8


def test_print_has_everything(page):
    assert 2 <= pages(page) <= 8


@pytest.mark.parametrize("width", [400, 1300])
def test_a_crowd_sticks_out_nowhere_and_labels_stand_free(crowd, width):
    scroll, labels, clashes = ask(
        crowd,
        """
        const named = (e) => [e.textContent, e.getBoundingClientRect()];
        const boxes = (svg, what) => [...svg.querySelectorAll(what)].map(named);
        const between = (low, value, high, by) => low + by < value && value < high - by;
        const inside = (x, y, box, by) => between(box.left, x, box.right, by) && between(box.top, y, box.bottom, by);
        const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
        const clashes = [];
        let count = 0;
        for (const svg of document.querySelectorAll(".chart svg")) {
          const shown = boxes(svg, ".label").filter(([, box]) => box.width);
          const dots = boxes(svg, ".point use");
          count += shown.length;
          shown.forEach(([name, box], i) => {
            for (const [other, beside] of shown.slice(i + 1)) if (!apart(box, beside)) clashes.push([name, other]);
            for (const [other, dot] of dots) {
              if (inside((dot.left + dot.right) / 2, (dot.top + dot.bottom) / 2, box, 0)) clashes.push([name, "a dot"]);
            }
            for (const line of svg.querySelectorAll(".series path")) {
              const place = line.getScreenCTM(), length = line.getTotalLength();
              for (let at = 0; at <= length; at += 1) {
                const spot = line.getPointAtLength(at).matrixTransform(place);
                if (inside(spot.x, spot.y, box, 2)) {
                  clashes.push([name, "a line"]);
                  break;
                }
              }
            }
          });
        }
        return [document.documentElement.scrollWidth, count, clashes];
        """,
        width,
    )  # fmt: skip
    assert scroll <= width
    assert clashes == []
    assert labels >= 40  # of six charts


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_two_policies_look_alike_and_each_looks_the_same_everywhere(crowd, dark):
    keys, series, cells = ask(
        crowd,
        """
        if (DARK) document.getElementById("theme-dark").click();
        const fill = (e) => getComputedStyle(e).fill, look = (e) => [e.getAttribute("d"), fill(e)].join(" ");
        const chips = [...document.querySelectorAll(".chips button")];
        const keys = chips.map((chip) => [chip.textContent.trim(), look(chip.querySelectorAll("path")[1])]);
        const colours = chips.map((chip) => fill(chip.querySelectorAll("path")[1]));
        const series = chips.map((chip, i) => {
          const lines = document.querySelectorAll(`.chart .series.s${i} path`);
          return lines.length && [...lines].every((line) => getComputedStyle(line).stroke === colours[i]);
        });
        const rows = [...document.querySelectorAll("#cells tbody tr")];
        const told = ({ cells: [cell] }) => [cell.textContent.trim(), look(cell.querySelector("path"))];
        return [keys, series, rows.map(told)];
        """.replace("DARK", str(dark).lower()),
    )
    assert len(keys) == 35
    assert len({look for _, look in keys}) == 35
    assert all(series)
    assert {tuple(cell) for cell in cells} == {tuple(key) for key in keys}


def test_nothing_is_cut_off_on_a_desk(crowd):
    table, box, text, room = ask(
        crowd,
        """
        const cells = document.getElementById("cells"), filter = document.getElementById("filter");
        const style = getComputedStyle(filter), pen = document.createElement("canvas").getContext("2d");
        pen.font = `${style.fontSize} ${style.fontFamily}`;
        const room = filter.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
        return [cells.offsetWidth, cells.parentElement.clientWidth, pen.measureText(filter.placeholder).width, room];
        """,
        1300,
    )
    assert table <= box
    assert text < room


def test_columns_come_in_groups_where_there_is_no_room_for_all(crowd):
    first, shown, every = ask(
        crowd,
        """
        const count = () => document.querySelectorAll("#cells thead tr:last-child th:not([hidden])").length;
        const group = document.getElementById("group"), first = [group.value, count()];
        group.value = ""; group.dispatchEvent(new Event("change"));
        return [first[0], first[1], count()];
        """,
        400,
    )
    assert first == "pope"
    assert shown < every


def test_the_reader_turns_the_lights_off_and_on(page):
    assert ask(
        page,
        """
        const paper = () => getComputedStyle(document.body).backgroundColor;
        return ["dark", "light"].map((theme) => { document.getElementById(`theme-${theme}`).click(); return paper(); });
        """,
    ) == ["rgb(21, 21, 19)", "rgb(255, 255, 252)"]


def test_files_to_take_away_are_in_the_page(page):
    links = ask(
        page,
        """
        return [...document.querySelectorAll(".downloads a")].map((a) => {
          const [address, content] = a.href.split(",");
          return [a.download, address, atob(content).slice(0, 40)];
        });
        """,
    )  # fmt: skip
    starts = {"pdf": "%PDF-", "csv": ("policy,", "model,"), "tex": r"% \usepackage{booktabs}"}
    assert {name.rsplit(".", 1)[1] for name, _, _ in links} == set(starts)
    for name, address, begin in links:
        assert address.startswith("data:")
        assert begin.startswith(starts[name.rsplit(".", 1)[1]])
    assert len({name for name, _, _ in links}) == len(links)


def test_warnings_of_many_cells_are_told_once(crowd):
    told = ask(
        crowd,
        'return [...document.querySelectorAll("#remarks > ul > li")].map((e) => e.firstChild.data.trim());',
    )
    assert told == ["3 to 35 answers say neither yes nor no"]
