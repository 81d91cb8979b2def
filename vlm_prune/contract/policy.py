"""What a policy is: `Policy`, and its shorter forms for one choice at one place, `SelectPolicy` and `ScorerPolicy`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ..errors import PolicyError
from .keep import Keep, top_mask
from .stages import PLACES, STAGES, Place, Stages

if TYPE_CHECKING:
    from .views import CacheView, EntryView, FeaturesView, GuideView, ModulateView, PrefillView, TowerView

__all__ = ["PLACES", "STAGES", "Keep", "Place", "Policy", "Positions", "ScorerPolicy", "SelectPolicy"]

Positions = Literal["original", "compact"]

Evicted = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
"""What `Policy.evict` answers: a keep mask, with keys and values of the rows that stay, or not; ``None`` keeps all."""


@dataclass(frozen=True)
class Policy:
    """Base of all policies: a frozen record of settings, with a method for each stage it takes part in.

    Attributes:
        positions: ``"original"`` keeps the RoPE positions the tokens had before pruning, ``"compact"`` renumbers the
            shortened sequence. Each policy defaults to what its released code does; ``None`` means "compact", and
            for "original" where a token's position is its place in the image (M-RoPE) and cannot be renumbered.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]
    """Where it acts, of `STAGES`: "modulate" edits attention and "guide" logits, all others drop tokens there."""
    acts: ClassVar[Stages] = Stages()
    """The same, to be asked what they mean. Follows from `stages`, as the next three do."""
    prunes: ClassVar[bool] = True
    """Whether it drops tokens, and so takes a budget."""
    encodes: ClassVar[bool] = True
    """Whether it chooses among all tokens of an image, before the decoder's first layer."""
    enters: ClassVar[bool] = False
    """Whether it does so at the decoder's entry."""
    keeps_all: ClassVar[bool] = False
    """Whether it keeps every token although its stage is one that drops them, and so takes no budget."""
    exceeds: ClassVar[bool] = False
    """Whether it may keep more tokens than the budget says, by a separate rule (a threshold)."""
    default_ratio: ClassVar[float] = 1.0
    """Share of visual tokens kept when the caller names no budget: the middle one of the paper."""
    after_projector: ClassVar[bool] = False
    """Whether `encode_final` is asked after the projector, about projected features, instead of before it."""
    single_patches: ClassVar[bool] = False
    """Whether `encode` chooses among single patches where the model merges several into one token."""
    late: ClassVar[bool] = False
    """Whether `encode_final` can choose among other tokens than those that its tower layers saw: those of a resized
    grid, or of all tiles of an image at once. What it leaves in ``carry`` then comes resized as the features do."""
    over_frames: ClassVar[bool] = False
    """Whether `encode_final` chooses among all frames of a video at once, which share their budgets, where a model
    tells which frames form one. An image is a video of one frame."""
    reads_cls: ClassVar[bool] = False
    """Whether `encode` asks for the attention that CLS pays; a tower without CLS is asked with its mean query."""
    per_image: ClassVar[bool] = False
    """Whether its budget is one of a whole image although it cuts each tile by itself, to `tile_target` units."""
    drops_newlines: ClassVar[bool] = False
    """Whether newline tokens go with the first dropped token, and not only with the last one of their line."""
    reads_tower: ClassVar[bool] = False
    """Whether `entry` looks at what entered the projector, where the engine sees that."""
    calls_projector: ClassVar[bool] = False
    """Whether `encode_final` calls the projector itself, before it."""
    reads_attention: ClassVar[bool] = False
    """Whether `prefill` looks at the attention of its layers."""
    reads_ahead: ClassVar[bool] = False
    """Whether `prefill` looks at what the layer after each of its layers would attend with."""
    reads_hidden: ClassVar[bool] = False
    """Whether `modulate` looks at the input of its layers."""
    needs_text_only: ClassVar[bool] = False
    """Whether `modulate` compares with a pass over the prompt without its images."""
    modulates: ClassVar[Literal["logits", "probabilities", "outputs"]] = "outputs"
    """What `modulate` edits. Whatever the written order, logits come first and outputs last."""
    by_head: ClassVar[bool] = False
    """Whether `evict` chooses for each KV head. No other policy can then evict from the same layers: of what both keep,
    heads would hold different numbers."""
    second_pass: ClassVar[Literal["image", "text"] | None] = None
    """What `guide` compares with: the same model asked about an image that went through `distort`, or without its
    images."""

    positions: Positions | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.acts = Stages(getattr(cls, "stages", ()))
        cls.prunes = cls.acts.prunes and not cls.keeps_all
        cls.encodes, cls.enters = cls.acts.encodes, cls.acts.enters

    def __post_init__(self) -> None:
        if self.positions not in ("original", "compact", None):
            raise ValueError(f'positions={self.positions!r}: choose "original" or "compact"')

    @property
    def needs_tower(self) -> bool:
        """Whether it needs a tower whose layers, and whose projector, can be hooked."""
        looks = bool(self.tower_layers(23)) or type(self).tower_grid is not Policy.tower_grid
        return looks or self.per_image or self.single_patches or self.calls_projector

    def tile_target(self, target: int) -> int:
        """Units to keep of each tile of an image that keeps ``target`` in total, if `per_image`."""
        raise NotImplementedError(f"{self.name} has a budget per image, but does not divide it among tiles")

    def tower_grid(self, grid: tuple[int, int], target: int) -> tuple[int, int] | None:
        """Rows and columns of units of the smaller image that the tower should see instead of ``grid``.

        ``None`` shows it the image as the processor prepared it.
        """
        return None

    def tower_layers(self, feature_layer: int) -> Collection[int]:
        """0-based vision layers after which `encode` is asked.

        ``feature_layer`` is the layer whose output the language model consumes.
        """
        return ()

    def watched_layers(self, feature_layer: int) -> Collection[int]:
        """Further vision layers whose attention `encode` finds in ``view.earlier`` at the next layer of `tower_layers`.

        Layers between two cuts can so be scored together.
        """
        return ()

    def encode(self, view: TowerView) -> Keep | None:
        """After a vision layer: which units go on. ``None`` keeps all of them."""
        raise NotImplementedError(f"{self.name} names tower layers but does not encode")

    def encode_final(self, view: FeaturesView) -> Keep | None:
        """After the tower, or after the projector: which units go on. ``None`` keeps all of them."""
        return None

    def entry(self, view: EntryView) -> Keep | None:
        """At the decoder's entry, before its first layer: which units go on. ``None`` keeps all of them."""
        raise NotImplementedError(f"{self.name} acts at the decoder's entry but does not choose there")

    def for_decoder(self, config: Any) -> Policy:
        """This policy, completed from the decoder's config, when pruning starts."""
        return self

    def for_family(self, family: str, mrope: bool) -> Policy:
        """This policy, adapted to a model ``family``, when pruning starts.

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

        A second tensor, shaped like ``view.hidden``, replaces the hidden states of the rows, where tokens are merged.
        ``None`` keeps all rows.
        """
        raise NotImplementedError(f"{self.name} names decoder layers but does not prune at them")

    def left(
        self, layer: int, depth: int, entered: int, target: int, tiles: list[tuple[int, int]]
    ) -> int | None:
        """How many visual tokens of a sequence `prefill` keeps at ``layer``, where that follows from the budget.

        The host then need not wait for the device to count them. ``None``: it depends on what the policy sees.

        Args:
            layer: 0-based, of ``depth`` layers.
            entered: visual tokens that entered layer 0.
            target: as `PrefillView.target`.
            tiles: units of each tile and how many are wanted; empty where stock code assembles tiles.
        """
        return None

    def observed_layers(self, depth: int) -> Collection[int]:
        """0-based decoder layers, of ``depth``, whose attention `observe` looks at."""
        return ()

    def observe(self, view: PrefillView) -> torch.Tensor | None:
        """After a decoder layer of a prefill: a score for each of its rows, which `evict` gets as ``view.scores``.

        ``(batch, rows)``, or ``(batch, kv_heads, rows)`` where it chooses by head.
        """
        raise NotImplementedError(f"{self.name} names layers to observe but does not observe them")

    def evicted_layers(self, depth: int) -> Collection[int]:
        """0-based decoder layers, of ``depth``, from whose KV cache `evict` drops rows."""
        return ()

    def evict(self, view: CacheView) -> Evicted:
        """After a prefill, or a decoding step that `evicts_at` names: which rows of a layer's KV cache stay.

        A keep mask, bool ``(batch, rows)``, or ``(batch, kv_heads, rows)`` with the same number in every head of a
        sequence. After a prefill, two more tensors may come with it, shaped like ``view.keys`` and ``view.values``: the
        rows that stay hold these keys and values then, where evicted rows are merged into them. ``None`` keeps all.
        """
        raise NotImplementedError(f"{self.name} names layers to evict from but does not evict")

    def evicts_at(self, step: int) -> bool:
        """Whether `evict` is asked after decoding step ``step``, counted from 1; the prefill is always asked about."""
        return False

    def modulate_layers(self, depth: int) -> Collection[int]:
        """0-based decoder layers, of ``depth``, at whose attention `modulate` is asked."""
        return ()

    def modulate(self, view: ModulateView) -> torch.Tensor | None:
        """After an attention call: new head outputs, shaped like ``view.output``, or ``None`` for no change."""
        raise NotImplementedError(f"{self.name} names decoder layers but does not modulate them")

    def distort(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the second pass of `guide` sees in place of ``pixels`` ``(images, ...)``, all of one shape."""
        raise NotImplementedError(f"{self.name} compares with another image but does not make one")

    def early_layers(self, depth: int) -> Collection[int]:
        """Decoder layers, of ``depth``, whose output `guide` reads as logits: 0 is what enters the first layer."""
        return ()

    def guide(self, view: GuideView) -> torch.Tensor:
        """After the language-model head: new logits, shaped like ``view.logits``."""
        raise NotImplementedError(f"{self.name} guides decoding but does not say how")


def _every_step(policy: Policy, step: int) -> bool:
    """`Policy.evicts_at` where the place is the cache while decoding."""
    return True


@dataclass(frozen=True)
class SelectPolicy(Policy):
    """A policy that makes one choice at one `place`, by `select`; stages and flags follow from the place."""

    place: ClassVar[Place]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if place := getattr(cls, "place", None):
            if place not in PLACES:
                raise TypeError(f"{cls.__name__}: place={place!r} is none of {', '.join(PLACES)}")
            cls.stages = (PLACES[place],)
            cls.late = place in ("features", "projected", "entry")
            cls.after_projector = place == "projected"
            cls.reads_attention = place == "layer"
            if place == "decode" and cls.evicts_at is Policy.evicts_at:
                cls.evicts_at = _every_step  # type: ignore[assignment, method-assign]
        super().__init_subclass__(**kwargs)

    def select(self, view: Any) -> Keep | None:
        """The units that stay; ``view`` is that of the place, ``view.target`` the number wanted."""
        raise NotImplementedError(f"{self.name} does not select")

    def layer(self, depth: int) -> int:
        """The 0-based layer after which it chooses, where the place is one, of a tower or decoder of ``depth`` layers.

        For the tower, ``depth`` counts the layers up to the one whose output the language model consumes.
        """
        raise NotImplementedError(f"{self.name} chooses after a layer but does not say which")

    def tower_layers(self, feature_layer: int) -> tuple[int, ...]:
        """The layer of `layer`, if the place is in the tower."""
        return (self.layer(feature_layer + 1),) if self.place == "tower" else ()

    def encode(self, view: TowerView) -> Keep | None:
        """See `select`."""
        return self.select(view)

    def encode_final(self, view: FeaturesView) -> Keep | None:
        """See `select`."""
        return self.select(view) if self.place in ("features", "projected") else None

    def entry(self, view: EntryView) -> Keep | None:
        """See `select`."""
        return self.select(view)

    def prefill_layers(self, depth: int) -> tuple[int, ...]:
        """The layer of `layer`, if the place is in the decoder."""
        return (self.layer(depth),) if self.place == "layer" else ()

    def prefill(self, view: PrefillView) -> torch.Tensor | None:
        """See `select`, about rows of the decoder."""
        keep = self.select(view)
        return None if keep is None else ~view.visual | keep.mask(view.visual.shape[1])


@dataclass(frozen=True)
class ScorerPolicy(SelectPolicy):
    """A policy that keeps the tokens of highest `score` at one `place`.

    ::

        @dataclass(frozen=True)
        class Loudest(ScorerPolicy):  # tokens whose features have the largest norm
            name: ClassVar[str] = "loudest"
            place: ClassVar[Place] = "features"

            def score(self, view: FeaturesView) -> torch.Tensor:
                return view.features.norm(dim=-1)
    """

    def score(self, view: Any) -> torch.Tensor:
        """The score of each token of ``view``: ``(batch, tokens)``; NaN ranks last."""
        raise NotImplementedError(f"{self.name} does not score")

    def select(self, view: TowerView | FeaturesView | EntryView) -> Keep:
        """The ``view.target`` highest of each tile."""
        tokens = view.units if hasattr(view, "units") else view.features[..., 0]
        return Keep.top(self._checked(view, tuple(tokens.shape)), view.target)

    def left(self, layer: int, depth: int, entered: int, target: int, tiles: list[tuple[int, int]]) -> int:
        """The budget."""
        return target

    def prefill(self, view: PrefillView) -> torch.Tensor:
        """The ``view.target`` visual rows of highest score in each sequence, and all text."""
        return self._highest(view)

    def evicted_layers(self, depth: int) -> Collection[int]:
        """All layers, if the place is the cache."""
        return range(depth) if self.acts.evicts else ()

    def evict(self, view: CacheView) -> torch.Tensor:
        """The ``view.target`` visual rows of highest score in each sequence, and all text."""
        return self._highest(view)

    def _highest(self, view: PrefillView | CacheView) -> torch.Tensor:
        scores = self._checked(view, tuple(view.visual.shape))
        return ~view.visual | top_mask(scores, view.target, view.visual)

    def _checked(self, view: Any, shape: tuple[int, ...]) -> torch.Tensor:
        scores: Any = self.score(view)
        if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != shape:
            given = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise PolicyError(
                f"{self.name}.score returned {given}: a tensor {shape} is needed, one score per token."
            )
        return scores
