"""AMBER: objects that descriptions invent, and yes-no questions (Wang et al. 2023, arXiv 2311.07397).

Generative, over descriptions. Of each count the nouns that AMBER knows, with repeats; an annotation names the objects
that are in the image, and those that people tend to imagine there:

    chair   nouns for neither a safe word nor an object in the image / nouns
    cover   objects in the images that are named / objects in the images
    hal     descriptions with a noun that counts for chair / descriptions
    cog     imagined objects that are named / imagined objects

Discriminative, over yes-no questions. *No* is the positive class, and an answer counts only if it is "Yes" or "No":

    accuracy   right answers / questions
    precision  rightly No / answers No
    recall     rightly No / questions whose truth is no
    f1         2 precision recall / (precision + recall)

    score      (1 - chair + f1) / 2

as in ``inference.py`` of junyangwang0410/AMBER, in fractions and unrounded. The script rounds precision and recall to
one decimal of a per cent first and adds 0.0001 (for existence 0.001) below the fraction of f1: `official_f1` does.
Where a rate divides by zero the script stops; here it is 0 and named in ``undefined``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_prune.eval.chair.singular import singular
from vlm_prune.eval.chair.tokens import tokenise
from vlm_prune.eval.pope_matching import Row
from vlm_prune.eval.records import read_json

Nouns = Callable[[str], Sequence[str]]
"""The nouns of a text, in their singular, with repeats."""

Similar = Callable[[str, str], bool]
"""Whether two words mean nearly the same. The script asks spaCy's en_core_web_lg for a similarity above 0.8."""

DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
}
"""Types of AMBER's annotations -> what they ask about; types that are not listed are relations, as in the script."""


@dataclass(frozen=True)
class Words:
    """What AMBER knows of words.

    Attributes:
        relations: object -> other words for it (``relation.json``).
        safe: words that count as right in every image (``safe_words.txt``).
        nouns: finds the nouns of a description.
        similar: near-synonyms; by default no two words are.
    """

    relations: Mapping[str, Sequence[str]]
    nouns: Nouns
    safe: Collection[str] = ()
    similar: Similar = field(default=lambda one, other: False)

    @property
    def known(self) -> set[str]:
        """All words that count as objects."""
        return {*self.relations, *(word for words in self.relations.values() for word in words)}


def plain_nouns(known: Collection[str]) -> Nouns:
    """Every word that is ``known``, as it is written or in its singular, whatever part of speech it is.

    >>> plain_nouns({"man", "horse", "grass"})("Two men feed the horses, not the grass.")
    ['man', 'horse', 'grass']
    """

    def nouns(text: str) -> list[str]:
        words = [token if token in known else singular(token) for token in tokenise(text.lower())]
        return [word for word in words if word in known]

    return nouns


def nltk_nouns() -> Nouns:
    """What the released script takes for nouns: tokens that NLTK tags NN.., in their lemma.

    Raises:
        ImportError: NLTK or its data are not installed.
    """
    try:
        from nltk.stem import WordNetLemmatizer  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from nltk.tag import pos_tag  # type: ignore[import-not-found,import-untyped,unused-ignore]

        lemmatizer = WordNetLemmatizer()
        pos_tag(["dog"])
        lemmatizer.lemmatize("dogs")
    except (ImportError, LookupError) as missing:
        raise ImportError(
            "AMBER's nouns need NLTK and two of its data packages: pip install nltk && python -m nltk.downloader "
            "wordnet averaged_perceptron_tagger_eng. Or take nouns: plain"
        ) from missing

    def nouns(text: str) -> list[str]:
        tagged = pos_tag(tokenise(text))
        return [lemmatizer.lemmatize(token) for token, tag in tagged if tag.startswith("NN")]

    return nouns


def read_words(relations: Path, safe: Path | None = None, nouns: Nouns | None = None) -> Words:
    """AMBER's words from its files, ``relation.json`` and ``safe_words.txt``; ``nouns`` are `plain_nouns` by default.

    Raises:
        ValueError: the relations are no mapping of lists.
    """
    found = read_json(relations)
    if not isinstance(found, dict) or not all(isinstance(words, list) for words in found.values()):
        raise ValueError(f"{relations}: a JSON object of lists is needed, AMBER's relation.json")
    lines = [] if safe is None else safe.read_text(encoding="utf-8").split("\n")
    right = [line.strip() for line in lines if line.strip()]
    if nouns is None:
        nouns = plain_nouns(Words(found, list).known)
    return Words(found, nouns, right)


def read_annotations(path: Path) -> dict[str, Row]:
    """AMBER's ``annotations.json`` by id.

    Raises:
        ValueError: it is no list of annotations.
    """
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(row, dict) and "id" in row for row in found):
        raise ValueError(f"{path}: a JSON list of objects with id is needed, AMBER's annotations.json")
    return {str(row["id"]): row for row in found}


def read_yes_no(answer: str, parser: str = "exact") -> str:
    """ "Yes", "No", or the answer as it is: of ``parser`` "word", what the first word says in any case.

    >>> read_yes_no("yes, it is", "word"), read_yes_no("No.", "word"), read_yes_no("No."), read_yes_no("None", "word")
    ('Yes', 'No', 'No.', 'None')
    """
    if parser == "exact":
        return answer
    first = "".join(c if c.isalnum() else " " for c in answer).split()[:1]
    return first[0].capitalize() if first and first[0].lower() in ("yes", "no") else answer


@dataclass(frozen=True)
class Description:
    """One description: what of it is right.

    Attributes:
        nouns: those that AMBER knows, with repeats.
        hallucinated: those of them that are not in the image.
        covered: objects in the image that it names.
        imagined: objects that people tend to imagine, and that it names.
    """

    nouns: list[str]
    hallucinated: list[str]
    covered: set[str]
    imagined: set[str]


def read_description(text: str, truth: Sequence[str], hallu: Sequence[str], words: Words) -> Description:
    """Read a description of an image that shows ``truth``, and in which people tend to imagine ``hallu``.

    A noun is right if it is safe, or a word for an object in the image, or nearly one. Before the last is asked, it may
    count as a word for an imagined object, so one noun can be both.

    Raises:
        ValueError: an annotated object is not in the relations.
    """
    if unknown := [name for name in (*truth, *hallu) if name not in words.relations]:
        raise ValueError(
            f"object {unknown[0]!r} of an annotation is not in AMBER's relations (relation.json)"
        )
    nouns = [noun for noun in words.nouns(text) if noun in words.known]
    right, wrong = _spellings(truth, words), _spellings(hallu, words)
    found = Description(nouns, [], set(), set())
    for noun in nouns:
        if noun in words.safe:
            continue
        if (name := _first(right, lambda word, noun=noun: word == noun)) is not None:  # type: ignore[misc]
            found.covered.add(name)
            continue
        for same in (lambda word, noun=noun: word == noun, lambda word, noun=noun: words.similar(noun, word)):
            if (name := _first(wrong, same)) is not None:
                found.imagined.add(name)
        if (name := _first(right, lambda word, noun=noun: words.similar(noun, word))) is not None:  # type: ignore[misc]
            found.covered.add(name)
        else:
            found.hallucinated.append(noun)
    return found


def _spellings(names: Sequence[str], words: Words) -> list[tuple[str, str]]:
    """``(word, object)``: other words first, then the objects' names, as the script goes through them."""
    return [
        *((word, name) for name in names for word in words.relations[name]),
        *((name, name) for name in names),
    ]


def _first(spellings: Iterable[tuple[str, str]], fits: Callable[[str], bool]) -> str | None:
    return next((name for word, name in spellings if fits(word)), None)


@dataclass(frozen=True)
class AmberResult:
    """Rates as fractions, those with nothing to divide by, and how many samples they rest on."""

    rates: dict[str, float]
    undefined: list[str]
    n: int


def score_descriptions(rows: Iterable[Row], words: Words) -> AmberResult:
    """The generative rates of rows with ``response``, ``truth`` and ``hallu`` (lists of objects).

    Raises:
        ValueError: there are no rows, or an object is unknown.
    """
    total: Counter[str] = Counter()
    for row in rows:
        one = read_description(row["response"], row["truth"], row["hallu"], words)
        total.update(
            n=1, nouns=len(one.nouns), wrong=len(one.hallucinated), bad=bool(one.hallucinated),
            covered=len(one.covered), truth=len(set(row["truth"])),
            imagined=len(one.imagined), hallu=len(set(row["hallu"])),
        )  # fmt: skip
    if not total["n"]:
        raise ValueError("there are no descriptions to score")
    return _result(
        total["n"],
        chair=(total["wrong"], total["nouns"]),
        cover=(total["covered"], total["truth"]),
        hal=(total["bad"], total["n"]),
        cog=(total["imagined"], total["hallu"]),
    )


def score_questions(rows: Iterable[Row]) -> dict[str, AmberResult]:
    """The discriminative rates, by dimension and for ``all``.

    Args:
        rows: with ``response``, ``truth`` (yes or no) and ``type``.

    Raises:
        ValueError: there are no rows, or a truth is neither yes nor no.
    """
    totals: dict[str, Counter[str]] = {"all": Counter()}
    for row in rows:
        if row["truth"] not in ("yes", "no"):
            raise ValueError(f"truth {row['truth']!r} of a question: 'yes' or 'no' is needed")
        said, no = row["response"], row["truth"] == "no"
        counts = {
            "n": 1,
            "right": said == ("No" if no else "Yes"),
            "said": said == "No",
            "no": no,
            "both": no and said == "No",
        }
        for name in ("all", DIMENSIONS.get(row["type"], "relation")):
            totals.setdefault(name, Counter()).update(counts)
    if not totals["all"]:
        raise ValueError("there are no answers to score")
    found = {}
    for name, total in totals.items():
        result = _result(
            total["n"],
            accuracy=(total["right"], total["n"]),
            precision=(total["both"], total["said"]),
            recall=(total["both"], total["no"]),
            f1=(2 * total["both"], total["said"] + total["no"]),
        )
        found[name] = result
    return found


def _result(n: int, **shares: tuple[float, float]) -> AmberResult:
    rates = {name: part / whole if whole else 0.0 for name, (part, whole) in shares.items()}
    return AmberResult(rates, [name for name, (_, whole) in shares.items() if not whole], n)


def official_f1(result: AmberResult, existence: bool = False) -> float:
    """F1 in per cent as the script prints it: from rounded precision and recall.

    >>> official_f1(AmberResult({"precision": 2 / 3, "recall": 1 / 2}, [], 6))
    57.2
    """
    precision, recall = (round(100 * result.rates[name], 1) / 100 for name in ("precision", "recall"))
    return round(2 * precision * recall / (precision + recall + (0.001 if existence else 0.0001)) * 100, 1)


def amber_score(descriptions: AmberResult, questions: AmberResult) -> float:
    """AMBER's one number, as a fraction."""
    return (1 - descriptions.rates["chair"] + questions.rates["f1"]) / 2
