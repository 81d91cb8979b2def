"""Who beats whom in a run folder written by hand; what the comparison page and the exports say of it."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

from tests.run_folders import EVIL, MODELS, make_folder, record
from tests.test_report import Page
from vlm_prune.cli import app
from vlm_prune.eval.report import export_report
from vlm_prune.eval.report.exhibits import Table, latex, slug
from vlm_prune.eval.report.page import grouped
from vlm_prune.eval.runs.folder import RunFolder, write_json, write_lines
from vlm_prune.eval.runs.standings import key_of, standings
from vlm_prune.eval.runs.table import joined, markdown, tasks_of

N = 20
RIGHT = {"none": range(20), "good": range(19), "bad": range(8), "idle": range(20), "copy": range(8)}
"""Which of twenty questions a policy gets right, each about an image of its own."""


def make_run(path) -> RunFolder:
    folder = RunFolder(path)
    rows = []
    for policy, right in reversed(RIGHT.items()):  # the unpruned model is found wherever it stands
        ratio = {} if policy == "none" else {"ratio": 0.5}
        told = []
        for i in range(N):
            one = record("one", "none" if policy in ("none", "idle") else "cut", "pope", i)
            one |= {"image": {**one["image"], "path": f"images/{i}.png"}, "label": "yes", "split": ""}
            one |= {"answer": "yes" if i in right else "no", "scores": {"said": "yes", "correct": i in right}}
            if policy == "idle":
                one["tiles"] = [{**tile, "kept": list(range(16))} for tile in one["tiles"]]
            told.append(one)
        write_lines(folder.cell(policy) / "samples.jsonl", told)
        rows.append(
            {
                "cell": policy, "model": "one", "policy": policy, "task": "pope", "kind": "pope", "n": N,
                "stages": ["encode"], "budget": ratio, "tokens": told[0]["tokens"], "visual_tokens": 16,
                "metrics": {"accuracy": len(right) / N, "f1": 0.5}, "intervals": {}, "undefined": [], "warnings": [],
            }
        )  # fmt: skip
    write_json(path / "results.json", rows)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


HALF = json.dumps({"ratio": 0.5})


def test_everybody_meets_at_the_same_budget_and_the_unpruned_model(run):
    found = standings(run, run.rows())
    assert len(found.pairs) == 10
    assert found.met("one", "pope", "accuracy", ("good", HALF)) == {
        ("none", "{}"): "ties", ("idle", HALF): "ties", ("bad", HALF): "beats", ("copy", HALF): "beats",
    }  # fmt: skip
    assert set(found.met("one", "pope", "accuracy", ("bad", HALF)).values()) == {"loses", "ties"}


def test_a_pair_holds_what_its_verdict_rests_on(run):
    pairs = standings(run, run.rows()).pairs
    (pair,) = [p for p in pairs if {p.first[0], p.second[0]} == {"none", "bad"}]
    assert (pair.first, pair.wins, pair.losses, pair.test) == (("none", "{}"), 12, 0, "McNemar")
    assert pair.value == pytest.approx(0.6)
    assert pair.p == pytest.approx(2 / 2**12)
    assert pair.p < pair.adjusted <= 10 * pair.p
    assert 0.3 < pair.low < 0.6 < pair.high < 0.9


def test_those_that_did_not_act_are_named(run):
    idle = standings(run, run.rows()).idle
    assert idle[("one", "idle", HALF)] == ("none", "{}")  # that all are kept may be written out
    assert len(idle) == 2
    assert {("one", "bad", HALF): ("copy", HALF), ("one", "copy", HALF): ("bad", HALF)}.items() & idle.items()


def test_cells_whose_samples_are_gone_take_no_part(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder.cell("good") / "samples.jsonl").unlink()
    (folder.cell("bad") / "samples.jsonl").write_text("{}\n")
    found = standings(folder, folder.rows())
    assert {side[0] for pair in found.pairs for side in (pair.first, pair.second)} == {"none", "idle", "copy"}


def test_tables_say_it(run):
    rows = run.rows()
    lines = joined(rows, {}, 1, standings(run, rows))
    good = next(line for line in lines if line["policy"] == "good")
    assert good["pope_accuracy_standing"] == {"beats": 2, "ties": 2, "loses": 0}
    assert good["pope_accuracy_to_unpruned"] == "ties"
    text = markdown(lines, tasks_of(rows))
    assert "accuracy: beats / ties / loses" in text
    assert "| 2 / 2 / 0 | ties |" in text
    assert "- idle 0.5 as none" in text
    assert "beats" not in markdown(joined(rows, {}, 1), tasks_of(rows))


def test_object_f1_of_a_pair_is_that_of_the_scores():
    """One caption names two of three objects and one that is not there: P = 2/3, R = 2/3."""
    from vlm_prune.eval.runs.standings import JUDGED

    said = [("cat", False), ("dog", True), ("cat", False), ("bed", False)]
    scores = {"mentions": [{"object": name, "hallucinated": wrong} for name, wrong in said]}
    counts = {j.name: j.counts({"scores": scores, "label": ["cat", "bed", "cup"]}) for j in JUDGED["chair"]}
    assert counts == {"f1": (4.0, 6.0), "chair_s": (1.0, 1.0)}


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_compare_shows_where_two_differ(tmp_path):
    folder = make_folder(tmp_path / "run")
    result = call("compare", folder.path, "none", "inside", "--samples", 3, "--model", "one")
    assert result.exit_code == 0, result.output
    assert (
        "none 100 % ties with inside 50 % on accuracy: +1.000 [+1.000, +1.000], better on 4 and worse on 0"
        in result.output
    )
    text = (folder.path / "compare.none.inside.html").read_text(encoding="utf-8")
    page = Page(text)
    shown = "".join(page.texts)
    assert "Their answers differ on 4 of 4 samples; 3 of these are shown" in shown
    assert [tag for tag, _ in page.elements].count("article") == 6  # of two tasks
    assert [tag for tag, _ in page.elements].count("script") == 0
    assert EVIL in shown
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nona", "inside"], "unknown policy 'nona'. Did you mean 'none'?"),
        (["none", "none"], "with another policy than itself"),
        (["none", "inside", "--model", "three"], "unknown model 'three'"),
        (["none", "inside", "--samples", "-1"], "choose 0 or more"),
    ],
)
def test_compare_says_what_is_wrong(arguments, message, tmp_path):
    folder = make_folder(tmp_path / "run")
    result = call("compare", folder.path, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_everything_can_be_taken_away(run, tmp_path):
    paths = export_report(run, tmp_path / "paper")
    kinds = {}
    for path in paths:
        kinds.setdefault(path.stem, set()).add(path.suffix)
        assert path.stat().st_size > 100
    assert sorted(map(sorted, kinds.values())) == [
        [".csv", ".pdf", ".svg"], [".csv", ".pdf", ".svg", ".tex"], [".csv", ".pdf", ".svg", ".tex"],
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "paper" / "cells-1-one.csv").open()))
    assert [(row["policy"], float(row["pope_accuracy"])) for row in rows] == [
        (row["policy"], row["metrics"]["accuracy"]) for row in run.rows()
    ]
    assert (tmp_path / "paper" / "pairs.pdf").read_bytes().startswith(b"%PDF")
    again = export_report(run, tmp_path / "again")
    assert [a.read_bytes() for a in again] == [b.read_bytes() for b in paths]


def test_names_and_cells_are_escaped():
    assert slug("a/b", "..", "c d") == "a-b-c-d"
    table = Table(["p_1", "50 %"], [[r"\x{}", "–"]], [False, True], [None], [], [])  # noqa: RUF001
    assert r"p\_1 & 50 \% \\" in latex(table)
    assert r"\textbackslash{}x\{\} & -- \\" in latex(table)


@pytest.mark.parametrize(
    ("told", "kinds"),
    [
        ([("a", "3 of 9 fail"), ("b", "5 of 9 fail"), ("c", "late")], [("3 to 5 of 9 fail", 2), ("late", 1)]),
        ([("a", "# fails"), ("b", "4 fails")], [("# fails", 1), ("4 fails", 1)]),
        ([], []),
    ],
)
def test_warnings_that_differ_in_numbers_are_one(told, kinds):
    assert [(kind["text"], len(kind["cells"])) for kind in grouped(told)] == kinds


def test_keys_are_those_of_rows():
    assert key_of({"model": MODELS[0], "policy": "p", "budget": {"tokens": 4}}) == (
        "one",
        "p",
        '{"tokens": 4}',
    )
