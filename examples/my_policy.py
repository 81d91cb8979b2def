"""A policy of your own, used without touching the package: in Python, on the command line and in a YAML run.

::

    prune(model, "my_policy:Contrast", tokens=64)         # from the folder that holds this file
    vlm-prune --plugin my_policy run my_policy.yaml       # or `plugins: [my_policy]` in the file itself
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_prune import ScorerPolicy, register_policy
from vlm_prune.policies.base import Place
from vlm_prune.policies.views import FeaturesView


@dataclass(frozen=True)
class Contrast(ScorerPolicy):
    """Keeps the tokens that differ most from the mean token of their tile."""

    name: ClassVar[str] = "contrast"
    place: ClassVar[Place] = "projected"

    def score(self, view: FeaturesView) -> torch.Tensor:
        """Distance to the mean: ``(tiles, tokens)``."""
        return (view.features - view.features.mean(1, keepdim=True)).norm(dim=-1)


register_policy("contrast", Contrast, overwrite=True)
