"""What an adapter says about a model: the engine's contract, under the name that other projects import it by."""

from ..contract.anatomy import Anatomy, Arrangement, Family, FeatureCall, PackedTower, Tower

__all__ = ["Anatomy", "Arrangement", "Family", "FeatureCall", "PackedTower", "Tower"]
