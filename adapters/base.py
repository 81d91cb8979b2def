"""What an adapter says about a model: the engine's contract, under its public import name."""

from ..contract.anatomy import Anatomy, Arrangement, Family, FeatureCall, PackedTower, Tower

__all__ = ["Anatomy", "Arrangement", "Family", "FeatureCall", "PackedTower", "Tower"]
