"""What all mappings of a run's YAML file share: known keys only, and errors that say where the mistake is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Misplaced(ValueError):
    """A mistake that depends on other parts of the file; ``loc`` is the path to it from where it is found."""

    def __init__(self, message: str, *loc: int | str):
        super().__init__(message)
        self.loc = loc


class Strict(BaseModel):
    """A mapping of a YAML file in which every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
