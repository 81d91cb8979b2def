"""Budgets in requests to the OpenAI-compatible server: ``"vlm_prune": {"tokens": 64}`` in the body of a request.

The server keeps unknown fields of a request, and its renderer reads the request first. There the budget is checked and
put where the processor finds it, in `mm_processor_kwargs`. A budget is bounded by the engine's ceiling, so it does not
need ``--trust-request-mm-kwargs``, as all other entries there do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..errors import BudgetError, UnsupportedCallError
from .plan import KEY, Plan

RENDERER = "vllm.renderers.online_renderer"
"""The module of vLLM's API server, which nothing else imports."""


def take_budgets() -> None:
    """Make the API server accept budgets, if this process is one."""
    module = sys.modules.get(RENDERER)
    if module is None or hasattr(module.validate_request_mm_kwargs, "stock"):
        return
    renderer, validate = module.OnlineRenderer, module.validate_request_mm_kwargs
    for name in ("preprocess_chat", "preprocess_cmpl"):
        setattr(renderer, name, _reading(getattr(renderer, name)))

    @wraps(validate)
    def trusting(*, mm_processor_kwargs: dict[str, Any] | None, **others: Any) -> None:
        """All entries but the budget require that the client is trusted."""
        rest = {name: value for name, value in (mm_processor_kwargs or {}).items() if name != KEY}
        validate(mm_processor_kwargs=rest or None, **others)

    trusting.stock = validate  # type: ignore[attr-defined]
    vars(module)["validate_request_mm_kwargs"] = trusting


def _reading(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The given method of the renderer, which now reads a request's budget first."""

    @wraps(stock)
    async def preprocess(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        place_budget(request, self.model_config.hf_config)
        return await stock(self, request, *args, **kwargs)

    return preprocess


def place_budget(request: Any, config: Any) -> None:
    """Check the budget of a ``request``, wherever it is, and put it into ``request.mm_processor_kwargs``.

    Raises:
        BudgetError: there are two, or the budget is not possible.
        UnsupportedCallError: the engine, whose model has this ``config``, does not prune.
    """
    options = getattr(request, "mm_processor_kwargs", None) or {}
    extra = getattr(request, "model_extra", None) or {}
    found = [place[KEY] for place in (extra, options) if KEY in place]
    if not found:
        return
    if len(found) > 1 and found[0] != found[1]:
        raise BudgetError(
            f'"{KEY}" is {found[0]!r}, and {found[1]!r} in mm_processor_kwargs: give one of them.'
        )
    plan = Plan.of(config)
    if plan is None:
        raise not_pruned()
    plan.asked(found[0])
    request.mm_processor_kwargs = {**options, KEY: found[0]}


def not_pruned() -> UnsupportedCallError:
    """The error for a request with a budget to an engine that does not prune."""
    return UnsupportedCallError(
        f'The request has "{KEY}", but this engine does not prune: start it with '
        f'hf_overrides={{"{KEY}": {{"policy": "flowcut", "tokens": 64}}}}.'
    )
