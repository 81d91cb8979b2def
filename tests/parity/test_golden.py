"""Every golden case equals the official code it was recorded from.

A golden folder holds one sub-folder per method (``flowcut/``, ``pope/`` ...). For each there is a module of the
same name in this directory with ``cases(folder) -> list[Path]`` (where its cases lie) and ``check(case)`` (which
raises if ours differs). A new case file is picked up by itself: nothing here knows its name.
"""

import importlib
import os
from pathlib import Path

import pytest

DEFAULT = Path(__file__).parents[1] / "data" / "golden"
GOLDEN = Path(os.environ.get("VLM_PRUNE_GOLDEN", DEFAULT))


def _methods() -> list[str]:
    here = Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if not p.stem.startswith(("test_", "_", "conftest")))


def _cases():
    for method in _methods():
        folder = GOLDEN / method
        if not folder.is_dir():
            continue
        module = importlib.import_module(f"tests.parity.{method}")
        for case in module.cases(folder):
            yield pytest.param(module, case, id=f"{method}/{case.stem}")


def test_golden_folder_is_there():
    assert GOLDEN.is_dir(), f"no golden data at {GOLDEN}: set VLM_PRUNE_GOLDEN to the folder that holds it"


@pytest.mark.parametrize("method", [m for m in _methods() if (GOLDEN / m).is_dir()])
def test_every_folder_of_a_known_method_has_cases(method):
    assert importlib.import_module(f"tests.parity.{method}").cases(GOLDEN / method)


@pytest.mark.parametrize("method", _methods())
def test_some_cases_of_every_method_are_in_this_repository(method):
    assert importlib.import_module(f"tests.parity.{method}").cases(DEFAULT / method)


@pytest.mark.parametrize(("module", "case"), list(_cases()))
def test_case(module, case):
    module.check(case)
