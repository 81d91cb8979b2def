"""Every Python and bash block of the README, of docs/ and of the guides in examples/ does what it says.

The blocks of a page are run in order: Python in one namespace, ``vlm-prune`` by its own parser, in a folder that has a
photograph and the other files that a reader would bring. A comment above a block says where that is not so, and why:

``<!-- not run: why -->``
    Its Python is parsed only; of its commands the names, the options and the targets of make are checked.
``<!-- slow: why -->``
    It is run among the slow tests.
``<!-- on a small model: family -->``
    What it loads by ``from_pretrained`` is a small random model of the family, with its stock processor.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import tomllib
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from tests.models import make
from tests.test_processors import PROCESSORS
from vlm_prune import unprune
from vlm_prune.cli import app
from vlm_prune.eval import load_model
from vlm_prune.eval.checkpoints import CHECKPOINTS, markdown
from vlm_prune.eval.runs.yaml_file import parse_config
from vlm_prune.eval.scenes import make_scene

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES += ["docs/gpu/README.md"]
PAGES += [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.md"))]
COMMAND = typer.main.get_command(app)

CHECKED_ONLY = ("pip", "git", "cd", "hf", "lmms-eval", "export", "curl", "vllm")
"""Commands of others, whose options are theirs; they stand in blocks that are not run."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its text, and what the comments above it say."""

    page: str
    line: int
    language: str
    text: str
    notes: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    text, found = (ROOT / page).read_text(encoding="utf-8"), []
    for match in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        above = re.search(r"(?:^ *<!--[^\n]*-->\n)*\Z", text[: match.start()], re.MULTILINE)[0]
        notes = dict(re.findall(r"<!-- ([^:]+?)(?:: (.*?))? -->", above))
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match[2], dedent(match[3]), notes))
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command: continued lines joined; comments, and variables that are set, left out."""
    lines = [x for x in re.sub(r"\\\n", " ", block.text).splitlines() if not re.match(r"\w+=\$\(", x)]
    split = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [[word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)] for words in split if words]


def check_options(arguments: list[str], place: str) -> None:
    """The command exists and takes these arguments; it is not run."""
    name, *rest = arguments
    command = COMMAND.get_command(COMMAND.make_context("vlm-prune", [name]), name)
    assert command is not None, f"{place}: vlm-prune has no command {name}"
    try:
        command.make_context(name, rest)
    except typer.Exit:
        pass
    except Exception as error:
        pytest.fail(f"{place}: vlm-prune {shlex.join(arguments)}: {error}")


def check(words: list[str], place: str) -> None:
    """What can be known of a command without running it."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if words[0] == "vlm-prune":
        check_options(words[1:], place)
    elif "vlm_prune" in words and words[words.index("vlm_prune") - 1] == "-m":
        check_options(words[words.index("vlm_prune") + 1 :], place)
    elif words[0] == "make":
        assert set(words[1:]) <= targets, f"{place}: make has no target {words[1:]}"
    elif words[0] == "python":
        assert words[1] == "-m" or (ROOT / words[1]).is_file(), f"{place}: there is no {words[1]}"
    elif words[0].endswith("pre-commit"):
        pass
    else:
        assert words[0] in CHECKED_ONLY, f"{place}: what is {words[0]}?"
    for asked in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert asked in extras, f"{place}: there is no extra {asked}"


def bring_files(folder: Path) -> None:
    """What a reader has: a photograph, answers, captions with their annotations; and the examples of the clone."""
    make_scene(2026).image.save(folder / "photo.jpg")
    (folder / "examples").symlink_to(ROOT / "examples")
    asked = {"question_id": 1, "text": "Is there a cat?", "label": "yes"}
    (folder / "q.jsonl").write_text(json.dumps(asked))
    (folder / "a.jsonl").write_text(json.dumps({"question_id": 1, "text": "Yes."}))
    (folder / "c.jsonl").write_text(json.dumps({"image_id": 1, "caption": "A cat on a desk."}))
    images = [{"id": 1, "file_name": "COCO_val2014_000000000001.jpg"}]
    (folder / "coco_annotations").mkdir()
    objects = {
        "images": images,
        "categories": [{"id": 17, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 17}],
    }
    captions = {"images": images, "annotations": [{"image_id": 1, "caption": "A cat."}]}
    (folder / "coco_annotations" / "instances_val2014.json").write_text(json.dumps(objects))
    (folder / "coco_annotations" / "captions_val2014.json").write_text(json.dumps(captions))


def stand_in(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """``from_pretrained`` gives a small model of ``family``, in float32, and its stock processor."""
    if family == "llava":  # a trained one, with as many tokens as the page drops
        small, processor = load_model("tiny-llava")
    else:
        small, processor = make(family), PROCESSORS[family]()

    def load_processor(name: str, **options: Any) -> Any:
        assert set(options) <= {"size", "max_patches"}
        return processor

    def load(name: str, dtype: Any) -> Any:
        assert name in CHECKPOINTS, f"{name} is none of the well-known checkpoints"
        assert CHECKPOINTS[name].family == family
        return small

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", load_processor)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    bring_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(block: Block, namespace: dict) -> None:
    # blank lines in front, so that a traceback names the line of the page
    code = compile("\n" * (block.line - 1) + block.text, str(ROOT / block.page), "exec", dont_inherit=True)
    exec(code, namespace)


def run_page(page: str, slow: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the blocks of a page in order. How many were run."""
    # a policy of one's own is a file of the package, see contributing.md
    namespace = {"__name__": "vlm_prune.policies.mypaper", "__package__": "vlm_prune.policies"}
    run = 0
    for block in blocks(page):
        if "not run" in block.notes or ("slow" in block.notes and not slow):
            continue
        if family := block.notes.get("on a small model"):
            stand_in(monkeypatch, family)
        if block.language == "python":
            run_python(block, namespace)
            run += 1
        elif block.language == "bash":
            for words in commands(block):
                assert words[0] == "vlm-prune", f"{block.place}: say why this is not run"
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, f"{block.place}: {shlex.join(words)}\n{result.output}"
            run += 1
    return run


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, workplace, monkeypatch):
    run_page(page, False, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any("slow" in b.notes for b in blocks(p))])
def test_slow_blocks_run(page, workplace, monkeypatch):
    run_page(page, True, monkeypatch)


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page)], ids=lambda b: b.place)
def test_what_is_not_run_is_checked(block):
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "bash":
        for words in commands(block):
            if not words[0].startswith("MODEL"):
                check(words, block.place)
    elif block.language == "yaml":
        parse_config(block.text, block.place)
    assert block.notes.get("not run") != "", f"{block.place}: say why it is not run"
    assert block.notes.get("slow") != "", f"{block.place}: say why it is slow"


def test_few_blocks_are_not_run():
    """The marks are for downloads, installations and other machines, not for blocks that fail."""
    marked = {b.place: b.notes["not run"] for page in PAGES for b in blocks(page) if "not run" in b.notes}
    reasons = r"download|install|virtual environment|vLLM|COCO|GPU|how the tests are started|half an hour"
    assert all(re.search(reasons, why) for why in marked.values()), marked


def test_every_call_of_the_table_runs(workplace):
    """The README lists the ways to call `prune`, one a row."""
    namespace: dict = {}
    first, *_ = (b for b in blocks("README.md") if b.language == "python")
    run_python(first, namespace)
    calls = re.findall(r"^\| `(prune\(model.*?\))` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(calls) > 5
    for call in calls:
        exec(call, namespace)
        namespace["model"].generate(**namespace["inputs"], max_new_tokens=1)
        unprune(namespace["model"])


def test_sizes_of_checkpoints_are_those_that_are_computed():
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- checkpoints -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert table, "docs/checkpoints.md has lost the marks around its table"
    assert table[1].strip() == markdown(), (
        "put vlm_prune.eval.checkpoints.markdown() into docs/checkpoints.md"
    )


def test_a_block_that_fails_is_noticed(workplace, monkeypatch):
    """Names a line of the page, so that the test above cannot pass by running nothing."""
    broken = Block("README.md", 7, "python", "x = 1\nraise RuntimeError('noticed')\n", {})
    with pytest.raises(RuntimeError) as caught:
        run_python(broken, {})
    assert caught.traceback[-1].lineno + 1 == 8
    assert run_page("README.md", False, monkeypatch) >= 4
    with pytest.raises(pytest.fail.Exception, match="No such option"):
        check_options(["ask", "photo.jpg", "why?", "--tokns", "64"], "here")
    with pytest.raises(AssertionError, match="no command"):
        check_options(["prune"], "here")
    with pytest.raises(AssertionError, match="no extra"):
        check(["pip", "install", ".[nothing]"], "here")
