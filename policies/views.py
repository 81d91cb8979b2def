"""What a policy may look at: the engine's contract, under the name that policies of other projects import it by."""

from ..contract.views import (
    AttentionView,
    CacheView,
    EntryView,
    FeaturesView,
    ModulateView,
    PrefillView,
    TowerView,
)

__all__ = [
    "AttentionView",
    "CacheView",
    "EntryView",
    "FeaturesView",
    "ModulateView",
    "PrefillView",
    "TowerView",
]
