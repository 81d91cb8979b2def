"""The effective rank of a Gram matrix by matrix products alone: no check for convergence, so no wait for the device.

An eigenvalue solver on a GPU takes the matrices of a batch one after the other and reports back to the host. A square
root by Newton-Schulz iteration and the traces of Chebyshev polynomials of it are products of whole batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import pi, sqrt

import torch

from ..kernels import planned

FLOOR = 1e-5
"""Singular values below this share of their norm count as zero."""
DEGREE = 64
"""Degree of the polynomials that approximate ``s`` and ``s log s``."""


def rank_by_products(gram: torch.Tensor) -> torch.Tensor:
    """Exponential of the entropy of the singular values' shares: fp64 ``(batch,)``, from 1 to ``size``.

    ``gram`` is fp64 ``(batch, size, size)``, symmetric, without negative eigenvalues; the singular values are the roots
    of its eigenvalues. Within 0.5 % of the exact rank where that is 5 or more, within 6 % below.
    """
    size = gram.shape[1]
    one = torch.eye(size, dtype=gram.dtype, device=gram.device)
    norm = torch.linalg.matrix_norm(gram)[:, None, None]
    # the shift keeps the roots of all eigenvalues at FLOOR or above, so that the iteration converges
    root = gram / norm.clamp(min=torch.finfo(gram.dtype).tiny) + FLOOR**2 * one
    inverse: torch.Tensor | None = None
    for scale in _scales(FLOOR):
        product = root if inverse is None else inverse @ root
        step = 1.5 * scale * one - 0.5 * scale**3 * product
        root, inverse = root @ step, step if inverse is None else step @ inverse
    total, spread = _series(gram.device) @ _traces(root, one).mT
    rank = (total.log() - spread / total).exp().clamp(1, size)
    return torch.where(norm[:, 0, 0] > 0, rank, 1.0)


@cache
def _scales(least: float) -> tuple[float, ...]:
    """Scaling factors for the fastest Newton-Schulz steps on roots between ``least`` and 1 (Chen & Chow 2014)."""
    scales = []
    while least < 0.9999:
        scales.append(sqrt(3 / (1 + least + least**2)))
        least = scales[-1] * least * (3 - (scales[-1] * least) ** 2) / 2
    return (*scales, 1.0)


def _traces(root: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """Traces of the Chebyshev polynomials up to `DEGREE` of ``root``, spectrum 0 to 1: ``(batch, DEGREE + 1)``.

    The upper half follows from the lower one, by ``T(i + j) = 2 T(i) T(j) - T(i - j)``; only its traces are computed.
    """
    first, half = 2 * root - one, DEGREE // 2
    terms = [one.expand_as(root), first]
    while len(terms) <= half:
        terms.append(2 * first @ terms[-1] - terms[-2])
    lower = torch.stack(terms, 1)
    traces = lower.diagonal(dim1=-2, dim2=-1).sum(-1)
    upper = 2 * (lower[:, -1:] * lower[:, 1:]).sum((-1, -2)) - traces[:, :-1].flip(-1)
    return torch.cat([traces, upper], 1)


def _series(device: torch.device) -> torch.Tensor:
    """Chebyshev coefficients of ``s`` and ``s log s``, functions of ``root(s**2 + FLOOR**2)``: fp64 ``(2, terms)``."""
    aside = device.type == "cuda"
    return planned(("spectrum", device), lambda: _coefficients().to(device, non_blocking=aside))


def _coefficients() -> torch.Tensor:

    def value(x: torch.Tensor) -> torch.Tensor:
        return (x.square() - FLOOR**2).clamp(min=0).sqrt()

    def coefficients(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        angle = (torch.arange(8192, dtype=torch.float64) + 0.5) * pi / 8192
        order = torch.arange(DEGREE + 1, dtype=torch.float64)[:, None]
        found = 2 * (function((angle.cos() + 1) / 2) * (order * angle).cos()).mean(-1)
        found[0] /= 2
        return found

    return torch.stack([coefficients(value), coefficients(lambda x: torch.xlogy(value(x), value(x)))])
