"""Every registered policy with what it needs on the tiny models, and what it promises. A new policy is one row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlm_prune.registry import POLICIES, policy_class

RATIO = 0.3


@dataclass(frozen=True)
class Row:
    """A policy in the tests of compositions.

    Attributes:
        settings: its fields, chosen so that it does something in a decoder of three layers.
        holds: what the budget means. "tile": exactly that many tokens of each tile enter the decoder; "most": not
            more; "prompt": exactly that share of a prompt's tokens leaves it; "average": the decoder's layers hold it
            on average; "exit": none leaves it; "all": none is dropped; "cache":
            none is, and that share of a prompt's tokens stays in the layers' caches, on average.
        idle: further fields with which a policy without budget changes nothing.
        exact: whether it then gives the stock model's bits.
        text_blind: whether the text has no say and never sees what is dropped, so that a prompt may come in one turn or
            in two.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    holds: str = "tile"
    idle: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    text_blind: bool = True


TABLE = {
    "act": Row({"threshold": 0.05, "kept": 0.1}, "all", {"kept": 1}, exact=False, text_blind=False),
    "agilepruner": Row({"erank_avg": 6.0}),
    "cdpruner": Row(text_blind=False),
    "dart": Row({"k": 1, "image_pivots": 2, "text_pivots": 2}, "prompt", text_blind=False),
    "divprune": Row(),
    "dola": Row({"layers": (0, 1), "beta": 0}, "all", {"alpha": 0}),
    "downsample": Row(holds="most"),
    "dycoke": Row(),
    "dyvte": Row({"exit_layer": 1}, "exit"),
    "fastv": Row({"k": 1}, "prompt", text_blind=False),
    "fastvid": Row(),
    "flowcut": Row(),
    "h2o": Row(holds="cache", text_blind=False),
    "lookm": Row(holds="cache", text_blind=False),
    "mmtok": Row(text_blind=False),
    "holov": Row({"runs": 4}),
    "mustdrop": Row({"layers": (0, 1), "merge_threshold": 0.1}, "prompt", text_blind=False),
    "none": Row(holds="all"),
    "pai": Row(
        {"first_layer": 1, "alpha": 0.9, "gamma": 1.5, "beta": 0},
        "all",
        {"alpha": 0, "gamma": 1, "beta": 0},
        text_blind=False,
    ),
    "paint": Row(
        {"first_layer": 1, "local_ratio": 0.3, "alpha": 0.9, "beta": 0.6},
        "all",
        {"alpha": 0, "beta": 0},
        text_blind=False,
    ),
    "pool": Row(),
    "prumerge": Row(),
    "pyramiddrop": Row({"layers": (1, 2)}, "prompt", text_blind=False),
    "random": Row(),
    "scope": Row(),
    "pyramidkv": Row({"window": 3, "kernel": 3, "beta": 4}, "cache", text_blind=False),
    "snapkv": Row({"window": 3, "kernel": 3}, "cache", text_blind=False),
    "sparsevlm": Row(holds="average", text_blind=False),
    "streamingllm": Row({"sinks": 2}, "cache", text_blind=False),
    "uniform": Row(),
    "var": Row(
        {"tau": 1.7, "first_layer": 1, "min_visual_mass": 0.02, "max_sink_share": 0.95, "move": 0.9},
        "all",
        {"move": 0},
        exact=False,
        text_blind=False,
    ),
    "vcd": Row({"beta": 0}, "all", {"alpha": 0, "beta": 0}),
    "vflowopt": Row({"t": 1.0, "m": 2.0}, "average"),
    "vhr": Row({"layers": (1, 2)}, "all", {"alpha": 1}, text_blind=False),
    "vlcache": Row(holds="cache", text_blind=False),
    "vidcom2": Row(),
    "visionzip": Row(),
    "vispruner": Row(),
    "zerotuning": Row({"gamma": 8.0}, "all", {"gamma": 1}, text_blind=False),
    "zooprune": Row({"directions": 8}),
}


def in_stage(stage: str) -> list[str]:
    """Registered policies that act in a stage."""
    return [name for name in sorted(POLICIES) if stage in policy_class(name).stages]


ENCODE = [name for name in sorted(POLICIES) if policy_class(name).encodes]
MODULATE = in_stage("modulate")
PREFILL = [name for name in in_stage("prefill") if name not in ENCODE]
"""Of the policies that act in prefill those that may follow one of the encode stage."""


EVICTING = [name for name in in_stage("decode") if policy_class(name).stages == ("decode",)]
"""Policies that drop rows of the cache and nothing else."""

IN_DECODER = [
    name for name in sorted(TABLE) if policy_class(name).acts.watches or policy_class(name).second_pass
]
"""Policies that need the whole prompt with its images at once: those that act in the decoder, or ask a second time."""


def options(composition: str, ratio: float = RATIO, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of `prune` for policies joined by "+"; ``changes`` are further fields of a single one."""
    names = composition.split("+")
    rows = {name: TABLE[name].settings for name in names}
    settings = {**rows[names[0]], **changes} if len(names) == 1 else rows
    budget = {"ratio": ratio} if any(policy_class(name).prunes for name in names) else {}
    return {"policy": composition, **budget, **settings}
