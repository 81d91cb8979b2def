"""CDPruner: diverse tokens, conditioned on the question, by a determinantal point process (Zhang et al., NeurIPS 2025,
arXiv 2506.10967).

Follows ``encode_images`` of the released ``llava/model/llava_arch.py`` and ``CLIPVisionTower.forward`` of its
``clip_encoder.py``. Two tokens are alike by the cosine of their projected features; tokens that matter to the question
enlarge the volume that a set of tokens spans, and the set is grown greedily by volume (Chen et al. 2018, "fast greedy
MAP inference").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ..contract.policy import Keep, Place, SelectPolicy
from ..contract.views import EntryView
from .settings import check_choice

NOTHING = 1e-5
"""Share of the first gain below which a token's gain is fp32 rounding noise."""


def text_windows(ids: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A question of any length as rows of a text tower's ``window``: int64 ids and mask, each ``(segments, window)``.

    ``ids`` ``(tokens,)`` are those of the tokenizer, from BOS to EOS; the last row is filled up with id 0, masked.
    Only the first row has BOS and only the last one EOS, as in the released code: CLIP pools a row without EOS
    elsewhere, the first one of several at BOS, where nothing of the question is known.
    """
    segments = -(-len(ids) // window)
    fill = segments * window - len(ids)
    rows, mask = (nn.functional.pad(x, (0, fill)).view(segments, window) for x in (ids, torch.ones_like(ids)))
    return rows, mask


def patch_embeds(features: torch.Tensor, norm: nn.Module, projection: nn.Linear) -> torch.Tensor:
    """CLIP's head for pooled outputs on every patch, in fp32: ``(tiles, patches, width)``.

    Args:
        features: ``(tiles, patches, channels)``, of the feature layer, the last but one, CLS left out.
        norm: the tower's ``post_layernorm``, in its own dtype.
        projection: CLIP's ``visual_projection``, which has no bias. LLaVA checkpoints lack it.
    """
    normed: torch.Tensor = norm(features).float()
    return normed @ projection.weight.float().mT


def relevance(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_valid: torch.Tensor | None = None,
    least_alike: bool = True,
    joint: bool = False,
) -> torch.Tensor:
    """The relevance of each token to the question, from about 0 to 1: fp32 or better ``(tiles, units)``.

    The mean over the text rows of the cosine with them, stretched to the range from 0 to 1, plus a little.

    Args:
        image_embeds: ``(tiles, units, width)``, in a space shared with the text.
        text_embeds: ``(rows, width)`` of one question, or ``(tiles, rows, width)``.
        text_valid: bool ``(tiles, rows)``, rows that count; ``None`` if all do. Without any, all tokens are equally
        relevant.
        least_alike: take the *negative* cosine, as the released code does: in CLIP's space, patches that show what the
            question names are the least like it (the authors, issue 14).
        joint: normalise all tiles by one range, as the released code does, instead of each by its own range.
    """
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    image = nn.functional.normalize(image_embeds.to(dtype), dim=-1)
    text = nn.functional.normalize(text_embeds.to(dtype), dim=-1)
    if text_valid is None:
        mean = text.mean(-2)
    else:
        count = text_valid.sum(-1, keepdim=True).clamp(min=1)
        mean = (text * text_valid[..., None]).sum(-2) / count
    mean = mean.expand(len(image), -1)
    cosine = (image @ mean[..., None]).squeeze(-1)
    score = -cosine if least_alike else cosine
    if joint:
        low, high = score.amin(), score.amax()
    else:
        low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    return torch.where(high > low, (score - low + 1e-6) / (high - low), 1.0)


def greedy_volume(
    features: torch.Tensor, quality: torch.Tensor, keep: int, official: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grow a set of tokens by the volume that it spans: int64 ``(batch, keep)`` in picking order, and the gain of each.

    The kernel of the point process is ``quality_i * cosine_ij * quality_j``. The gain of a token is its
    squared length orthogonal to those already picked; the largest one is picked, ties go to the earlier token. Once no
    gain is left, which happens beyond the rank of ``features``, tokens are picked in order of quality. None is picked
    twice. Only the rows of the kernel that belong to picked tokens are computed, fp32 or better; ``keep`` steps, none
    of which waits for the device.

    Args:
        features: ``(batch, units, channels)``.
        quality: ``(batch, units)``, not negative.
        keep: tokens to pick, up to ``units``.
        official: divide by norms in the dtype of ``features``, and as they are. Without it, in fp32 or better, and a
            row of zeros is similar to none.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    if official:
        unit = (features / features.norm(dim=-1, keepdim=True)).to(dtype)
    else:
        unit = nn.functional.normalize(features.to(dtype), dim=-1)
    quality = quality.to(dtype)
    scaled = unit * quality[..., None]
    batch, units, channels = scaled.shape
    left = scaled.square().sum(-1)
    if not official:  # exact, so that rounding does not order tokens of equal quality
        left = torch.where(left > 0, quality.square(), 0.0)
    least = left.amax(-1, keepdim=True) * NOTHING
    taken = torch.zeros_like(left, dtype=torch.bool)
    residue = scaled.new_zeros(batch, keep, units)
    picked, gains = [], []
    for step in range(keep):
        gain, latest = left.masked_fill(taken, -torch.inf).max(-1, keepdim=True)
        spent = gain <= least
        latest = torch.where(spent, quality.masked_fill(taken, -torch.inf).argmax(-1, keepdim=True), latest)
        taken.scatter_(1, latest, True)
        row = scaled @ scaled.gather(1, latest[..., None].expand(-1, -1, channels)).mT
        known = residue[:, :step]
        seen = known.gather(2, latest[:, None].expand(-1, step, -1))
        row = row.squeeze(2) - (seen.mT @ known).squeeze(1)
        row = torch.where(spent, 0.0, row / gain.clamp(min=torch.finfo(dtype).tiny).sqrt())
        residue[:, step] = row
        left = left - row.square()
        picked.append(latest)
        gains.append(gain)
    return torch.cat(picked, dim=1), torch.cat(gains, dim=1)


@dataclass(frozen=True)
class CDPruner(SelectPolicy):
    """CDPruner, at the decoder's entry, where the question is known. The budget applies to each tile separately.

    The released code compares patches and question by CLIP's two towers, of which a LLaVA checkpoint contains one; no
    code was released for other models. Here relevance is the cosine of projected tokens with the embeddings of the text
    rows after the image, as third parties do; `relevance` and `patch_embeds` also work with CLIP's own. The decoder's
    embeddings are not CLIP's space, so tokens *most* like the question count as relevant, as the paper has it.

    It differs from the released code in these points, too:

    - Exactly the budget is kept. Beyond the rank of the features, with a feature row of zeros, or where all tokens
      are equally relevant, the released code divides by zero and then keeps fewer tokens; here tokens are picked by
      relevance once none adds volume, such a row adds none, and equal relevance gives the plain point process.
    - Relevance is normalised within each tile, so that a tile keeps the same tokens in any batch. The released code
      takes minimum and maximum over all tiles of a call, including other sequences of the batch.
    - Each image uses the question in its own sequence; the released code uses one for all. A prompt without a
      question gives the plain point process instead of an error.
    - Norms are taken in fp32.

    Attributes:
        least_alike: count tokens *least* like the question as most relevant, the released rule for CLIP's space.
        use_question: whether relevance counts at all; without it, this is the plain point process.
        compat: ``"official"`` takes norms in the model's dtype and one range of relevance for all tiles of a call. With
            embeddings of CLIP, the functions of this file then give what the released code gives.
    """

    name: ClassVar[str] = "cdpruner"
    place: ClassVar[Place] = "entry"
    default_ratio: ClassVar[float] = 64 / 576

    least_alike: bool = False
    use_question: bool = True
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, least_alike=(False, True), use_question=(False, True), compat=(None, "official"))

    def select(self, view: EntryView) -> Keep:
        """The tokens picked, in their original order."""
        features, official = view.features.detach(), self.compat == "official"
        asked = view.question & self.use_question
        quality = relevance(features, view.text.detach(), asked, self.least_alike, official)
        order, _ = greedy_volume(features, quality, view.target, official)
        return Keep(order.sort(dim=-1).values)
