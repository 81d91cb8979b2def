"""The demo: what pruning two trained models costs in answers and wins in time and memory.

It is a run like any other (`eval/runs`), of the config that `DemoSettings.config` makes; what it shows and saves is
read off the run folder. The scenes are procedural (`scenes.py`), fresh for the models, and never COCO.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_prune.eval.models import model_path
from vlm_prune.eval.runs.config import RunConfig
from vlm_prune.registry import make_policies


@dataclass(frozen=True)
class DemoSettings:
    """What to run.

    Attributes:
        models: names that `load_model` takes.
        sizes: width and height of a model's scenes, by name; default one 128 x 128 tile.
        policies: names of policies, or compositions; "none" is run once, at all tokens.
        ratios: shares of visual tokens to keep.
        scenes: scenes per model, each with one caption and six questions.
        split: which absent objects POPE asks for.
        rounds: timed rounds; each times every policy and budget on two scenes, in turn with the unpruned model.
        seed: of the scenes; models were trained on others.
        batch_size: prompts answered together where nothing is timed.
    """

    models: tuple[str, ...] = ("tiny-llava", "tiny-internvl")
    sizes: dict[str, tuple[int, int]] = field(default_factory=lambda: {"tiny-internvl": (256, 128)})
    policies: tuple[str, ...] = ("none", "flowcut", "uniform", "random")
    ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)
    scenes: int = 24
    split: str = "adversarial"
    rounds: int = 5
    seed: int = 2026
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in self.models:
            model_path(name)
        for policy in self.policies:
            make_policies(policy, {})
        if bad := [ratio for ratio in self.ratios if not 0 < ratio <= 1]:
            raise ValueError(f"ratio {bad[0]}: choose shares above 0 and up to 1, such as 0.25")
        for name, least in (("scenes", 4), ("rounds", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: {least} or more is needed")

    def replaced(self, **changes: Any) -> DemoSettings:
        """A copy with other values."""
        return replace(self, **changes)

    def quick(self) -> DemoSettings:
        """Fewer scenes, budgets and rounds: figures with more noise."""
        return self.replaced(scenes=6, rounds=2, ratios=(1.0, 0.25, 0.0625))

    def config(self, output: Path) -> RunConfig:
        """The run, into the folder ``output``."""
        scenes = {"scenes": self.scenes, "sizes": {k: v for k, v in self.sizes.items() if k in self.models}}
        return RunConfig.model_validate(
            {
                "models": list(self.models),
                "policies": list(self.policies),
                "ratios": list(self.ratios),
                "tasks": [
                    {"task": "pope", "data": scenes, "splits": [self.split], "max_new_tokens": 2},
                    {"task": "chair", "data": scenes, "max_new_tokens": 64},
                    {"task": "speed", "data": scenes, "rounds": self.rounds},
                ],
                "seed": self.seed,
                "batch_size": self.batch_size,
                "output": output,
            }
        )
