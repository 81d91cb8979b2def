"""The lemmas of the WordNet variant of CHAIR (OPERA, PAI, VISTA, lmms-eval), through NLTK if it is there.

That variant tags each token with a part of speech and takes its WordNet lemma instead of the official
singular, so "bus" counts and "men" does not. Its numbers cannot be compared with official ones: always name
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Lemmatiser = Callable[[Sequence[str]], list[str]]
"""The tokens of one caption -> as many lemmas."""

_HOW_TO_INSTALL = (
    "the wordnet variant needs NLTK and two of its data packages: pip install nltk && "
    "python -m nltk.downloader wordnet averaged_perceptron_tagger_eng. "
    "Or pass a lemmatiser of your own, or choose variant 'official'"
)


def nltk_lemmatiser() -> Lemmatiser:
    """Tagger and lemmatiser of NLTK, put together as those scripts do: nouns unless tagged J.., V.. or R...

    Raises:
        ImportError: NLTK or its data are not installed; the message says what to install.
    """
    try:
        from nltk.stem import WordNetLemmatizer  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from nltk.tag import pos_tag  # type: ignore[import-not-found,import-untyped,unused-ignore]

        lemmatizer = WordNetLemmatizer()
        pos_tag(["dog"])
        lemmatizer.lemmatize("dog", pos="n")
    except (ImportError, LookupError) as missing:
        raise ImportError(_HOW_TO_INSTALL) from missing

    classes = {"J": "a", "V": "v", "R": "r"}

    def lemmatise(tokens: Sequence[str]) -> list[str]:
        tagged = pos_tag(list(tokens))
        return [lemmatizer.lemmatize(token, pos=classes.get(tag[0], "n")) for token, tag in tagged]

    return lemmatise
