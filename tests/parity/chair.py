"""CHAIR against the official script, Maxlinn's and PAI's: one case an ``expected_*.json``, a sub-folder with an
``expected.json``, or a table of singulars.

Where NLTK and its data are missing, the WordNet variant takes its lemmas from the case instead of making them; the
rest of the score is checked all the same.
"""

import json
from pathlib import Path

import pytest

from vlm_prune.eval.chair import CaptionReader, coco_truth, image_id, read_captions, score_captions
from vlm_prune.eval.chair.singular import singular
from vlm_prune.eval.chair.tokens import tokenise
from vlm_prune.eval.chair.vocabulary import Vocabulary
from vlm_prune.eval.chair.wordnet import nltk_lemmatiser

RATES = {"CHAIRs": "chair_s", "CHAIRi": "chair_i", "Recall": "recall", "Precision": "precision", "F1": "f1"}


def cases(folder: Path) -> list[Path]:
    files = [*folder.glob("expected_*.json"), *folder.glob("singularize_*.json")]
    return sorted([*files, *(path.parent for path in folder.glob("*/expected.json"))])


def check(case: Path) -> None:
    if case.stem.startswith("singularize"):
        table = json.loads(case.read_text())
        assert {word: singular(word) for word in table} == table
        return
    folder = case if case.is_dir() else case.parent
    expected = json.loads((case / "expected.json" if case.is_dir() else case).read_text())
    sentences = expected.get("sentences", [])
    captions = read_captions(folder / "captions.jsonl")
    other_form = folder / "captions_official_format.json"
    if other_form.exists():
        assert sorted(read_captions(other_form)) == sorted(captions)
    reader, truth = _reader_and_truth(case, folder, captions, sentences)
    if "gt_objects" in expected:
        assert {str(image): sorted(truth[image]) for image in truth} == expected["gt_objects"]
    result = score_captions(captions, truth, reader, samples=0)
    for score, want in zip(result.captions, sentences, strict=bool(sentences)) if sentences else ():
        _compare_sentence(score.as_official(), want)
    _compare_overall(result, expected.get("overall_metrics") or expected.get("overall") or expected)


def _reader_and_truth(case, folder, captions, sentences):
    recorded = {want["image_id"]: want["mscoco_gt_words"] for want in sentences}
    reader = CaptionReader()
    if "wordnet" in case.stem:
        try:
            reader = CaptionReader(variant="wordnet", lemmatise=nltk_lemmatiser())
        except ImportError:
            return CaptionReader(variant="wordnet", lemmatise=_replay(sentences)), recorded
    if (folder / "gt_objects.json").exists():
        listed = json.loads((folder / "gt_objects.json").read_text())
        return reader, {image_id(image): objects for image, objects in listed.items()}
    if (folder / "annotations").is_dir():
        return reader, coco_truth(folder / "annotations", reader, {image for image, _ in captions})
    return reader, recorded


def _replay(sentences):
    """A lemmatiser that gives the recorded words back, joined phrases taken apart again."""
    recorded = {tuple(tokenise(want["caption"].lower())): want["words"] for want in sentences}
    phrases = Vocabulary.coco().phrases

    def lemmatise(tokens):
        lemmas: list[str] = []
        for word in recorded[tuple(tokens)]:
            here = tokens[len(lemmas) :]
            for phrase, becomes in phrases.items():
                alike = zip(phrase, here, strict=False)
                if becomes == word and len(here) > 1 and all(part[:2] == token[:2] for part, token in alike):
                    lemmas += phrase
                    break
            else:
                lemmas.append(word)
        return lemmas

    return lemmatise


def _compare_sentence(ours, want):
    for key, value in want.items():
        if key != "metrics":
            assert ours[key] == (sorted(value) if key == "mscoco_gt_words" else value), (want["caption"], key)
    for name, value in want["metrics"].items():
        if name != "Len":  # always 0 there
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-12), (want["caption"], name)


def _compare_overall(result, want):
    if "error" in want:
        assert result.undefined, "the official script divides by zero here; that must be reported"
        return
    for name, ours in RATES.items():
        if name in want:
            assert result.metrics[ours] == pytest.approx(want[name], rel=1e-12), name
    if "Len" in want:  # PAI stores a hundredth of it
        length = result.metrics["length"]
        assert want["Len"] in (pytest.approx(length, rel=1e-12), pytest.approx(length / 100, rel=1e-12))
    counts = {
        "n_caps": result.counts["n_captions"],
        "n_hallucinated_caps": result.counts["n_hallucinated_captions"],
        "n_hallucinated": result.counts["n_hallucinated_words"],
        "n_node_words": result.counts["n_object_words"],
        "n_gt": sum(len(score.truth) for score in result.captions),
        "n_generated_unique": sum(len({m.object for m in score.mentions}) for score in result.captions),
        "n_recalled": sum(len({m.object for m in s.mentions} & s.truth) for s in result.captions),
    }
    assert {name: counts[name] for name in counts if name in want} == {
        n: want[n] for n in counts if n in want
    }
