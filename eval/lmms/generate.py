"""Answers in batches. What a prompt is answered does not depend on what else is in its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm_prune.eval.lmms.prompts import Prompt, collate

_READ = {"until", "max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@dataclass(frozen=True)
class Decoding:
    """How to decode: lmms-eval's ``generation_kwargs``, understood.

    Attributes:
        until: strings that end an answer; what follows the first of them is cut off, and itself too.
        max_new_tokens: at most.
        temperature: of sampling; 0 is greedy.
        top_k: likeliest tokens to sample from; 0 for all.
        top_p: their share of the probability; 1 for all.
        options: further options of ``generate``, such as ``num_beams``.
        unknown: names that ``generate`` does not have, which were left out.
    """

    until: tuple[str, ...] = ()
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    unknown: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, kwargs: dict[str, Any], max_new_tokens: int = 1024) -> Decoding:
        """From a task's ``generation_kwargs``; ``max_new_tokens`` if they do not say.

        As in lmms-eval's own models a temperature above 0 means sampling, whatever ``do_sample`` says;
        ``do_sample: true`` without a temperature samples at 1, and a temperature of 0 is greedy.

        Raises:
            ValueError: a value out of range, or beams together with sampling.
        """
        until = kwargs.get("until") or ()
        temperature = kwargs.get("temperature")
        if temperature is None:
            temperature = 1.0 if kwargs.get("do_sample") else 0.0
        limit = kwargs.get("max_new_tokens") or kwargs.get("max_gen_toks") or max_new_tokens
        known = set(GenerationConfig().to_dict())
        others = {name: value for name, value in kwargs.items() if name not in _READ and value is not None}
        beams = int(others.get("num_beams", 1))
        if temperature < 0 or int(limit) < 1 or beams < 1:
            raise ValueError(
                f"temperature={temperature}, max_new_tokens={limit}, num_beams={beams}: no temperature below 0, and "
                "one token and one beam at least, are allowed."
            )
        if temperature > 0 and beams > 1:
            raise ValueError(
                f"temperature={temperature} with num_beams={beams}: sampling goes without beams. Set one of them to "
                "its default: --gen_kwargs temperature=0, or num_beams=1."
            )
        return cls(
            until=(until,) if isinstance(until, str) else tuple(stop for stop in until if stop),
            max_new_tokens=int(limit),
            temperature=float(temperature),
            top_k=int(kwargs.get("top_k") or 0) if temperature > 0 else 0,
            top_p=float(kwargs.get("top_p") or 1.0) if temperature > 0 else 1.0,
            options=tuple(sorted((name, others[name]) for name in others if name in known)),
            unknown=tuple(sorted(name for name in others if name not in known)),
        )

    def cut(self, text: str) -> str:
        """The answer up to the first of the strings that end it."""
        return text[: min((text.find(stop) for stop in self.until if stop in text), default=len(text))]


@dataclass(frozen=True)
class Job:
    """One prompt to answer. ``build`` makes it when its turn comes, since images are large."""

    build: Callable[[], Prompt]
    length: int
    decoding: Decoding = Decoding()
    seed: str = ""


@dataclass(frozen=True)
class Answer:
    """A text and how many tokens went in (all placeholders counted) and came out."""

    text: str
    input_tokens: int
    output_tokens: int


def batches(jobs: Sequence[Job], size: int, window: int = 16) -> Iterator[tuple[list[int], list[Prompt]]]:
    """Numbers and prompts of jobs that go together: same decoding, similar length, the longest first.

    Texts are sorted first. Images are only opened for ``window`` batches at a time, and these sorted again.
    """
    groups: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(repr(job.decoding), []).append(number)  # options may be lists
    for numbers in groups.values():
        numbers.sort(key=lambda n: -jobs[n].length)
        for start in range(0, len(numbers), size * window):
            built = [(n, jobs[n].build()) for n in numbers[start : start + size * window]]
            built.sort(key=lambda pair: pair[1].size, reverse=True)
            for first in range(0, len(built), size):
                part = built[first : first + size]
                yield [n for n, _ in part], [prompt for _, prompt in part]


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    seeds: Sequence[str],
) -> list[Answer]:
    """Answers to prompts that are decoded alike. ``seeds`` fix what each one samples."""
    tokenizer = processor.tokenizer
    inputs = collate(processor, prompts).to(model.device, model.dtype)
    start = inputs["input_ids"].shape[1]
    ends = _as_list(model.generation_config.eos_token_id)
    # special tokens do not show in the text, so a task that ends an answer by one has to be told to generate
    ends += [
        tokenizer.convert_tokens_to_ids(stop)
        for stop in decoding.until
        if stop in tokenizer.all_special_tokens
    ]
    output = model.generate(
        **inputs,
        **dict(decoding.options),
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(set(ends)) or None,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=_sampling(decoding, seeds),
        stopping_criteria=StoppingCriteriaList(
            [_Until(tokenizer, decoding.until, start)] if decoding.until else []
        ),
    )
    new = output[:, start:]
    silent = torch.tensor([*ends, tokenizer.pad_token_id], device=new.device)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    counts = (~torch.isin(new, silent)).sum(1).tolist()
    lengths = inputs["attention_mask"].sum(1).tolist()
    return [
        Answer(decoding.cut(text), length, count)
        for text, length, count in zip(texts, lengths, counts, strict=True)
    ]


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or ())


def _sampling(decoding: Decoding, seeds: Sequence[str]) -> LogitsProcessorList:
    steps = LogitsProcessorList()
    if decoding.temperature > 0:
        steps.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k > 0:
            steps.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            steps.append(TopPLogitsWarper(decoding.top_p))
        steps.append(_Draw(seeds))
    return steps


class _Draw(LogitsProcessor):
    """Gumbel noise: the largest score is then a draw from the softmax. Each row has its own random numbers."""

    def __init__(self, seeds: Sequence[str]):
        digests = [hashlib.sha256(seed.encode()).digest() for seed in seeds]
        self.generators = [torch.Generator().manual_seed(int.from_bytes(d[:7], "big")) for d in digests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack(
            [
                torch.empty(scores.shape[-1], dtype=torch.float64).exponential_(generator=g)
                for g in self.generators
            ]
        )
        return scores.double() - noise.log().to(scores.device)


class _Until(StoppingCriteria):
    """Ends a row once its answer holds one of the strings. Only its end is looked at, so each token costs the same."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int):
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        # a token is a byte at least, and its neighbours may be needed to decode it
        self.window = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tail = input_ids[:, self.start :][:, -self.window :]
        texts = self.tokenizer.batch_decode(tail, skip_special_tokens=True)
        return torch.tensor(
            [any(stop in text for stop in self.stops) for text in texts], device=input_ids.device
        )
