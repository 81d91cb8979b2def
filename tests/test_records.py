"""Files of records as people have them: what is understood, and what is said of the rest."""

from __future__ import annotations

import json

import pytest

from vlm_prune.eval.chair import read_captions
from vlm_prune.eval.chair.mentions import token_spans
from vlm_prune.eval.coco import image_id, instance_objects
from vlm_prune.eval.pope import score_pope, score_splits
from vlm_prune.eval.pope_questions import build_questions, read_object_lists
from vlm_prune.eval.records import read_json, read_records

ROWS = [{"image_id": 1, "caption": "a cat"}, {"image_id": 2, "caption": "a dog"}]
FORMS = {
    "lines": "\n".join(map(json.dumps, ROWS)) + "\n",
    "crlf and blank lines": "\r\n\r\n".join(map(json.dumps, ROWS)),
    "byte order mark": "\ufeff" + json.dumps(ROWS),
    "list": json.dumps(ROWS, indent=1),
    # as POPE's own captions of LLaVA are written
    "objects over several lines": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "objects on one line": "".join(map(json.dumps, ROWS)),
    "lines that end with a comma": ",\n".join(map(json.dumps, ROWS)) + ",\n",
    "annotations": json.dumps({"annotations": ROWS}),
    "by image": json.dumps(
        {"imgToEval": {str(row["image_id"]): {"caption": row["caption"]} for row in ROWS}}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_captions(form, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(FORMS[form], encoding="utf-8")
    assert read_captions(path) == [(1, "a cat"), (2, "a dog")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 2}\n{"a', "line 3: not JSON"),
        ('{"a": 1}\n,,{"a": 2}', "line 2: not JSON"),
        (" \n", "is empty"),
        pytest.param("[" * 100_000, "line 1: JSON nested too deeply", id="deep"),
        ("1 2", "a list of JSON objects is needed"),
    ],
)
def test_broken_files_are_one_clear_error(text, message, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(path)
    path.write_text("{} {}")
    with pytest.raises(ValueError, match="several stand one after another"):
        read_json(path)


def test_ids_as_other_tools_write_them():
    assert image_id(7.0) == image_id("7") == image_id("COCO_val2014_000000000007") == 7
    with pytest.raises(ValueError, match="a number or a string"):
        image_id(7.5)
    questions = [
        {"question_id": 1, "text": "?", "label": "yes"},
        {"question_id": 2, "text": "?", "label": "no"},
    ]
    answers = [{"question_id": 2.0, "answer": "no"}, {"question_id": 1.0, "answer": "yes"}]
    assert score_pope(questions, answers).rates["accuracy"] == 1
    with pytest.raises(ValueError, match="no question has one"):
        score_pope([{"text": "?", "label": "yes"}], answers[:1])


def test_a_split_without_answers_is_left_out_and_said():
    questions = [
        {"question_id": n, "text": "?", "label": "yes", "category": split}
        for n, split in enumerate(["random", "popular"])
    ]
    found = score_splits(questions, [{"question_id": 0, "answer": "yes"}])
    assert list(found) == ["random"]
    assert any("'popular'" in warning for warning in found["random"].warnings)
    with pytest.raises(ValueError, match="none of the 1 questions"):
        score_splits(questions[:1], [{"answer": "yes"}][:0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": [{"id": [1], "name": "cat"}]}, "category id"),
        ({"categories": [{"id": 1, "name": None}]}, "not text"),
        ({"annotations": [{"image_id": 1, "category_id": [1]}]}, "category id"),
    ],
)
def test_odd_annotations_are_one_clear_error(change, message, tmp_path):
    path = tmp_path / "instances_val.json"
    whole = {"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    path.write_text(json.dumps({**whole, **change}))
    with pytest.raises(ValueError, match=message):
        instance_objects(path)


@pytest.mark.parametrize("name", [3, "", ["cat"], {"cat": 1}])
def test_objects_of_questions_are_names(name, tmp_path):
    path = tmp_path / "objects.jsonl"
    path.write_text(json.dumps({"image": "a.jpg", "objects": ["dog", name]}))
    with pytest.raises(ValueError, match=r"of image 'a\.jpg' is no name"):
        read_object_lists(path)


@pytest.mark.parametrize("template", ["Is there {} or {}?", "Is there a {} {x}?", "Is there {?", "Is there?"])
def test_a_template_has_one_place(template):
    with pytest.raises(ValueError, match="a template with one"):
        build_questions({"a": ["cat", "dog"], "b": ["cow", "bus"]}, per_image=1, template=template)


@pytest.mark.parametrize("caption", ["İ dog", "the İİİ cat and dog", "a dog"])
def test_spans_are_of_the_caption_as_it_stands(caption):
    tokens = caption.lower().split()
    spans = token_spans(caption, tokens)
    assert [caption[start:end].lower() for start, end in spans] == tokens
