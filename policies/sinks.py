"""Sink tokens: which tokens hold massive activations, and in which dimensions a model has them.

A sink is a token whose normalised hidden state is huge in one of very few dimensions, the same ones for all tokens of
a model (Sun et al. 2024, "Massive Activations in Large Language Models"; used by VAR, arXiv 2503.03321).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

KNOWN_SINK_DIMS: dict[tuple[str, int, int], tuple[int, ...]] = {
    # VAR's released constants.py: Llama 2 and Vicuna, in LLaVA-1.5 and LLaVA-NeXT
    ("llama", 4096, 11008): (1415, 2533),
    ("llama", 5120, 13824): (2100, 4743),
    # reported for VAR on Qwen2-VL-7B and InternVL2-8B
    ("qwen2_vl_text", 3584, 18944): (458, 2570),
    ("internlm2", 4096, 14336): (3584,),
}
"""(model type of the language model, hidden size, intermediate size) -> dimensions as published, not re-measured."""


def known_sink_dims(model_type: str, hidden_size: int, intermediate_size: int) -> tuple[int, ...] | None:
    """Published sink dimensions of a language model, ``None`` if there are none."""
    return KNOWN_SINK_DIMS.get((model_type, hidden_size, intermediate_size))


def default_tau(hidden_size: int) -> float:
    """VAR's threshold on `sink_score`: 20 as published, less in models narrower than those it was tested on.

    The score cannot exceed the root of the hidden size, so for less than 1024 channels it is the level at which one
    dimension holds a tenth of a token's energy, as it does at 20 among the 4096 channels of a 7B model.
    """
    return 20.0 if hidden_size >= 1024 else (hidden_size / 10) ** 0.5


def root_mean_square(hidden: torch.Tensor) -> torch.Tensor:
    """Root mean square over the channels of ``(..., channels)``, with the epsilon of VAR's code; fp32 or better."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def sink_score(hidden: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
    """phi of each token, as VAR calls it: largest magnitude in ``dims`` over the root mean square, ``(batch, tokens)``.

    ``hidden`` ``(batch, tokens, channels)`` is a decoder layer's input before its norm; ``dims`` ``(batch, n)`` int64
    may differ between sequences, negative numbers mean no dimension. Never exceeds ``sqrt(channels)``.
    Official: ``DimProspector``.
    """
    index = dims.clamp(min=0)[:, None].expand(-1, hidden.shape[1], -1)
    scale = root_mean_square(hidden)
    magnitude = hidden.gather(2, index).to(scale.dtype).abs() / scale
    return magnitude.masked_fill((dims < 0)[:, None], 0).amax(-1)


def first_token(hidden: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Normalised magnitudes of each sequence's first real token, ``(batch, channels)``.

    ``hidden`` is ``(batch, tokens, channels)``, ``valid`` ``(batch, tokens)`` marks real tokens, ``None`` if all are.
    """
    if valid is None:
        token = hidden[:, 0]
    else:
        token = hidden[torch.arange(len(hidden), device=hidden.device), valid.to(torch.int8).argmax(-1)]
    return token.to(torch.promote_types(token.dtype, torch.float32)).abs() / root_mean_square(token)


def first_token_dims(
    hidden: torch.Tensor, tau: float, valid: torch.Tensor | None = None, limit: int = 3
) -> torch.Tensor:
    """Dimensions in which the first token of each sequence is massive: int64 ``(batch, limit)``, -1 where fewer.

    The first token is a sink in every trained decoder, since all others see it; nothing found means that the layer
    has no sinks. Arguments as in `first_token`; a dimension counts from ``tau`` times the root mean square on.
    """
    magnitude, dims = first_token(hidden, valid).topk(min(limit, hidden.shape[-1]), dim=-1)
    return dims.masked_fill(magnitude < tau, -1)


def find_sink_dims(
    hidden_states: Sequence[torch.Tensor],
    tau: float = 20.0,
    valid: torch.Tensor | None = None,
    limit: int = 3,
) -> tuple[int, ...]:
    """A model's sink dimensions, from a forward of any short text; empty if it has none.

    Those in which the first token is massive (see `first_token_dims`) in most layers of the middle half, strongest
    first, at most ``limit``. Raises ValueError where ``tau`` cannot be reached.

    Args:
        hidden_states: the input ``(batch, tokens, channels)`` of each decoder layer, in order.
        tau: magnitude over root mean square from which a dimension counts.
        valid: bool ``(batch, tokens)``, real tokens; ``None`` if all are.
        limit: largest number of dimensions to return.
    """
    depth, channels = len(hidden_states), hidden_states[0].shape[-1]
    if tau >= channels**0.5:
        raise ValueError(f"tau={tau}: with hidden size {channels}, choose less than {channels**0.5:.1f}")
    middle = hidden_states[depth // 4 : max(depth * 3 // 4, depth // 4 + 1)]
    magnitude = torch.cat([first_token(hidden, valid) for hidden in middle])
    often = (magnitude >= tau).float().mean(0)
    strength = magnitude.mean(0).masked_fill(often <= 0.5, 0)
    top = strength.topk(min(limit, channels))
    return tuple(d for d, s in zip(top.indices.tolist(), top.values.tolist(), strict=True) if s > 0)
