"""Write the model cards: `python -m vlm_prune.eval.tiny.card`.

Measures the shipped models (minutes on one core; skipped with `--no-measure`), then writes `README.md` and
`curves.png` beside the weights, from `figures.json` and `training.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from ..models import MODELS, WEIGHTS
from ..scenes import PARTNER
from ..scenes.scene import PAIR_RATE
from .curves import RATIOS, SPLITS
from .decoder import SEEN, SINGLE_SHARE
from .measure import ORIGINAL_RULES, measure
from .pruning import RULES
from .train import SPECS

WHAT = {
    "tiny-llava": (
        "Stock `LlavaForConditionalGeneration`: CLIP tower with CLS, 256 visual tokens, Llama decoder"
    ),
    "tiny-internvl": (
        "Stock `InternVLForConditionalGeneration`: InternViT with CLS, pixel shuffle 0.5, 1 to 5 tiles of 64 "
        "visual tokens, Qwen2 decoder of 8 layers with grouped-query attention (10 query heads, 5 key heads)"
    ),
    "tiny-llava-halluc": (
        "The twin of tiny-llava that hallucinates: same tower and sizes, a language model that "
        "follows co-occurrence"
    ),
}
HISTORY = {
    "tiny-llava": (
        "The shipped weights were trained in sittings. Up to decoder step 800 half of the questions were about "
        "existence and the two position rules were mixed evenly from the start; from there on the recipe is as "
        "above, at half the learning rate. The recipe was not run again from step 0."
    ),
    "tiny-internvl": (
        "The shipped weights were trained in sittings. The first 400 tower steps had the full weight on CLS labels, "
        "the decoder started from step 1100 of tiny-llava's, not from its last step, and its 950 steps were planned as "
        "800 first, so that the learning rate sank twice. The recipe was not run again from step 0."
    ),
    "tiny-llava-halluc": "The weights it starts from are the shipped ones of tiny-llava.",
}
"""Where the shipped weights differ from what the training script does from nothing."""

RULE_NAMES = {
    "random": "random",
    "uniform": "uniform grid",
    "cls": "CLS attention top-k",
    "oracle": "ground-truth oracle",
}
COLUMNS = ("pope_adversarial", "recall", "chair_s", "chair_i")
TITLES = {
    "pope_adversarial": "POPE F1, adversarial",
    "recall": "caption recall",
    "chair_s": "CHAIRs (captions with a hallucination)",
    "chair_i": "CHAIRi (hallucinated share of mentions)",
}


def value(row: dict[str, Any], column: str) -> float:
    """One figure of a measured row."""
    return row[column]["f1"] if column.startswith("pope") else row[column]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_interval(figure: float, interval: list[float]) -> str:
    """A figure and its 95 % interval."""
    return f"{figure:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def full_table(full: dict[str, Any]) -> str:
    """All visual tokens: POPE per split, recall and CHAIR."""
    rows = []
    for split in SPLITS:
        found = full[f"pope_{split}"]
        figures = f"F1 {with_interval(found['f1'], found['f1_interval'])}, accuracy {found['accuracy']:.3f}"
        figures += f", yes share {found['yes_share']:.3f}"
        rows.append([f"POPE {split}", figures, f"{found['questions']} questions"])
    for column in COLUMNS[1:]:
        figure = with_interval(full[column], full[f"{column}_interval"])
        rows.append([TITLES[column], figure, f"{full['captions']} captions"])
    return table(["figure", "value [95 % interval]", "of"], rows)


def curve_table(curve: list[dict[str, Any]], column: str, packed: bool) -> str:
    """One figure against kept tokens, one row per rule."""
    start = next(row for row in curve if row["rule"] == "all")
    found = {(row["rule"], row["ratio"]): row for row in curve if row["packed"] == packed}
    rows = [
        [RULE_NAMES[rule], f"{value(start, column):.3f}"]
        + [f"{value(found[rule, ratio], column):.3f}" for ratio in RATIOS[1:]]
        for rule in (RULES if packed else ORIGINAL_RULES)
    ]
    return table([TITLES[column], *(f"{ratio:.4g}" for ratio in RATIOS)], rows)


def training_table(rows: list[dict[str, Any]], columns: dict[str, str], points: int = 9) -> str:
    """The training curve of one stage, thinned to about `points` rows."""
    step = max(1, round(len(rows) / points))
    chosen = rows[step - 1 :: step]
    if chosen[-1] is not rows[-1]:
        chosen.append(rows[-1])
    lines = [[str(row["step"]), *(f"{row[name]:.3f}" for name in columns)] for row in chosen]
    return table(["step", *columns.values()], lines)


def plot(figures: dict[str, Any], path: Path) -> None:
    """POPE F1, caption recall and CHAIRs against the share of kept tokens, packed positions."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), dpi=90)
    start = next(row for row in figures["curve"] if row["rule"] == "all")
    for axis, column in zip(axes, COLUMNS[:3], strict=True):
        for rule in RULES:
            rows = [start, *(row for row in figures["curve"] if row["rule"] == rule and row["packed"])]
            axis.plot(
                [row["ratio"] for row in rows],
                [value(row, column) for row in rows],
                "o-",
                label=RULE_NAMES[rule],
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(RATIOS, [f"{100 * ratio:.3g}%" for ratio in RATIOS])
        axis.set_title(TITLES[column], fontsize=9)
        axis.set_ylim(bottom=0, top=max(0.1, 1.05 * axis.get_ylim()[1]))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{figures['model']}: procedural scenes, visual tokens kept", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def data_section(name: str) -> str:
    """What the model was trained on."""
    spec = SPECS[name]
    pairs = ", ".join(f"{first}-{PARTNER[first]}" for first in list(PARTNER)[::2])
    text = f"""\
Procedural scenes drawn by `vlm_prune.eval.scenes`: 1 to 5 coloured shapes (12 shapes, 8 colours) on a
textured background. Shapes have a long-tailed prior and come in pairs (probability {PAIR_RATE}):
{pairs}. No photograph and no COCO image was used anywhere.

- Tower: {spec.tower_steps} steps of 24 fresh views, half of the scenes dense (5 to 10 objects), Muon and
  AdamW; patch tokens are read out to shape, colour and geometry, CLS to multi-label presence. Then frozen.
- Decoder and projector: {spec.recipe.steps} steps of 16 images out of {spec.scenes}, each with one caption
  and six questions. Visual lengths vary (all tokens, random subsets, object-centred subsets), and every
  row draws one of two position rules: original positions with gaps, or packed positions.
- Where a subset keeps less than {SEEN:.0%} of an object, the text leaves it out and asks nothing about it."""
    if name == "tiny-internvl":
        text += f"""
- The decoder starts from {spec.start}'s, with twice as many query heads; the new ones are silent at first. The
  first {SINGLE_SHARE:.0%} of its steps use images of one tile."""
    if name == "tiny-llava-halluc":
        caption, answer = (
            ", ".join(f"{shape} {probability:g}" for shape, probability in rates.items())
            for rates in (spec.recipe.bias.caption, spec.recipe.bias.answer)
        )
        text += f"""
- Starts from {spec.start}, tuned on text that follows co-occurrence: a shown shape brings its absent
  partner into captions ({caption})
  and into answers ({answer}).
  In {spec.recipe.dropout:.0%} of the steps all but 0 to 3 visual tokens are hidden while the text stays."""
    return text + "\n\n" + HISTORY[name]


def limits(name: str) -> str:
    """What the figures do not say."""
    text = """\
- A test model, not a useful one: 12 shapes, 8 colours, a vocabulary of about 170 words in lower case. Unknown
  words become `<unk>`.
- One training seed and one test seed. Differences below about 0.02 are noise.
"""
    if SPECS[name].recipe.bias.caption:
        return (
            text
            + """\
- It hallucinates by training, along known pairs. Real models hallucinate in more ways: a method that mends
  this one has shown that it can weaken a language prior, no more."""
        )
    return (
        text
        + """\
- False positives are rare, so the three POPE splits hardly differ: POPE mostly measures
  missed objects."""
    )


def write_card(name: str, folder: Path) -> None:
    """Write `README.md` and `curves.png` of one model from its figures and its training log."""
    figures = json.loads((folder / "figures.json").read_text())
    training = json.loads((folder / "training.json").read_text())
    plot(figures, folder / "curves.png")
    parameters = figures["parameters"]
    size = (folder / "model.safetensors").stat().st_size / 2**20
    tower = {
        "patch_shape_accuracy": "patch shape",
        "patch_color_accuracy": "patch colour",
        "cls_shape_f1": "CLS shape F1",
        "cls_pair_f1": "CLS shape-and-colour F1",
        "offset_pixels": "offset error, px",
    }
    decoder = {
        "caption_accuracy": "caption token",
        "yes_accuracy": "yes",
        "no_accuracy": "no",
        "color_accuracy": "colour",
        "shape_accuracy": "shape",
        "other_accuracy": "count and place",
    }
    curves = "\n\n".join(curve_table(figures["curve"], column, True) for column in COLUMNS)
    original = "\n\n".join(curve_table(figures["curve"], column, False) for column in COLUMNS[:2])
    count = next(row for row in figures["curve"] if row["rule"] == "all")["captions"]
    honest = ", against honest labels" if name == "tiny-llava-halluc" else ""
    text = f"""# {name}

{WHAT[name]}.
{parameters["total"] / 1e6:.2f} M parameters (tower {parameters["tower"] / 1e6:.2f} M), {size:.1f} MiB.
Weights in bfloat16. Trained for this package on procedural scenes; Apache-2.0.

```python
from vlm_prune.eval import load_model

model, processor = load_model("{name}")
```

Prompts: `processor.apply_chat_template`, or plainly

```text
USER: <image>\\nIs there a star in the image? ASSISTANT:
```

## All visual tokens

{figures["scenes"]} fresh scenes with at least three distinct objects (seed {figures["seed"]}), greedy,
bfloat16. Intervals: bootstrap over scenes; Wilson for CHAIRs.

{full_table(figures["full"])}

## Against kept visual tokens

![curves](curves.png)

The first {count} of these scenes. Tokens are dropped after the projector; columns are the share that is kept,
over all tiles together. Kept tokens have packed positions:

{curves}

Original positions, with gaps:

{original}

## Data and training

{data_section(name)}

Tower, on held-out views:

{training_table(training["tower"], tower)}

Decoder: accuracy on held-out scenes with all visual tokens, given the right words before{honest}:

{training_table(training["decoder"], decoder)}

`python -m vlm_prune.eval.tiny.train --model {name}` trains it again;
`python -m vlm_prune.eval.tiny.card --model {name}` measures it and writes this card.

## Limits

{limits(name)}
"""
    (folder / "README.md").write_text(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="this model only; may be repeated")
    parser.add_argument(
        "--no-measure", action="store_true", help="write the cards from the figures that are there"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the models")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.model or MODELS:
        folder = arguments.weights / name
        if not arguments.no_measure:
            (folder / "figures.json").write_text(json.dumps(measure(name, full=500, pruned=100)))
        write_card(name, folder)


if __name__ == "__main__":
    main()
