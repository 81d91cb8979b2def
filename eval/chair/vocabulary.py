"""Which words of a caption name an object: COCO's 80, or any other set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from vlm_prune.eval.chair.tables import packaged, parse_sections


@dataclass(frozen=True)
class Vocabulary:
    """Words, the objects they mean, and the words that are read together.

    Args:
        object_of: every word or phrase that names an object -> that object (an object names itself).
        phrases: two or more words in a row -> the word or phrase that takes their place. One that names no
            object is
            swallowed: "train track" is no train.
        ignored: pairs (word, other): ``word`` does not count in a caption in which ``other`` stands.

    Build one with :meth:`coco`, :meth:`of` or :meth:`read`.
    """

    object_of: Mapping[str, str]
    phrases: Mapping[tuple[str, ...], str]
    ignored: tuple[tuple[str, str], ...] = ()

    @cached_property
    def objects(self) -> frozenset[str]:
        """The objects themselves."""
        return frozenset(self.object_of.values())

    @cached_property
    def known_words(self) -> frozenset[str]:
        """Every single word that names an object or is part of a phrase."""
        return frozenset(self.object_of) | {word for phrase in self.phrases for word in phrase}

    @cached_property
    def phrases_by_first_word(self) -> dict[str, list[tuple[tuple[str, ...], str]]]:
        """``first word -> [(whole phrase, what it becomes)]``, the longest phrase first."""
        found: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for phrase in sorted(self.phrases, key=len, reverse=True):
            found.setdefault(phrase[0], []).append((phrase, self.phrases[phrase]))
        return found

    @classmethod
    def of(cls, synonyms: Mapping[str, Iterable[str]] | Iterable[str]) -> Vocabulary:
        """From ``{object: other words for it}`` (or just the objects); names of several words become phrases.

        >>> Vocabulary.of({"red cube": ["crimson cube"], "ball": []}).object_of["crimson cube"]
        'red cube'
        """
        table = synonyms if isinstance(synonyms, Mapping) else dict.fromkeys(synonyms, ())
        object_of: dict[str, str] = {}
        for name, words in table.items():
            for word in (name, *words):
                word = " ".join(word.lower().split())
                if object_of.setdefault(word, name) != name:
                    raise ValueError(
                        f"{word!r} is given as a word for {object_of[word]!r} and for {name!r}; keep one"
                    )
        return cls(object_of, {tuple(word.split()): word for word in object_of if " " in word})

    @classmethod
    def parse(cls, text: str, complete: bool = True) -> Vocabulary:
        """From the text of a table such as ``coco_objects.txt``, whose head explains the form.

        Args:
            text: sections ``[objects]`` and, if needed, ``[phrases]`` and ``[ignored]``.
            complete: count words marked with ``~`` and join every name of several words; False is the
                official script's reading, in which only the phrases of ``[phrases]`` are joined.
        """
        sections = parse_sections(text)
        if not sections.get("objects"):
            raise ValueError("a vocabulary needs a section [objects] with lines 'object: word, word'")
        synonyms: dict[str, list[str]] = {}
        for line in sections["objects"]:
            name, _, words = line.partition(":")
            kept = (word.strip() for word in words.split(",") if complete or not word.strip().startswith("~"))
            synonyms.setdefault(name.strip(), []).extend(word.lstrip("~") for word in kept if word)
        every = cls.of(synonyms)
        phrases = dict(every.phrases) if complete else {}
        for line in sections.get("phrases", ()):
            phrase, _, becomes = (part.strip() for part in line.partition("="))
            phrases[tuple(phrase.split())] = becomes or phrase
        ignored = tuple(tuple(pair.split(" beside ", 1)) for pair in sections.get("ignored", ()))
        if any(len(pair) != 2 for pair in ignored):
            raise ValueError(f"[ignored] wants lines 'word beside other', got {sections['ignored']}")
        return cls(every.object_of, phrases, ignored)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path | str) -> Vocabulary:
        """From a table file of one's own."""
        try:
            return cls.parse(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def coco(cls, complete: bool = False) -> Vocabulary:
        """COCO's 80 objects with CHAIR's synonyms: as the official script reads them, or ``complete``."""
        return _coco(complete)


@cache
def _coco(complete: bool) -> Vocabulary:
    return Vocabulary.parse(packaged("coco_objects.txt"), complete)
