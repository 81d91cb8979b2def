"""DyVTE: all visual tokens leave the decoder once the text has seen enough (arXiv 2411.19628).

Follows the released ``modeling_llama.py``; the gates themselves are in ``exit_gates.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Policy, Positions
from .exit_gates import ExitGates, exit_features, wants_exit

if TYPE_CHECKING:
    from ..contract.views import PrefillView


@dataclass(frozen=True)
class DyVTE(Policy):
    """DyVTE, inside the decoder (prefill stage).

    After each layer of the prefill a trained gate looks at the text after the image; where it decides so, the sequence
    goes on without its visual tokens. The cache of the earlier layers keeps them. There is no budget: the gates decide
    how much is saved, and ``ratio=`` and ``tokens=`` only matter where they mean "all".

    The default mode differs from the released code as follows. Visual and text rows are known exactly, not by
    fixed positions (35 and 576). Each sequence of a batch decides separately. A single text
    row is its own mean. The gate after the last layer, where nothing is left to save, is not asked. Random
    gates are refused: the authors ship none, and with random ones most models leave at layer 0. New tokens of a
    sequence that left at layer e see the image in the layers up to e only; long captions depend on that.

    Attributes:
        gates: trained gates, or the safetensors file that holds them.
        exit_layer: leave after this layer (0-based) without asking any gate.
        min_exit_layer: first layer (0-based) after which gates are asked.
        margin: by how much "leave" must beat "go on"; 0 in the paper.
        compat: ``"official"`` asks all layers, lets the first sequence decide for the batch, and never leaves a prompt
            with one text row.
    """

    name: ClassVar[str] = "dyvte"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)
    default_ratio: ClassVar[float] = 0.5

    positions: Positions = "original"
    gates: ExitGates | str | Path | None = None
    exit_layer: int | None = None
    min_exit_layer: int = 0
    margin: float = 0.0
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compat not in (None, "official"):
            raise ValueError(f'compat={self.compat!r}: choose "official" or None')
        for name in ("exit_layer", "min_exit_layer"):
            layer = getattr(self, name)
            if layer is not None and (type(layer) is not int or layer < 0):
                raise ValueError(f"{name}={layer!r}: give a 0-based layer number")
        if (self.gates is None) == (self.exit_layer is None):
            given = (
                "neither gates nor exit_layer was" if self.gates is None else "both gates and exit_layer were"
            )
            raise ValueError(
                f"{given} given. DyVTE's authors ship no trained gates: train some with `vlm-prune train-exit` and "
                "pass gates=their file, or pass exit_layer=k to leave after layer k always."
            )
        if self.gates is not None and self.trained.trained_steps == 0:
            raise ValueError(
                "these gates are untrained and would leave at random: train them, or pass exit_layer=k"
            )

    @cached_property
    def trained(self) -> ExitGates:
        """The gates, loaded."""
        if self.gates is None:
            raise ValueError(f"exit_layer={self.exit_layer} asks no gates")
        return self.gates if isinstance(self.gates, ExitGates) else ExitGates.load(self.gates)

    def prefill_layers(self, depth: int) -> range:
        """The layers whose gates are asked, or the one of `exit_layer`."""
        fixed = self.exit_layer is not None
        first = self.min_exit_layer if self.exit_layer is None else self.exit_layer
        end = depth if fixed or self.compat == "official" else depth - 1
        if first >= end:
            name = "exit_layer" if fixed else "min_exit_layer"
            raise ValueError(f"{name}={first}: this decoder has {depth} layers, choose 0 to {end - 1}")
        if fixed:
            return range(first, first + 1)
        self.trained.check_fits(depth)
        return range(first, end)

    def left(
        self, layer: int, depth: int, entered: int, target: int, tiles: list[tuple[int, int]]
    ) -> int | None:
        """Zero after a fixed exit; gates decide by what they see."""
        if self.exit_layer is None:
            return None
        return entered if target >= entered and self.compat is None else 0

    def prefill(self, view: PrefillView) -> torch.Tensor:
        """Drop all visual tokens of the sequences that leave here."""
        leaves = self._ask(view) if self.exit_layer is None else torch.ones_like(view.visual[:, 0])
        if self.compat != "official":
            leaves = leaves & (view.target < view.initial)
        return ~(view.visual & leaves[:, None])

    def _ask(self, view: PrefillView) -> torch.Tensor:
        """Which sequences the gate of this layer sends on without their image: bool ``(batch,)``."""
        self.trained.check_fits(channels=view.hidden.shape[-1])
        text = view.text
        with torch.no_grad():
            features = exit_features(view.hidden, text)
            leaves = wants_exit(self.trained.to(features.device)(view.layer, features), self.margin)
        rows = text.sum(-1)
        if self.compat == "official":
            return (leaves & (rows > 1))[:1].expand(len(leaves))
        return leaves & (rows > 0)
