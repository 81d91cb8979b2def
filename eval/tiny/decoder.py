"""Stages 1 and 2: train projector and language model on the cached features of a frozen tower.

Visual lengths vary from the start and both position rules are used, row by row at random: a tiny language
model that has only met one image length learns distances by heart and fails on any other, whatever was
pruned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..scenes import COLORS, SHAPES, Part, SceneObject
from ..scenes.questions import Turn
from . import attention
from .features import FeatureCache
from .language import HONEST, Bias, dialogue
from .packing import LABEL_IGNORE, Packer, packed_hidden
from .training import make_optimizers, train

BATCH = 16
SEEN, READ = 0.25, 0.6
"""An object is seen, a character or a bar read, when this share of it is in the kept tokens of the tiles, or of the
thumbnail."""

SUBSET_SHARE = 0.6
"""Share of the steps that only use short, object-centred token subsets, nearly all at original positions."""

SINGLE_SHARE = 0.3
"""Share of the steps that only use images of one tile."""


@dataclass(frozen=True)
class Recipe:
    """One run of the decoder.

    Attributes:
        steps: optimizer steps of 16 images, each with one caption and six questions.
        seed: fixes data order and initial weights.
        bias: what language adds to the truth.
        curriculum: whether to begin with object-centred subsets.
        dropout: share of the batches in which the image is hidden but for very few random tokens, while the
            text still tells the whole truth (or more).
        scale: factor on the learning rates.
    """

    steps: int
    seed: int
    bias: Bias = HONEST
    curriculum: bool = True
    dropout: float = 0.0
    scale: float = 1.0


@dataclass
class Batch:
    """Rows of one step: scenes, kept tokens, position rule and dialogue."""

    scenes: list[int]
    kept: list[np.ndarray]
    packed: list[bool]
    turns: list[list[Turn]]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A draw that is uniform on the logarithmic scale."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def object_subset(shares: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """`budget` tokens, those that hold objects first (at random among themselves), then random background."""
    order = rng.permutation(shares.shape[-1])
    holds = shares[..., order].max((0, 1)) > 0
    return np.sort(np.concatenate([order[holds], order[~holds]])[:budget])


def random_subset(total: int, budget: int, rng: np.random.Generator) -> np.ndarray:
    """`budget` of `total` tokens, uniformly."""
    return np.sort(rng.choice(total, budget, replace=False))


def seen_parts(parts: Sequence[Part], shares: np.ndarray, kept: np.ndarray) -> list[bool]:
    """Which parts keep enough of themselves to be asked about."""
    needed = [SEEN if isinstance(part, SceneObject) else READ for part in parts]
    return [
        bool(share >= least)
        for share, least in zip(shares[..., kept].sum(-1, dtype=np.float32).max(0), needed, strict=True)
    ]


def draw_batch(cache: FeatureCache, progress: float, recipe: Recipe, rng: np.random.Generator) -> Batch:
    """Choose scenes, kept tokens and text for one step, `progress` from 0 to 1."""
    hidden = rng.random() < recipe.dropout
    subset = recipe.curriculum and progress < SUBSET_SHARE
    full = not subset and not hidden and rng.random() < 0.45
    lengths = np.diff(cache.starts)
    pool = np.flatnonzero(lengths == lengths[rng.integers(len(cache))]) if full else np.arange(len(cache))
    if recipe.curriculum and progress < SINGLE_SHARE:
        pool = np.flatnonzero(lengths == lengths.min())
    scenes = [int(index) for index in rng.choice(pool, BATCH)]
    shortest = int(lengths[scenes].min())
    oracle = subset or rng.random() < 0.4
    low, high = (24, 73) if subset else (16, 200)
    budget = min(shortest, int(log_uniform(rng, low, high)))
    if hidden:
        budget = int(rng.integers(0, 4))
    kept, turns = [], []
    for index in scenes:
        shares, total = cache.shares[index], int(lengths[index])
        if full:
            keep = np.arange(total)
        elif oracle and not hidden:
            keep = object_subset(shares, budget, rng)
        else:
            keep = random_subset(total, budget, rng)
        parts = cache.parts[index]
        seen = [True] * len(parts) if hidden else seen_parts(parts, shares, keep)
        kept.append(keep)
        turns.append(dialogue(parts, seen, cache.sizes[index], rng, recipe.bias))
    packed = rng.random(BATCH) < (0.1 if subset else 0.5)
    return Batch(scenes, kept, list(packed), turns)


class DecoderTrainer:
    """Losses and held-out figures of one model on cached features."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: FeatureCache,
        held_out: FeatureCache,
        recipe: Recipe,
    ) -> None:
        self.model, self.cache, self.held_out, self.recipe = model, cache, held_out, recipe
        self.packer = Packer(model, tokenizer)
        self.tokenizer = tokenizer

    def forward(self, cache: FeatureCache, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `(labels, vocabulary)` in float32, labels and weights of all supervised slots."""
        features = torch.stack(
            [
                cache.tokens(index)[torch.from_numpy(keep)]
                for index, keep in zip(batch.scenes, batch.kept, strict=True)
            ]
        )
        totals = [int(cache.starts[index + 1] - cache.starts[index]) for index in batch.scenes]
        segments = [
            [
                (*self.packer.segment(turn.question, turn.answer), 1.0 if number == 0 else 2.0)
                for number, turn in enumerate(turns)
            ]
            for turns in batch.turns
        ]
        pack = self.packer.pack(batch.kept, totals, batch.packed, segments)
        with attention.autocast():
            hidden = packed_hidden(self.model, features, pack)
            supervised = pack.labels != LABEL_IGNORE
            logits = self.model.lm_head(hidden[supervised]).float()
        return logits, pack.labels[supervised], pack.weights[supervised]

    def loss_at(self, step: int) -> dict[str, torch.Tensor]:
        """Losses of one training step, captions and answers apart."""
        rng = np.random.default_rng((self.recipe.seed, 3, step))
        batch = draw_batch(self.cache, step / self.recipe.steps, self.recipe, rng)
        logits, labels, weights = self.forward(self.cache, batch)
        losses = F.cross_entropy(logits, labels, reduction="none") * weights / weights.sum()
        caption = weights == 1
        return {"caption": losses[caption].sum(), "answer": losses[~caption].sum()}

    def figures(self) -> dict[str, float]:
        """Teacher-forced accuracy on held-out scenes with all visual tokens, by kind of word."""
        rng = np.random.default_rng(11)
        right: dict[str, list[bool]] = {}
        lengths = np.diff(self.held_out.starts)
        for length in np.unique(lengths):
            group = np.flatnonzero(lengths == length)
            for start in range(0, len(group), BATCH):
                scenes = [int(index) for index in group[start : start + BATCH]]
                turns = [
                    dialogue(
                        self.held_out.parts[i],
                        [True] * len(self.held_out.parts[i]),
                        self.held_out.sizes[i],
                        rng,
                    )
                    for i in scenes
                ]
                batch = Batch(scenes, [np.arange(length)] * len(scenes), [True] * len(scenes), turns)
                logits, labels, weights = self.forward(self.held_out, batch)
                hits = logits.argmax(-1) == labels
                for token, hit, weight in zip(labels.tolist(), hits.tolist(), weights.tolist(), strict=True):
                    right.setdefault(self.kind(token, weight), []).append(hit)
        return {f"{kind}_accuracy": round(float(np.mean(hits)), 4) for kind, hits in sorted(right.items())}

    def kind(self, token: int, weight: float) -> str:
        """What a label is: a caption token, yes, no, a colour, a shape or another answer."""
        word = self.tokenizer.convert_ids_to_tokens(token)
        if weight == 1:
            return "caption"
        if word in ("yes", "no"):
            return word
        return (
            "color" if word in COLORS else "shape" if word in SHAPES else "end" if word == "</s>" else "other"
        )


def trained_modules(model: PreTrainedModel) -> nn.ModuleList:
    """What this stage trains, in the order of its checkpoints: projector, language model, output layer."""
    return nn.ModuleList([model.model.multi_modal_projector, model.model.language_model, model.lm_head])


def train_decoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: FeatureCache,
    held_out: FeatureCache,
    recipe: Recipe,
    folder: Path,
) -> None:
    """Train, or resume, projector and language model in place; the tower stays as it is."""
    stock = model.config._attn_implementation
    model.model.language_model.config._attn_implementation = attention.register()
    trained = trained_modules(model).requires_grad_(True)
    embeddings = {id(model.get_input_embeddings().weight), id(model.lm_head.weight)}
    matrices = [p for p in trained.parameters() if p.ndim == 2 and id(p) not in embeddings]
    taken = {id(p) for p in matrices}
    rest = [p for p in trained.parameters() if id(p) not in taken]
    trainer = DecoderTrainer(model, tokenizer, cache, held_out, recipe)
    optimizers = make_optimizers(matrices, rest, recipe.scale)
    train(folder, trained, optimizers, recipe.steps, trainer.loss_at, trainer.figures, every=100)
    model.model.language_model.config._attn_implementation = stock
