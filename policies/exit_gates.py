"""DyVTE's exit gates: one small network per decoder layer that says when the text has seen enough of the image.

Follows the released ``modeling_llama.py`` (class ``Router``): two matrices, no biases, an exact GELU between them, on
the mean and the last of the text rows. Its authors ship no trained gates; `train_exit` in ``vlm_prune`` makes them.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

FORMAT = "vlm_prune.exit_gates.v1"
RELEASED_WIDTH = 2048


def exit_features(hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """What a gate looks at: the mean of all ``text`` rows but the last, and the last one, ``(batch, 2 x channels)``.

    ``hidden`` is ``(batch, rows, channels)``, a layer's output, ``text`` bool ``(batch, rows)``. A single text row is
    its own mean (the released code divides by zero there); without any the result is 0. In fp32 or better.
    """
    place = text.long().cumsum(-1)
    last = text & (place == place[:, -1:])
    others = text & ~last
    others = others | (last & ~others.any(-1, keepdim=True))
    return torch.cat([_mean(hidden, others), _mean(hidden, last)], -1)


def gate_logits(features: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Scores for going on and for leaving, ``(batch, 2)``, of features ``(batch, inputs)``.

    ``weights`` are ``(width, inputs)`` and ``(2, width)``; a low-rank gate has ``(rank, inputs)`` first, and
    ``(width, rank)``. No biases; the GELU is the exact one.
    """
    *first, last = weights
    for weight in first:
        features = features @ weight.to(features.dtype).T
    return torch.nn.functional.gelu(features) @ last.to(features.dtype).T


def exit_labels(
    full: torch.Tensor, masked: torch.Tensor, targets: torch.Tensor, first_id: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Whether a sequence could have left: its answer stays the same, and almost as likely. Bool ``(batch,)``.

    That is, at more than 99 % of the answer the most likely token is the same, and the answer's mean cross-entropy is
    below 1.03 times what it is with the image.

    Args:
        full: logits ``(batch, answer, vocabulary)`` at the rows that predict the answer.
        masked: the same with visual tokens masked after the layer in question.
        targets: the answer's ids ``(batch, answer)``; negative ones fill up shorter answers.
        first_id: smallest id that counts. The released code overlooks id 0: give 1 to follow it.

    Returns:
        the labels, and ``agreement``, ``loss_full`` and ``loss_masked``, each ``(batch,)``. Without an answer the
        numbers are NaN and the label is False.
    """
    counted = targets >= first_id
    number = counted.sum(-1)
    same = (full.argmax(-1) == masked.argmax(-1)) & counted
    ids = targets.clamp(min=0)[..., None]
    losses = [-x.float().log_softmax(-1).gather(-1, ids)[..., 0] for x in (full, masked)]
    loss_full, loss_masked = (x.masked_fill(~counted, 0).sum(-1) / number for x in losses)
    agreement = same.sum(-1) / number
    label = (agreement > 0.99) & (loss_masked < 1.03 * loss_full)
    return label, {"agreement": agreement, "loss_full": loss_full, "loss_masked": loss_masked}


def gate_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of gate ``logits`` ``(batch, 2)`` with `exit_labels` ``(batch,)``."""
    return torch.nn.functional.cross_entropy(logits, labels.long())


def wants_exit(logits: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
    """Whether to leave, bool ``(batch,)``: strictly better by more than ``margin``. NaN stays."""
    return logits[:, 1] - logits[:, 0] > margin


class ExitGates(nn.Module):
    """The gates of all decoder layers.

    Attributes:
        depth: number of gates, the decoder's layers.
        channels: width of the decoder's hidden states.
        width: hidden units of a gate; the released size is 2048.
        rank: inner size of a factored first matrix, ``None`` if it is whole. With 4096 channels a whole gate has 16.8
            million weights, one of rank 16 has 0.17.
        trained_steps: updates that training made; 0 for random gates, which `DyVTE` refuses.
    """

    def __init__(self, depth: int, channels: int, width: int = RELEASED_WIDTH, rank: int | None = None):
        super().__init__()
        for name, value in (("depth", depth), ("channels", channels), ("width", width), ("rank", rank)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: gates need at least 1")
        self.depth, self.channels, self.width, self.rank = depth, channels, width, rank
        self.trained_steps = 0
        first = [2 * channels, width] if rank is None else [2 * channels, rank, width]
        sizes = [*first, 2]
        self.gates = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.empty(b, a)) for a, b in pairwise(sizes))
            for _ in range(depth)
        )
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def forward(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        """`gate_logits` of the gate after ``layer`` (0-based), computed in the features' dtype."""
        return gate_logits(features, list(self.gates[layer].parameters()))

    def check_fits(self, depth: int | None = None, channels: int | None = None) -> None:
        """Raise ValueError if these gates were made for a decoder of another depth or width."""
        for what, ours, theirs in (("layers", self.depth, depth), ("channels", self.channels, channels)):
            if theirs is not None and ours != theirs:
                raise ValueError(
                    f"these gates are for a decoder of {ours} {what}, this one has {theirs}. Train gates for this "
                    "model, or give exit_layer=k."
                )

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write a safetensors file; ``notes`` (what they were trained on and how) go into its metadata."""
        about = {
            "depth": self.depth,
            "channels": self.channels,
            "width": self.width,
            "rank": self.rank,
            "trained_steps": self.trained_steps,
            **notes,
        }
        tensors = {name: p.detach().contiguous().cpu() for name, p in self.named_parameters()}
        save_file(tensors, str(path), metadata={"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> ExitGates:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a file of exit gates.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"gates={str(path)!r}: no such file")
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"gates={str(path)!r} is not a file of exit gates ({FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        about = json.loads(metadata["about"])
        gates = cls(about["depth"], about["channels"], about["width"], about["rank"])
        gates.load_state_dict(tensors)
        gates.trained_steps = about["trained_steps"]
        return gates

    @classmethod
    def from_released(cls, state: dict[str, torch.Tensor]) -> ExitGates:
        """Take the gates out of the state dict of a checkpoint trained with the authors' code."""
        found = {
            (int(match[1]), int(match[2]) - 1): tensor
            for name, tensor in state.items()
            if (match := re.search(r"visual_gates_router\.(\d+)\.w([12])\.weight$", name))
        }
        if not found:
            raise ValueError("this state dict has no visual_gates_router weights")
        width, inputs = found[0, 0].shape
        gates = cls(len(found) // 2, inputs // 2, width)
        gates.load_state_dict({f"gates.{layer}.{i}": tensor for (layer, i), tensor in found.items()})
        gates.trained_steps = 1  # how many is not recorded there
        return gates


def _mean(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean of the marked rows in fp32 or better, 0 where there are none: ``(batch, channels)``."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    total = hidden.masked_fill(~rows[..., None], 0).sum(1)
    return total / rows.sum(-1, keepdim=True).clamp(min=1)
