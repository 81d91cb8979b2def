"""The public functions: `prune`, `unprune`, `pruned`, `from_pretrained`, `ignore_visual_labels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .composition import Composition
from .config import load_config
from .contract.policy import Policy
from .errors import PolicyError, PruningError, StateError, UnsupportedModelError
from .registry import find_anatomy, make_policies
from .saving import find_config, how_to_load, locate, missing_models

if TYPE_CHECKING:
    from .language.loss import IgnoreVisualLabels
    from .session import Pruning

Model = TypeVar("Model", bound=nn.Module)


class _Default(str):
    """A default that can be told apart from the same value given by the caller."""

    __slots__ = ()


BESIDE = ("policy", "tokens", "ratio", "per", "capture")
"""Arguments of `prune` that are no settings of a policy."""
FLOWCUT, TILE = _Default("flowcut"), _Default("tile")


def prune(
    model: Model,
    policy: str | Policy | Sequence[Policy] = FLOWCUT,
    *,
    tokens: int | None = None,
    ratio: float | None = None,
    per: str = TILE,
    capture: bool = False,
    config: Mapping[str, Any] | str | Path | None = None,
    **settings: Any,
) -> Model:
    """Make a stock vision-language model drop visual tokens. In place, this instance only; returns the same model.

    Args:
        model: an unmodified transformers model of a supported family; or a PEFT model around one, whose base model is
            pruned then.
        policy: a policy's name, see the table in the README, or a policy object. Several are composed in written
            order: ``"flowcut+vhr"``, or a list of objects.
        tokens: visual tokens to keep per image (per tile where a model cuts images into tiles; per frame of a video,
            which policies over frames such as VidCom2 let frames share).
        ratio: the share of visual tokens to keep, instead. Without either, the policy's own default.
        per: what the budget applies to: ``"tile"``, each tile that a model cuts an image into (or frame of a video) by
            itself, as in the papers; or ``"image"`` (or ``"video"``, which is the same), all tiles of an image (or
            frames of a video) together. They compete for it then, and tokens are chosen after the tower.
        capture: compute vision tower and prefill by CUDA graphs, recorded when a shape is first seen, where that can be
            done; what runs eagerly and why is in the receipt. See docs/performance.md.
        config: policy, budget and settings, instead of all these: the ``model.pruning.config`` of another
            model, a JSON file with it, or a folder to which a pruned model was saved.
        settings: fields of the policy, such as ``compat="official"`` for FlowCut. For a composition, a dict for each
            policy that needs one: ``flowcut={"compat": "official"}``.

    Raises:
        UnsupportedModelError: the model's family has no adapter, or its modules cannot be hooked.
        PolicyError: no such policy, or no such setting.
        BudgetError: more tokens than there are, a ratio outside (0, 1], or both budgets at once.
        StateError: the model is pruned already.
    """
    if config is not None:
        given = {"tokens": tokens is not None, "ratio": ratio is not None, "per": per is not TILE}
        given["capture"] = capture
        _refuse_beside(config, {"policy": policy is not FLOWCUT, **given, **dict.fromkeys(settings, True)})
        return prune(model, **load_config(config))
    if getattr(model, "pruning", None) is not None:
        raise StateError(
            f"This model is pruned already ({model.pruning.name}). Call unprune(model) first."  # type: ignore[union-attr]
        )
    if not isinstance(capture, bool):
        raise PolicyError(f"capture={capture!r}: True or False is needed.")
    policies = make_policies(policy, settings)
    check_hookable(model)
    stock = stock_model(model)
    anatomy = find_anatomy(stock)
    # the engine imports parts of transformers that take seconds and are loaded by now
    from .session import Pruning

    try:
        composition = Composition.fit(policies, anatomy, tokens, ratio, per)
        pruning = Pruning(stock, anatomy, composition, None if model is stock else model, capture)
    except PruningError:
        raise
    except ValueError as error:  # a policy that does not fit this model
        raise PolicyError(f"{'+'.join(p.name for p in policies)} on {anatomy.family}: {error}") from error
    # a plain attribute: nn.Module would list a module here, and nothing of ours may appear in the state dict
    object.__setattr__(stock, "pruning", pruning)
    return model


def unprune(model: Model) -> Model:
    """Undo `prune`: the model is again bit for bit what it was. Returns the same model."""
    pruning: Pruning | None = getattr(model, "pruning", None)
    if pruning is None:
        raise StateError(f"This {type(model).__name__} is not pruned, so there is nothing to undo.")
    pruning.remove()
    object.__delattr__(stock_model(model), "pruning")
    return model


@contextmanager
def pruned(
    model: Model, policy: str | Policy | Sequence[Policy] = FLOWCUT, **options: Any
) -> Iterator[Model]:
    """`prune` for the length of a ``with`` block; takes the same arguments."""
    prune(model, policy, **options)
    try:
        yield model
    finally:
        unprune(model)


def from_pretrained(
    path: str | Path,
    policy: str | Policy | Sequence[Policy] | None = None,
    *,
    tokens: int | None = None,
    ratio: float | None = None,
    per: str = TILE,
    capture: bool = False,
    config: Mapping[str, Any] | str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """Load a vision-language model and prune it, by default as it was when it was saved.

    Args:
        path: a folder, a model's name on the hub, or that of a shipped test model.
        policy: a policy's name or object, instead of what the model's ``vlm_prune.json`` says.
        tokens: its budget, see `prune`.
        ratio: its budget, see `prune`.
        per: what the budget applies to, see `prune`.
        capture: whether calls are captured, see `prune`.
        config: another config, instead; see `prune`.
        kwargs: for ``AutoModelForImageTextToText.from_pretrained``: ``dtype``, ``device_map``, ``revision``, ...

    Raises:
        ModelNotFoundError: there is no such model, on this machine or on the hub.
        PolicyError: the model has no ``vlm_prune.json``, and neither ``policy`` nor ``config`` is given; or what they
            say is invalid. Nothing has been loaded at that point.
    """
    from transformers import AutoModelForImageTextToText  # lists all families of transformers

    given = {"tokens": tokens is not None, "ratio": ratio is not None, "per": per is not TILE}
    given["capture"] = capture
    if config is not None:
        _refuse_beside(config, {"policy": policy is not None, **given})
        chosen = load_config(config)
    elif policy is None:
        if any(given.values()):
            raise PolicyError("tokens=, ratio=, per= and capture= go with a policy: give policy= too.")
        path = locate(path, kwargs.get("subfolder", ""))
        chosen = load_config(find_config(path, kwargs))
    else:
        chosen = {"policy": policy, "tokens": tokens, "ratio": ratio, "per": per, "capture": capture}
    # a mistake in them must be found before a large model is loaded
    make_policies(chosen["policy"], {k: v for k, v in chosen.items() if k not in BESIDE})
    path = locate(path, kwargs.get("subfolder", ""))
    with missing_models(path):
        model = AutoModelForImageTextToText.from_pretrained(path, **kwargs)
    return prune(model, **chosen)


def ignore_visual_labels(model: Any, collator: Callable[[Any], Any]) -> IgnoreVisualLabels:
    """``collator``, with the labels on visual tokens set to -100, so that pruning removes no label.

    Trainers that accumulate gradients count the labels of all micro-batches before the first forward
    (``num_items_in_batch``). With this collator they count what the loss will sum, whatever is dropped::

        Trainer(model, train_dataset=data, data_collator=ignore_visual_labels(model, collator), ...)

    Args:
        model: a model of a supported family, or a PEFT model around one; pruned or not.
        collator: makes a batch of examples, with ``input_ids`` and ``labels``, int64 ``(batch, length)``.

    Raises:
        UnsupportedModelError: the model's family is not known.
    """
    from .language.loss import IgnoreVisualLabels

    return IgnoreVisualLabels(collator, tuple(find_anatomy(stock_model(model)).image_tokens))


def _refuse_beside(config: Any, given: Mapping[str, bool]) -> None:
    """Raise if any argument is given in addition to ``config``."""
    if names := [name for name, there in given.items() if there]:
        raise PolicyError(
            f"config={config!r} holds policy, budget and settings: give nothing beside it ({', '.join(names)} given)."
        )


def stock_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} puts learned tokens into the prompt, which moves the image tokens: use "
            "an adapter that changes weights, such as LoRA."
        )
    return model.get_base_model()


def check_hookable(model: nn.Module) -> None:
    """Raise if hooks on the model's modules would not fire."""
    if isinstance(model, str | Path):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a torch module: {str(model)!r} names a model, and prune takes the model. "
            f"{how_to_load(str(model))}"
        )
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
