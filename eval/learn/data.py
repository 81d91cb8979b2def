"""Prompts and answers to tune policies on: a jsonl file of one's own, or procedural scenes for the shipped models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_prune.eval.images import load_image
from vlm_prune.eval.measure import prompt_text
from vlm_prune.eval.models import MODELS
from vlm_prune.eval.records import read_records
from vlm_prune.eval.scenes import make_scenes, pope_questions
from vlm_prune.eval.tiny.language import dialogue


@dataclass(frozen=True)
class Example:
    """A question about an image, and its answer."""

    image: Image.Image
    question: str
    answer: str


def examples(data: Path | None, model: str, count: int, seed: int) -> list[Example]:
    """``count`` examples: lines of a jsonl file (image, question, answer), or else turns about fresh scenes.

    Raises:
        ValueError: no file for a model that does not come with scenes, or a line without one of the three keys.
    """
    if data is None:
        _has_scenes(model)
        return list(_scene_examples(model, count, seed))
    found = []
    for number, record in enumerate(read_records(data)[:count], 1):
        try:
            image = load_image(data.parent / record["image"], f"{record['image']} ({data}, record {number})")
            found.append(Example(image, record["question"], record["answer"]))
        except KeyError as error:
            raise ValueError(
                f"{data}, record {number}: no {error}; image, question and answer are needed."
            ) from error
    return found


def questions(model: str, count: int, seed: int) -> list[Example]:
    """A yes-no question about each of ``count`` fresh scenes for a shipped model.

    Raises:
        ValueError: it is not one.
    """
    _has_scenes(model)
    scenes = list(make_scenes(count, seed, [_size(model)], min_names=3))
    rows = pope_questions(scenes, "random", seed)
    wanted = {(number, "yes" if number % 2 else "no") for number in range(count)}
    found: dict[int, Example] = {}
    for row in rows:
        if (row["image"], row["label"]) in wanted:
            found.setdefault(row["image"], Example(scenes[row["image"]].image, row["text"], row["label"]))
    return list(found.values())


def _has_scenes(model: str) -> None:
    """Raise if scenes were not made for a model."""
    if model not in MODELS:
        raise ValueError(
            f"data for {model!r}: give --data with a jsonl file of image, question and answer. Only the shipped "
            f"models ({', '.join(MODELS)}) have scenes of their own."
        )


def _size(model: str) -> tuple[int, int]:
    return (256, 128) if model == "tiny-internvl" else (128, 128)


def _scene_examples(model: str, count: int, seed: int) -> Iterator[Example]:
    size = _size(model)
    rng = np.random.default_rng(seed)
    for scene in make_scenes(-(-count // 7), seed, [size], min_names=1):
        for turn in dialogue(scene.objects, [True] * len(scene.objects), size, rng):
            if count:
                count -= 1
                yield Example(scene.image, turn.question, turn.answer)


def training_batches(
    processor: Any, turns: list[Example], batch_size: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, in shuffled order: what the processor makes, and ``labels`` that are -100 off the answer."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(turns))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            some = [turns[i] for i in order[start : start + batch_size]]
            prompts = [prompt_text(processor, turn.question) for turn in some]
            texts = [f"{prompt} {turn.answer}" for prompt, turn in zip(prompts, some, strict=True)]
            images = [turn.image for turn in some]
            batch = processor(
                images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"
            )
            labels = batch["input_ids"].clone()
            for row, (image, prompt, text) in enumerate(zip(images, prompts, texts, strict=True)):
                whole = processor(images=image, text=text)["input_ids"]
                asked = processor(images=image, text=prompt)["input_ids"]
                answer = len(_flat(whole)) - len(_flat(asked))
                labels[row, : labels.shape[1] - answer] = -100
            yield {**batch, "labels": labels}


def _flat(ids: Any) -> list[int]:
    return ids[0] if isinstance(ids[0], list) else ids
