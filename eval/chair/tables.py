"""The package's word tables: plain text in ``[sections]``, ``#`` for comments."""

from functools import cache
from importlib.resources import files


def parse_sections(text: str) -> dict[str, list[str]]:
    """``{section: its lines}`` of a table; comments and empty lines are left out.

    Raises:
        ValueError: a line stands before the first ``[section]``.
    """
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        if line.startswith("[") and line.endswith("]"):
            lines = sections.setdefault(line[1:-1], [])
        elif line and lines is None:
            raise ValueError(f"line {number}: {line!r} stands before the first section, such as [objects]")
        elif line and lines is not None:
            lines.append(line)
    return sections


def packaged(name: str) -> str:
    """Text of a table that comes with the package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def english(section: str) -> frozenset[str]:
    """The words of one section of ``english.txt``."""
    return frozenset(" ".join(parse_sections(packaged("english.txt"))[section]).split())
