"""VAR: move attention from sink tokens to the rest of the image (Kang et al., ICLR 2025, arXiv 2503.03321).

Follows the released ``src/logic/logic.py``: where sinks are, which heads attend to the image, how attention moves.
``sinks.py`` finds the sinks.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ..contract.policy import Policy
from ..kernels import to_device
from .attention_rows import rewrite_rows, rows_where
from .settings import check_choice, check_number
from .sinks import default_tau, first_token_dims, known_sink_dims, sink_score

if TYPE_CHECKING:
    from ..contract.views import ModulateView

SINKS, DIMS = "var_sinks", "var_dims"
"""Names of the state kept with the cache: sink keys, and the dimensions by which they were found."""
UNSEEN = -2
"""In the place of a dimension: the sequence has not had an image yet."""


def group_mass(probabilities: torch.Tensor, *groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Attention mass of groups of keys, one ``(batch, heads, rows)`` each.

    ``probabilities`` is ``(batch, heads, rows, keys)``, a group bool ``(batch, keys)``.
    """
    members = torch.stack(groups, -1).to(probabilities.dtype)
    return (probabilities @ members[:, None]).unbind(-1)


def select_heads(
    probabilities: torch.Tensor,
    sinks: torch.Tensor,
    visual: torch.Tensor,
    max_sink_share: float,
    min_visual_mass: float,
    official: bool = False,
) -> torch.Tensor:
    """Heads that attend to the image, and not mainly to its sinks: bool ``(batch, heads, rows)``.

    A head is selected in a row that gives at least ``min_visual_mass`` to visual keys, no more than ``max_sink_share``
    of it to sinks among them. ``probabilities`` is ``(batch, heads, rows, keys)``, ``sinks`` and ``visual`` are bool
    ``(batch, keys)``. ``official`` adds 1e-6 per visual key to the denominator of the share, and selects nothing in a
    sequence without a visual sink. Official: ``HeadFork``.
    """
    inside, mass = group_mass(probabilities, sinks & visual, visual)
    limit = max_sink_share * mass
    if not official:
        return (inside <= limit) & (mass >= min_visual_mass)
    limit = max_sink_share * (mass + 1e-6 * visual.sum(-1)[:, None, None])
    gate = (sinks & visual).any(-1)[:, None, None]
    return (inside <= limit) & (mass >= min_visual_mass) & gate


def redistribute(
    probabilities: torch.Tensor,
    sinks: torch.Tensor,
    visual: torch.Tensor,
    selected: torch.Tensor,
    move: float,
) -> torch.Tensor:
    """Move the share ``move`` of every sink's attention to the visual keys that are not sinks.

    They receive it in proportion to their attention, so a row still sums to 1. This happens where ``selected`` (bool
    ``(batch, heads, rows)``) and where some token can receive it. Other arguments are as in `select_heads`.
    Official: ``VARProcessor.attn_redist`` with ``p = 1 - move``.
    """
    receivers = visual & ~sinks
    given, held = group_mass(probabilities, sinks, receivers)
    selected = selected & (held > 0)
    gain = 1 + move * given / held.where(selected, 1.0)
    factor = torch.where(receivers[:, None, None], gain[..., None], 1.0)
    factor = factor.masked_fill(sinks[:, None, None], 1 - move)
    return torch.where(selected[..., None], probabilities * factor, probabilities)


@dataclass(frozen=True)
class VAR(Policy):
    """VAR, on the attention probabilities of text rows after the image (modulate stage).

    Sinks are tokens of the prompt whose hidden state, at the layer's input, is ``tau`` times its root mean square or
    more in one of a few fixed dimensions; they are found once and kept with the cache. Generated tokens are not tested.

    The names differ from the paper's and the code's, which use the same letters in opposite ways: ``move`` is the
    paper's p and ``1 - p`` of the code, ``max_sink_share`` is the code's rho and ``1 - rho`` of the paper. An
    independent study saw no gain on CHAIR for LLaVA-1.5-7B; measure before relying on it.

    Attributes:
        tau: how massive a sink is; ``None`` is the paper's 20, less in narrow models (`sinks.default_tau`). No token
            can exceed the root of the hidden size: VAR warns and does nothing where that is below ``tau``.
        max_sink_share: largest share of image attention on sinks with which a head counts as attending to the image.
            The paper's values are 0.5 against hallucination, 0.2 for general and 0.1 for vision-centric questions.
        min_visual_mass: smallest attention to the image with which a head does; fewer tokens receive less of it.
        move: share of the sinks' attention that moves.
        sink_dims: the dimensions; ``None`` uses the published ones of known models (see `for_decoder`), and elsewhere
            those in which the prompt's first token, always a sink, is massive at that layer.
        first_layer: first decoder layer (0-based) to act in; ``None`` is the paper's 2, since sinks arise in the first
            two, or the last possible one in models with fewer than four layers.
        compat: ``"official"`` follows the released code: phi must exceed ``tau``, the last layer takes part, and a
            layer without a visual sink is skipped. ``"paper"``: phi may equal ``tau``, the last layer is left alone,
            sinks in the text suffice. Neither repeats the released code's leak of sinks from one sample to the next.
    """

    name: ClassVar[str] = "var"
    stages: ClassVar[tuple[str, ...]] = ("modulate",)
    reads_hidden: ClassVar[bool] = True
    modulates: ClassVar[Literal["logits", "probabilities", "outputs"]] = "probabilities"

    tau: float | None = None
    max_sink_share: float = 0.5
    min_visual_mass: float = 0.2
    move: float = 0.4
    sink_dims: tuple[int, ...] | None = None
    first_layer: int | None = None
    compat: Literal["official", "paper"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_dims is not None:  # configuration files have lists
            object.__setattr__(self, "sink_dims", tuple(self.sink_dims))
        check_number(self, optional=True, tau=(1, 1000), first_layer=(0, 1000))
        check_number(self, max_sink_share=(0, 1), min_visual_mass=(0, 1), move=(0, 1))
        check_choice(self, compat=("official", "paper"))
        if self.sink_dims is not None and (not self.sink_dims or min(self.sink_dims) < 0):
            raise ValueError(
                f"sink_dims={self.sink_dims}: choose dimensions of the hidden state, such as (1415, 2533), or None"
            )

    def for_decoder(self, config: Any) -> VAR:
        """This policy, with the published sink dimensions if a language model of this config has any.

        Raises ValueError if ``sink_dims`` do not fit its hidden size.
        """
        if self.sink_dims is None:
            sizes = config.model_type, config.hidden_size, config.intermediate_size
            return replace(self, sink_dims=known_sink_dims(*sizes))
        self._check_dims(config.hidden_size)
        return self

    def _check_dims(self, hidden_size: int) -> None:
        if self.sink_dims is not None and max(self.sink_dims) >= hidden_size:
            raise ValueError(f"sink_dims={self.sink_dims}: the hidden size is {hidden_size}")

    def modulate_layers(self, depth: int) -> Collection[int]:
        """From ``first_layer`` to the last layer ("official") or the one before. Raises ValueError if that is none."""
        end = depth if self.compat == "official" else depth - 1
        first = max(min(2, end - 1), 0) if self.first_layer is None else self.first_layer
        if first >= end:
            raise ValueError(
                f"first_layer={self.first_layer}, compat={self.compat!r}: the language model has {depth} layers, of "
                f"which {max(end, 0)} can take part; choose a first_layer below that"
            )
        return range(first, end)

    def modulate(self, view: ModulateView) -> torch.Tensor | None:
        """Recompute the text rows after the image, and overwrite selected heads."""
        sinks = self._find_sinks(view)
        if sinks is None:
            return None
        text = view.once("text after the image", lambda: view.text_after_image, view.visual, view.valid)

        def change(probabilities: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            asked = text if text.shape[1] == 1 else text.gather(1, rows)
            return self._moved(probabilities, sinks, view, asked[:, None])

        return rewrite_rows(view, rows_where(text, view.most_text()), view.logit_edits, change)

    def _moved(
        self, probabilities: torch.Tensor, sinks: torch.Tensor, view: ModulateView, asked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`redistribute` in the rows ``asked`` and heads of `select_heads`, and that selection, by one product.

        Values returned for other rows are meaningless.
        """
        if self.compat == "official":
            share, least = self.max_sink_share, self.min_visual_mass
            selected = select_heads(probabilities, sinks, view.visual, share, least, True) & asked
            return redistribute(probabilities, sinks, view.visual, selected, self.move), selected
        visual, dtype = view.visual, probabilities.dtype
        here = view.once(("visual", dtype), lambda: visual.to(dtype), visual)
        there = sinks.to(dtype)
        both = there * here
        receivers = here - both
        masses = probabilities @ torch.stack([both, here, there, receivers], -1)[:, None]
        inside, mass, given, held = masses.unbind(-1)
        selected = (
            (inside <= self.max_sink_share * mass) & (mass >= self.min_visual_mass) & asked & (held > 0)
        )
        # gradients pass through rows that are not selected, too, where nothing may be held
        change = (
            receivers[:, None, None] * (given / held.where(held > 0, 1.0))[..., None] - there[:, None, None]
        )
        return torch.addcmul(probabilities, probabilities, change, value=self.move), selected

    def _find_sinks(self, view: ModulateView) -> torch.Tensor | None:
        """Sinks among the keys, bool ``(batch, keys)``: those found before, and those of the prompt of this call."""
        if not view.prefill:
            return view.carry[SINKS].bool() if SINKS in view.carry else None
        if (hidden := view.hidden) is None:
            raise RuntimeError("var reads the input of its decoder layers, but was not given it")
        queries, width = hidden.shape[1:]
        self._check_dims(width)
        tau = default_tau(width) if self.tau is None else self.tau
        if tau >= width**0.5:
            warnings.warn(
                f"var changes nothing: with hidden size {width} no token can reach tau={tau:g}. Choose less than "
                f"{width**0.5:.1f}, or None for {default_tau(width):.1f}.",
                stacklevel=2,
            )
            return None
        real = None if view.valid is None else view.valid[:, -queries:]
        if self.sink_dims is not None:
            dims = to_device(list(self.sink_dims), hidden.device).expand(len(hidden), -1)
        else:
            dims = view.state[DIMS] = self._first_dims(view, hidden, tau, real)
        score = sink_score(hidden, dims)
        sinks = score > tau if self.compat == "official" else score >= tau
        if real is not None:
            sinks = sinks & real
        if view.brings is not None:  # a prompt without an image waits for its first one, in a batch as alone
            sinks = sinks & view.brings[:, None]
        sinks = torch.nn.functional.pad(sinks, (view.key.shape[2] - queries, 0))
        if SINKS in view.carry:
            sinks = sinks | view.carry[SINKS].bool()
        view.carry[SINKS] = sinks
        return sinks

    def _first_dims(
        self, view: ModulateView, hidden: torch.Tensor, tau: float, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Sink dimensions ``(batch, dims)``, from the first token of the call with a sequence's first image."""
        known = view.state.get(DIMS)
        if known is not None and view.brings is None:
            return known
        found = first_token_dims(hidden, tau, real)
        if view.brings is not None:
            found = found.masked_fill(~view.brings[:, None], UNSEEN)
        return found if known is None else torch.where(known == UNSEEN, found, known)
