"""What `make docs` adds to the pages of docs/: README and guides from elsewhere, generated references, and right links.

Pages are written to be read on GitHub, where links lead to files. On the site a link to a page leads to that page, a
link to any other file to the repository; one that leads nowhere is a warning, which fails a strict build.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
HOME = "https://github.com/vlm-prune/vlm-prune/blob/main"
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "examples/serve_vllm.md": "serve_vllm.md",
}
"""Files outside docs/ that are pages, and where on the site."""

log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from elsewhere and the generated ones."""
    from pygments.formatters import HtmlFormatter

    generated = {
        "reference/policies.md": policies(),
        "reference/families.md": families(),
        "reference/command_line.md": command_line(),
        "pygments.css": HtmlFormatter().get_style_defs(".highlight"),
    }
    for source, target in ELSEWHERE.items():
        generated[target] = (ROOT / source).read_text(encoding="utf-8")
    for target, content in generated.items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to pages or to the repository, and set comments apart from the tables below them."""
    sources = {target: source for source, target in ELSEWHERE.items()}
    here = PurePosixPath(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files} | ELSEWHERE

    def led(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.normpath(here.parent / target)
        end = f"#{anchor}" if anchor else ""
        if path in pages:
            return f"]({os.path.relpath(pages[path], PurePosixPath(page.file.src_uri).parent)}{end})"
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which is not there", here, target)
        return f"]({HOME}/{path}{end})"

    fences = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    fences[::2] = [re.sub(r"\]\(([^)\s]+)\)", led, text) for text in fences[::2]]
    return re.sub(r"-->\n(?=\S)", "-->\n\n", "".join(fences))


def policies() -> str:
    """The reference of all registered policies."""
    from vlm_prune.registry import POLICIES

    parts = ["# Policies", "Each policy with its fields; [which one when](../policies.md)."]
    return "\n\n".join([*parts, *(_entry(POLICIES[name], f"`{name}`") for name in sorted(POLICIES))])


def families() -> str:
    """The reference of all adapters."""
    from vlm_prune.registry import ADAPTERS

    parts = [
        "# Model families",
        "Adapters by `config.model_type`; [one of your own](../contributing.md#add-a-model-family).",
    ]
    shown = {ADAPTERS[name]: name for name in reversed(ADAPTERS)}
    names = {entry: [n for n in ADAPTERS if ADAPTERS[n] == entry] for entry in shown}
    entries = (_entry(entry, ", ".join(f"`{n}`" for n in names[entry])) for entry in reversed(shown))
    return "\n\n".join([*parts, *entries])


def _entry(path: Any, title: str) -> str:
    name = path.replace(":", ".")
    return f"## {title}\n\n::: {name}\n    options:\n      heading_level: 3"


def command_line() -> str:
    """The help of every command."""
    import typer
    from typer.testing import CliRunner

    from vlm_prune.cli import app

    command = typer.main.get_command(app)
    names: list[str] = command.list_commands(command.make_context("vlm-prune", [], resilient_parsing=True))
    parts = [
        "# Command line",
        "`vlm-prune` and its commands; `--install-completion` teaches them to your shell.",
    ]
    for words in ([], *([name] for name in names)):
        help_text = CliRunner().invoke(app, [*words, "--help"], terminal_width=100).output
        parts += [f"## vlm-prune {' '.join(words)}".rstrip(), f"```text\n{help_text.strip()}\n```"]
    return "\n\n".join(parts)
