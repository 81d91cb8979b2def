"""The kernels without a GPU: in Triton's interpreter, compiled ahead of time, and the ops around them on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vlm_prune import kernels
from vlm_prune.kernels import reference

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python at the root of the repository."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parent, env=env, capture_output=True, text=True, check=False
    )


@needs_triton
def test_kernels_equal_the_reference_in_the_interpreter():
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py", TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout
    assert " passed" in done.stdout


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here_and_spill_nothing():
    code = """
from vlm_prune.kernels.compile import compile_all
for found in compile_all((90,)):
    print(found.kernel, found.dtype, found.registers, found.shared, found.spilled)
"""
    done = python("-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-4000:]
    table = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in table} == {
        f"{name}_kernel"
        for name in ("close", "gather", "place", "kv", "overwrite", "merge", "softmax", "join", "mass")
    }
    assert {row[1] for row in table} == {"bfloat16", "float16", "float32"}
    for _, _, registers, shared, spilled in table:
        assert 0 < int(registers) <= 255
        assert int(shared) <= 100 * 1024  # what every one of these GPUs lets a block have
        assert int(spilled) == 0


def test_importing_the_package_loads_no_kernel():
    code = "import sys, vlm_prune, vlm_prune.policies.visionzip; print([m for m in sys.modules if '.kernels.' in m])"
    assert python("-c", code).stdout.strip() == "['vlm_prune.kernels.plans', 'vlm_prune.kernels.reference']"


# --- the registered ops ---


def calls(requires_grad: bool = False):
    """Each op by name, with arguments of a batch of two."""

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=torch.float64, requires_grad=requires_grad)

    index = torch.tensor([[0, 2, 5], [1, 2, 4]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    live = torch.zeros(2, 6, dtype=torch.bool).scatter(1, index, valid)
    into = torch.tensor([[0, 1, -1, 1, 0, 2], [2, -1, -1, 0, 0, 0]])
    return {
        "gather_rows": (random(2, 6, 3), index, valid, 0.0),
        "place_rows": (random(2, 3, 3), index, valid, 6, 0.0),
        "close_holes": (random(2, 6, 3), live, torch.arange(6)[None], None, ~live, 3),
        "merge_rows": (random(2, 6, 3), into, random(2, 6), 3),
        "gather_kv": (random(2, 2, 6, 3), random(2, 2, 6, 3), index),
        "overwrite_rows": (random(2, 6, 2, 3), index, random(2, 3, 2, 3), valid[:, None]),
        "attention_mass": (
            torch.randn(2, 4, 6, 3),
            torch.randn(2, 2, 8, 3),
            index,
            valid,
            None,
            0.5,
        ),
    }


@pytest.fixture(scope="module")
def ops():
    pytest.importorskip("triton")
    return kernels._ops()


@pytest.mark.parametrize("name", calls())
def test_op_is_registered_as_torch_wants_it(ops, name):
    differentiable = name != "attention_mass"
    torch.library.opcheck(getattr(torch.ops.vlm_prune, name).default, calls(differentiable)[name])


@pytest.mark.parametrize("name", [name for name in calls() if name != "attention_mass"])
def test_gradients_are_those_of_the_reference(ops, name):
    arguments = calls(requires_grad=True)[name]

    def differentiable(*inputs):
        rest = iter(inputs)
        full = [next(rest) if isinstance(x, torch.Tensor) and x.requires_grad else x for x in arguments]
        results = getattr(torch.ops.vlm_prune, name)(*full)
        return [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]

    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    assert torch.autograd.gradcheck(differentiable, inputs)


@pytest.mark.parametrize("name", calls())
def test_a_gpu_gets_the_op_and_nothing_of_it_waits(ops, name):
    with FakeTensorMode():
        on_gpu = [
            torch.empty(x.shape, dtype=x.dtype if x.dtype != torch.float64 else torch.float32, device="cuda")
            if isinstance(x, torch.Tensor)
            else x
            for x in calls()[name]
        ]
        results = getattr(kernels, name)(*on_gpu)
    expected = getattr(reference, name)(*calls()[name])
    pairs = zip(results, expected, strict=True) if isinstance(results, tuple) else [(results, expected)]
    for ours, theirs in pairs:
        assert ours.device.type == "cuda"
        assert ours.shape == theirs.shape


def test_what_kernels_cannot_compute_takes_the_reference(monkeypatch):
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "_ops", lambda: pytest.fail("fp64 has no kernel"))
    x, index = torch.randn(1, 5, 2, dtype=torch.float64), torch.tensor([[1, 3]])
    assert torch.equal(kernels.gather_rows(x, index), x[:, [1, 3]])
