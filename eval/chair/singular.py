"""The singular of a noun, as the official CHAIR script gets it: with Pattern's ``singularize``.

Its mistakes are part of the metric (``bus`` -> ``bu``, ``tennis`` -> ``tenni``, ``four`` -> ``fmy``), so they
are kept. Rules and word lists follow module ``inflect`` of Pattern (see ``english.txt`` for the source), for
lower-case words.
"""

import re
from functools import lru_cache

from vlm_prune.eval.chair.tables import english

_UNCHANGED = english("unchanged")
# Pattern asks whether a listed word ends in the given one, not the other way round: "rice" makes "ice" stay.
_UNCHANGED_ENDINGS = frozenset(word[at:] for word in _UNCHANGED for at in range(len(word) + 1))
_KEEPS_IES = tuple(word + "s" for word in sorted(english("keeps -ies")))
_IRREGULAR = dict(pair.split("=") for pair in english("irregular"))
_IRREGULAR_LENGTHS = sorted({len(plural) for plural in _IRREGULAR})
_PREPOSITIONS = english("prepositions")

# (what comes before, plural ending, singular ending); only the first rule that fits is applied.
_RULES = tuple(
    (re.compile("|".join(f"(?<={stem}){ending}$" for stem in stems.split(" "))), single)
    for stems, ending, single in (
        (".", "ae", "a"),
        (".", "itis", "itis"),
        (".", "eaux", "eau"),
        ("quiz", "zes", ""),
        ("matr", "ices", "ix"),
        ("ap vert ind", "ices", "ex"),
        ("^", "oxen(.*)", r"ox\1"),
        ("alias status", "es", ""),
        ("[octpvir|]", "i", "us"),
        ("cris ax test", "es", "is"),
        ("shoe", "s", ""),
        ("o bus", "es", ""),
        ("[ml|]", "ice", "ouse"),
        ("x ch ss sh", "es", ""),
        ("mov .omb", "ies", "ie"),
        ("s", "eries", "eries"),
        ("[^aeiouy] qu", "ies", "y"),
        ("[aeo]l [^d]ea ar", "ves", "f"),
        ("er", "ves", "ve"),
        ("[nlw]i", "ves", "fe"),
        ("[lr]", "ves", "f"),
        ("[aeo]", "ves", "ve"),
        ("sive tive hive", "s", ""),
        ("[^f]", "ves", "fe"),
        ("^analy", "ses", "sis"),
        ("analy", "ses", "asis"),
        ("ba diagno progno synop the .op .y", "ses", "sis"),
        ("[hdronbp] cl", "oses", "ose"),
        (".", "oses", "osis"),
        ("[ti]", "a", "um"),
        ("n", "ews", "ews"),
        ("", "s", ""),
    )
)


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """Singular of a lower-case ``word``; a word that matches no rule is returned as it is."""
    first, *rest = word.split("-")
    if rest and rest[0] in _PREPOSITIONS:
        return "-".join([singular(first), *rest])
    if word.endswith("'"):
        return singular(word[:-1]) + "'s"
    if word in _UNCHANGED_ENDINGS or word.endswith(_KEEPS_IES):
        return word
    for length in _IRREGULAR_LENGTHS:
        if word[-length:] in _IRREGULAR:
            return word[:-length] + _IRREGULAR[word[-length:]]
    for plural, single in _RULES:
        if plural.search(word):
            return plural.sub(single, word)
    return word
