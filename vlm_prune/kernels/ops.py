"""The kernels as registered ops, ``torch.ops.vlm_prune.*``: schema, device dispatch, fake results, gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from . import moves, reference, sums
from .reference import Closed

_library = torch.library.Library("vlm_prune", "DEF")
_library.define("gather_rows(Tensor x, Tensor index, Tensor? valid, float fill) -> Tensor")
_library.define("place_rows(Tensor rows, Tensor index, Tensor? valid, int length, float fill) -> Tensor")
_library.define(
    "close_holes(Tensor x, Tensor live, Tensor positions, Tensor? mask, Tensor? gone, int length)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("merge_rows(Tensor x, Tensor into, Tensor weight, int count) -> Tensor")
_library.define("gather_kv(Tensor keys, Tensor values, Tensor index) -> (Tensor, Tensor)")
_library.define(
    "attention_mass(Tensor query, Tensor key, Tensor index, Tensor votes, Tensor? valid, float scaling)"
    " -> (Tensor, Tensor)"
)
_library.define("overwrite_rows(Tensor output, Tensor rows, Tensor new, Tensor changed) -> Tensor")


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher whose kernel runs on its first argument's device: by itself, Triton uses the current device."""

    @wraps(launch)
    def guarded(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return launch(x, *args)

    return guarded


for _name, _kernels in (
    ("gather_rows", moves),
    ("place_rows", moves),
    ("close_holes", moves),
    ("gather_kv", moves),
    ("overwrite_rows", moves),
    ("merge_rows", sums),
    ("attention_mass", sums),
):
    _library.impl(_name, on_its_device(getattr(_kernels, _name)), "CUDA")
    _library.impl(_name, getattr(reference, _name), "CPU")

_ops = torch.ops.vlm_prune


# --- fake results ---


@torch.library.register_fake("vlm_prune::gather_rows")
def _(x: torch.Tensor, index: torch.Tensor, valid: Any, fill: float) -> torch.Tensor:
    return x.new_empty(*index.shape, x.shape[2])


@torch.library.register_fake("vlm_prune::place_rows")
def _(rows: torch.Tensor, index: torch.Tensor, valid: Any, length: int, fill: float) -> torch.Tensor:
    return rows.new_empty(len(rows), length, rows.shape[2])


@torch.library.register_fake("vlm_prune::close_holes")
def _(
    x: torch.Tensor, live: torch.Tensor, positions: torch.Tensor, mask: Any, gone: Any, length: int
) -> Closed:
    batch = len(x)
    return (
        x.new_empty(batch, length, x.shape[2]),
        live.new_empty(batch, length, dtype=torch.int64),
        live.new_empty(batch, length),
        positions.new_empty(*positions.shape[:-2], batch, length),
        live.new_empty(batch, dtype=torch.int64),
    )


@torch.library.register_fake("vlm_prune::merge_rows")
def _(x: torch.Tensor, into: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    return x.new_empty(len(x), count, x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("vlm_prune::gather_kv")
def _(keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, some = *keys.shape[:2], index.shape[1]
    return keys.new_empty(batch, heads, some, keys.shape[3]), values.new_empty(
        batch, heads, some, values.shape[3]
    )


@torch.library.register_fake("vlm_prune::attention_mass")
def _(
    query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, votes: Any, valid: Any, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, dtype = (len(query), query.shape[2]), torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=dtype)


@torch.library.register_fake("vlm_prune::overwrite_rows")
def _(output: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(output)


# --- gradients ---


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, index, valid, _ = inputs
    ctx.rows = x.shape[1]
    ctx.save_for_backward(index, valid)


def _gather_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    index, valid = ctx.saved_tensors
    # a row named twice gets both gradients, so this is a sum and not `place_rows`
    if valid is not None:
        grad = grad.masked_fill(~valid[..., None], 0)
    full = grad.new_zeros(len(grad), ctx.rows, grad.shape[2])
    return full.scatter_add(1, index[..., None].expand_as(grad), grad), None, None, None


def _save_place(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, index, valid, _, _ = inputs
    ctx.save_for_backward(index, valid)


def _place_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    index, valid = ctx.saved_tensors
    return _ops.gather_rows(grad, index, valid, 0.0), None, None, None, None


def _save_close(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, live = inputs[:2]
    ctx.full = x.shape[1]
    ctx.save_for_backward(live, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _close_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    live, order = ctx.saved_tensors
    valid = live.gather(1, order)
    return _ops.place_rows(grad, order, valid, ctx.full, 0.0), None, None, None, None, None


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])


def _merge_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, into, weight = ctx.saved_tensors
    joined = _ops.gather_rows(grad, into.clamp(min=0), into >= 0, 0.0)
    return (
        (joined * weight[..., None]).to(x.dtype) if ctx.needs_input_grad[0] else None,
        None,
        (joined * x).sum(-1).to(weight.dtype) if ctx.needs_input_grad[2] else None,
        None,
    )


def _save_kv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    keys, _, index = inputs
    ctx.rows = keys.shape[2]
    ctx.save_for_backward(index)


def _kv_backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    full = (g.new_zeros(*g.shape[:2], ctx.rows, g.shape[3]) for g in grads)
    return *(
        x.scatter_add(2, index[:, None, :, None].expand_as(g), g) for x, g in zip(full, grads, strict=True)
    ), None


def _save_overwrite(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rows, new, changed = inputs
    ctx.dtype = new.dtype
    ctx.save_for_backward(rows, changed)


def _overwrite_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    rows, changed = ctx.saved_tensors
    index = rows[..., None, None].expand(-1, -1, *grad.shape[2:])
    asked, changed = grad.gather(1, index), changed.transpose(1, 2)[..., None]
    kept = _ops.overwrite_rows(grad, rows, torch.zeros_like(asked), changed.squeeze(-1).transpose(1, 2))
    return kept, None, asked.masked_fill(~changed, 0).to(ctx.dtype), None


for _name, _backward, _save in (
    ("gather_rows", _gather_backward, _save_gather),
    ("place_rows", _place_backward, _save_place),
    ("close_holes", _close_backward, _save_close),
    ("merge_rows", _merge_backward, _save_merge),
    ("gather_kv", _kv_backward, _save_kv),
    ("overwrite_rows", _overwrite_backward, _save_overwrite),
):
    torch.library.register_autograd(f"vlm_prune::{_name}", _backward, setup_context=_save)


# --- calls ---

gather_rows = _ops.gather_rows.default
place_rows = _ops.place_rows.default
close_holes = _ops.close_holes.default
merge_rows = _ops.merge_rows.default
gather_kv = _ops.gather_kv.default
overwrite_rows = _ops.overwrite_rows.default


def attention_mass(query: torch.Tensor, key: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The op without gradients: its result is only used for choices."""
    return _ops.attention_mass(query.detach(), key.detach(), *args)
