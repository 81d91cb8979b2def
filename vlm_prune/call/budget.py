"""How many visual tokens to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..contract.numbers import is_whole, plain_number
from ..errors import BudgetError

if TYPE_CHECKING:
    from .forward_call import ForwardCall


@dataclass(frozen=True)
class Budget:
    """Visual tokens to keep per tile: a number (``tokens``) or a share (``ratio``) of what the tile has.

    A ``joint`` budget covers all tiles of an image: its tiles compete for it.
    ``extra`` tokens of a tile are always kept and count towards ``tokens`` (a CLS row handed to the language model).
    """

    tokens: int | None = None
    ratio: float | None = None
    extra: int = 0
    joint: bool = False

    @classmethod
    def checked(
        cls,
        tokens: Any,
        ratio: Any,
        default: float,
        available: int | None,
        tile: str,
        extra: int = 0,
        joint: bool = False,
    ) -> Budget:
        """Validate what the user asked for: Python's numbers, or those of numpy and of tensors without dimensions.

        ``available`` is the number of tokens a tile of the usual size has, ``None`` if tiles have any size.
        """
        if tokens is not None and ratio is not None:
            raise BudgetError(f"Both tokens={tokens} and ratio={ratio} were given: give one of them.")
        if tokens is not None:
            tokens = plain_number(tokens)
            if not is_whole(tokens):
                raise BudgetError(
                    f"tokens={tokens!r}: a whole number of tokens per {tile} is needed; a share is ratio=0.25."
                )
            if available is None and tokens < 1:
                raise BudgetError(f"tokens={tokens}: at least one token per {tile} has to be kept.")
            if available is not None and not 1 + extra <= tokens <= available + extra:
                raise BudgetError(
                    f"tokens={tokens}: this model has {available + extra} visual tokens per {tile}, and the budget is "
                    f"per {tile} too. Choose {1 + extra} to {available + extra}, or give ratio= instead."
                )
            return cls(tokens=tokens, extra=extra, joint=joint)
        ratio = default if ratio is None else plain_number(ratio)
        if not _is_share(ratio):
            raise BudgetError(f"ratio={ratio!r}: choose a share above 0 and up to 1, such as 0.25.")
        return cls(ratio=float(ratio), extra=extra, joint=joint)

    def units(self, available: int, tiles: int = 1) -> int:
        """Units to keep of ``available``, at least one. They cover ``tiles`` tiles."""
        if self.ratio is not None:
            return max(1, min(available, round(available * self.ratio)))
        return min(available, (self.tokens or 1) * tiles - self.extra)

    def of_visual(self, base: torch.Tensor, call: ForwardCall) -> torch.Tensor:
        """Visual tokens to keep in each prompt of a batch, int64 ``(batch,)``, out of ``base`` ``(batch,)``.

        A ``ratio`` is a share of these; ``tokens`` are kept for each tile of the ``call``, or all that a tile has.
        """
        if self.ratio is not None:
            return (base.double() * self.ratio).round().long().clamp(min=1).minimum(base)
        return call.per_sequence(self._of_tiles).minimum(base)

    def of_prompt(self, base: int, tiles: list[list[int]]) -> int:
        """The same for one prompt, on the host; ``tiles`` are the rows of each tile of each of its images."""
        if self.ratio is not None:
            return min(max(round(base * self.ratio), 1), base)
        return min(sum(self._of_tiles(rows) for rows in tiles), base)

    def _of_tiles(self, tiles: list[int]) -> int:
        tokens = self.tokens or 1
        return min(tokens, sum(tiles)) if self.joint else sum(min(tokens, rows) for rows in tiles)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
