"""vlm_prune: visual-token pruning for stock Hugging Face vision-language models, without retraining."""

from typing import TYPE_CHECKING, Any

from .api import from_pretrained, ignore_visual_labels, prune, pruned, unprune
from .contract.policy import Keep, Policy, ScorerPolicy, SelectPolicy
from .errors import (
    BudgetError,
    ModelNotFoundError,
    PolicyError,
    PruningError,
    StateError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from .registry import ADAPTERS, POLICIES, register_family, register_policy

if TYPE_CHECKING:
    from .call.receipt import Receipt

__version__ = "0.1.0"

__all__ = [
    "ADAPTERS",
    "POLICIES",
    "BudgetError",
    "Keep",
    "ModelNotFoundError",
    "Policy",
    "PolicyError",
    "PruningError",
    "Receipt",
    "ScorerPolicy",
    "SelectPolicy",
    "StateError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "from_pretrained",
    "ignore_visual_labels",
    "prune",
    "pruned",
    "register_family",
    "register_policy",
    "unprune",
]


def __getattr__(name: str) -> Any:
    # importing the engine takes seconds, for modules of transformers and torch that are loaded anyway once a model is
    if name == "Receipt":
        from .call.receipt import Receipt

        return Receipt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
