"""Saving a pruned model, as stock weights and a ``vlm_prune.json``; and finding a model to load.

While a model is pruned, its ``save_pretrained`` writes that file too, and so do the stock calls that upload
to the hub, ``push_to_hub(...)`` and ``save_pretrained(..., push_to_hub=True)``. Nothing of ours enters the weights or
``config.json``: without this package, the same folder loads as the stock model.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode
from transformers.utils import cached_file

from .config import FILE, write_config
from .errors import ModelNotFoundError, PolicyError
from .registry import load_entry

SHIPPED = ("tiny-llava", "tiny-internvl", "tiny-llava-halluc")
"""Names of the trained test models that ship with the package."""

WEIGHTS = "vlm_prune.eval.models:model_path"
"""Finds their folders."""

FROM_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
"""Arguments of transformers' `from_pretrained` that say where files come from."""


class Saver:
    """Replaces a model's ``save_pretrained`` until `remove` is called; also writes ``pruning.config``."""

    def __init__(self, model: Any, pruning: Any):
        self.model, self.pruning = model, pruning
        self.before = vars(model).get("save_pretrained")
        self.stock = model.save_pretrained
        object.__setattr__(model, "save_pretrained", self.save_pretrained)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """What the stock method saves, and ``vlm_prune.json``; the same arguments.

        Raises:
            PolicyError: a policy cannot be named in a file; nothing was written.
        """
        config = self.pruning.config
        given = inspect.signature(self.stock).bind(save_directory, *args, **kwargs).arguments
        with self._uploading(config):
            result = self.stock(save_directory, *args, **kwargs)
        if given.get("is_main_process", True):
            write_config(config, save_directory)
        return result

    @contextmanager
    def _uploading(self, config: Mapping[str, Any]) -> Iterator[None]:
        """``save_pretrained(..., push_to_hub=True)`` looks for new files before it returns."""
        upload = self.model._upload_modified_files

        def with_config(folder: str | Path, *args: Any, **kwargs: Any) -> Any:
            write_config(config, folder)
            return upload(folder, *args, **kwargs)

        object.__setattr__(self.model, "_upload_modified_files", with_config)
        try:
            yield
        finally:
            object.__delattr__(self.model, "_upload_modified_files")

    def remove(self) -> None:
        """Restore the model's own method."""
        if self.before is None:
            object.__delattr__(self.model, "save_pretrained")
        else:
            object.__setattr__(self.model, "save_pretrained", self.before)


def find_config(path: str | Path, kwargs: Mapping[str, Any]) -> str:
    """The path on this machine of a model's ``vlm_prune.json``; ``path`` is a folder or a model's name on the hub.

    ``kwargs`` are those of transformers' `from_pretrained`.

    Raises:
        PolicyError: there is none.
        ModelNotFoundError: there is no such model.
    """
    where = {name: kwargs[name] for name in FROM_HUB if name in kwargs}
    try:
        return str(cached_file(path, FILE, **where))
    except OSError as error:
        if not Path(path).is_dir():
            with missing_models(path):
                cached_file(path, "config.json", **where)
        raise PolicyError(
            f"{path} has no {FILE}, so it does not say how to prune: name a policy, as in "
            f'from_pretrained({str(path)!r}, policy="flowcut", tokens=64), or save a pruned model there first.'
        ) from error


def locate(path: str | Path, subfolder: str = "") -> str | Path:
    """Where a model is: the folder of a shipped test model, or ``path`` itself, a folder or a name on the hub.

    Raises:
        ModelNotFoundError: it is neither.
    """
    if str(path) in SHIPPED and not Path(path).is_dir():
        return Path(load_entry(WEIGHTS)(str(path)))
    folder = Path(path) / subfolder
    if folder.is_dir() and not any(
        (folder / file).exists() for file in ("config.json", "adapter_config.json")
    ):
        raise ModelNotFoundError(missing_model(str(folder), FileNotFoundError("no config.json")))
    if is_no_name(str(path)):
        raise ModelNotFoundError(missing_model(str(path)))
    return path


@contextmanager
def missing_models(path: str | Path) -> Iterator[None]:
    """Turn transformers' error about a model that it cannot find into a `ModelNotFoundError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # an error of the system, such as a full disk
            raise
        raise ModelNotFoundError(missing_model(str(path), error)) from error


def is_no_name(name: str) -> bool:
    """Whether this can be the name of no model, neither on this machine nor on the hub (where names are owner/name)."""
    path = Path(name)
    return not path.is_dir() and ("/" not in name or path.is_absolute() or name.startswith("."))


def near(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``."""
    spelt = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.6)
    return spelt[found[0]] if found else None


def how_to_load(name: str) -> str:
    """How to prune a model that is given by name."""
    if name in SHIPPED:
        return f'Load it first: model, processor = vlm_prune.eval.load_model("{name}").'
    likely = near(name, SHIPPED) if is_no_name(name) else None
    hint = f'Did you mean the test model "{likely}"? ' if likely else ""
    return f'{hint}Load and prune in one: vlm_prune.from_pretrained("{likely or name}", policy="flowcut").'


def missing_model(
    name: str, error: Exception | None = None, known: Iterable[str] = (), size: str | None = None
) -> str:
    """What is missing where a model could not be loaded, and what to do.

    Args:
        name: as the user gave it.
        error: what transformers said.
        known: names on the hub that may have been meant.
        size: of the download, if that is known.
    """
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(name).is_dir():
        return (
            f"The folder {name} holds no complete checkpoint ({said}). Give one that save_pretrained of a model and of "
            "its processor wrote."
        )
    likely = near(name, SHIPPED) or near(name, known)
    hint = f'Did you mean "{likely}"? ' if likely not in (None, name) else ""
    shipped = f"Test models that ship with the package and need no download: {', '.join(SHIPPED)}."
    if is_no_name(name):
        return (
            f'There is no model "{name}": no folder of that name, and names on the hub include an owner, as in '
            f'"llava-hf/llava-1.5-7b-hf". {hint}{shipped}'
        )
    much = f", {size}," if size else ""
    if is_offline_mode():
        return (
            f'"{name}" is not in this machine\'s cache ({HF_HUB_CACHE}), and the hub is switched off '
            f"(HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '1')}). {hint}Unset it, or download the "
            f"checkpoint{much} on a machine with a network (hf download {name}) and give its folder. {shipped}"
        )
    return (
        f'"{name}" could not be loaded: it is not in this machine\'s cache ({HF_HUB_CACHE}), and the hub gave none '
        f"({said}). {hint}Check the name and the network, or give a folder. {shipped}"
    )
