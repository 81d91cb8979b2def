import json
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vlm_prune.eval.chair import (
    CaptionReader,
    Vocabulary,
    coco_truth,
    image_id,
    only_images,
    read_captions,
    read_image_ids,
    sample_image_ids,
    score_captions,
    write_image_ids,
)
from vlm_prune.eval.chair.rates import bootstrap_sums
from vlm_prune.eval.chair.singular import singular
from vlm_prune.eval.chair.tokens import sentences, tokenise
from vlm_prune.eval.scores_cli import app

SHAPES = Vocabulary.of({"red circle": ["crimson disc"], "blue square": [], "bus": [], "tie": ["bow tie"]})


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a dog. two cats!", "a dog . two cats !"),
        ("the player's bats aren't here.", "the player 's bats are n't here ."),
        ("dogs' bowls, 3,000 of them: ok", "dogs ' bowls , 3,000 of them : ok"),
        ('he said "a cat." then left', "he said `` a cat . '' then left"),
        (
            "mr. fox vs. dr. owl at 5 p.m. in the u.s. today.",
            "mr. fox vs. dr. owl at 5 p.m. in the u.s. today .",
        ),
        ("number 3. the dog, b. the cat", "number 3. the dog , b. the cat"),
        ("in 1990. 5 dogs.", "in 1990 . 5 dogs ."),
        ("well-worn t-shirt- and co-op", "well-worn t-shirt- and co-op"),
        ("a dog...and a cat -- or", "a dog ... and a cat -- or"),
        ("it's 7 o'clock; i cannot, gonna 'em", "it 's 7 o'clock ; i can not , gon na ' em"),
        ("a dog \U0001f436. cute\U0001f600!", "a dog \U0001f436 . cute\U0001f600 !"),
        ("(a dog.) [a cat?]", "( a dog . ) [ a cat ? ]"),
        ("caf\u00e9 \u2014 \u201cd\u00f6ner\u201d", "caf\u00e9 \u2014 \u201c d\u00f6ner \u201d"),
        ("first line\n\nsecond line.\n", "first line second line ."),
        ("", ""),
        ("$5.50 & 50% #1 @home a/b", "$ 5.50 & 50 % # 1 @ home a/b"),
    ],
)
def test_tokens_are_those_of_nltk(text, tokens):
    """Expected values: nltk 3.10.4 word_tokenize with the punkt_tab English model."""
    assert tokenise(text) == tokens.split()


@settings(max_examples=200)
@given(st.text(st.characters(exclude_characters="\"'`", exclude_categories=["Cs"]), max_size=60))
def test_no_character_is_lost(text):
    text = text.lower()
    assert "".join(tokenise(text)) == "".join(text.split())
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("word", "single"),
    [
        ("dogs", "dog"), ("men", "man"), ("people", "person"), ("bus", "bu"), ("buses", "bus"), ("ties", "ty"),
        ("tennis", "tenni"), ("glass", "glas"), ("knives", "knife"), ("geese", "goose"), ("sheep", "sheep"),
        ("four", "fmy"), ("ice", "ice"), ("police", "polouse"), ("cookies", "cookies"), ("dogs'", "dog's"),
        ("mothers-in-law", "mother-in-law"), ("oxenford", "oxford"), ("psychoanalyses", "psychoanalyasis"),
        ("", ""), ("-", "-"),
    ],
)  # fmt: skip
def test_singular_keeps_the_mistakes_of_pattern(word, single):
    assert singular(word) == single


def objects(caption, **settings):
    return [mention.object for mention in CaptionReader(**settings).read(caption).mentions]


def test_official_reading_and_the_plain_one():
    caption = (
        "A bus, two ties, a motor bike, a cheesecake, a tennis racket and a dining table with an iPhone."
    )
    assert objects(caption) == ["tennis racket", "dining table"]
    assert objects(caption, variant="plain") == [
        "bus", "tie", "motorcycle", "cake", "tennis racket", "dining table", "cell phone",
    ]  # fmt: skip
    assert objects("the seat of the toilet") == ["toilet"]
    assert objects("a baby elephant on train tracks") == ["elephant"]


def test_own_vocabulary_finds_plurals_synonyms_and_phrases():
    reader = CaptionReader(SHAPES)
    assert reader.variant == "plain"
    reading = reader.read("Two red circles, a Crimson Disc, a red square, buses and bow ties.")
    assert [m.object for m in reading.mentions] == ["red circle", "red circle", "bus", "tie"]
    assert "red circle" in reading.words
    with pytest.raises(ValueError, match="'disc' is given as a word for 'a' and for 'b'"):
        Vocabulary.of({"a": ["disc"], "b": ["disc"]})
    with pytest.raises(ValueError, match=r"unknown object 'red cirle'. Did you mean 'red circle'\?"):
        score_captions([("x", "a bus")], {"x": ["red cirle"]}, reader)


def test_vocabulary_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# mine\n[objects]\ncube: box, small cube\nball:\n[phrases]\nball game\n")
    reader = CaptionReader(Vocabulary.read(path))
    assert [m.object for m in reader.read("a ball game, small cubes, boxes, balls").mentions] == [
        "cube"
    ] * 2 + ["ball"]
    path.write_text("cube: box\n")
    with pytest.raises(ValueError, match=r"words.txt: line 1: 'cube: box' stands before the first section"):
        Vocabulary.read(path)


def test_scores_by_hand():
    captions = [(1, "A dog, a dog and a cat."), (2, "Nothing."), ("s", "Two cars and a person.")]
    truth = {1: ["dog", "bird"], 2: ["car"], "s": ["car", "person"]}
    result = score_captions(captions, truth, samples=50)
    assert result.metrics == pytest.approx(
        {
            "chair_s": 1 / 3,
            "chair_i": 1 / 5,
            "recall": 3 / 5,
            "precision": 3 / 4,
            "f1": 2 / 3,
            "length": (9 + 2 + 6) / 3,
            "repetition": 0.0,
        }
    )
    first = result.captions[0]
    assert first.metrics()["chair_i"] == pytest.approx(1 / 3)
    assert [first.caption[a:b] for a, b in first.spans()] == ["cat"]
    assert first.as_official()["mscoco_hallucinated_words"] == [["cat", "cat"]]


def test_repetition_is_the_share_of_repeated_four_grams():
    score = score_captions([(1, "a b c d a b c d a b c d"), (1, "a b c")], {1: []}, samples=0)
    assert [c.repetition for c in score.captions] == [pytest.approx(1 - 4 / 9), 0.0]


def test_nothing_to_divide_by_is_reported():
    result = score_captions([(1, "The sky.")], {1: []})
    assert set(result.undefined) == {"recall", "precision", "chair_i", "f1"}
    assert result.metrics["chair_i"] == 0
    with pytest.raises(ValueError, match="no captions"):
        score_captions([], {})
    with pytest.raises(ValueError, match="image 3 has no ground truth"):
        score_captions([(3, "a dog")], {})


def test_intervals_are_seeded_and_hold_the_score():
    captions = [(n, "a dog and a cat" if n % 3 else "a dog") for n in range(60)]
    truth = {n: ["dog"] for n in range(60)}
    one, same, other = (score_captions(captions, truth, seed=s) for s in (0, 0, 1))
    assert one.intervals == same.intervals != other.intervals
    for name, (low, high) in one.intervals.items():
        assert low <= one.metrics[name] <= high
    assert one.intervals["chair_s"][1] - one.intervals["chair_s"][0] == pytest.approx(
        0.24, abs=0.05
    )  # 2 x 1.96 sd
    counts = np.arange(12.0).reshape(4, 3)
    sums = bootstrap_sums(counts, 4000, seed=0)
    assert sums.shape == (4000, 3)
    assert sums.mean(axis=0) == pytest.approx(counts.sum(axis=0), rel=0.03)


@given(st.permutations(list(range(6))))
def test_order_of_captions_does_not_matter(order):
    texts = ["a dog", "two cats", "", "a car, a car", "a person with a dog", "birds"]
    truth = {n: ["dog", "car"] for n in range(6)}
    shuffled = score_captions([(n, texts[n]) for n in order], truth, samples=0)
    assert shuffled.metrics == pytest.approx(score_captions(list(enumerate(texts)), truth, samples=0).metrics)


def test_wordnet_variant_is_separate():
    lemmas = {"buses": "bus", "men": "men", "seated": "seat"}
    reader = CaptionReader(variant="wordnet", lemmatise=lambda tokens: [lemmas.get(t, t) for t in tokens])
    result = score_captions([(1, "Seated men, a bus and buses.")], {1: ["bus"]}, reader)
    assert result.variant == "wordnet"
    assert [m.object for m in result.captions[0].mentions] == ["chair", "bus", "bus"]
    with pytest.raises(ValueError, match="only used by variant 'wordnet'"):
        CaptionReader(lemmatise=list)
    with pytest.raises(ValueError, match="1 lemmas of 2 tokens"):
        CaptionReader(variant="wordnet", lemmatise=lambda tokens: ["a"]).read("a dog")
    with pytest.raises(ValueError, match=r"unknown CHAIR variant 'oficial'. Did you mean 'official'\?"):
        CaptionReader(variant="oficial")


def test_without_nltk_the_wordnet_variant_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.stem", None)
    with pytest.raises(ImportError, match="pip install nltk"):
        CaptionReader(variant="wordnet")


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (1, 2, 3)]
    instances = {
        "images": images,
        "categories": [{"id": 18, "name": "dog"}, {"id": 67, "name": "dining table"}],
        "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 67}] * 2,
    }
    captions = {"images": images, "annotations": [{"image_id": 1, "caption": "Two cats and a desk."}]}
    (folder / "instances_val2014.json").write_text(json.dumps(instances))
    (folder / "captions_val2014.json").write_text(json.dumps(captions))
    return folder


def test_ground_truth_joins_segments_and_captions(coco):
    reader = CaptionReader()
    truth = coco_truth(coco, reader)
    assert truth == {1: {"dog", "cat", "dining table"}, 2: {"dining table"}, 3: set()}
    assert coco_truth(coco, reader, [2]) == {2: {"dining table"}}
    with pytest.raises(ValueError, match=r"1 of 2 images are not in the annotations of .*first \[9\]"):
        coco_truth(coco, reader, [1, 9])
    with pytest.raises(ValueError, match=r"unknown object '(dog|dining table)'"):
        coco_truth(coco, CaptionReader(SHAPES))
    (coco / "captions_val2014.json").unlink()
    with pytest.raises(ValueError, match=r"holds no captions_\*.json"):
        coco_truth(coco, reader)


def test_usual_caption_files(tmp_path):
    path = tmp_path / "c.json"
    forms = [
        [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}],
        [
            {"image": "COCO_val2014_000000000001.jpg", "text": "a"},
            {"image": "000000000002.jpg", "answer": "b"},
        ],
        {
            "overall": {},
            "imgToEval": {"1": {"image_id": 1, "caption": "a"}, "2": {"image_id": "2", "caption": "b"}},
        },
    ]
    for form in forms:
        path.write_text(json.dumps(form))
        assert read_captions(path) == [(1, "a"), (2, "b")]
    path.write_text("\n".join(map(json.dumps, forms[0])))
    assert read_captions(path) == [(1, "a"), (2, "b")]
    path.write_text(json.dumps([{"id": 1, "says": "a"}]))
    assert read_captions(path, "id", "says") == [(1, "a")]
    with pytest.raises(
        ValueError, match=r"record 1: no key 'caption or .* text or answer'; it has 'id', 'says'"
    ):
        read_captions(path)
    path.write_text(json.dumps([{"image_id": 1, "caption": None}]))
    with pytest.raises(ValueError, match="record 1: the caption is None, not text"):
        read_captions(path)
    assert image_id("scene-7.png") == "scene-7.png"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", '{"COCO_val2014_000000000001.jpg": "a, \\"b\\"", "val2017/000000000002.jpg": "c"}'),
        ("c.json", '{"1": {"caption": "a, \\"b\\""}, "2": {"caption": "c"}}'),
        (
            "c.jsonl",
            '{"image": "x/000000000001.jpg", "response": "a, \\"b\\""}\n{"image": "2", "prediction": "c"}',
        ),
        (
            "c.jsonl",
            '{"image_id": 1, "filtered_resps": [["a, \\"b\\""]]}\n{"image_id": 2, "filtered_resps": ["c"]}',
        ),
        ("c.csv", 'image_id,caption\r\n1.0,"a, ""b"""\r\n2.0,c\r\n'),
        ("c.csv", 'image_id;caption\n1;"a, ""b"""\n2;c\n'),
        ("c.tsv", 'file_name\ttext\n000000000001.jpg\t"a, ""b"""\nCOCO_train2014_000000000002.jpg\tc\n'),
    ],
)
def test_captions_as_other_tools_write_them(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_captions(tmp_path / name) == [(1, 'a, "b"'), (2, "c")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,caption\n", "no records"),
        ("image_id,caption\n1,a,b\n", "line 2: the line has more or fewer cells"),
    ],
)
def test_a_table_that_is_not_whole_is_an_error(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / "c.csv")


def test_several_captions_of_an_image_are_counted_and_said():
    truth = {1: ["dog"], 2: ["cat"]}
    once = [(1, "A dog."), (2, "A dog.")]
    assert score_captions(once, truth).warnings == []
    twice = score_captions([*once, once[0], (2, "A cat.")], truth)
    assert twice.metrics["chair_s"] == 1 / 4
    (warning,) = twice.summary()["warnings"]
    assert "2 of 2 images have several captions, first image 1 with 2; 1 captions repeat" in warning


def test_saved_image_lists_repeat_a_run(tmp_path):
    ids = sample_image_ids(range(1000), 5, seed=3)
    assert (
        ids == sample_image_ids(reversed(range(1000)), 5, seed=3) != sample_image_ids(range(1000), 5, seed=4)
    )
    write_image_ids(tmp_path / "ids.json", ids, seed=3)
    assert read_image_ids(tmp_path / "ids.json") == ids
    assert only_images([(ids[0], "a"), (-1, "b")], ids[:1]) == [(ids[0], "a")]
    with pytest.raises(ValueError, match="4 of 5 listed images have no caption"):
        only_images([(ids[0], "a")], ids)
    with pytest.raises(ValueError, match="between 1 and 3"):
        sample_image_ids([1, 2, 3], 4, seed=0)


def test_command(tmp_path, coco):
    captions, details, ids = tmp_path / "c.jsonl", tmp_path / "d.json", tmp_path / "ids.json"
    captions.write_text(
        '{"image_id": 1, "caption": "A dog and a car."}\n{"image_id": 3, "caption": "A cat."}\n'
    )
    base = ["chair", "--captions", str(captions), "--annotations", str(coco)]
    run = CliRunner().invoke(app, [*base, "--details", str(details), "--save-image-ids", str(ids), "--json"])
    assert run.exit_code == 0, run.output
    shown = json.loads(run.stdout)
    assert {name: shown[name] for name in ("chair_s", "chair_i", "recall", "precision", "length")} == {
        "chair_s": 1.0, "chair_i": 2 / 3, "recall": 1 / 3, "precision": 1 / 3, "length": 4.5,
    }  # fmt: skip
    assert json.loads(details.read_text())["sentences"][0]["hallucination_spans"] == [[12, 15]]
    assert read_image_ids(ids) == [1, 3]
    captions.write_text(captions.read_text() * 2)
    assert "warning: 2 of 2 images have several captions" in CliRunner().invoke(app, base).stderr
    ids.write_text("[1]")
    captions.write_text(captions.read_text().splitlines()[0])
    only = json.loads(CliRunner().invoke(app, [*base, "--image-ids", str(ids), "--json"]).stdout)
    assert only["n_captions"] == 1
    assert "chair_s" in CliRunner().invoke(app, base).stdout
    captions.write_text('{"image_id": 77, "caption": "A dog."}')
    bad = CliRunner().invoke(app, [*base, "--json"])
    assert (bad.exit_code, bad.stdout) == (2, "")
    assert "error: 1 of 1 images are not in the annotations" in bad.stderr


def test_five_thousand_short_captions_take_well_under_a_second():
    text = "a man rides a brown horse near two parked cars and some tall trees while birds fly over the bus"
    words = text.split()
    captions = [(n, " ".join(words[n % 7 :][: 9 + n % 5]) + f" number {n}.") for n in range(5000)]
    start = time.process_time()
    score_captions(captions, {n: ["person", "horse"] for n in range(5000)})
    assert time.process_time() - start < 1.5
