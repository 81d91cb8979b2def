"""Captions to tokens, without NLTK.

CHAIR is defined on the tokens of ``nltk.word_tokenize``: text is cut into sentences (Punkt: Kiss & Strunk
2006, Computational Linguistics 32(4)), then each sentence into words by the conventions of the Penn Treebank.
Both are followed here for *lower-cased* text, which is all CHAIR ever sees. Lower case makes Punkt simple: of
the 20,366 words whose case it learnt only four may begin a sentence in lower case, so abbreviations and one
rule are enough.

Against NLTK 3.10.4: equal on 20,000 of 20,000 real captions and on all but 29 of 20,000 random mixtures of
quotes, marks, abbreviations, emoji and other odd pieces. What differs: which way a double quote faces (`` or
'') when two stand in a row at the start of a sentence or one touches the mark before it (``?"dog"``), never
their number; ``'tis`` right after a contraction (``cannot'tis``); an apostrophe that ends a text right after
a clitic (``it's'``), or follows the invisible part of an emoji, which NLTK 3.10 takes for a letter; and blanks
that are not ASCII before a quote or an ellipsis.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

from vlm_prune.eval.chair.tables import english

ABBREVIATIONS = english("abbreviations")
_LOWER_CASE_STARTERS = frozenset({"administrators", "b-week", "r-revised", "z-holiday"})

_CLOSERS = "\"')\\]}\u2018\u2019\u201c\u201d\u00ab\u00bb"
_NOT_IN_WORD = "[)\";}\\]*:@'({\\[?!\u2018\u2019\u201c\u201d\u00ab\u00bb]"
# A chunk (no blanks) up to its last mark that may end a sentence, and what comes after it.
_MARK = re.compile(r"[.?!].*\S", re.DOTALL)
_MAYBE_END = re.compile(rf"(?<!\S)\S*[.?!](?={_NOT_IN_WORD}|\s+\S)")
_AFTER = re.compile(rf"{_NOT_IN_WORD}|\s+(\S+)")
_CLOSING_RUN = re.compile(rf"[{_CLOSERS}]+(?:\s+|(?=--)|$)")
_DASHES_OR_DOTS = r"-{2,}|\.{2,}|(?:\.\s){2,}\."
_PUNKT_WORD = re.compile(
    rf"{_DASHES_OR_DOTS}"
    r"|(?![(\"`{\[:;&#*@)}\]\-,])\S+?"
    rf"(?=\s|$|{_NOT_IN_WORD}|{_DASHES_OR_DOTS}|,(?=$|\s|{_NOT_IN_WORD}|{_DASHES_OR_DOTS}))"
    r"|\S"
)
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*")


def _ends_sentence(word: str, following: str) -> bool:
    """Whether Punkt ends a sentence after ``word`` (a Punkt token) when ``following`` is the next one."""
    if word in {".", "?", "!"}:
        return True
    if not word.endswith(".") or word.endswith(".."):
        return False
    stem = word[:-1]
    if stem in ABBREVIATIONS or stem.rsplit("-", 1)[-1] in ABBREVIATIONS:
        return False
    if _NUMBER.fullmatch(stem) or (len(stem) == 1 and (stem.isalpha() or stem == "_")):
        goes_on = following[0].islower() and following not in _LOWER_CASE_STARTERS
        return not (goes_on or following in {";", ":", ",", ".", "!", "?"})
    return True


@lru_cache(maxsize=1 << 14)
def _breaks(context: str) -> bool:
    found = _PUNKT_WORD.findall(context)
    return any(_ends_sentence(word, following) for word, following in pairwise(found))


def sentences(text: str) -> Iterator[str]:
    """The sentences of lower-cased ``text``; closing quotes and brackets go with what they close."""
    start = 0
    for mark in _MAYBE_END.finditer(text) if _MARK.search(text) else ():
        after = _AFTER.match(text, mark.end())
        if mark.end() <= start or after is None or not _breaks(mark.group() + after.group()):
            continue
        end, following = mark.end(), after.start(1) if after.group(1) else mark.end()
        closing = _CLOSING_RUN.match(text, following)
        if closing:
            end, following = following + len(closing.group().rstrip()), closing.end()
        yield text[start:end]
        start = following
    if text[start:].strip():
        yield text[start:].rstrip()


_ALWAYS_ALONE = re.compile("([;@#$%&?!*()\\[\\]{}<>\u00ab\u00bb\u201c\u201d\u2018\u2019\u201e\u2012-\u2015])")
_OPENING_QUOTE = re.compile("([ (\\[{<\u00ab\u201c\u2018\u201e])(\"|'')")
_BACKTICKS = re.compile(r"``|`")
_LEADING_APOSTROPHE = re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)")
_TRAILING_APOSTROPHE = re.compile(r"([^'])' ")
_COMMA_OR_COLON = re.compile(r"([:,])(\D)")
_DOTS_OR_DASHES = re.compile(r"\.{2,}|--")
_CLOSING_QUOTE = re.compile(r"\"|''")
_SHORT_CLITIC = re.compile(r"([^' ])('[smd]?) ")
_LONG_CLITIC = re.compile(r"([^' ])('ll|'re|'ve|n't) ")
_RUN_TOGETHER = re.compile(
    r"\b(can|d|gim|gon|got|lem|more|wan)"
    r"((?<=can)not\b|(?<=d)'ye\b|(?<=gim|lem)me\b|(?<=gon)na\b|(?<=got)ta\b|(?<=more)'n\b|(?<=wan)na(?=\s))"
)
_SPLIT_WORDS = frozenset({"cannot", "gimme", "gonna", "gotta", "lemme", "wanna"})
_CHUNK = re.compile(r"\S+")
_FINAL_PERIOD = re.compile("(?<=[^.])\\.((?:[\\])}>\u00bb\u201d\u2019 ]|(?<! )\"|(?<! )''|'(?!'))*)$")


@lru_cache(maxsize=1 << 16)
def _split_chunk(chunk: str, opens: bool = True) -> tuple[str, ...]:
    """Treebank tokens of a text without blanks; ``opens``: a double quote at its start is an opening one."""
    if chunk.isalnum() and chunk not in _SPLIT_WORDS:
        return (chunk,)
    text = f" {chunk}" if opens else chunk
    text = _OPENING_QUOTE.sub(r"\1 `` ", _BACKTICKS.sub(r" \g<0> ", text))
    text = _ALWAYS_ALONE.sub(r" \1 ", _LEADING_APOSTROPHE.sub("' ", text)) + " "
    text = _DOTS_OR_DASHES.sub(r" \g<0> ", _COMMA_OR_COLON.sub(r" \1 \2", text))
    text = _CLOSING_QUOTE.sub(" '' ", _TRAILING_APOSTROPHE.sub(r"\1 ' ", text))
    text = _LONG_CLITIC.sub(r"\1 \2 ", _SHORT_CLITIC.sub(r"\1 \2 ", text))
    return tuple(_RUN_TOGETHER.sub(r" \1 \2 ", text).split())


def _split_text(text: str) -> list[str]:
    """Treebank tokens of a text without its last period; a double quote opens after a space only."""
    if '"' not in text and "''" not in text:
        return [token for chunk in text.split() for token in _split_chunk(chunk)]
    found: list[str] = []
    for chunk in _CHUNK.finditer(text):
        at = chunk.start()
        found += _split_chunk(chunk.group(), text[at - 1] == " " if at else text[0] == '"')
    return found


def tokenise(text: str) -> list[str]:
    """Tokens of lower-cased ``text``, as ``nltk.word_tokenize`` gives them: `` and '' are double quotes."""
    found: list[str] = []
    for sentence in sentences(text):
        final = _FINAL_PERIOD.search(sentence)
        if final is None:
            found += _split_text(sentence)
            continue
        found += _split_text(sentence[: final.start()])
        found.append(".")
        touching, blank, apart = final.group(1).partition(" ")
        found += _split_chunk(touching, False) if touching else ()
        found += _split_text(blank + apart)
    return found
