"""What a policy may look at: the engine's contract, under the name that policies of other projects import it by."""

from ..contract.views import AttentionView, FeaturesView, ModulateView, PrefillView, TowerView

__all__ = ["AttentionView", "FeaturesView", "ModulateView", "PrefillView", "TowerView"]
