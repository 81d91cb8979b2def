"""Engines for Qwen2.5-VL, and what they are asked."""

from __future__ import annotations

from functools import partial

from tests.serving.engines import Ask, scene

See = partial(Ask, mark="<|vision_start|><image><|vision_end|>\n")
WIDE, TALL = (224, 136), (112, 256)
PLAN = {"policy": "flowcut", "ratio": 0.25}
STAR = "Is there a star in the image?"

ASKS = [
    See((scene(1, WIDE),)),
    See((scene(2, WIDE), scene(3, TALL))),
    See((scene(4, TALL),), budget={"tokens": 7}),
    See((scene(5, (168, 168)), scene(5, (168, 168)), scene(6, WIDE)), budget={"tokens": 1}),
    See((), STAR),
    See((scene(1, WIDE),), budget={"ratio": 1.0}),
    See((scene(7, TALL), scene(8, WIDE)), STAR, mark="<|vision_start|><image><|vision_end|>"),
]
"""One image and several, of different sizes, apart and side by side, budgets of their own, and none."""
