"""Which objects a caption mentions, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlm_prune.eval.chair.singular import singular
from vlm_prune.eval.chair.tokens import tokenise
from vlm_prune.eval.chair.vocabulary import Vocabulary
from vlm_prune.eval.chair.wordnet import Lemmatiser, nltk_lemmatiser
from vlm_prune.eval.records import choose

VARIANTS = {
    "official": "singulars as Pattern makes them, 'bus' -> 'bu' and all (LisaAnne/Hallucination, Maxlinn)",
    "wordnet": "WordNet lemmas of tagged tokens (OPERA, PAI, lmms-eval); needs NLTK and its data",
    "plain": "no quirks: a word counts as it stands or in its singular; for a vocabulary of one's own",
}


class Mention(NamedTuple):
    """One object word of a caption: ``token`` is the first of its ``width`` tokens."""

    word: str
    object: str
    token: int
    width: int
    official_index: int


class Reading(NamedTuple):
    """A caption as CHAIR sees it; ``words`` are the ``tokens`` in their counted form with phrases joined."""

    tokens: list[str]
    words: list[str]
    mentions: list[Mention]


class CaptionReader:
    """Finds the objects of a vocabulary in captions.

    Args:
        vocabulary: default COCO's (with all its names for variant ``plain``).
        variant: one of :data:`VARIANTS`; default ``official`` for COCO, ``plain`` for another vocabulary.
        lemmatise: for variant ``wordnet``: from the tokens of a caption to their lemmas; default NLTK's.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | None = None,
        variant: str | None = None,
        lemmatise: Lemmatiser | None = None,
    ):
        variant = variant or ("plain" if vocabulary else "official")
        self.variant = choose("CHAIR variant", variant, VARIANTS)
        self.vocabulary = vocabulary or Vocabulary.coco(complete=variant == "plain")
        if lemmatise is not None and variant != "wordnet":
            raise ValueError(f"a lemmatiser is only used by variant 'wordnet', not by {variant!r}")
        self._lemmatise = (lemmatise or nltk_lemmatiser()) if variant == "wordnet" else None
        self._plain_forms: dict[str, str] = {}

    def read(self, caption: str) -> Reading:
        """Tokens, words and object mentions of a caption."""
        tokens = tokenise(caption.lower())
        words, starts = self._join_phrases(self._forms(tokens))
        kept = list(range(len(words)))
        for word, other in self.vocabulary.ignored:
            if word in words and other in words:
                kept = [at for at in kept if words[at] != word]
        object_of = self.vocabulary.object_of
        mentions = [
            Mention(
                words[at],
                object_of[words[at]],
                starts[at],
                starts[at + 1] - starts[at],
                # The official script looks the position up after ignored words are gone, hence shifted; the
                # WordNet scripts count words instead of tokens.
                place if self.variant == "wordnet" else starts[place],
            )
            for place, at in enumerate(kept)
            if words[at] in object_of
        ]
        return Reading(tokens, words, mentions)

    def _forms(self, tokens: Sequence[str]) -> Sequence[str]:
        if self.variant == "official":
            return [singular(token) for token in tokens]
        if self._lemmatise is not None:
            lemmas = self._lemmatise(tokens)
            if len(lemmas) != len(tokens):
                raise ValueError(
                    f"the lemmatiser made {len(lemmas)} lemmas of {len(tokens)} tokens; one each is due"
                )
            return lemmas
        forms = self._plain_forms
        for token in tokens:
            if token not in forms:
                known = self.vocabulary.known_words
                candidates = (token, singular(token), token.removesuffix("s"), token.removesuffix("es"))
                forms[token] = next((form for form in candidates if form in known), token)
        return [forms[token] for token in tokens]

    def _join_phrases(self, forms: Sequence[str]) -> tuple[list[str], list[int]]:
        """Greedy from the left; also where each word starts, and one more: the number of tokens."""
        phrases = self.vocabulary.phrases_by_first_word
        if phrases.keys().isdisjoint(forms):
            return list(forms), list(range(len(forms) + 1))
        words: list[str] = []
        starts: list[int] = []
        at = 0
        while at < len(forms):
            word, width = forms[at], 1
            for phrase, becomes in phrases.get(word, ()):
                if tuple(forms[at : at + len(phrase)]) == phrase:
                    word, width = becomes, len(phrase)
                    break
            words.append(word)
            starts.append(at)
            at += width
        return words, [*starts, len(forms)]


def token_spans(caption: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """``(start, end)`` in characters of each token in ``caption``; a double quote is one or two wide."""
    text, at, spans = caption.lower(), 0, []
    for token in tokens:
        spellings = ('"', "''", "``") if token in {"``", "''"} else (token,)
        start, width = min(
            ((text.find(form, at), len(form)) for form in spellings if text.find(form, at) >= 0),
            default=(at, 0),
        )
        spans.append((start, start + width))
        at = start + width
    if len(text) == len(caption):
        return spans
    # a few letters are longer in lower case: back to the characters that each of these stands for
    place = [number for number, letter in enumerate(caption) for _ in letter.lower()] + [len(caption)]
    return [(place[start], place[end - 1] + 1 if end > start else place[start]) for start, end in spans]
