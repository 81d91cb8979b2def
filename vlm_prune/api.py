"""The public functions: `prune`, `unprune`, `pruned`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .budget import Budget
from .config import load_config
from .errors import BudgetError, PolicyError, StateError, UnsupportedModelError
from .policies.base import Policy
from .registry import find_anatomy, make_policies
from .session import Pruning

Model = TypeVar("Model", bound=nn.Module)


def prune(
    model: Model,
    policy: str | Policy | Sequence[Policy] = "flowcut",
    *,
    tokens: int | None = None,
    ratio: float | None = None,
    config: str | Path | None = None,
    **settings: Any,
) -> Model:
    """Make a stock vision-language model drop visual tokens. In place, this instance only; returns the same model.

    Args:
        model: a transformers model of a supported family, untouched.
        policy: a policy's name, see the table in the README, or a policy object. Several are composed in written
            order: ``"flowcut+vhr"``, or a list of objects.
        tokens: visual tokens to keep per image (per tile where a model cuts images into tiles).
        ratio: the share of visual tokens to keep, instead. Without either, the policy's own default.
        config: a JSON file with policy, budget and settings, instead of all these.
        settings: fields of the policy, such as ``compat="official"`` for FlowCut. For a composition, a dict for each
            policy that needs one: ``flowcut={"compat": "official"}``.

    Raises:
        UnsupportedModelError: the model's family has no adapter, or its modules cannot be hooked.
        PolicyError: no such policy, or no such setting.
        BudgetError: more tokens than there are, a ratio outside (0, 1], or both budgets at once.
        StateError: the model is pruned already.
    """
    if config is not None:
        if settings or tokens is not None or ratio is not None or policy != "flowcut":
            raise PolicyError(
                f"config={str(config)!r} holds policy, budget and settings: give nothing beside it."
            )
        return prune(model, **load_config(config))
    if getattr(model, "pruning", None) is not None:
        raise StateError(
            f"This model is pruned already ({model.pruning.name}). Call unprune(model) first."  # type: ignore[union-attr]
        )
    policies = make_policies(policy, settings)
    check_hookable(model)
    anatomy = find_anatomy(model)
    owner = next((p for p in policies if p.prunes), None)
    if owner is None and (tokens is not None or ratio is not None):
        raise BudgetError(
            f"{'+'.join(p.name for p in policies)} drops no tokens, so tokens= and ratio= have no meaning. Leave them "
            'out, or compose it with a policy that prunes, such as "flowcut+...".'
        )
    extra = int(anatomy.tower.keeps_cls)
    default = owner.default_ratio if owner is not None else 1.0
    budget = Budget.checked(tokens, ratio, default, anatomy.tower.units, anatomy.tile, extra)
    try:
        pruning = Pruning(model, anatomy, policies, budget)
    except ValueError as error:  # a policy that does not fit this model, say by a layer that it has not
        raise PolicyError(f"{'+'.join(p.name for p in policies)} on {anatomy.family}: {error}") from error
    # a plain attribute: nn.Module would list a module here, and nothing of ours may enter the state dict
    object.__setattr__(model, "pruning", pruning)
    return model


def unprune(model: Model) -> Model:
    """Undo `prune`: the model is bit for bit what it was. Returns the same model."""
    pruning: Pruning | None = getattr(model, "pruning", None)
    if pruning is None:
        raise StateError(f"This {type(model).__name__} is not pruned, so there is nothing to undo.")
    pruning.remove()
    object.__delattr__(model, "pruning")
    return model


@contextmanager
def pruned(
    model: Model, policy: str | Policy | Sequence[Policy] = "flowcut", **options: Any
) -> Iterator[Model]:
    """`prune` for the length of a ``with`` block; takes the same arguments."""
    prune(model, policy, **options)
    try:
        yield model
    finally:
        unprune(model)


def check_hookable(model: nn.Module) -> None:
    """Raise if hooks on the model's modules would not fire."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a torch module: give a transformers model."
        )
    compiled = "Prune the plain model first, then compile it: torch.compile(prune(model))."
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is compiled, so hooks would not fire. {compiled}"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            raise UnsupportedModelError(
                f"{name} is a {type(module).__name__}, so hooks would not fire. {compiled}"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModelError(f"{name} is compiled, so hooks would not fire. {compiled}")
