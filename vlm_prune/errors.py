"""Errors a user can meet. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations


class PruningError(Exception):
    """Base class of this package's errors."""


class UnsupportedModelError(PruningError, TypeError):
    """The model, or a part of it, cannot be pruned."""


class ModelNotFoundError(PruningError, OSError):
    """There is no model of that name, on this machine or on the hub."""


class BudgetError(PruningError, ValueError):
    """The requested number of tokens is not possible."""


class PolicyError(PruningError, ValueError):
    """The policy is unknown or cannot be built from the given settings."""


class StateError(PruningError, RuntimeError):
    """The model is pruned when it must not be, or the reverse."""


class UnsupportedCallError(PruningError, ValueError):
    """A pruned model was called in a way whose result would be wrong."""
