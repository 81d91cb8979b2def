"""What leaving after a decoder layer would have done to a batch: the labels that DyVTE's gates are trained on.

The model runs once as it is; then the layers after an exit layer run again with the visual columns masked, which gives
text rows the same values as taking the tokens out. Follows the training branch of DyVTE's released
``modeling_llama.py``, which instead duplicates the batch after the exit layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedModelError
from ...policies.exit_gates import exit_features, exit_labels


@dataclass
class Recording:
    """What one forward did in a decoder: each layer's arguments, and the outputs of the layers asked for."""

    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def recorded(layers: list[nn.Module], exits: Collection[int]) -> Iterator[Recording]:
    """Record the forward that runs inside the ``with`` block; outputs of the layers ``exits`` only."""
    tape = Recording()

    def enter(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tape.calls[number] = args, kwargs

    def leave(number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tape.outputs[number] = output[0] if isinstance(output, tuple) else output

    handles = [
        layer.register_forward_pre_hook(partial(enter, number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ] + [layers[number].register_forward_hook(partial(leave, number)) for number in exits]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def hide_columns(mask: Any, visual: torch.Tensor) -> torch.Tensor:
    """A decoder layer's attention mask in which text rows do not see ``visual`` (bool ``(batch, rows)``) columns.

    ``mask`` is ``(batch, 1, rows, rows)``, bool or additive, or ``None`` for a causal one; the result is bool for
    ``None``. Visual rows keep what they saw: nobody reads them, and a row that sees nothing would be NaN.
    """
    hidden = (visual[:, None, :] & ~visual[:, :, None])[:, None]
    if mask is None:
        rows = visual.shape[1]
        return torch.ones(rows, rows, dtype=torch.bool, device=visual.device).tril() & ~hidden
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        raise UnsupportedModelError(
            "Training of exit gates masks single columns, which this attention implementation cannot do: load the "
            'model with attn_implementation="sdpa" or "eager".'
        )
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def run_without_image(
    layers: list[nn.Module], tape: Recording, exit_layer: int, visual: torch.Tensor
) -> torch.Tensor:
    """Output of the last layer ``(batch, rows, channels)`` when text stops seeing the image after ``exit_layer``."""
    hidden, masks = tape.outputs[exit_layer], {}
    for number in range(exit_layer + 1, len(layers)):
        args, kwargs = tape.calls[number]
        stock = kwargs.get("attention_mask")
        if id(stock) not in masks:
            masks[id(stock)] = hide_columns(stock, visual)
        output = layers[number](hidden, *args[1:], **{**kwargs, "attention_mask": masks[id(stock)]})
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def prompt_text(visual: torch.Tensor, valid: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rows between the last visual token and the answer, padding excluded: what a gate sees. Bool ``(batch, rows)``."""
    number = visual.long().cumsum(-1)
    behind = (number == number[:, -1:]) & ~visual & (number > 0)
    return behind & valid & ((labels >= 0).cumsum(-1) == 0)


def answer_rows(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that predict the answer and the ids they should predict: two int64 ``(batch, longest answer)``.

    ``labels`` is ``(batch, rows)``, not shifted, -100 except on the answer. Shorter answers are filled up with -100.
    """
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    wanted = targets >= 0
    index = (~wanted).to(torch.int8).argsort(dim=-1, stable=True)[:, : int(wanted.sum(-1).max())]
    return index, targets.gather(1, index).masked_fill(~wanted.gather(1, index), -100)


@dataclass(frozen=True)
class Observation:
    """What leaving after one layer would have done to a batch.

    Attributes:
        features: input of the gate, ``(batch, 2 x channels)``.
        labels: whether the sequence could have left, bool ``(batch,)``.
        usable: sequences that have an image, text after it, and an answer, bool ``(batch,)``.
        numbers: ``agreement``, ``loss_full`` and ``loss_masked``, see `exit_labels`.
    """

    features: torch.Tensor
    labels: torch.Tensor
    usable: torch.Tensor
    numbers: dict[str, torch.Tensor]


@torch.no_grad()
def observe(
    run: Callable[[], torch.Tensor],
    layers: list[nn.Module],
    norm: nn.Module,
    head: nn.Module,
    visual: torch.Tensor,
    valid: torch.Tensor,
    labels: torch.Tensor,
    exits: Collection[int],
    first_id: int = 0,
) -> dict[int, Observation]:
    """Try leaving after each of the layers ``exits``: one full pass, and one from each exit on.

    ``run`` does the full pass without a cache, and returns the decoder's last hidden state ``(batch, rows, channels)``
    as it leaves ``norm``. ``visual`` and ``valid`` are bool, ``labels`` int64, all ``(batch, rows)``.
    """
    text = prompt_text(visual, valid, labels)
    index, targets = answer_rows(labels)
    usable = text.any(-1) & (targets >= first_id).any(-1)

    def answer_logits(last: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = head(last.gather(1, index[..., None].expand(-1, -1, last.shape[2])))
        return logits

    with recorded(layers, exits) as tape:
        full = answer_logits(run())
    seen = {}
    for layer in exits:
        masked = answer_logits(norm(run_without_image(layers, tape, layer, visual)))
        leave, numbers = exit_labels(full, masked, targets, first_id)
        seen[layer] = Observation(exit_features(tape.outputs[layer], text), leave, usable, numbers)
    return seen
