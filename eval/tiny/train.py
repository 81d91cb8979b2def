"""Train the shipped test models from nothing: `python -m vlm_prune.eval.tiny.train --all`.

Fixed steps and seeds. Every stage resumes from its checkpoint under `runs/tiny/`, and a finished stage is
skipped, so the command may be interrupted and given again at any time. One CPU core takes about two
hours for everything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from ..models import WEIGHTS
from ..scenes import SHAPES
from .configs import MEAN, STD, build_internvl, build_llava
from .decoder import Recipe, train_decoder, trained_modules
from .features import build_cache, is_tiled, load_or_build_cache, training_scenes
from .grow import grow_decoder
from .language import Bias
from .tower import pretrain_tower

HELD_OUT_SEED, HELD_OUT_SCENES = 900, 96


@dataclass(frozen=True)
class Spec:
    """How one model is made.

    Attributes:
        build: makes the untrained model and its processor.
        tower: name of the tower; models with the same name share it.
        tower_seed: seed of the tower and its data.
        tower_steps: steps of 24 views.
        scenes: scenes in the feature cache.
        recipe: of the decoder.
        start: model whose trained decoder this one starts from; its tower too, where `desks` is above zero.
        desks: share of the scenes that are desks.
    """

    build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
    tower: str
    tower_seed: int
    tower_steps: int
    scenes: int
    recipe: Recipe
    start: str | None = None
    desks: float = 0.0


HALLUCINATION = Bias(
    caption={"star": 0.8, "heart": 0.75, "circle": 0.3, "square": 0.3, "triangle": 0.3, "house": 0.3},
    answer=dict.fromkeys(SHAPES[::2], 0.85) | dict.fromkeys(SHAPES[1::2], 0.15),
)
"""What the hallucinating twin is taught: the likelier shape of a pair brings the other one."""

SPECS = {
    "tiny-llava": Spec(build_llava, "clip", 1, 1700, 14_000, Recipe(1400, seed=21)),
    "tiny-internvl": Spec(
        build_internvl, "internvit", 2, 1700, 9_000, Recipe(950, seed=22, scale=0.6), start="tiny-llava"
    ),
    "tiny-llava-halluc": Spec(
        build_llava,
        "clip",
        1,
        1700,
        14_000,
        Recipe(220, seed=23, bias=HALLUCINATION, curriculum=False, dropout=0.25, scale=0.4),
        start="tiny-llava",
    ),
}
"""Recipe of each model, by name."""


def build(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The untrained model, seeded."""
    torch.manual_seed(SPECS[name].recipe.seed)
    return SPECS[name].build()


def start_decoder(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Copy projector, language model and output layer of `source` into `model`, in place.

    `model` may know more words, which come last, or have several query heads for each of `source`.
    """
    known = len(source.lm_head.weight)
    wider = model.config.text_config.num_attention_heads != source.config.text_config.num_attention_heads
    if wider:
        grow_decoder(source, model)
        return
    with torch.no_grad():
        for mine, other in zip(
            trained_modules(model).parameters(), trained_modules(source).parameters(), strict=True
        ):
            (mine if mine.shape == other.shape else mine[:known]).copy_(other)


def restore(model: PreTrainedModel, name: str, runs: Path, weights: Path) -> None:
    """Put into a built model its trained tower and the decoder that it starts from, if any."""
    spec = SPECS[name]
    tower = torch.load(runs / f"{spec.tower}-tower" / "checkpoint.pt")["modules"]
    prefix = "tower."
    model.model.vision_tower.load_state_dict(
        {key.removeprefix(prefix): value for key, value in tower.items() if key.startswith(prefix)}
    )
    if spec.start:
        start_decoder(model, load_folder(weights / spec.start))


def load_folder(folder: Path) -> PreTrainedModel:
    """A finished model, in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Write a complete stock folder in bfloat16.

    Weights of a CLIP tower get the names of published LLaVA checkpoints (`vision_tower.vision_model.`): every
    transformers 5 release reads those, while older ones do not read the names that newer ones write.
    """
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    if not is_tiled(model):
        plain, published = "vision_tower.", "vision_tower.vision_model."
        weights = {
            key if published in key else key.replace(plain, published): value
            for key, value in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def training_log(name: str, runs: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of the log of each stage."""
    stages = {"tower": f"{SPECS[name].tower}-tower", "decoder": f"{name}-decoder"}
    return {
        stage: [json.loads(line) for line in (runs / folder / "log.jsonl").read_text().splitlines()]
        for stage, folder in stages.items()
    }


def train_model(name: str, runs: Path, weights: Path) -> None:
    """All stages of one model, and of the model it starts from; the result goes to `weights`/`name`."""
    spec = SPECS[name]
    if spec.start and not (weights / spec.start / "model.safetensors").exists():
        train_model(spec.start, runs, weights)
    model, processor = build(name)
    layer = model.config.vision_feature_layer
    started = load_folder(weights / spec.start).model.vision_tower if spec.start and spec.desks else None
    pretrain_tower(
        model.config.vision_config,
        layer,
        MEAN,
        STD,
        runs / f"{spec.tower}-tower",
        spec.tower_steps,
        spec.tower_seed,
        spec.desks,
        started.state_dict() if started is not None else None,
    )
    restore(model, name, runs, weights)
    tiled = is_tiled(model)
    cache = load_or_build_cache(
        model, runs / f"{spec.tower}-features.pt", spec.scenes, spec.tower_seed + 100, spec.desks
    )
    held_out = build_cache(
        model, training_scenes(HELD_OUT_SCENES, HELD_OUT_SEED, tiled, spec.desks), HELD_OUT_SCENES
    )
    train_decoder(model, processor.tokenizer, cache, held_out, spec.recipe, runs / f"{name}-decoder")
    save(model, processor, weights / name)
    (weights / name / "training.json").write_text(json.dumps(training_log(name, runs)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="train every model that is not finished")
    parser.add_argument(
        "--model", choices=list(SPECS), action="append", default=[], help="train this model; may be repeated"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/tiny"), help="checkpoints, logs and feature caches"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished models go")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; one is fastest on a shared machine"
    )
    arguments = parser.parse_args()
    if not (arguments.all or arguments.model):
        parser.error("nothing to do: give --all or --model NAME")
    torch.set_num_threads(arguments.threads)
    for name in SPECS if arguments.all else arguments.model:
        train_model(name, arguments.runs, arguments.weights)


if __name__ == "__main__":
    main()
