"""The receipt: what a call kept, and what that cost and saved. Numbers come from what ran, not from the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..contract.policy import Keep
from . import flops
from .survivors import DecoderTrace, Units, tile_units

Segments = Callable[[], "list[list[int]]"]
"""Reads sequence lengths from the device, where a packed tower has them."""

TOWER_PART, DECODER_PART = "vision tower", "language model"
"""The parts of a call that can be captured."""

MEAN_QUERY = "attention of the mean query"
"""What `policies.scores.global_attention` uses where there is no CLS token."""


@dataclass
class Receipt:
    """What the last call with images did, in this thread.

    Attributes:
        policy: the policy's name, as given.
        family: model family.
        tile: what one entry of `kept` is, "image" or "tile".
        grids: rows and columns of visual tokens of each tile before pruning.
        targets: visual tokens wanted of each tile.
        positions: the policy's rule for RoPE positions.
        tower_tokens: tokens that each tower layer computed for the largest tile, CLS included.
        tower_masked: whether tokens that the tower dropped were masked in its layers, and computed all the same: faster
            where the host is the slower one (`encode.fixed.STILL`).
        prompt_tokens: length of the prompt as the caller sees it.
        decoder_tokens: rows that each decoder layer computed in prefill.
        tower_size: channels of the tower, and elements of one of its layers' matrices.
        stand_in: what was used instead of a CLS token that the policy needs and the tower lacks.
        kv_bytes: storage of the KV cache after prefill, ``None`` if no cache was used.
        kv_bytes_dense: what it would hold without pruning.
        captured: of a model with ``capture=True``, for each part of the call "captured", or "eager: " and why.
        guide_flops: operations of the second pass over the prompt that guided decoding compares with, part of `flops`.
        guide_kv_bytes: storage behind that pass's KV cache, beside `kv_bytes`.
    """

    policy: str
    family: str
    tile: str
    grids: list[tuple[int, int]]
    targets: list[int]
    positions: str
    tower_tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    batch: int = 0
    decoder_tokens: list[int] = field(default_factory=list)
    kv_bytes: int | None = None
    kv_bytes_dense: int | None = None
    captured: dict[str, str] = field(default_factory=dict)
    guide_flops: int = 0
    guide_kv_bytes: int = 0
    keeps: list[Keep] | None = field(default=None, repr=False)
    tower_keeps: list[list[Keep] | None] = field(default_factory=list, repr=False)
    tower_grids: list[tuple[int, int]] = field(default_factory=list, repr=False)
    trace: DecoderTrace | None = field(default=None, repr=False)
    tower_size: tuple[int, int] = (0, 0)
    stand_in: str | None = None
    tower_masked: bool = False
    text_config: Any = field(default=None, repr=False)
    _tower_segments: tuple[Segments, Segments] = field(default=(list, list), repr=False)
    _tower_ms: Callable[[], float] | None = field(default=None, repr=False)
    _prefill_ms: Callable[[], float] | None = field(default=None, repr=False)

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        return len(self.grids)

    @property
    def grid(self) -> tuple[int, int]:
        """The first of `grids`; all are the same unless images of different sizes came together."""
        return self.grids[0]

    @property
    def units(self) -> int:
        """Visual tokens of the first tile before pruning, see `grid`."""
        return self.grid[0] * self.grid[1]

    @property
    def planned(self) -> int:
        """The first of `targets`, see `grid`."""
        return self.targets[0]

    @property
    def kept(self) -> Units:
        """Per tile, the raster numbers of the visual tokens that reached the language model."""
        return tile_units(self.keeps, self.grids)

    @property
    def tower_units(self) -> list[Units]:
        """For each tower layer, per tile, the raster numbers of the visual tokens whose patches it computed."""
        return [tile_units(keeps, self.tower_grids) for keeps in self.tower_keeps]

    @property
    def decoder_units(self) -> list[Units]:
        """For each decoder layer, per tile, the raster numbers of the visual tokens that it computed in prefill."""
        if self.trace is None:
            return [self.kept] * len(self.decoder_tokens)
        return self.trace.units(self.grids)

    @property
    def tower_segments(self) -> list[list[int]]:
        """For each tower layer, the lengths of the sequences that attention ran over."""
        return self._tower_segments[0]()

    @property
    def tower_segments_dense(self) -> list[list[int]]:
        """The same without pruning."""
        return self._tower_segments[1]()

    @property
    def tower_ms(self) -> float | None:
        """Milliseconds from the tower's entry until after the projector."""
        return self._tower_ms() if self._tower_ms else None

    @property
    def prefill_ms(self) -> float | None:
        """Milliseconds of the decoder's prefill."""
        return self._prefill_ms() if self._prefill_ms else None

    @property
    def flops(self) -> int:
        """Operations of tower and prefill as they ran, by the formulas of `call.flops`."""
        tower = flops.tower_flops(*self.tower_size, self.tower_segments)
        return (
            self.guide_flops + tower + self.batch * flops.decoder_flops(self.text_config, self.decoder_tokens)
        )

    @property
    def flops_dense(self) -> int:
        """The same without pruning."""
        tower = flops.tower_flops(*self.tower_size, self.tower_segments_dense)
        prefill = [self.prompt_tokens] * len(self.decoder_tokens)
        return tower + self.batch * flops.decoder_flops(self.text_config, prefill)

    def record_prefill(
        self, batch: int, length: int, rows: list[int], kv_bytes: tuple[int, int] | None
    ) -> None:
        """Note a prefill of ``length`` tokens per sequence that computed ``rows[i]`` of them in layer ``i``.

        ``kv_bytes`` is what its cache holds, and what it would hold without pruning.
        """
        self.batch, self.prompt_tokens, self.decoder_tokens = batch, length, rows
        if kv_bytes is not None:
            self.kv_bytes, self.kv_bytes_dense = kv_bytes

    def __str__(self) -> str:
        kept = [len(row) for row in self.kept]
        units = [rows * columns for rows, columns in self.grids]
        lines = [
            f"{self.policy} on {self.family}: kept {_listed(kept)} of {_common(units)} visual tokens per {self.tile}"
        ]
        lines[0] += f" (planned {_common(self.targets)}), positions {self.positions}"
        if self.tower_tokens:
            lines.append(
                f"  tower    {_summary(self.tower_tokens)} tokens through {len(self.tower_tokens)} layers"
                + (", those dropped masked and not cut" if self.tower_masked else "")
            )
        if self.stand_in is not None:
            lines.append(f"  scores   no CLS token in this tower: {self.stand_in}")
        if self.decoder_tokens:
            lines.append(
                f"  decoder  {_summary(self.decoder_tokens)} of {self.prompt_tokens} tokens through "
                f"{len(self.decoder_tokens)} layers"
            )
            lines.append(f"  compute  {self.flops / 1e9:.3g} of {self.flops_dense / 1e9:.3g} GFLOP")
        if self.kv_bytes is not None and self.kv_bytes_dense:
            lines.append(f"  KV cache {self.kv_bytes / 2**20:.3g} of {self.kv_bytes_dense / 2**20:.3g} MiB")
        lines += [f"  {part}: {how}" for part, how in self.captured.items()]
        if self.guide_flops:
            lines.append(
                f"  guiding  {self.guide_flops / 1e9:.3g} GFLOP of these, and {self.guide_kv_bytes / 2**20:.3g} MiB "
                "beside the KV cache, for a second pass"
            )
        times = [
            f"{name} {ms:.1f} ms"
            for name, ms in (("tower", self.tower_ms), ("prefill", self.prefill_ms))
            if ms is not None
        ]
        if times:
            lines.append("  time     " + ", ".join(times))
        return "\n".join(lines)


@dataclass
class JoinedReceipt(Receipt):
    """The receipt of a prompt for which the tower was called several times: images first, then videos.

    ``parts`` are those of the calls; lists of tiles are theirs, one after another.
    """

    parts: list[Receipt] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, parts: list[Receipt]) -> JoinedReceipt:
        """Join receipts of the same prefill."""
        shared = {f.name: getattr(parts[0], f.name) for f in fields(Receipt)}
        lists = ("grids", "targets", "tower_grids")
        shared |= {name: [x for part in parts for x in getattr(part, name)] for name in lists}
        counts = zip(*(part.tower_tokens for part in parts), strict=True)
        return cls(**{**shared, "tower_tokens": [max(layer) for layer in counts]}, parts=parts)

    @property
    def kept(self) -> Units:
        """See `Receipt.kept`."""
        return [units for part in self.parts for units in part.kept]

    @property
    def tower_units(self) -> list[Units]:
        """See `Receipt.tower_units`."""
        return _tiles_joined([part.tower_units for part in self.parts])

    @property
    def tower_segments(self) -> list[list[int]]:
        """See `Receipt.tower_segments`."""
        return _tiles_joined([part.tower_segments for part in self.parts])

    @property
    def tower_segments_dense(self) -> list[list[int]]:
        """See `Receipt.tower_segments_dense`."""
        return _tiles_joined([part.tower_segments_dense for part in self.parts])

    @property
    def decoder_units(self) -> list[Units]:
        """See `Receipt.decoder_units`."""
        return _tiles_joined([part.decoder_units for part in self.parts])

    @property
    def tower_ms(self) -> float | None:
        """Milliseconds in the tower and after it, of all calls together."""
        times = [part.tower_ms for part in self.parts]
        return sum(time or 0.0 for time in times)


def _tiles_joined(parts: list[list[list[Any]]]) -> list[list[Any]]:
    """Layer by layer, the lists of all parts one after another."""
    return [[x for part in layer for x in part] for layer in zip(*parts, strict=True)]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _common(numbers: list[int]) -> str:
    """The number itself where all are the same."""
    return _listed(numbers[:1] if len(set(numbers)) == 1 else numbers)


def _summary(tokens: list[int]) -> str:
    return str(tokens[0]) if len(set(tokens)) == 1 else f"{tokens[0]} falling to {min(tokens)}"
