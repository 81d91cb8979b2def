"""Accuracy against kept visual tokens, dropped between projector and stock language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from vlm_prune.versions import CACHE

from ..scenes import PATCH, Scene, pope_questions
from .features import is_tiled, scene_pixels, select_features, token_shares
from .language import CAPTION_PROMPTS
from .metrics import bootstrap, chair_counts, chair_figures, pope_counts, pope_figures, wilson
from .packing import Packer, packed_hidden
from .pruning import choose, cls_attention

SPLITS = ("random", "popular", "adversarial")
RATIOS = (1.0, 0.5, 0.25, 0.125, 0.0625)
CHUNK = 25


@dataclass
class Encoded:
    """A scene after the tower: features `(tokens, width)`, CLS attention `(tokens,)`, ground truth."""

    features: torch.Tensor
    cls: np.ndarray
    shares: np.ndarray


class Subject:
    """A model under measurement, on scenes that are encoded once."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        scenes: Sequence[Scene],
        encoded: Sequence[Encoded] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.scenes = model.eval(), processor.tokenizer, scenes
        self.packer = Packer(model, processor.tokenizer)
        self.cell = PATCH * 2 if is_tiled(model) else PATCH
        self.encoded = encoded or self.encode_all()
        self.questions = {split: pope_questions(scenes, split, seed=0) for split in SPLITS}
        self.texts: list[list[str]] = [[] for _ in scenes]
        for question in (question for split in SPLITS for question in self.questions[split]):
            if question["text"] not in self.texts[question["image"]]:
                self.texts[question["image"]].append(question["text"])

    def encode_all(self) -> list[Encoded]:
        """Run the tower over all scenes, with the eager attention that returns its maps."""
        tower = self.model.model.vision_tower
        stock = tower.config._attn_implementation
        tower.set_attn_implementation("eager")
        encoded = [self.encode(scene) for scene in self.scenes]
        tower.set_attn_implementation(stock)
        return encoded

    @torch.no_grad()
    def encode(self, scene: Scene) -> Encoded:
        """Run the tower on one scene."""
        pixels = scene_pixels(scene).to(self.model.dtype)
        outputs = self.model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        features = select_features(self.model, outputs).flatten(0, 1)
        cls = cls_attention(self.model, outputs.attentions).flatten().numpy()
        return Encoded(features, cls, token_shares(scene, self.cell))

    def chunks(self) -> Iterator[list[int]]:
        """Scenes of equally many visual tokens, at most `CHUNK` at a time."""
        lengths = np.array([len(item.features) for item in self.encoded])
        for length in np.unique(lengths):
            group = np.flatnonzero(lengths == length)
            yield from (group[start : start + CHUNK].tolist() for start in range(0, len(group), CHUNK))

    @torch.no_grad()
    def run(self, rule: str, ratio: float, packed: bool = True) -> dict[str, Any]:
        """Answer every POPE question and caption every scene with `ratio` of the visual tokens.

        `packed` renumbers the kept tokens; otherwise they keep their original positions.
        """
        answers: list[dict[str, str]] = [{} for _ in self.scenes]
        captions = [""] * len(self.scenes)
        for chunk in self.chunks():
            total = len(self.encoded[chunk[0]].features)
            budget = max(1, round(ratio * total))
            kept = [self.kept(index, rule, budget) for index in chunk]
            features = torch.stack(
                [
                    self.encoded[index].features[torch.from_numpy(keep)]
                    for index, keep in zip(chunk, kept, strict=True)
                ]
            )
            for index, replies in zip(chunk, self.answer(chunk, features, kept, total, packed), strict=True):
                answers[index] = dict(zip(self.texts[index], replies, strict=True))
            for index, text in zip(chunk, self.caption(features, kept, total, packed), strict=True):
                captions[index] = text
        return {"rule": rule, "ratio": ratio, "packed": packed} | self.figures(answers, captions)

    def kept(self, index: int, rule: str, budget: int) -> np.ndarray:
        """Visual tokens of one scene that a rule keeps."""
        item = self.encoded[index]
        return choose(rule, budget, item.cls, item.shares, 128 // self.cell, (17, index))

    def answer(
        self, chunk: list[int], features: torch.Tensor, kept: list[np.ndarray], total: int, packed: bool
    ) -> list[list[str]]:
        """First greedy word of the answer to every question about the scenes of a chunk."""
        segments = [
            [(*self.packer.segment(text, "yes"), 1.0) for text in self.texts[index]] for index in chunk
        ]
        pack = self.packer.pack(kept, [total] * len(chunk), [packed] * len(chunk), segments)
        hidden = packed_hidden(self.model, features, pack)
        yes = self.packer.encode("yes")[0]
        words = self.model.lm_head(hidden[pack.labels == yes]).argmax(-1).tolist()
        replies = iter(self.tokenizer.convert_ids_to_tokens(words))
        return [[next(replies) for _ in self.texts[index]] for index in chunk]

    def caption(
        self, features: torch.Tensor, kept: list[np.ndarray], total: int, packed: bool, limit: int = 64
    ) -> list[str]:
        """Greedy captions of equally long prompts."""
        prompt, _ = self.packer.segment(CAPTION_PROMPTS[0])
        pack = self.packer.pack(
            kept, [total] * len(kept), [packed] * len(kept), [[(prompt, len(prompt), 1.0)]] * len(kept)
        )
        embed, positions = self.model.get_input_embeddings(), pack.positions
        embeddings = embed(pack.ids)
        projected = self.model.model.multi_modal_projector(features)
        embeddings = embeddings.masked_scatter(pack.visual[..., None], projected)
        cache, done = DynamicCache(), torch.zeros(len(kept), dtype=torch.bool)
        written: list[list[int]] = [[] for _ in kept]
        for _ in range(limit):
            hidden = self.model.model.language_model(
                inputs_embeds=embeddings, position_ids=positions, **{CACHE: cache}, use_cache=True
            ).last_hidden_state
            tokens = self.model.lm_head(hidden[:, -1]).argmax(-1)
            done |= tokens == self.packer.end
            for row in torch.nonzero(~done).flatten().tolist():
                written[row].append(int(tokens[row]))
            if done.all():
                break
            embeddings, positions = embed(tokens[:, None]), positions[:, -1:] + 1
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]

    def figures(self, answers: list[dict[str, str]], captions: list[str]) -> dict[str, Any]:
        """POPE per split and CHAIR with 95 % intervals: bootstrap over scenes, Wilson for CHAIRs."""
        result: dict[str, Any] = {}
        for split in SPLITS:
            rows = np.zeros((len(self.scenes), 4), int)
            for question in self.questions[split]:
                reply = answers[question["image"]][question["text"]]
                rows[question["image"]] += pope_counts([reply], [question["label"]])
            result[f"pope_{split}"] = pope_figures(rows.sum(0)) | {
                "questions": len(self.questions[split]),
                "f1_interval": bootstrap(rows, lambda counts: pope_figures(counts)["f1"]),
            }
        rows = np.stack(
            [chair_counts(text, scene.names) for text, scene in zip(captions, self.scenes, strict=True)]
        )
        totals = rows.sum(0)
        result |= chair_figures(totals) | {
            "captions": len(captions),
            "caption_words": float(np.mean([len(text.split()) for text in captions])),
            "chair_s_interval": wilson(totals[4], totals[5]),
            "chair_i_interval": bootstrap(rows, lambda counts: chair_figures(counts)["chair_i"]),
            "recall_interval": bootstrap(rows, lambda counts: chair_figures(counts)["recall"]),
        }
        return result
