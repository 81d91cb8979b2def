"""Names of policies and model families, and where their code is. Nothing is imported before it is asked for."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .contract.anatomy import Anatomy
from .contract.policy import Policy
from .errors import PolicyError, UnsupportedModelError

POLICIES: dict[str, str | type[Policy]] = {
    "agilepruner": "vlm_prune.policies.agilepruner:AgilePruner",
    "divprune": "vlm_prune.policies.divprune:DivPrune",
    "downsample": "vlm_prune.policies.pooling:Downsample",
    "dyvte": "vlm_prune.policies.dyvte:DyVTE",
    "fastv": "vlm_prune.policies.fastv:FastV",
    "flowcut": "vlm_prune.policies.flowcut:FlowCut",
    "mustdrop": "vlm_prune.policies.mustdrop:MustDrop",
    "none": "vlm_prune.policies.baselines:Identity",
    "paint": "vlm_prune.policies.paint:Paint",
    "pool": "vlm_prune.policies.pooling:Pool",
    "random": "vlm_prune.policies.baselines:Random",
    "uniform": "vlm_prune.policies.baselines:Uniform",
    "var": "vlm_prune.policies.var:VAR",
    "vflowopt": "vlm_prune.policies.vflowopt:VFlowOpt",
    "vhr": "vlm_prune.policies.vhr:VHR",
    "visionzip": "vlm_prune.policies.visionzip:VisionZip",
}
"""Policy name -> class, or "module:class" to import on demand."""

ALIASES = {"fixing_imbalance": "paint"}
"""Other names that policies go by."""

ADAPTERS: dict[str, str | Callable[[Any], Anatomy]] = {
    "internvl": "vlm_prune.adapters.internvl:anatomy",
    "llava": "vlm_prune.adapters.llava:anatomy",
    "qwen2_5_vl": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen2_vl": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen3_vl": "vlm_prune.adapters.qwen_vl:anatomy",
    "llava_next": "vlm_prune.adapters.llava_next:next_anatomy",
    "llava_next_video": "vlm_prune.adapters.llava_next:next_video_anatomy",
    "llava_onevision": "vlm_prune.adapters.llava_next:onevision_anatomy",
    "vipllava": "vlm_prune.adapters.llava:vip_anatomy",
    "qwen3_vl_moe": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm4v": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm4v_moe": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm46v": "vlm_prune.adapters.qwen_vl:anatomy",
    "glmga": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm_ocr": "vlm_prune.adapters.qwen_vl:anatomy",
    "cosmos3_omni": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen2_5_omni_thinker": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen3_omni_moe_thinker": "vlm_prune.adapters.qwen_vl:anatomy",
}
"""``config.model_type`` -> function that finds a model's parts, or "module:function" to import on demand."""

GENERAL = "vlm_prune.adapters.features:anatomy"
"""What finds the parts of a model of any other type."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known names and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    return f"{hint}Available: {', '.join(known)}."


def register_policy(name: str, policy: type[Policy]) -> None:
    """Make a policy of your own known by name. Raises if the name is taken."""
    if name in POLICIES or name in ALIASES:
        raise PolicyError(f'policy="{name}" exists already: register yours under another name.')
    POLICIES[name] = policy


def policy_class(name: str) -> type[Policy]:
    """The class of a policy."""
    name = ALIASES.get(name, name)
    if name not in POLICIES:
        raise PolicyError(f'policy="{name}" is not known. {did_you_mean(name, POLICIES)}')
    return _load(POLICIES[name])


def registered_name(policy: Policy) -> str:
    """The name by which `policy_class` finds the class of a policy."""
    for name in (policy.name, *POLICIES):
        if name in POLICIES and policy_class(name) is type(policy):
            return name
    raise PolicyError(
        f"{type(policy).__name__} is not registered, so no config can name it: call "
        f'register_policy("{policy.name}", {type(policy).__name__}) first, here and where the config is read.'
    )


def make_policies(policy: str | Policy | Sequence[Policy], settings: dict[str, Any]) -> tuple[Policy, ...]:
    """The policies of a composition, in written order.

    ``policy`` is a name, names joined by "+", a policy object or several. ``settings`` are the fields of a single
    named policy; for a composition, each policy's name with a dict of its fields.
    """
    if not isinstance(policy, str):
        objects = (policy,) if isinstance(policy, Policy) else policy
        if (
            not isinstance(objects, list | tuple)
            or not objects
            or not all(isinstance(p, Policy) for p in objects)
        ):
            raise PolicyError(f'policy={policy!r}: give a name such as "flowcut", or policy objects.')
        if settings:
            raise PolicyError(f"{', '.join(settings)} given beside policy objects: set it on the object.")
        return _checked(tuple(objects))
    names = policy.split("+")
    if len(names) == 1:
        return (_make(policy, settings),)
    classes = [policy_class(name) for name in names]
    for name, fields in settings.items():
        if name not in names or not isinstance(fields, dict):
            raise PolicyError(
                f'{name}={fields!r}: settings of the composition "{policy}" are given by policy, such as '
                f"{names[0]}={{...}}."
            )
    made = [_make(name, settings.get(name, {})) for name, _ in zip(names, classes, strict=True)]
    return _checked(tuple(made))


def _checked(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    encoders = [p.name for p in policies if "encode" in p.stages]
    if len(encoders) > 1:
        raise PolicyError(
            f"{' and '.join(encoders)} both drop tokens in the encode stage, where one decides for all. Compose one "
            "of them with policies of the prefill, decode and modulate stages."
        )
    if len({p.name for p in policies}) < len(policies):
        raise PolicyError(f"{'+'.join(p.name for p in policies)}: a policy can stand in a composition once.")
    return policies


def _make(name: str, settings: dict[str, Any]) -> Policy:
    cls = policy_class(name)
    fields = [f.name for f in dataclasses.fields(cls)]
    for setting in settings:
        if setting not in fields:
            raise PolicyError(f'policy="{name}" has no setting {setting!r}. {did_you_mean(setting, fields)}')
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise PolicyError(f'policy="{name}": {error}') from error


def find_anatomy(model: Any) -> Anatomy:
    """The parts of a stock model, by its ``config.model_type``."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type: give a vision-language model of transformers, for "
            "instance AutoModelForImageTextToText.from_pretrained(...)."
        )
    try:
        anatomy: Anatomy = _load(ADAPTERS.get(model_type, GENERAL))(model)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error}") from error
    except AttributeError as error:
        raise UnsupportedModelError(
            f'{type(model).__name__} is of model type "{model_type}" but lacks a part that its adapter looks for '
            f"({error}). Give the complete stock model, with its language-modelling head, for instance "
            "AutoModelForImageTextToText.from_pretrained(...)."
        ) from error
    return anatomy


def _load(entry: Any) -> Any:
    if not isinstance(entry, str):
        return entry
    module, name = entry.split(":")
    return getattr(importlib.import_module(module), name)
