"""What a policy is (`Policy`) and what it answers (`Keep`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

if TYPE_CHECKING:
    from .views import FeaturesView, ModulateView, PrefillView, TowerView

Positions = Literal["original", "compact"]


@dataclass(frozen=True)
class Keep:
    """Which units (candidates for keeping) survive, for a batch of tiles.

    ``index`` is ``(batch, kept)`` int64, ascending where valid. Rows that keep fewer than ``kept`` units are filled
    up with units they drop, marked False in ``valid``; ``valid=None`` says that every row keeps ``kept`` units.
    ``rows`` ``(batch, kept, channels)`` are new features for the kept units, where a policy merges others into them.
    """

    index: torch.Tensor
    valid: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @classmethod
    def top(cls, scores: torch.Tensor, counts: int | list[int]) -> Keep:
        """The ``counts`` highest of ``scores`` ``(batch, units)`` in each row, in their original order.

        ``counts`` is one number for all rows, or one per row. NaN ranks last, whatever the backend thinks of it.
        """
        lowest = torch.finfo(scores.dtype).min  # above -inf, by which a policy rules a unit out
        scores = scores.nan_to_num(nan=lowest, neginf=-torch.inf)
        if isinstance(counts, int) or len(set(counts)) == 1:
            k = counts if isinstance(counts, int) else counts[0]
            return cls(scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values)
        rank = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        return cls.from_mask(rank < torch.tensor(counts, device=scores.device)[:, None], max(counts))

    @classmethod
    def from_mask(cls, mask: torch.Tensor, width: int) -> Keep:
        """From a bool ``(batch, units)`` whose fullest row has ``width`` True entries."""
        index = (~mask).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
        return cls(index, mask.gather(1, index))

    def sparing(self, spared: list[bool], units: int) -> Keep | None:
        """The same, but of the rows ``spared`` all of their ``units`` stay; ``None`` if that is all rows."""
        if not any(spared):
            return self
        if all(spared):
            return None
        mask = self._mask(units)
        return Keep.from_mask(mask | torch.tensor(spared, device=mask.device)[:, None], units)

    @classmethod
    def joined(cls, parts: list[tuple[torch.Tensor, Keep]], features: torch.Tensor, units: int) -> Keep:
        """Answers for some tiles each of ``features`` ``(batch, tokens, channels)``, as one for all of them.

        Tiles that no part is about keep all of their ``units``, and so does the longest row that comes of it.
        """
        mask = torch.ones(len(features), units, dtype=torch.bool, device=features.device)
        for chosen, keep in parts:
            mask[chosen] = keep._mask(units)
        answered = sum(len(chosen) for chosen, _ in parts)
        keep = cls.from_mask(
            mask, max(k.index.shape[1] for _, k in parts) if answered == len(mask) else units
        )
        merged = [(chosen, part.rows) for chosen, part in parts if part.rows is not None]
        if not merged:
            return keep
        rows = features.gather(1, keep.index[..., None].expand(-1, -1, features.shape[2]))
        for chosen, new in merged:
            rows[chosen, : new.shape[1]] = new.to(rows.dtype)
        return replace(keep, rows=rows)

    def _mask(self, units: int) -> torch.Tensor:
        """Bool ``(batch, units)``, True where they survive."""
        mask = torch.zeros(len(self.index), units, dtype=torch.bool, device=self.index.device)
        valid = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        return mask.scatter(1, self.index, valid)

    def tolist(self) -> list[list[int]]:
        """The kept units of each row. Waits for the device."""
        index = self.index.tolist()
        if self.valid is None:
            return index
        valid = self.valid.tolist()
        return [[i for i, ok in zip(*row, strict=True) if ok] for row in zip(index, valid, strict=True)]


@dataclass(frozen=True)
class Policy:
    """Base of all policies: a frozen record of settings, with a method for each stage it takes part in.

    Attributes:
        positions: ``"original"`` keeps the RoPE positions the tokens had before pruning, ``"compact"`` renumbers the
            shortened sequence. Each policy defaults to what its released code does; ``None`` stands for "compact", and
            for "original" where a token's position is its place in the image (M-RoPE) and cannot be renumbered.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]
    """Where it acts: "encode", "prefill", "decode" drop tokens there, "modulate" edits attention and drops none."""
    default_ratio: ClassVar[float] = 1.0
    """Share of visual tokens kept when the caller names no budget: the middle one of the paper."""
    after_projector: ClassVar[bool] = False
    """Whether `encode_final` is asked behind the projector, about projected features, instead of before it."""
    single_patches: ClassVar[bool] = False
    """Whether `encode` chooses among single patches where the model merges several into one token."""
    late: ClassVar[bool] = False
    """Whether `encode_final` can choose among other tokens than those that its tower layers saw: those of a resized
    grid, or of all tiles of an image at once. What it leaves in ``carry`` then comes resized as the features do."""
    reads_cls: ClassVar[bool] = False
    """Whether `encode` asks for the attention that CLS pays; a tower without CLS is asked with its mean query."""
    per_image: ClassVar[bool] = False
    """Whether its budget is one of a whole image although it cuts each tile by itself, to `tile_target` units."""
    drops_newlines: ClassVar[bool] = False
    """Whether newline tokens go with the first dropped token, and not only with the last one of their line."""
    reads_attention: ClassVar[bool] = False
    """Whether `prefill` looks at the attention of its layers."""
    reads_ahead: ClassVar[bool] = False
    """Whether `prefill` looks at what the layer behind each of its layers would attend with."""
    reads_hidden: ClassVar[bool] = False
    """Whether `modulate` looks at the input of its layers."""
    needs_text_only: ClassVar[bool] = False
    """Whether `modulate` compares with a pass over the prompt without its images."""
    modulates: ClassVar[Literal["logits", "probabilities", "outputs"]] = "outputs"
    """What `modulate` edits. Whatever the written order, logits come first and outputs last."""

    positions: Positions | None = None

    def __post_init__(self) -> None:
        if self.positions not in ("original", "compact", None):
            raise ValueError(f'positions={self.positions!r}: choose "original" or "compact"')

    @property
    def prunes(self) -> bool:
        """Whether it drops tokens, and so takes a budget."""
        return self.stages != ("modulate",)

    def tile_target(self, target: int) -> int:
        """Units to keep of each tile of an image of which ``target`` shall be left in the end, if `per_image`."""
        raise NotImplementedError(f"{self.name} has a budget per image, but does not share it out")

    def tower_grid(self, grid: tuple[int, int], target: int) -> tuple[int, int] | None:
        """Rows and columns of units that the tower shall see of a smaller image, instead of ``grid``.

        ``None`` shows it the image as the processor prepared it.
        """
        return None

    def tower_layers(self, feature_layer: int) -> Collection[int]:
        """0-based vision layers after which `encode` is asked.

        ``feature_layer`` is the layer whose output the language model consumes.
        """
        return ()

    def encode(self, view: TowerView) -> Keep | None:
        """After a vision layer: which units go on. ``None`` keeps all of them."""
        raise NotImplementedError(f"{self.name} names tower layers but does not encode")

    def encode_final(self, view: FeaturesView) -> Keep | None:
        """Behind the tower, or behind the projector: which units go on. ``None`` keeps all of them."""
        return None

    def for_decoder(self, config: Any) -> Policy:
        """This policy with what it can read off the decoder's config filled in, when pruning starts."""
        return self

    def for_family(self, family: str, mrope: bool) -> Policy:
        """This policy as it is at work on a model ``family``, when pruning starts.

        ``mrope`` says that positions of visual tokens are places in the image.
        """
        if self.positions is None:
            return replace(self, positions="original" if mrope else "compact")
        if mrope and self.positions == "compact":
            raise ValueError(
                'positions="compact": with multimodal RoPE a visual token\'s position is its place in the image, which '
                'renumbering would destroy. Leave positions out, or give "original".'
            )
        return self

    def prefill_layers(self, depth: int) -> Collection[int]:
        """0-based decoder layers, of ``depth``, after which `prefill` is asked."""
        return ()

    def prefill(self, view: PrefillView) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """After a decoder layer: a keep mask, bool ``(batch, rows)``; rows that are not visual tokens always stay.

        With a second tensor, shaped like ``view.hidden``, rows go on with what that holds: where tokens are merged.
        ``None`` keeps all rows.
        """
        raise NotImplementedError(f"{self.name} names decoder layers but does not prune at them")

    def left(
        self, layer: int, depth: int, entered: int, target: int, tiles: list[tuple[int, int]]
    ) -> int | None:
        """How many visual tokens `prefill` leaves a sequence at ``layer``, where that follows from the budget.

        The host then need not wait for the device to count them. ``None``: it depends on what the policy sees.

        Args:
            layer: 0-based, of ``depth`` layers.
            entered: visual tokens that entered layer 0.
            target: as `PrefillView.target`.
            tiles: units of each tile and those wanted of it; empty where stock code puts tiles together.
        """
        return None

    def trimmed_layers(self, depth: int) -> Collection[int]:
        """Decoder layers that lose, after prefill, the KV of tokens which later layers dropped."""
        return ()

    def modulate_layers(self, depth: int) -> Collection[int]:
        """0-based decoder layers, of ``depth``, at whose attention `modulate` is asked."""
        return ()

    def modulate(self, view: ModulateView) -> torch.Tensor | None:
        """Behind an attention call: new head outputs, shaped like ``view.output``, or ``None``."""
        raise NotImplementedError(f"{self.name} names decoder layers but does not modulate them")
