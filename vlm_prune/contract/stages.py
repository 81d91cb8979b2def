"""Where a policy acts: the stages of a call, the places in them, and what follows from a set of stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

STAGES = ("encode", "entry", "prefill", "decode", "modulate", "guide")
"""Stages that `Policy.stages` may name, in the order of a call."""

Place = Literal["tower", "features", "projected", "entry", "layer", "cache", "decode"]
"""Where a `SelectPolicy` chooses: after a layer of the vision tower, after the tower, after the projector, at the
decoder's entry with the text known, after a decoder layer, in the cache after prefill, in the cache while decoding."""

PLACES: dict[Place, str] = {
    "tower": "encode",
    "features": "encode",
    "projected": "encode",
    "entry": "entry",
    "layer": "prefill",
    "cache": "decode",
    "decode": "decode",
}
"""Place -> the stage that it belongs to."""


class Stages(tuple[str, ...]):
    """The stages of a policy, of a composition, or of a recorded run. Nothing else compares the names of stages."""

    __slots__ = ()

    @classmethod
    def joined(cls, several: Iterable[tuple[str, ...]]) -> Stages:
        """The union of several policies' stages, in order of first appearance."""
        return cls(dict.fromkeys(stage for stages in several for stage in stages))

    @property
    def prunes(self) -> bool:
        """Whether tokens are dropped anywhere."""
        return not self or bool(set(self) - {"modulate", "guide"})

    @property
    def encodes(self) -> bool:
        """Whether tokens are chosen among all of an image, before the decoder's first layer."""
        return "encode" in self or self.enters

    @property
    def enters(self) -> bool:
        """Whether that happens at the decoder's entry."""
        return "entry" in self

    @property
    def cuts(self) -> bool:
        """Whether tokens are dropped between decoder layers."""
        return "prefill" in self

    @property
    def evicts(self) -> bool:
        """Whether rows are dropped from the KV cache."""
        return "decode" in self

    @property
    def edits(self) -> bool:
        """Whether attention is edited."""
        return "modulate" in self

    @property
    def guides(self) -> bool:
        """Whether logits are edited."""
        return "guide" in self

    @property
    def watches(self) -> bool:
        """Whether anything happens between the decoder's entry and its exit."""
        return bool(set(self) - {"encode", "guide"})

    @property
    def inside(self) -> tuple[str, ...]:
        """The stages inside the language model; empty if everything is decided before it is called."""
        return tuple(stage for stage in self if stage != "encode")
