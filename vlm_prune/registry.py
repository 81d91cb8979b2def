"""Names of policies and model families, and where their code is. Nothing is imported before it is needed."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .contract.anatomy import Anatomy
from .contract.checks import check_policy
from .contract.numbers import plain_number
from .contract.policy import Policy
from .errors import PolicyError, UnsupportedModelError

POLICIES: dict[str, str | type[Policy]] = {
    "act": "vlm_prune.policies.act:ACT",
    "agilepruner": "vlm_prune.policies.agilepruner:AgilePruner",
    "cdpruner": "vlm_prune.policies.cdpruner:CDPruner",
    "dart": "vlm_prune.policies.dart:DART",
    "divprune": "vlm_prune.policies.divprune:DivPrune",
    "dola": "vlm_prune.policies.dola:DoLa",
    "downsample": "vlm_prune.policies.pooling:Downsample",
    "dycoke": "vlm_prune.policies.dycoke:DyCoke",
    "dyvte": "vlm_prune.policies.dyvte:DyVTE",
    "fastv": "vlm_prune.policies.fastv:FastV",
    "fastvid": "vlm_prune.policies.fastvid:FastVID",
    "flowcut": "vlm_prune.policies.flowcut:FlowCut",
    "h2o": "vlm_prune.policies.h2o:H2O",
    "lookm": "vlm_prune.policies.lookm:LookM",
    "mmtok": "vlm_prune.policies.mmtok:MMTok",
    "holov": "vlm_prune.policies.holov:HoloV",
    "mustdrop": "vlm_prune.policies.mustdrop:MustDrop",
    "none": "vlm_prune.policies.baselines:Identity",
    "pai": "vlm_prune.policies.pai:PAI",
    "paint": "vlm_prune.policies.paint:Paint",
    "pool": "vlm_prune.policies.pooling:Pool",
    "prumerge": "vlm_prune.policies.prumerge:PruMerge",
    "pyramiddrop": "vlm_prune.policies.pyramiddrop:PyramidDrop",
    "random": "vlm_prune.policies.baselines:Random",
    "scope": "vlm_prune.policies.scope:SCOPE",
    "pyramidkv": "vlm_prune.policies.pyramidkv:PyramidKV",
    "snapkv": "vlm_prune.policies.snapkv:SnapKV",
    "sparsevlm": "vlm_prune.policies.sparsevlm:SparseVLM",
    "streamingllm": "vlm_prune.policies.streamingllm:StreamingLLM",
    "uniform": "vlm_prune.policies.baselines:Uniform",
    "var": "vlm_prune.policies.var:VAR",
    "vcd": "vlm_prune.policies.vcd:VCD",
    "vflowopt": "vlm_prune.policies.vflowopt:VFlowOpt",
    "vlcache": "vlm_prune.policies.vlcache:VLCache",
    "vhr": "vlm_prune.policies.vhr:VHR",
    "vidcom2": "vlm_prune.policies.vidcom2:VidCom2",
    "visionzip": "vlm_prune.policies.visionzip:VisionZip",
    "vispruner": "vlm_prune.policies.vispruner:VisPruner",
    "zerotuning": "vlm_prune.policies.zerotuning:ZeroTuning",
    "zooprune": "vlm_prune.policies.zooprune:ZOOPrune",
}
"""Policy name -> class, or "module:class" to import on demand."""

BUILT_IN = tuple(POLICIES)
"""Names of the policies in the package."""

ALIASES = {"fixing_imbalance": "paint", "pdrop": "pyramiddrop", "vl-cache": "vlcache", "look-m": "lookm"}
"""Other names of policies."""

ELSEWHERE = "vlm_prune.policies.elsewhere:not_among"
"""Says where well-known methods are that are not among the policies."""

BUDGET_WORDS = {
    **dict.fromkeys(
        (
            "keep_ratio",
            "keep_rate",
            "retain_ratio",
            "retention_ratio",
            "retention",
            "share",
            "fraction",
            "rate",
        ),
        "ratio",
    ),
    **dict.fromkeys(
        (
            "num_tokens",
            "n_tokens",
            "keep_tokens",
            "num_keep",
            "visual_tokens",
            "num_visual_tokens",
            "max_tokens",
        ),
        "tokens",
    ),
    **dict.fromkeys(("token_budget", "k", "top_k", "topk"), "tokens"),
    **dict.fromkeys(("budget", "keep", "prune_ratio", "pruning_ratio", "drop_ratio", "sparsity"), ""),
}
"""What other libraries call the budget, and whether it means ``tokens`` or ``ratio``; "" if that is unclear."""

ADAPTERS: dict[str, str | Callable[[Any], Anatomy]] = {
    "llava": "vlm_prune.adapters.llava:anatomy",
    "vipllava": "vlm_prune.adapters.llava:vip_anatomy",
    "llava_next": "vlm_prune.adapters.llava_next:next_anatomy",
    "llava_next_video": "vlm_prune.adapters.llava_next:next_video_anatomy",
    "llava_onevision": "vlm_prune.adapters.llava_next:onevision_anatomy",
    "internvl": "vlm_prune.adapters.internvl:anatomy",
    "qwen2_vl": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen2_5_vl": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen3_vl": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen3_vl_moe": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm4v": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm4v_moe": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm46v": "vlm_prune.adapters.qwen_vl:anatomy",
    "glmga": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm_ocr": "vlm_prune.adapters.qwen_vl:anatomy",
    "cosmos3_omni": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen2_5_omni_thinker": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen3_omni_moe_thinker": "vlm_prune.adapters.qwen_vl:anatomy",
    "deepseek_vl": "vlm_prune.adapters.siglip:anatomy",
    "paligemma": "vlm_prune.adapters.siglip:anatomy",
    "gemma3": "vlm_prune.adapters.siglip:anatomy",
    "idefics3": "vlm_prune.adapters.siglip:anatomy",
    "smolvlm": "vlm_prune.adapters.siglip:anatomy",
    "aya_vision": "vlm_prune.adapters.siglip:anatomy",
    "cohere2_vision": "vlm_prune.adapters.siglip:anatomy",
    "janus": "vlm_prune.adapters.siglip:anatomy",
    "ovis2": "vlm_prune.adapters.siglip:anatomy",
    "exaone4_5": "vlm_prune.adapters.qwen_vl:anatomy",
    "glm5_next": "vlm_prune.adapters.qwen_vl:anatomy",
    "hyperclovax_vision_v2": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen3_5": "vlm_prune.adapters.qwen_vl:anatomy",
    "qwen3_5_moe": "vlm_prune.adapters.qwen_vl:anatomy",
}
"""``config.model_type`` -> function that finds a model's parts, or "module:function" to import on demand."""

BUILT_IN_FAMILIES = tuple(ADAPTERS)
"""Model types with an adapter in the package; `GENERAL` serves many others."""

NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What a policy may be called."""
GENERAL = "vlm_prune.adapters.features:anatomy"
"""Finds the parts of a model of any other type."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the closest known name and all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    return f"{hint}Available: {', '.join(known)}."


def register_policy(name: str, policy: type[Policy], overwrite: bool = False) -> None:
    """Make your policy available by name to `prune`, configs, YAML runs and the command line.

    Raises:
        PolicyError: the name is taken and ``overwrite`` is False, or the class cannot work as a policy; see
            `checks.check_policy`.
    """
    if not overwrite and (name in POLICIES or name in ALIASES):
        raise PolicyError(
            f'policy="{name}" exists already: register yours under another name, or give overwrite=True.'
        )
    if not NAME.fullmatch(name):
        raise PolicyError(
            f'policy={name!r}: a name of letters, digits, _ and - is needed, such as "my_policy".'
        )
    check_policy(policy)
    POLICIES[name] = policy


def register_family(model_type: str, anatomy: Any, overwrite: bool = False) -> None:
    """Make your model family available, by the ``config.model_type`` of its models.

    Args:
        model_type: as in the model's config.
        anatomy: takes a model and returns its parts, or ``"module:function"`` to import on demand.
        overwrite: whether it may replace an existing adapter.

    Raises:
        UnsupportedModelError: the type is taken and ``overwrite`` is False, or ``anatomy`` is neither of these.
    """
    if not overwrite and model_type in ADAPTERS:
        raise UnsupportedModelError(
            f'model type "{model_type}" has an adapter already: give overwrite=True to replace it.'
        )
    if not (callable(anatomy) or (isinstance(anatomy, str) and anatomy.count(":") == 1)):
        raise UnsupportedModelError(
            f'the adapter of "{model_type}" is {anatomy!r}: a function that takes a model and returns its Anatomy, or '
            '"module:function", is needed.'
        )
    ADAPTERS[model_type] = anatomy


def load_plugins(modules: Iterable[str] = ()) -> list[str]:
    """Import ``modules``, which register policies and families, and load the entry points of installed packages.

    The groups are ``vlm_prune.policies`` and ``vlm_prune.adapters``. An entry point never replaces a known name, and
    one that cannot be read is left out: returns a sentence about each of these.

    Raises:
        PolicyError: one of the ``modules`` cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise PolicyError(
                f"plug-in {module!r} cannot be imported ({error}): give the name of a module on the Python path."
            ) from error
    trouble = []
    for group, known in (("vlm_prune.policies", POLICIES), ("vlm_prune.adapters", ADAPTERS)):
        for point in importlib.metadata.entry_points(group=group):
            if point.name in known:
                if known[point.name] != point.value:
                    trouble.append(
                        f"{group}: {point.name} ({point.value}) is left out, since the name is taken."
                    )
                continue
            try:
                if group == "vlm_prune.policies":
                    check_policy(load_entry(point.value))
            except Exception as error:  # a broken package must not stop this one from working
                trouble.append(
                    f"{group}: {point.name} ({point.value}) is left out: {type(error).__name__}: {error}"
                )
                continue
            known[point.name] = point.value
    return trouble


def policy_class(name: str) -> type[Policy]:
    """The class of a policy, by its name or as ``"module:Class"``."""
    name = ALIASES.get(name, name)
    if ":" in name:
        return _outside(name)
    if name not in POLICIES:
        load_plugins()
    if name not in POLICIES:
        elsewhere = load_entry(ELSEWHERE)(name)
        known = did_you_mean("" if elsewhere else name, POLICIES)
        raise PolicyError(f'policy="{name}" is not known. {elsewhere}{known}')
    return load_entry(POLICIES[name])


def named_policies(policy: str) -> list[type[Policy]]:
    """The classes of a composition's policies, written ``"flowcut+vhr"``."""
    return [policy_class(name.strip()) for name in policy.split("+")]


def _outside(name: str) -> type[Policy]:
    """The policy that ``"module:Class"`` names."""
    try:
        found = load_entry(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PolicyError(
            f'policy="{name}" cannot be imported ({error}): give "module:Class" of a module on the Python path.'
        ) from error
    check_policy(found)
    return found


def registered_name(policy: Policy) -> str:
    """The name by which `policy_class` finds the class of a policy."""
    outside = f"{type(policy).__module__}:{type(policy).__qualname__}"
    for name in (policy.name, *POLICIES):
        if name in POLICIES and policy_class(name) is type(policy):
            return name
    if "__main__" not in outside and "<" not in outside and _importable(outside, type(policy)):
        return outside
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
            made = f", such as {policy.__name__}()" if isinstance(policy, type) else ""
            raise PolicyError(f'policy={policy!r}: give a name such as "flowcut", or policy objects{made}.')
        if settings:
            raise PolicyError(f"{', '.join(settings)} given beside policy objects: set it on the object.")
        return _checked(tuple(objects))
    names = [name.strip() for name in policy.split("+")]
    if len(names) > 1 and not all(names):
        raise PolicyError(f'policy="{policy}": a name is missing beside a "+", as in "flowcut+vhr".')
    if len(names) == 1:
        return (_make(names[0], settings),)
    for name in names:
        policy_class(name)
    for name, fields in settings.items():
        _refuse_budget_words(name, fields)
        if name not in names or not isinstance(fields, dict):
            raise PolicyError(
                f'{name}={fields!r}: settings of the composition "{policy}" are given by policy, such as '
                f"{names[0]}={{...}}."
            )
    return _checked(tuple(_make(name, settings.get(name, {})) for name in names))


def _checked(policies: tuple[Policy, ...]) -> tuple[Policy, ...]:
    for policy in policies:
        check_policy(type(policy))
    encoders = [p.name for p in policies if p.encodes]
    if len(encoders) > 1:
        raise PolicyError(
            f"{' and '.join(encoders)} both drop tokens in the encode stage, where only one can decide. Compose one "
            "of them with policies of the prefill, decode and modulate stages."
        )
    if len({p.name for p in policies}) < len(policies):
        raise PolicyError(
            f"{'+'.join(p.name for p in policies)}: a policy can appear in a composition only once."
        )
    return policies


def _make(name: str, settings: dict[str, Any]) -> Policy:
    cls = policy_class(name)
    fields = [f.name for f in dataclasses.fields(cls)]
    for setting, value in settings.items():
        if setting not in fields:
            _refuse_budget_words(setting, value)
            raise PolicyError(f'policy="{name}" has no setting {setting!r}. {did_you_mean(setting, fields)}')
    try:
        return cls(**{setting: plain_number(value) for setting, value in settings.items()})
    except (TypeError, ValueError) as error:
        raise PolicyError(f'policy="{name}": {error}') from error


def _refuse_budget_words(name: str, value: Any) -> None:
    """Raise if a setting is the budget under another name."""
    if name not in BUDGET_WORDS:
        return
    shares = {"ratio": "ratio=0.25", "tokens": "tokens=64", "": "tokens=64 or ratio=0.25"}
    raise PolicyError(
        f"{name}={value!r} is no setting. The budget is what is kept: tokens= is the number of visual tokens per "
        f"image, ratio= the share of them. Give {shares[BUDGET_WORDS[name]]}, say, in its place."
    )


def find_anatomy(model: Any) -> Anatomy:
    """The parts of a stock model, by its ``config.model_type``."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type: give a vision-language model of transformers, for "
            "instance AutoModelForImageTextToText.from_pretrained(...)."
        )
    if model_type not in ADAPTERS:
        load_plugins()
    try:
        anatomy: Anatomy = load_entry(ADAPTERS.get(model_type, GENERAL))(model)
    except (ValueError, AttributeError) as error:
        if model_type not in ADAPTERS:
            raise UnsupportedModelError(
                f'{type(model).__name__} is of model type "{model_type}", which has no adapter{_why(model)}. The '
                f"general adapter cannot serve it: {error} Available: {', '.join(sorted(ADAPTERS))}."
            ) from error
        if isinstance(error, ValueError):
            raise UnsupportedModelError(f"{type(model).__name__}: {error}") from error
        raise UnsupportedModelError(
            f'{type(model).__name__} is of model type "{model_type}" but lacks a part that its adapter looks for '
            f"({error}). Give the complete stock model, with its language-modelling head, for instance "
            "AutoModelForImageTextToText.from_pretrained(...)."
        ) from error
    return anatomy


def _why(model: Any) -> str:
    """Why a model has no adapter: it has no vision tower, it is only a tower, or its family is unknown."""
    parts = vars(model.config) if hasattr(model.config, "__dict__") else {}
    if any(name in parts for name in ("vision_config", "text_config", "vq_config")):
        return "; docs/contributing.md (Add a model family) says how to write one"
    if "image_size" in parts or "patch_size" in parts:
        return ", since it is only a vision tower: give the whole vision-language model"
    return ", since it has no vision tower, and so no visual tokens to prune: give a vision-language model"


def _importable(name: str, cls: type[Policy]) -> bool:
    """Whether ``"module:Class"`` names exactly this class."""
    try:
        return load_entry(name) is cls
    except (ImportError, AttributeError):
        return False


def load_entry(entry: Any) -> Any:
    """The object that ``"module:name"`` names; anything but a string is returned as it is."""
    if not isinstance(entry, str):
        return entry
    module, name = entry.split(":")
    return getattr(importlib.import_module(module), name)
