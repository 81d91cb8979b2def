"""Saving a pruned model: stock weights, and beside them ``vlm_prune.json``.

While a model is pruned, its ``save_pretrained`` writes that file too, and so do the stock calls that save on their way
to the hub, ``push_to_hub(...)`` and ``save_pretrained(..., push_to_hub=True)``. Nothing of ours enters the weights or
``config.json``: whoever does not know this package loads the stock model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from .config import FILE, write_config
from .errors import PolicyError

FROM_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
"""Arguments of transformers' `from_pretrained` that say where files come from."""


class Saver:
    """Stands in for a model's ``save_pretrained`` until `remove` is called; ``pruning.config`` is written beside it."""

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
        """Give the model its own method back."""
        if self.before is None:
            object.__delattr__(self.model, "save_pretrained")
        else:
            object.__setattr__(self.model, "save_pretrained", self.before)


def find_config(path: str | Path, kwargs: Mapping[str, Any]) -> str:
    """The path on this machine of a model's ``vlm_prune.json``; ``path`` is a folder or a model's name on the hub.

    ``kwargs`` are those of transformers' `from_pretrained`.

    Raises:
        PolicyError: there is none.
    """
    where = {name: kwargs[name] for name in FROM_HUB if name in kwargs}
    try:
        return str(cached_file(path, FILE, **where))
    except OSError as error:
        raise PolicyError(
            f"{path} has no {FILE}, so it does not say how to prune: name a policy, as in "
            f'from_pretrained({str(path)!r}, policy="flowcut", tokens=64), or save a pruned model there first.'
        ) from error
