"""AMBER, MME, RePOPE, and the measures of ChartQA and DocVQA, on cases that were worked out by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vlm_prune.eval.amber import (
    Words,
    amber_score,
    official_f1,
    plain_nouns,
    read_description,
    read_words,
    read_yes_no,
    score_descriptions,
    score_questions,
)
from vlm_prune.eval.mme import mme_scores, read_answer
from vlm_prune.eval.pope import relabelled, score_pope
from vlm_prune.eval.runs.scoring import Scorer
from vlm_prune.eval.runs.tasks import VqaTask
from vlm_prune.eval.scores_cli import app
from vlm_prune.eval.vqa import METRICS, anls, relaxed_accuracy

RELATIONS = {"sky": ["heaven"], "tree": ["oak", "pine"], "man": ["person"], "bird": ["crow"], "sun": []}
NEAR = {("forest", "tree"), ("moon", "sun")}
KNOWN = {"forest", "moon", "cloud"}


def words(**more):
    return Words(
        RELATIONS | {name: [] for name in KNOWN},
        nouns=lambda text: [word.strip(".,") for word in text.split()],
        safe={"cloud"},
        similar=lambda one, other: (one, other) in NEAR,
        **more,
    )


def test_nouns_of_a_description():
    found = read_description(
        "a pine, an oak, heaven, a cloud, a forest, a crow and a crow, the moon.",
        ["sky", "tree"],
        ["bird", "sun"],
        words(),
    )
    assert found.nouns == ["pine", "oak", "heaven", "cloud", "forest", "crow", "crow", "moon"]
    assert found.hallucinated == ["crow", "crow", "moon"]
    assert found.covered == {"sky", "tree"}
    assert found.imagined == {"bird", "sun"}
    with pytest.raises(ValueError, match="object 'dragon' of an annotation is not in AMBER's relations"):
        read_description("a pine", ["dragon"], [], words())


def test_generative_rates():
    rows = [
        # nouns: pine, person, cloud; person is not there. Named: tree of sky, tree. Imagined: man of man, bird.
        {"response": "a pine a person a cloud", "truth": ["sky", "tree"], "hallu": ["man", "bird"]},
        # nouns: sky, bird, sky; all right. Imagined: none of man.
        {"response": "the sky a bird the sky", "truth": ["sky", "bird"], "hallu": ["man"]},
        # no noun that is known
        {"response": "nothing", "truth": ["sun"], "hallu": []},
    ]
    result = score_descriptions(rows, words())
    assert result.rates == pytest.approx({"chair": 1 / 6, "cover": 3 / 5, "hal": 1 / 3, "cog": 1 / 3})
    assert (result.n, result.undefined) == (3, [])
    empty = score_descriptions(rows[2:], words())
    assert empty.undefined == ["chair", "cog"]
    with pytest.raises(ValueError, match="no descriptions"):
        score_descriptions([], words())


def question(kind, truth, response):
    return {"type": f"discriminative-{kind}", "truth": truth, "response": response}


def test_discriminative_rates():
    rows = [
        question("hallucination", "no", "No"), question("hallucination", "no", "Yes"),
        question("hallucination", "no", "No"),
        question("attribute-state", "yes", "No"), question("attribute-number", "yes", "Yes"),
        question("attribute-action", "no", "No."),  # not the word itself: neither
        question("relation", "yes", "yes"), question("relation", "no", "No"),
    ]  # fmt: skip
    found = score_questions(rows)
    assert found["existence"].rates == pytest.approx(
        {"accuracy": 2 / 3, "precision": 1, "recall": 2 / 3, "f1": 4 / 5}
    )
    assert found["attribute"].rates == {"accuracy": 1 / 3, "precision": 0, "recall": 0, "f1": 0}
    assert found["relation"].rates == pytest.approx({"accuracy": 1 / 2, "precision": 1, "recall": 1, "f1": 1})
    # No was said to 4 questions, rightly to 3 of 5
    assert found["all"].rates == pytest.approx(
        {"accuracy": 1 / 2, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3}
    )
    assert [result.n for result in found.values()] == [8, 3, 3, 2]
    # precision 100.0, recall 66.7: 2 * 1 * .667 / (1 + .667 + .001) = .79976
    assert official_f1(found["existence"], existence=True) == 80.0
    assert official_f1(found["all"]) == 66.7
    described = score_descriptions([{"response": "a pine a person", "truth": ["tree"], "hallu": []}], words())
    assert amber_score(described, found["all"]) == pytest.approx((1 - 1 / 2 + 2 / 3) / 2)
    assert score_questions([question("relation", "yes", "Yes")])["all"].undefined == [
        "precision",
        "recall",
        "f1",
    ]
    with pytest.raises(ValueError, match="'yes' or 'no' is needed"):
        score_questions([question("relation", "maybe", "Yes")])


def test_mme():
    rows = [
        {"category": category, "image": image, "label": label, "answer": answer}
        for category, image, answers in [
            ("existence", "a", ("Yes", "No")), ("existence", "b", ("Yes.", "yes")),
            ("color", "a", ("no", "Yes, it is")),
            ("code_reasoning", "c", ("yes it is", "Not at all")),
        ]
        for label, answer in zip(("Yes", "No"), answers, strict=True)
    ]  # fmt: skip
    assert mme_scores(rows) == {
        "existence": 100 * (3 / 4 + 1 / 2), "color": 0.0, "code_reasoning": 200.0, "perception": 125.0,
        "cognition": 200.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="image 'c' of code_reasoning has 1 questions"):
        mme_scores(rows[:-1])
    assert [read_answer(text) for text in ("YES", " no", "Unknown", "know", "")] == [
        "yes",
        "no",
        "other",
        "no",
        "other",
    ]


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("105", ["100"], 1), ("95", ["100"], 1), ("105.1", ["100"], 0), ("-100", ["100"], 0), ("-96", ["-100"], 1),
        ("0", ["0"], 1), ("0.001", ["0"], 0), ("5%", ["0.05"], 1), ("5%", ["5"], 0), ("52%", ["50%"], 1),
        ("Yes", ["yes"], 1), ("yes.", ["yes"], 0), (" 2019 ", ["2020"], 1), ("nan", ["nan"], 1), ("inf", ["1"], 0),
        ("the dog", ["dog"], 0), ("7", ["blue", "7"], 1), ("", [""], 1),
    ],
)  # fmt: skip
def test_relaxed_accuracy(answer, accepted, score):
    assert relaxed_accuracy(answer, accepted) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7), ("flaw", ["lawn"], 0.5), ("  The  DOG ", ["the dog"], 1),
        ("abcd", ["abxyz"], 0),
        ("2 may", ["2 May 1990", "may"], 0.6), ("", [""], 1), ("", ["a"], 0), ("a", ["", "a"], 1),
        ("$1,000", ["$1.000"], 5 / 6),
    ],
)  # fmt: skip
def test_anls(answer, accepted, score):
    assert anls(answer, accepted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("metric", "score", "read"),
    [("exact", 0, "104"), ("vqa", 0, "104"), ("relaxed", 1, "104"), ("anls", 2 / 3, "104")],
)
def test_runs_score_by_each_of_them(metric, score, read):
    data = {"jsonl": "rows.jsonl"}
    task = VqaTask.model_validate({"task": "vqa", "data": data, "metric": metric})
    record = {"answer": "104", "label": ["100", "105"], "scores": {}}
    assert Scorer(task).judge(record)["scores"] == {"accuracy": pytest.approx(score), "read": read}


texts = st.text("ab 1%.", max_size=8)


@given(texts, st.lists(texts, min_size=1, max_size=4))
def test_measures_are_fractions_and_the_answer_itself_is_right(answer, accepted):
    for name, measure in METRICS.items():
        assert 0 <= measure(answer, accepted) <= 1
        assert measure(answer, [*accepted, answer]) == 1 or name == "vqa"
        assert measure(answer, [answer]) == 1


def test_labels_of_repope_stand_in_for_those_of_pope(tmp_path):
    questions = [
        {
            "question_id": n,
            "image": "COCO_val2014_000000000007.jpg",
            "text": f"Is there a {thing}?",
            "label": label,
        }
        for n, (thing, label) in enumerate([("dog", "yes"), ("cat", "no"), ("car", "no")], 1)
    ]
    corrected = [{**questions[2], "label": "yes"}, {**questions[0], "question_id": "1"}]
    answers = [{"question_id": n, "text": text} for n, text in enumerate(["Yes", "Yes", "Yes"], 1)]
    assert score_pope(questions, answers).rates["accuracy"] == 1 / 3
    kept, theirs = relabelled(questions, answers, corrected)
    assert [(row["question_id"], row["label"]) for row in kept] == [(1, "yes"), (3, "yes")]
    result = score_pope(kept, theirs)
    assert (result.rates["accuracy"], result.counts["n"], result.warnings) == (1, 2, [])
    for name, rows in {"q": questions, "a": answers, "l": corrected}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"--questions": "q", "--answers": "a", "--labels": "l"}
    options = [word for key, name in files.items() for word in (key, str(tmp_path / f"{name}.jsonl"))]
    shown = json.loads(CliRunner().invoke(app, ["pope", *options, "--json"]).stdout)
    assert (shown["accuracy"], shown["n"]) == (1, 2)
    with pytest.raises(ValueError, match="question 2: the labels are of 'Is there a cow\\?'"):
        relabelled(questions, answers, [{"question_id": 2, "text": "Is there a cow?", "label": "no"}])
    with pytest.raises(ValueError, match="an answer has no question_id"):
        relabelled(questions, [{"text": "Yes"}], corrected)
    with pytest.raises(ValueError, match="question 9 of the labels"):
        relabelled(questions, answers, [{"question_id": 9, "label": "no"}])


def test_words_from_ambers_files(tmp_path):
    (tmp_path / "relation.json").write_text(json.dumps({"dog": ["puppy"], "tree": []}))
    (tmp_path / "safe_words.txt").write_text("image\n\nscene \n")
    read = read_words(tmp_path / "relation.json", tmp_path / "safe_words.txt")
    found = read_description("Two puppies beside trees, in this image of a dog.", ["dog"], ["tree"], read)
    assert found.nouns == ["puppy", "tree", "dog"]
    assert (found.covered, found.imagined, found.hallucinated) == ({"dog"}, {"tree"}, ["tree"])
    assert plain_nouns({"bus", "glass"})("A bus, two buses and glasses.") == ["bus", "bus", "glass"]
    (tmp_path / "relation.json").write_text("[1]")
    with pytest.raises(ValueError, match="a JSON object of lists is needed"):
        read_words(tmp_path / "relation.json")


@pytest.mark.parametrize(
    ("answer", "word", "exact"),
    [
        ("Yes", "Yes", "Yes"),
        ("yes.", "Yes", "yes."),
        ("No, it", "No", "No, it"),
        ("Not", "Not", "Not"),
        ("", "", ""),
    ],
)
def test_ambers_answers(answer, word, exact):
    assert read_yes_no(answer, "word") == word
    assert read_yes_no(answer, "exact") == exact
