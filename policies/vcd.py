"""VCD: visual contrastive decoding (Leng et al., CVPR 2024, arXiv 2311.16922).

Follows the released ``vcd_sample.py`` (how logits are contrasted) and ``vcd_add_noise.py`` (how an image is distorted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from ..contract.policy import Policy
from .contrast import contrasted, implausible
from .settings import check_number

if TYPE_CHECKING:
    from ..contract.views import GuideView


def diffusion_signal(step: int, steps: int = 1000) -> float:
    """The share of an image's variance that is left after ``step`` (0-based) of ``steps`` of forward diffusion.

    The noise of a step rises along a sigmoid from 0.00001 to 0.005. Official: ``add_diffusion_noise``.
    """
    left = 1.0
    for number in range(step + 1):
        share = 1 / (1 + math.exp(6 - 12 * number / (steps - 1)))
        left *= 1 - (share * (0.5e-2 - 1e-5) + 1e-5)
    return left


@dataclass(frozen=True)
class VCD(Policy):
    """VCD, on the logits: tokens that are likely for a noised image, too, count for less (guide stage).

    Each forward runs twice, so decoding costs twice as much; the second pass has a separate KV cache, and the same
    pruning as the first. Tokens that the first pass finds implausible get ``-inf``.

    The released code draws new noise for every image; here it depends on ``seed`` and the image's size alone, so that a
    call can be repeated and a batch gives what its rows give alone.

    Attributes:
        alpha: strength of the contrast. The released command line has 1, its sampling function 0.5.
        beta: tokens less than ``beta`` times as likely as the likeliest are excluded; the paper has 0.1.
        noise_step: number of diffusion steps, out of 1000; the paper has 500.
        seed: seed of the noise.
    """

    name: ClassVar[str] = "vcd"
    stages: ClassVar[tuple[str, ...]] = ("guide",)
    second_pass: ClassVar[Literal["image", "text"] | None] = "image"

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, alpha=(0, 100), beta=(0, 1), noise_step=(0, 999), seed=(0, 2**63 - 1))

    def distort(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised ``pixels`` ``(images, ...)`` under the noise of ``noise_step``, the same for each of them."""
        signal = diffusion_signal(self.noise_step)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(pixels.shape[1:], generator=generator, dtype=torch.float32)
        noise = noise.to(pixels.device, non_blocking=pixels.is_cuda)
        mixed: torch.Tensor = signal**0.5 * pixels.float() + (1 - signal) ** 0.5 * noise
        return mixed.to(pixels.dtype)

    def guide(self, view: GuideView) -> torch.Tensor:
        """The contrast of both passes, over the tokens that the first finds plausible."""
        if view.second is None:
            raise RuntimeError("vcd compares with a second pass, but was not given it")
        new = contrasted(view.logits, view.second, self.alpha)
        return new.masked_fill(implausible(view.logits, self.beta), -torch.inf)
