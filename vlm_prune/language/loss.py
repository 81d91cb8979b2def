"""The loss of a pruned model: a row whose successor was dropped is trained to predict the next remaining one.

Trainers that sum a loss over several batches count the targets of all of them before any goes through the model
(``num_items_in_batch``), including those of tokens that will be dropped. A batch only knows its own targets, so it
scales that count by the share that it keeps itself: exact for one batch, and for several that keep equal shares. For
others there is `IgnoreVisualLabels`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..call import stream
from ..errors import UnsupportedCallError

IGNORE = -100


def share_left(before: torch.Tensor, left: torch.Tensor, ignore: int = IGNORE) -> torch.Tensor:
    """The share of the targets ``before`` that is ``left``; 1 where there are none."""
    targets = (before != ignore).sum()
    return torch.where(targets > 0, (left != ignore).sum() / targets.clamp(min=1), 1.0)


class Loss:
    """Replaces a model's ``loss_function`` until `remove` is called, and calls it.

    This replaces the loss function, since hooks on the model would not fire: PEFT calls ``model.forward`` directly.
    """

    def __init__(self, model: Any, session: Any):
        self.model, self.session, self.stock = model, session, model.loss_function
        self.before = vars(model).get("_loss_function")  # where the setter of `loss_function` stores it
        model.loss_function = self

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The stock loss, with the next *live* row's label as each row's target."""
        rows = self.session.take_live_rows()
        if rows is not None:
            shifted = kwargs.get("shift_labels")
            if shifted is None:
                shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE)
            valid = None if rows.valid is None else rows.valid.to(shifted.device)
            kwargs["shift_labels"] = left = stream.retarget(shifted, rows.order.to(shifted.device), valid)
            if (counted := kwargs.get("num_items_in_batch")) is not None:
                kwargs["num_items_in_batch"] = counted * share_left(shifted, left)
        return self.stock(logits, labels, *args, **kwargs)

    def remove(self) -> None:
        """Restore the model's own loss function."""
        if self.before is None:
            del self.model._loss_function
        else:
            self.model.loss_function = self.before


@dataclass(frozen=True)
class IgnoreVisualLabels:
    """A data collator that masks the labels of visual tokens; made by `api.ignore_visual_labels`.

    Attributes:
        collator: makes the batch.
        tokens: ids of the model's placeholders for images and videos.
    """

    collator: Callable[[Any], Any]
    tokens: tuple[int, ...]

    def __call__(self, examples: Any) -> Any:
        """The collator's batch, with -100 in ``labels`` where ``input_ids`` hold a placeholder.

        Raises:
            UnsupportedCallError: the batch has no ``labels`` and ``input_ids`` ``(batch, length)`` of one shape.
        """
        batch = self.collator(examples)
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if ids is None or labels is None or ids.shape != labels.shape:
            shapes = {"input_ids": ids, "labels": labels}
            given = ", ".join(f"{k} {None if x is None else tuple(x.shape)}" for k, x in shapes.items())
            raise UnsupportedCallError(
                f"ignore_visual_labels needs a batch with input_ids and labels of one shape, and the collator made "
                f"{given}. Let it write labels, or use it alone."
            )
        batch["labels"] = labels.masked_fill(torch.isin(ids, ids.new_tensor(self.tokens)), IGNORE)
        return batch
