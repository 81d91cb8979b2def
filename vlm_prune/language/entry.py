"""The decoder's entry: visual tokens are chosen here before the first layer, with the text known.

The encode stage leaves the candidates as `Offer`s. What a policy drops of them becomes holes like any others, so
positions, masks, caches and the receipt need no further code.
"""

from __future__ import annotations

import torch

from ..call import stream
from ..call.encode_call import Offer
from ..call.forward_call import ForwardCall
from ..contract.keep import Keep
from ..contract.policy import Policy
from ..contract.views import EntryView
from ..errors import PolicyError, UnsupportedCallError
from ..kernels import to_device


class Entry:
    """Asks the ``policy`` that chooses at the decoder's entry."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def offered(self, call: ForwardCall) -> bool:
        """Whether this call has tokens to choose among. Raises if it has features of unknown origin."""
        if call.unknown_features and call.image_masks and not call.encoded:
            raise UnsupportedCallError(
                f"{self.policy.name} chooses visual tokens at the decoder's entry, and this call's features do not "
                "come from the tower of this pruned model. Pass input_ids and pixel_values instead."
            )
        return any(encoded.offers for encoded in call.encoded)

    def choose(
        self, call: ForwardCall, embeds: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows of ``embeds`` ``(batch, length, channels)`` go on: bool ``(batch, length)``; and the rows.

        ``real`` is False at padding, ``None`` if there is none. One sequence, and batches of a fixed budget whose rows
        are known on the host, add no wait for the device.
        """
        visual = call.image_mask
        if visual is None:
            raise UnsupportedCallError(
                f"{self.policy.name} looks at the text and cannot tell where it is: pass input_ids and pixel_values."
            )
        census = call.count()
        if not call.accounted:
            raise UnsupportedCallError(
                "the number of image placeholders in input_ids is not what these images need, or some are masked out. "
                "Let the processor write the prompt, with one <image> for every image."
            )
        text = ~visual if real is None else ~visual & real
        last = visual.long().cumsum(-1)
        asked = text & (last == last[:, -1:])
        asked = torch.where(asked.any(-1, keepdim=True), asked, text)
        order = stream.live_order(text, max(1, *census.text))
        shown = (stream.compact(embeds, order), text.gather(1, order), asked.gather(1, order))

        flags: list[torch.Tensor] = []
        overflows: list[torch.Tensor] = []
        lost: list[int] | None = [0] * len(embeds)
        for encoded, owners in zip(call.encoded, call.owners(), strict=True):
            total = sum(span.rows for span in encoded.spans)
            # one extra, for tokens that became no row
            alive = torch.ones(total + 1, dtype=torch.bool, device=embeds.device)
            overflow = embeds.new_zeros(total + 1)
            for offer in encoded.offers:
                keep = self._ask(offer, [owners[span] for span in offer.spans], shown)
                rows = offer.rows.to(embeds.device)
                places = torch.where(rows < 0, total, rows).flatten()
                alive = alive.index_copy(0, places, keep.mask(rows.shape[1]).flatten())
                taint = stream.overflow(offer.features).to(embeds.device, embeds.dtype)
                overflow = overflow.index_copy(0, places, taint[:, 0].expand(rows.shape).flatten())
                lost = _lost(lost, call, encoded.kind, offer, owners, keep)
            flags.append(encoded.settle(alive[:total]))
            overflows.append(overflow[:total])
            lost = lost if encoded.arrangement is None else None
        kinds = [encoded.kind for encoded in call.encoded]
        chosen = ~visual | stream.lay_out(flags, kinds, call.image_masks, call.copies)
        embeds = embeds + stream.lay_out(overflows, kinds, call.image_masks, call.copies)[..., None]
        call.recount(lost)
        return chosen, embeds

    def _ask(
        self, offer: Offer, sequences: list[int], shown: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> Keep:
        if len(shown[0]) > 1 or len(sequences) > 1:
            index = to_device(sequences, shown[0].device)
            text, valid, question = (x.index_select(0, index) for x in shown)
        else:
            text, valid, question = shown
        view = EntryView(
            features=offer.features.to(text.device),
            grid=offer.grid,
            target=offer.target,
            content_key=offer.content_key.to(text.device),
            pixels=None,
            carry={name: x.to(text.device) for name, x in offer.carry.items()},
            text=text,
            text_valid=valid,
            question=question,
            tower=None if offer.tower is None else offer.tower.to(text.device),
        )
        with torch.autocast(text.device.type, enabled=False):
            keep = self.policy.entry(view)
        members, tokens = offer.rows.shape
        if keep is None:
            return Keep(torch.arange(tokens, device=text.device).expand(members, -1))
        keep = keep.checked(self.policy.name, members, tokens, None if self.policy.exceeds else offer.target)
        if keep.rows is not None:
            raise PolicyError(
                f"{self.policy.name} merges tokens at the decoder's entry, where they are in the prompt already. Merge "
                "after the projector, in encode_final."
            )
        return keep


def _lost(
    lost: list[int] | None, call: ForwardCall, kind: int, offer: Offer, owners: list[int], keep: Keep
) -> list[int] | None:
    """Visual tokens that each sequence loses, as far as the host knows."""
    if lost is None or keep.valid is not None:
        return None
    gone = offer.rows.shape[1] - keep.index.shape[1]
    for span in offer.spans:
        for sequence in range(owners[span], owners[span] + call.copies[kind]):
            lost[sequence] += gone
    return lost
