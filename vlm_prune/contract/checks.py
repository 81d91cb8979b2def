"""What a plug-in must define: checked when it is registered, so that a mistake is one clear error."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from ..errors import PolicyError
from .policy import Policy, ScorerPolicy, SelectPolicy
from .stages import STAGES

NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "encode": (("encode", "encode_final", "tower_grid"),),
    "entry": (("entry",),),
    "prefill": (("prefill_layers",), ("prefill",)),
    "decode": (("evicted_layers",), ("evict",)),
    "modulate": (("modulate_layers",), ("modulate",)),
    "guide": (("guide",),),
}
"""For each stage, the methods that its policies override: at least one of each group."""


def check_policy(policy: Any) -> None:
    """Raise if this class cannot work as a policy.

    Raises:
        PolicyError: not a subclass of `Policy`, not a frozen dataclass, no name, an unknown stage, or a stage without
            the methods that it needs.
    """
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        given = policy.__name__ if isinstance(policy, type) else repr(policy)
        raise PolicyError(
            f"{given} is not a policy class: derive it from Policy, SelectPolicy or ScorerPolicy of "
            "vlm_prune.policies.base."
        )
    title = policy.__name__
    parameters = vars(policy).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise PolicyError(
            f"{title} is not a frozen dataclass: write @dataclass(frozen=True) above the class."
        )
    if not isinstance(getattr(policy, "name", None), str) or not policy.name:
        raise PolicyError(f'{title} has no name: give it name: ClassVar[str] = "my_policy".')
    short = issubclass(policy, SelectPolicy)
    if short and not isinstance(getattr(policy, "place", None), str):
        raise PolicyError(f'{title} has no place: give it place: ClassVar[Place] = "features", for instance.')
    stages = getattr(policy, "stages", None)
    if not isinstance(stages, tuple) or not stages:
        raise PolicyError(f'{title} has no stages: give it stages: ClassVar[tuple[str, ...]] = ("encode",).')
    for stage in stages:
        if stage not in STAGES:
            raise PolicyError(f"{title}: stage {stage!r} is none of {', '.join(STAGES)}.")
        for group in () if short else NEEDED[stage]:
            if all(getattr(policy, name) is getattr(Policy, name) for name in group):
                raise PolicyError(
                    f"{title} acts in the {stage} stage but has no method {' or '.join(group)}."
                )
    if short:
        _check_choice(cast("type[SelectPolicy]", policy))
    for field in dataclasses.fields(policy):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PolicyError(
                f"{title}: setting {field.name!r} has no default, so the policy cannot be made by name."
            )


def _check_choice(policy: type[SelectPolicy]) -> None:
    scorer = issubclass(policy, ScorerPolicy)
    method, base = ("score", ScorerPolicy) if scorer else ("select", SelectPolicy)
    decides = ["evict"] if policy.acts.evicts and not scorer else [method]
    if all(getattr(policy, name, None) is getattr(base, name, None) for name in decides):
        raise PolicyError(f"{policy.__name__} chooses at its place but has no method {decides[0]}.")
    if policy.place in ("tower", "layer") and policy.layer is SelectPolicy.layer:
        raise PolicyError(f"{policy.__name__} chooses after a layer but has no method layer that says which.")
