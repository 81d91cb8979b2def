import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vlm_prune.eval.pope import PARSERS, RATES, mean_rates, parse_answer, pope_rates, score_pope, score_splits
from vlm_prune.eval.pope_questions import SPLITS, build_questions, read_object_lists, write_questions
from vlm_prune.eval.records import read_records
from vlm_prune.eval.scores_cli import app

YES, NO, NEITHER = True, False, None


@pytest.mark.parametrize(
    ("answer", "official", "recorder", "strict", "lmms"),
    [
        ("Yes", YES, YES, YES, YES),
        ("yes.", YES, YES, YES, NEITHER),
        ("No, there is no dog.", NO, NO, NO, NEITHER),
        ("NO", YES, NO, NO, NO),
        ("No!", YES, YES, NO, NEITHER),
        ("No\n", YES, YES, NO, NO),
        ("", YES, YES, NEITHER, NEITHER),
        ("Nope", YES, YES, NEITHER, NEITHER),
        ("There isn't a dog.", YES, NO, NEITHER, NEITHER),
        ("There is not.", NO, NO, NEITHER, NEITHER),
        ("no,no", YES, YES, NO, NEITHER),
        (". no", YES, NO, NO, NEITHER),
        ("Yes. No dog is visible.", YES, NO, YES, NEITHER),
        ("Yes, but not a big one", NO, NO, YES, NEITHER),
    ],
)
def test_parsers(answer, official, recorder, strict, lmms):
    wanted = {"official": official, "recorder": recorder, "strict": strict, "lmms": lmms}
    assert {name: parse_answer(answer, name) for name in PARSERS} == wanted


def test_unknown_parser_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown POPE parser 'offical'. Did you mean 'official'\?"):
        parse_answer("yes", "offical")


def rows(labels, **more):
    return [
        {"question_id": n, "text": f"Is there a thing {n}?", "label": label, **more}
        for n, label in enumerate(labels, 1)
    ]


def said(answers):
    return [{"question_id": n, "text": answer} for n, answer in enumerate(answers, 1)]


@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.booleans()), min_size=1), st.booleans())
def test_rates_are_fractions_and_zero_division_is_named(pairs, missed):
    verdicts, labels = [v for v, _ in pairs], [label for _, label in pairs]
    rates, counts, undefined = pope_rates(verdicts, labels, missed)
    assert all(0 <= value <= 1 for value in rates.values())
    assert rates["accuracy"] == sum(v is label for v, label in pairs) / len(pairs)
    assert ("precision" in undefined) == (True not in verdicts)
    assert counts["tp"] + counts["fp"] + counts["tn"] + counts["fn"] + verdicts.count(None) == len(pairs)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.randoms())
def test_answers_are_matched_by_id_in_any_order(pairs, rng):
    questions = rows(["yes" if label else "no" for _, label in pairs])
    answers = said(["Yes" if verdict else "No" for verdict, _ in pairs])
    shuffled = rng.sample(answers, len(answers))
    in_order = [{"question": q["text"], "answer": a["text"]} for q, a in zip(questions, answers, strict=True)]
    results = [score_pope(questions, a) for a in (answers, shuffled, in_order)]
    assert results[0].rates == results[1].rates == results[2].rates
    assert [r.matched_by for r in results] == ["question_id", "question_id", "order"]


def test_strict_counts_no_answer_as_a_miss_and_lmms_does_not():
    questions, answers = rows(["yes", "yes", "no"]), said(["Yes", "Maybe", "No"])
    assert score_pope(questions, answers, "strict").rates["recall"] == 0.5
    assert score_pope(questions, answers, "lmms").rates["recall"] == 1.0


def test_answers_that_say_neither_are_warned_of():
    result = score_pope(rows(["yes", "no", "no"]), said(["Maybe", "There is not.", "No"]))
    assert result.counts["n_neither"] == 2
    assert "2 of 3 answers hold neither 'yes' nor 'no', first 'Maybe'" in result.warnings[0]
    assert "reads 1 of them as yes, 1 as no" in result.warnings[0]


def test_always_no_is_zero_and_says_so():
    result = score_pope(rows(["yes", "no"]), said(["No", "No"]))
    assert result.undefined == ["precision", "f1"]
    assert result.rates["f1"] == 0
    assert any("nothing to divide by" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        (rows(["yes"]), [{"question_id": 7, "text": "yes"}], "question_id that no question has, first '7'"),
        (rows(["yes", "no"]), [said(["yes"])[0]] * 2, "question_id '1' stands in several answers"),
        (rows(["maybe"]), said(["yes"]), "label 'maybe', 'yes' or 'no' is needed"),
        (rows(["yes"]), [{"question_id": 1, "reply": "yes"}], "answer 1: no text under 'answer' or 'text'"),
        (rows(["yes"]), [{"answer": "yes"}] * 2, "2 answers without question_id for 1 questions"),
        (rows(["yes", "no"]), [{"answer": "yes"}, said(["no"])[0]], "1 of 2 answers have no 'question_id'"),
    ],
)
def test_bad_rows_are_clear_errors(questions, answers, message):
    with pytest.raises(ValueError, match=message):
        score_pope(questions, answers)


THINGS = [("dog", "yes"), ("cat", "no"), ("car", "yes"), ("bus", "no")]
ASKED = [
    {
        "question_id": n,
        "image": f"COCO_val2014_00000031019{n // 3}.jpg",
        "text": f"Is there a {thing} in the image?",
        "label": label,
    }
    for n, (thing, label) in enumerate(THINGS, 1)
]
SUFFIX = "\nAnswer the question using a single word or phrase."


def answered(places, **keys):
    """Answers 1 to 4 that repeat what other questions have, by ``{their key: the question's}``."""
    given = [{key: ASKED[place][name] for key, name in keys.items()} for place in places]
    return [{"question_id": n, **row, "response": "Yes"} for n, row in enumerate(given, 1)]


@pytest.mark.parametrize(
    ("answers", "count", "what"),
    [
        (answered([0, 2, 1, 3], prompt="text"), 2, "question"),
        (answered([3, 2, 1, 0], question="text"), 4, "question"),
        (answered([0, 1, 2, 0], query="text"), 1, "question"),
        (answered([0, 1, 3, 3], input="text"), 1, "question"),
        ([{**row, "answer": "Yes"} for row in answered([0, 2, 1, 3], text="text")], 2, "question"),
        (answered([0, 1, 0, 3], image="image"), 1, "image"),
        (answered([3, 1, 2, 0], image_source="image"), 2, "image"),
        (answered([1, 1, 2, 3], target="label"), 1, "label"),
        (answered([1, 0, 3, 2], ground_truth="label"), 4, "label"),
        (answered([1, 1, 2, 3], answer="label"), 1, "label"),
    ],
)
def test_answers_that_repeat_something_else_are_noticed(answers, count, what):
    by_id = score_pope(ASKED, answers)
    in_order = score_pope(ASKED, [{k: v for k, v in row.items() if k != "question_id"} for row in answers])
    for result in (by_id, in_order, score_splits(ASKED, answers)["all"]):
        assert f"{count} of 4 answers repeat another {what} than the one in their place" in result.warnings[0]
        assert result.rates["accuracy"] == 0.5


@pytest.mark.parametrize(
    "repeated",
    [
        {"prompt": lambda q: q["text"] + SUFFIX},
        {"question": lambda q: "<image>\nUSER:  " + q["text"].replace("image", "imange").upper()},
        {"image": lambda q: "val2017/" + q["image"].removeprefix("COCO_val2014_")},
        {"image": lambda q: "C:\\coco\\" + q["image"].removesuffix(".jpg") + ".png"},
        {"image_source": lambda q: q["image"].removesuffix(".jpg")},
        {"image_id": lambda q: int(q["image"][13:25])},
        {"label": lambda q: q["label"].upper()},
    ],
)
def test_the_same_thing_in_other_words_is_no_contradiction(repeated):
    ((key, form),) = repeated.items()
    answers = [{"question_id": q["question_id"], key: form(q), "text": q["label"]} for q in ASKED]
    assert score_pope(ASKED, answers).warnings == []


@pytest.mark.parametrize(
    ("answer", "official", "warned"),
    [
        ("No</s>", YES, True), ("No<|im_end|>", YES, True), ("No\nThere is no dog", NO, False),
        ("No\nThere is none", YES, True),
        ("The answer is no</s>", YES, True), ("Yes, but not a big one", NO, True),
        ("Yes. No dog is visible.", YES, False), ("no dog", NO, False), ("Yes</s>", YES, False),
    ],
)  # fmt: skip
def test_answers_that_the_parser_reads_against_their_words_are_warned_of(answer, official, warned):
    result = score_pope(rows(["yes", "no"]), said([answer, "No"]))
    assert result.predictions == [official, NO]
    assert result.counts["n_misread"] == warned
    warnings = [warning for warning in result.warnings if "are read otherwise than they say" in warning]
    assert len(warnings) == warned
    if warned:
        assert (
            f"1 of 2 answers are read otherwise than they say, first {answer!r} to question 1" in warnings[0]
        )


HUB = [
    {"id": str(n), "question_id": str(n % 2 + 1), "question": q["text"], "answer": q["label"], "category": split,
     "image_source": q["image"].removesuffix(".jpg")}
    for n, (q, split) in enumerate(zip(ASKED, ("popular", "popular", "random", "random"), strict=True))
]  # fmt: skip
"""As the data set on the hub is exported: ids begin anew in each category, ``answer`` is the label."""


@pytest.mark.parametrize(
    ("questions", "keys", "by"),
    [
        (HUB, ("id",), "question_id"),
        (HUB, ("category", "question_id"), "category and question_id"),
        (HUB, ("category", "question_id", "answer", "question", "image_source"), "category and question_id"),
        (HUB, ("question",), "order"),
        ([{**row, "question_id": row["id"]} for row in HUB], ("id",), "question_id"),
    ],
)
def test_the_hubs_export_is_understood(questions, keys, by):
    given = [{**{key: row[key] for key in keys}, "response": row["answer"]} for row in questions]
    given = given if by == "order" else given[::-1]
    found = score_splits(questions, given)
    assert [result.rates["accuracy"] for result in found.values()] == [1, 1]
    assert list(found) == ["popular", "random"]
    assert {(result.matched_by, *result.warnings) for result in found.values()} == {(by,)}
    # were the labels taken for answers, nothing could be wrong
    wrong = [{**row, "response": "No" if row["response"] == "yes" else "Yes"} for row in given]
    assert [result.rates["accuracy"] for result in score_splits(questions, wrong).values()] == [0, 0]


def test_ids_of_something_else_and_rows_of_a_data_set():
    right = [q["label"] for q in ASKED]
    other = [{"id": f"chatcmpl-{n}", "text": word} for n, word in enumerate(right)]
    result = score_pope(ASKED, other)
    assert (result.rates["accuracy"], result.matched_by) == (1, "order")
    assert (
        "none of the answers' ids, such as 'chatcmpl-0', is a question's: matched by order" in result.warnings
    )
    samples = [{"doc_id": n, "target": word, "filtered_resps": [word]} for n, word in enumerate(right)]
    assert score_pope(ASKED, samples[::-1]).rates["accuracy"] == 1
    whole = [{"doc": {**row, "answer": row["label"]}, "resps": [[row["label"]]]} for row in ASKED]
    assert score_pope(ASKED, whole[::-1]).rates["accuracy"] == 1
    assert score_pope(ASKED, samples[2:]).matched_by == "doc_id"
    with pytest.raises(ValueError, match="doc_id 4 of an answer: it numbers the 4 questions from 0"):
        score_pope(ASKED, [{**samples[0], "doc_id": 4}])
    with pytest.raises(ValueError, match="doc_id 3 stands in several answers"):
        score_pope(ASKED, [samples[3], samples[3]])


def test_missing_answers_are_counted_and_other_questions_noticed():
    result = score_pope(rows(["yes", "no"]), said(["yes"]))
    assert (result.counts["n"], result.counts["n_missing"]) == (1, 1)
    swapped = [{"question": "Is there a thing 2?", "answer": "yes"}, {"question": "?", "answer": "no"}]
    assert "another question" in score_pope(rows(["yes", "no"]), swapped).warnings[0]


def test_splits_and_their_mean():
    questions = [
        {"question_id": i, "text": "", "label": "yes", "category": split} for i, split in enumerate(SPLITS)
    ]
    answers = [{"question_id": i, "answer": answer} for i, answer in enumerate(["yes", "yes", "no"])]
    results = score_splits(questions, answers)
    assert list(results) == list(SPLITS)
    assert mean_rates(results)["accuracy"] == pytest.approx(2 / 3)


objects_of_images = st.lists(
    st.lists(st.sampled_from("abcdefgh"), min_size=0, max_size=4), min_size=3, max_size=12
).map(lambda lists: {f"{n}.png": names for n, names in enumerate(lists)})


@settings(max_examples=60)
@given(objects_of_images, st.integers(0, 3))
def test_built_questions_follow_the_rules(objects, seed):
    pool = {name for names in objects.values() if len(set(names)) >= 2 for name in names}
    if not any(len(set(names)) >= 2 for names in objects.values()):
        with pytest.raises(ValueError, match="images are wanted; 0 of"):
            build_questions(objects, per_image=2)
        return
    if any(len(pool - set(names)) < 2 for names in objects.values() if len(set(names)) >= 2):
        return
    built = build_questions(objects, per_image=2, seed=seed)
    assert built == build_questions(objects, per_image=2, seed=seed)
    assert built["random"] == build_questions(objects, ["random"], per_image=2, seed=seed)["random"]
    for questions in built.values():
        assert [row["question_id"] for row in questions] == list(range(1, len(questions) + 1))
        assert [row["label"] for row in questions] == ["yes", "no"] * (len(questions) // 2)
        for image, names in objects.items():
            asked = [row["object"] for row in questions if row["image"] == image]
            assert len(asked) == len(set(asked)) == (4 if len(set(names)) >= 2 else 0)
            assert asked[::2] == list(dict.fromkeys(names))[:2] if asked else True
            assert not set(asked[1::2]) & set(names)


def test_popular_and_adversarial_negatives():
    objects = {
        "a": ["dog", "cat"],
        "b": ["dog", "apple"],
        "c": ["dog", "apple"],
        "d": ["cat", "bird"],
        "e": ["fish", "bird"],
    }
    built = build_questions(objects, per_image=1)
    by = {s: {r["image"]: r["object"] for r in q if r["label"] == "no"} for s, q in built.items()}
    assert by["popular"] == {"a": "apple", "b": "cat", "c": "cat", "d": "dog", "e": "dog"}
    assert by["adversarial"]["a"] == "apple"  # most often beside a dog
    assert by["adversarial"]["d"] == "dog"
    texts = [row["text"] for row in built["popular"]]
    assert "Is there an apple in the image?" in texts
    assert "Is there a dog in the image?" in texts


def test_random_negatives_are_uniform():
    objects = {str(n): ["dog"] for n in range(3000)} | {str(-n): [name] for n, name in enumerate("abcd", 1)}
    negatives = [r["object"] for r in build_questions(objects, ["random"], per_image=1)["random"][1:6000:2]]
    shares = [negatives.count(name) / len(negatives) for name in "abcd"]
    assert max(abs(share - 0.25) for share in shares) < 0.04


def test_sampled_images_depend_on_the_seed():
    objects = {str(n): [str(n % 7), "x"] for n in range(50)}
    draws = [
        build_questions(objects, ["popular"], n_images=5, per_image=1, seed=s)["popular"] for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 10
    with pytest.raises(ValueError, match="60 images are wanted; 50 of 50"):
        build_questions(objects, n_images=60, per_image=1)


COCO = {
    "categories": [{"id": n, "name": name} for n, name in enumerate(["dog", "cat", "apple", "car"])],
    "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(6)],
    "annotations": [{"image_id": n, "category_id": c} for n in range(6) for c in (n % 4, n % 4, (n + 1) % 4)],
}


def test_questions_from_coco_and_from_object_lines(tmp_path):
    coco, lines, captions = tmp_path / "instances.json", tmp_path / "lines.json", tmp_path / "captions.json"
    coco.write_text(json.dumps(COCO))
    found = read_object_lists(coco)
    assert found["1.jpg"] == ["cat", "apple"]
    lines.write_text("".join(json.dumps({"image": i, "objects": o}) + "\n" for i, o in found.items()))
    assert read_object_lists(lines) == found
    notes = [{"image_id": 1, "caption": "Two dogs and a cat."}]
    captions.write_text(json.dumps({"images": COCO["images"], "annotations": notes}))
    assert read_object_lists(coco, captions)["1.jpg"] == ["cat", "apple", "dog"]
    out = tmp_path / "out"
    run = CliRunner().invoke(
        app,
        [
            "pope-questions",
            "--annotations",
            str(coco),
            "--out",
            str(out),
            "--images",
            "4",
            "--per-image",
            "1",
        ],
    )
    assert run.exit_code == 0, run.output
    written = read_records(out / "pope_popular.json")
    assert len(written) == 8
    assert set(written[0]) == {"question_id", "image", "text", "label"}


def test_command_prints_only_json_on_stdout(tmp_path):
    random.seed(0)
    questions, answers = (
        rows(["yes", "no"] * 10),
        said([random.choice(["Yes", "No", "?"]) for _ in range(20)]),
    )
    q, a = tmp_path / "coco_pope_random.json", tmp_path / "a.jsonl"
    write_questions(q, [{**row, "image": "x"} for row in questions])
    a.write_text("\n".join(map(json.dumps, answers)))
    run = CliRunner().invoke(app, ["pope", "--questions", str(q), "--answers", str(a), "--json"])
    assert run.exit_code == 0
    shown = json.loads(run.stdout)
    assert {name: shown[name] for name in RATES} == {
        n: score_pope(questions, answers).rates[n] for n in RATES
    }
    assert "warning: " in run.stderr
    pair = ["--questions", str(q), "--answers", str(a)]
    both = json.loads(CliRunner().invoke(app, ["pope", *pair, *pair, "--json"]).stdout)
    assert both["f1"] == shown["f1"]
    assert len(both["splits"]) == 2
    assert "f1" in CliRunner().invoke(app, ["pope", *pair, *pair]).stdout


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"1": "Yes", "2": "No", "3": "Yes", "4": "No"}'),
        (
            "a.json",
            '{"4": {"response": "No"}, "1": {"response": "Yes"}, "2": {"text": "No"}, "3": {"text": "Yes"}}',
        ),
        (
            "a.jsonl",
            "\n".join(
                f'{{"question_id": {n + 1}, "filtered_resps": [["{"YN"[n % 2]}o"]]}}' for n in range(4)
            ),
        ),
        ("a.csv", "question_id,answer\n4,No\n2.0,No\n1,Yes\n3,Yes\n"),
        ("a.csv", "answer\nYes\nNo\nYes\nNo\n"),
        ("a.tsv", "qid\tprediction\n2\tNo\n4\tNo\n1\tYes\n3\tYes\n"),
    ],
)
def test_answer_files_as_other_tools_write_them(tmp_path, name, text):
    text = text.replace("Yo", "Yes")
    (tmp_path / name).write_text(text)
    for questions in ("q.json", "q.csv"):
        if questions.endswith("csv"):
            lines = [",".join(map(str, row.values())) for row in ASKED]
            (tmp_path / questions).write_text("\n".join([",".join(ASKED[0]), *lines]))
        else:
            write_questions(tmp_path / questions, ASKED)
        files = ["--questions", str(tmp_path / questions), "--answers", str(tmp_path / name)]
        run = CliRunner().invoke(app, ["pope", *files, "--json"])
        assert run.exit_code == 0, run.output
        assert json.loads(run.stdout)["accuracy"] == 1
        assert run.stderr == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        pytest.param("[" * 100_000, "nested too deeply", id="deep"),
        ('{"question_id": 1, "text": "yes"}\n{"question', "line 2: not JSON"),
        ("[1, 2]", "a list of JSON objects is needed"),
        ("[]", "holds no records"),
    ],
)
def test_command_errors_name_the_file_and_the_line(tmp_path, text, message):
    q, a = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    q.write_text(json.dumps(rows(["yes"])))
    if text is not None:
        a.write_text(text)
    run = CliRunner().invoke(app, ["pope", "--questions", str(q), "--answers", str(a), "--json"])
    assert run.exit_code == 2
    assert run.stdout == ""
    assert message in run.stderr
    assert "a.jsonl" in run.stderr
