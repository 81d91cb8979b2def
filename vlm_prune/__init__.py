"""vlm_prune: visual-token pruning for stock Hugging Face vision-language models, without retraining."""

from .api import from_pretrained, prune, pruned, unprune
from .errors import (
    BudgetError,
    PolicyError,
    PruningError,
    StateError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from .policies.base import Keep, Policy
from .receipt import Receipt
from .registry import ADAPTERS, POLICIES, register_policy

__version__ = "0.1.0"

__all__ = [
    "ADAPTERS",
    "POLICIES",
    "BudgetError",
    "Keep",
    "Policy",
    "PolicyError",
    "PruningError",
    "Receipt",
    "StateError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "from_pretrained",
    "prune",
    "pruned",
    "register_policy",
    "unprune",
]
