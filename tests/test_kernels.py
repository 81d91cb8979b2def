"""Triton kernels against the torch reference: on a GPU, or in Triton's interpreter on any machine.

Without a GPU these are skipped unless TRITON_INTERPRET=1 is set before Python starts, as test_kernels_anywhere.py does.
Memory that a kernel has not written is NaN (see `poisoned`), so a row it forgets is seen.
"""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch

from vlm_prune.kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    *([] if INTERPRETED else [pytest.mark.cuda]),
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:triton"),  # numpy on log(0), which the kernels mean
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY = list(product((63, 577, 1000), TYPES, (False, True), (0.0, 0.3, 1.0)))
SOME = [
    (63, torch.float32, True, 0.3),
    (63, torch.bfloat16, False, 0.0),
    (63, torch.float16, False, 1.0),
    (577, torch.float16, True, 0.3),
    (1000, torch.bfloat16, False, 0.3),
]
"""The interpreter takes a second for what a GPU does in a microsecond: there, some of the combinations."""
MODELS = list(
    product(
        ("llava-gqa", "internvl"), ("flowcut", "visionzip", "pool", "vflowopt", "fastv", "mustdrop", "var")
    )
)
FEW_MODELS = [
    ("internvl", "flowcut"),
    ("llava-gqa", "visionzip"),
    ("llava-gqa", "mustdrop"),
    ("llava", "var"),
]

SHAPES = pytest.mark.parametrize(
    ("size", "dtype", "strided", "share"),
    SOME if INTERPRETED else EVERY,
    ids=lambda x: str(x).removeprefix("torch."),
)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers; let it multiply the numbers."""
    if not INTERPRETED:
        return
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product_of = InterpreterBuilder.create_dot

    def exact(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: product_of(self, exact(a), exact(b), *rest),
    )


@pytest.fixture
def kernels(request, monkeypatch):
    """All launchers; imported late, because Triton decides at import whether it interprets."""
    from vlm_prune.kernels import moves, sums

    if INTERPRETED:  # fewer and larger programs: a block's size is no part of what a kernel computes
        callspec = getattr(request.node, "callspec", None)
        if callspec is None or callspec.params.get("size", 577) > 63:
            monkeypatch.setattr(moves, "ROWS", 64)

    class Launchers:
        def __getattr__(self, name):
            return getattr(moves, name, None) or getattr(sums, name)

    return Launchers()


def random(*sizes, dtype=torch.float32, strided=False):
    """Normal numbers; ``strided`` ones are every second channel of rows that lie in another order."""
    if not strided:
        return torch.randn(sizes).to(DEVICE, dtype)
    *front, rows, channels = sizes
    return torch.randn(*front, 2 * channels, rows + 1).to(DEVICE, dtype)[..., 1:].mT[..., ::2]


def flags(*sizes, share=0.5):
    return (torch.rand(sizes) < share).to(DEVICE)


def selection(batch, size, share):
    """Ascending row numbers, as many in each sequence, and which of them count."""
    count = round(size * share)
    index = torch.stack([torch.randperm(size)[:count].sort().values for _ in range(batch)]).to(DEVICE)
    return index, flags(batch, count, share=0.7)


def same(ours, theirs):
    """Equal bit by bit, in dtype, shape and NaN."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@SHAPES
def test_gather_and_place(kernels, size, dtype, strided, share):
    x = random(2, size, 40, dtype=dtype, strided=strided)
    index, valid = selection(2, size, share)
    for some, fill in ((None, 0.0), (valid, 0.0), (valid, float("nan"))):
        rows = reference.gather_rows(x, index, some, fill)
        same(kernels.gather_rows(x, index, some, fill), rows)
        ours = kernels.place_rows(x[:, : index.shape[1]], index, some, size, fill)
        same(ours, reference.place_rows(x[:, : index.shape[1]], index, some, size, fill))


@SHAPES
def test_close_holes(kernels, size, dtype, strided, share):
    x = random(3, size, 40, dtype=dtype, strided=strided)
    live = flags(3, size, share=share)
    x[~live] = torch.nan  # as holes are
    length = max(1, int(live.sum(-1).max()))
    each = torch.arange(size, device=DEVICE) + torch.tensor([[0], [3], [100]], device=DEVICE)
    grid = torch.stack([each, 2 * each, each + 7])
    for positions, mask, gone in (
        (each[:1], None, None),
        (each, flags(3, size, share=0.8), ~live),
        (grid, None, flags(3, size)),
    ):
        arguments = x, live, positions, mask, gone, length
        for ours, theirs in zip(
            kernels.close_holes(*arguments), reference.close_holes(*arguments), strict=True
        ):
            same(ours, theirs)


@SHAPES
def test_merge(kernels, size, dtype, strided, share):
    count = 1 + int((6 if INTERPRETED else 40) * share)
    x = random(2, size, 40, dtype=dtype, strided=strided)
    into = torch.randint(-1, count, (2, size), device=DEVICE)
    into[0] = into[0].clamp(max=count // 2)  # groups without members
    into[1, ::2] = -1
    x[1, 0] = torch.nan  # of no group
    weight = random(2, size).abs()
    weight[1, 0] = torch.nan
    ours = kernels.merge_rows(x, into, weight, count)
    torch.testing.assert_close(ours, reference.merge_rows(x, into, weight, count), rtol=1e-5, atol=1e-4)
    same(ours, kernels.merge_rows(x, into, weight, count))  # always the same order of summation


@SHAPES
@pytest.mark.parametrize("dim", [16, 72])
def test_gather_kv(kernels, size, dim, dtype, strided, share):
    keys = random(2, 3, size, dim, dtype=dtype, strided=strided)
    values = random(2, 3, size, dim // 2, dtype=dtype)
    index, _ = selection(2, size, share)
    for ours, theirs in zip(
        kernels.gather_kv(keys, values, index), reference.gather_kv(keys, values, index), strict=True
    ):
        same(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "past", "asked", "heads", "shared", "dim", "dtype", "strided"),
    [
        (63, 0, 1, 4, 4, 16, torch.float32, False),
        (63, 9, 33, 6, 2, 72, torch.float32, True),
        (63, 9, 20, 6, 2, 16, torch.bfloat16, True),
        (577, 0, 17, 2, 2, 16, torch.float16, False),
        (1000, 30, 5, 4, 1, 16, torch.bfloat16, False),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
@pytest.mark.parametrize("padded", [False, True], ids=["causal", "padded"])
def test_attention_mass(kernels, rows, past, asked, heads, shared, dim, dtype, strided, padded):
    query = random(2, heads, rows, dim, dtype=dtype, strided=strided)
    key = random(2, shared, past + rows, dim, dtype=dtype, strided=strided)
    index = torch.stack([torch.randperm(rows)[:asked].sort().values for _ in range(2)]).to(DEVICE)
    votes = flags(2, asked, share=0.8)
    valid = None
    if padded:
        valid = flags(2, past + rows, share=0.7)
        valid[torch.arange(2, device=DEVICE)[:, None], index + past] = True  # who votes is no padding
    arguments = query, key, index, votes, valid, dim**-0.5
    for ours, theirs in zip(
        kernels.attention_mass(*arguments), reference.attention_mass(*arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_attention_mass_of_nobody(kernels):
    query, key = random(2, 4, 63, 16), random(2, 4, 63, 16)
    nobody = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    for mass in kernels.attention_mass(query, key, nobody, nobody.bool(), None, 1.0):
        same(mass, torch.zeros(2, 63, device=DEVICE))
    some = torch.arange(5, device=DEVICE).expand(2, -1)
    for mass in kernels.attention_mass(query, key, some, torch.zeros_like(some).bool(), None, 1.0):
        same(mass, torch.zeros(2, 63, device=DEVICE))


@SHAPES
def test_overwrite(kernels, size, dtype, strided, share):
    rows, _ = selection(2, size, 0.2)
    new = random(2, rows.shape[1], 6, 20, strided=strided)
    for changed in (flags(2, 6, rows.shape[1], share=share), flags(2, 1, 1, share=share)):
        ours = random(2, size, 6, 20, dtype=dtype, strided=strided)
        theirs = ours.clone()
        kernels.overwrite_rows(ours, rows, new, changed)
        reference.overwrite_rows(theirs, rows, new, changed)
        same(ours, theirs)


@pytest.mark.parametrize(("family", "policy"), FEW_MODELS if INTERPRETED else MODELS)
@torch.no_grad()
def test_a_pruned_model_computes_the_same_with_kernels(family, policy, kernels, monkeypatch):
    from tests.models import make, prompt
    from tests.policy_table import options
    from vlm_prune import kernels as dispatch
    from vlm_prune import pruned

    model = make(family).to(DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in prompt(family, [(2, -1, 6), (1, -1, 3)]).inputs.items()}
    answers, called = [], []

    class Noted:
        def __getattr__(self, name):
            called.append(name)
            launch = getattr(kernels, name)
            return launch

    for ours in (False, True):
        monkeypatch.setattr(dispatch, "_kernels", lambda x, ours=ours: Noted() if ours else None)
        with pruned(model, **options(policy)):
            answers.append((model(**inputs).logits, str(model.pruning.receipt.tower_tokens)))
    torch.testing.assert_close(answers[1][0], answers[0][0], rtol=1e-4, atol=1e-4)
    assert answers[1][1] == answers[0][1]
    assert ("overwrite_rows" if policy == "var" else "close_holes") in called
