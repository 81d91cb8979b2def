"""Engines that are shut down again, and what the Hugging Face path answers to the same prompts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_prune import pruned
from vlm_prune.eval import load_model
from vlm_prune.eval.models import model_path
from vlm_prune.eval.scenes import make_scene

DESCRIBE = "Please describe this image in detail."
TOLERANCE = 1e-4
"""Of log-probabilities, in fp32."""


@dataclass(frozen=True)
class Ask:
    """One prompt. ``budget`` is its own one, as ``mm_processor_kwargs`` bring it."""

    images: tuple[Any, ...]
    question: str = DESCRIBE
    budget: dict[str, Any] | None = field(default=None, hash=False)
    mark: str = "<image>\n"

    @property
    def prompt(self) -> str:
        return "USER: " + self.mark * len(self.images) + f"{self.question} ASSISTANT:"

    def request(self) -> dict[str, Any]:
        """For ``LLM.generate``."""
        found: dict[str, Any] = {"prompt": self.prompt}
        if self.images:
            found["multi_modal_data"] = {"image": list(self.images)}
        if self.budget is not None:
            found["mm_processor_kwargs"] = {"vlm_prune": self.budget}
        return found


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and the log-probability of each; ``rows`` of the prompt that the decoder computed."""

    tokens: list[int]
    logprobs: list[float]
    rows: int


def scene(seed: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    return make_scene(seed, size).image


@contextmanager
def engine(model: str | Path, plan: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An ``LLM`` for a shipped model (by name) or a folder; ``plan`` is what ``hf_overrides`` say of pruning."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8}
    path = model if isinstance(model, Path) else model_path(model)
    overrides = {} if plan is None else {"vlm_prune": plan}
    llm = LLM(model=str(path), hf_overrides=overrides, **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(
    llm: Any, asks: list[Ask], most: int = 24, requests: list[Any] | None = None, **more: Any
) -> list[Answer]:
    """Answers of an engine to all prompts at once; ``more`` are arguments of ``generate``."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=most, logprobs=0)
    outputs = llm.generate(requests or [one.request() for one in asks], sampling, use_tqdm=False, **more)
    found = []
    for output in outputs:
        tokens, seen = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        logprobs = [at[token].logprob for at, token in zip(seen, tokens, strict=True)]
        found.append(Answer(tokens, logprobs, len(output.prompt_token_ids)))
    return found


@cache
def hugging_face(model: str | Path) -> tuple[Any, Any]:
    """A shipped model (by name) or that of a folder in fp32, and its processor."""
    if isinstance(model, str):
        return load_model(model)
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    return loaded.eval(), AutoProcessor.from_pretrained(model)


@torch.no_grad()
def expect(name: str | Path, asks: list[Ask], plan: dict[str, Any] | None, most: int = 24) -> list[Answer]:
    """What the Hugging Face model answers, pruned as ``plan`` or a prompt's own budget says, each prompt by itself."""
    model, processor = hugging_face(name)
    found = []
    for one in asks:
        options = {
            key: value for key, value in (plan or {}).items() if key not in ("tokens", "ratio", "ceiling")
        }
        budget = one.budget or {
            key: value for key, value in (plan or {}).items() if key in ("tokens", "ratio")
        }
        prune = pruned(model, **options, **budget) if plan and one.images else nullcontext()
        inputs = processor(images=list(one.images) or None, text=one.prompt, return_tensors="pt")
        with prune:
            output = model.generate(
                **inputs,
                max_new_tokens=most,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            rows = (
                model.pruning.receipt.decoder_tokens[0] if plan and one.images else len(inputs.input_ids[0])
            )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = [
            step[0].float().log_softmax(-1)[token].item()
            for step, token in zip(output.logits, tokens, strict=True)
        ]
        found.append(Answer(tokens, logprobs, rows))
    return found


def same(ours: list[Answer], theirs: list[Answer], tolerance: float = TOLERANCE) -> None:
    """Raise unless tokens, prompt lengths and log-probabilities agree."""
    assert [one.rows for one in ours] == [one.rows for one in theirs]
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.tokens == other.tokens, f"prompt {number}: {mine.tokens} is not {other.tokens}"
        worst = max(abs(a - b) for a, b in zip(mine.logprobs, other.logprobs, strict=True))
        assert worst < tolerance, f"prompt {number}: log-probabilities differ by {worst}"
