"""The models lmms-eval calls: a stock model, loaded and pruned as ``--model_args`` say."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_prune import prune
from vlm_prune.eval.lmms.arguments import LOADING, checkpoint, pruning_options
from vlm_prune.eval.lmms.generate import Decoding, Job, answer_batch, batches
from vlm_prune.eval.lmms.likelihood import score_batch
from vlm_prune.eval.lmms.prompts import PLACEHOLDER, Prompt, from_messages, from_text

Following = Callable[[int, list[str], Any], "tuple[Callable[[], Prompt], list[str], Any] | None"]
"""From a round's number, the answers so far and the task's notes to the next prompt, answers and notes; None: over."""


@dataclass(frozen=True)
class _Call:
    """A request for text, of either kind. Its document and images are only fetched by ``first``."""

    name: str
    context: str
    kwargs: dict[str, Any]
    first: Callable[[], Prompt]
    following: Following


class Likelihood(tuple[float, bool], GenerationResult):
    """A log-likelihood and whether its text is the greedy answer: the pair that lmms-eval documents.

    A `GenerationResult` too, since the evaluator of lmms-eval 0.7 takes these apart but makes a string of other pairs.
    """

    def __new__(cls, total: float, greedy: bool) -> Likelihood:
        """The pair."""
        return super().__new__(cls, (total, greedy))

    def __init__(self, total: float, greedy: bool):
        GenerationResult.__init__(self, (total, greedy))


class VlmPrune(lmms):
    """A pruned model, see the two classes below for the form of its prompts.

    Args:
        pretrained: a path or hub name of a supported family, or the name of a shipped test model.
        policy: see `vlm_prune.prune`; "none" for the stock model with a receipt. Default FlowCut.
        tokens: visual tokens to keep per image (per tile).
        ratio: their share, instead.
        per: "image" for one budget for all tiles of an image.
        config: a JSON file with policy, budget and settings, instead of these.
        batch_size: prompts answered together.
        device: "cuda:1", "cpu"; default what accelerate finds. Of several processes each takes its own.
        max_new_tokens: of tasks that name no limit.
        system_prompt: a text, or a file that holds it.
        arguments: `LOADING` go to ``from_pretrained``; all others are settings of the policy, of a composition with the
            policy's name before a dot: ``policy=flowcut+vhr,flowcut.compat=official``.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        tokens: int | None = None,
        ratio: float | None = None,
        per: str | None = None,
        config: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_new_tokens: int = 1024,
        system_prompt: str = "",
        **arguments: Any,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: a number is needed, such as 8.")
        loading = {name: arguments.pop(name) for name in LOADING if name in arguments}
        # before any weights are read
        options = pruning_options(policy, tokens, ratio, per, config, arguments)
        self.batch_size = self.batch_size_per_gpu = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        self.system_prompt = self._resolve_system_prompt(system_prompt)

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.world_size > 1 and "device_map" in loading:
            raise ValueError(
                f"device_map={loading['device_map']} in {self.world_size} processes: each holds the model on one "
                "device. Leave device_map out, or start one process."
            )
        path = checkpoint(pretrained)
        model = AutoModelForImageTextToText.from_pretrained(path, **loading).eval()
        if "device_map" not in loading:
            model.to(self.accelerator.device if self.world_size > 1 else device or self.accelerator.device)
        shared = {name: loading[name] for name in ("revision", "trust_remote_code") if name in loading}
        self.processor = AutoProcessor.from_pretrained(path, **shared)
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.image_token = getattr(self.processor, "image_token", None) or PLACEHOLDER
        self.device = model.device
        # lmms-eval's `clean` lets go of it when all is answered, so nothing else here may hold on to it
        self.model = prune(model, **options)
        self.pruning_name = self.model.pruning.name
        self._unknown_told: set[str] = set()

    # --- what lmms-eval calls ---

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests."""
        calls = [self._read(request.args) for request in requests]
        return self._answer(calls, [call.first for call in calls], "answers")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each round, until the task says that there are no more rounds."""
        calls = [self._read(request.args) for request in requests]
        prompts = {number: call.first for number, call in enumerate(calls)}
        outputs: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        done = 0
        while prompts:
            done += 1
            asked = list(prompts)
            given = self._answer([calls[n] for n in asked], list(prompts.values()), f"round {done}")
            prompts = {}
            for n, result in zip(asked, given, strict=True):
                outputs[n].append(result.text)
                if (then := calls[n].following(done, list(outputs[n]), notes[n])) is not None:
                    prompts[n], outputs[n], notes[n] = then
        return outputs

    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """Sum of the log-probabilities of the continuation's tokens, and whether it is the greedy answer.

        Of requests of a ``multiple_choice`` task the sum comes with its sign turned: lmms-eval 0.7 scores those by the
        smallest value, since its own models return a loss.
        """
        jobs, continuations, signs = [], [], []
        for request in requests:
            context, target, *rest = request.args
            visual, doc = None, None
            if rest:  # else only text is given, for the likelihood of a choice without its question
                visual, doc_id, name, split = rest
                doc = partial(self._doc, name, split, doc_id)
            continuations.append(target if isinstance(target, str) else str(target(doc() if doc else None)))
            task = getattr(visual, "__self__", None)
            signs.append(-1 if getattr(task, "OUTPUT_TYPE", None) == "multiple_choice" else 1)
            jobs.append(Job(partial(self._plain, context, visual, doc), len(context)))
        results: list[Likelihood] = [Likelihood(0.0, False)] * len(jobs)
        with tqdm(total=len(jobs), disable=self.rank != 0, desc=f"{self.pruning_name}: likelihoods") as bar:
            for numbers, prompts in batches(jobs, self.batch_size):
                scored = score_batch(self.model, self.processor, prompts, [continuations[n] for n in numbers])
                for n, (total, greedy) in zip(numbers, scored, strict=True):
                    results[n] = Likelihood(signs[n] * total, greedy)
                bar.update(len(numbers))
        return results

    # --- how ---

    def _answer(
        self, calls: Sequence[_Call], prompts: Sequence[Callable[[], Prompt]], what: str
    ) -> list[GenerationResult]:
        seen: Counter[str] = Counter()
        jobs = []
        for call, build in zip(calls, prompts, strict=True):
            # a task may ask the same several times, and then wants several samples
            seed = f"{torch.initial_seed()} {call.name} {what} {seen[call.name]}"
            seen[call.name] += 1
            jobs.append(Job(build, len(call.context), Decoding.of(call.kwargs, self.max_new_tokens), seed))
        self._tell_unknown(jobs)
        results: list[GenerationResult] = [GenerationResult("")] * len(jobs)
        kept = images = 0
        begin = perf_counter()
        with tqdm(total=len(jobs), disable=self.rank != 0, desc=f"{self.pruning_name}: {what}") as bar:
            for numbers, built in batches(jobs, self.batch_size):
                seeds, decoding = [jobs[n].seed for n in numbers], jobs[numbers[0]].decoding
                answers = answer_batch(self.model, self.processor, built, decoding, seeds)
                for n, answer in zip(numbers, answers, strict=True):
                    counts = TokenCounts(answer.input_tokens, answer.output_tokens)
                    results[n] = GenerationResult(answer.text, counts)
                if here := sum(len(prompt.images) for prompt in built):
                    images += here
                    kept += sum(map(len, self.model.pruning.receipt.kept))
                bar.update(len(numbers))
        elapsed = perf_counter() - begin
        tokens = sum(result.token_counts.output_tokens or 0 for result in results if result.token_counts)
        more: dict[str, float] = {"total_requests": len(jobs)}
        if images:
            more["visual_tokens_per_image"] = kept / images
        log_metrics(elapsed, tokens, tokens / elapsed, additional_metrics=more)
        return results

    def _tell_unknown(self, jobs: Iterable[Job]) -> None:
        names = {name for job in jobs for name in job.decoding.unknown} - self._unknown_told
        if names and self.rank == 0:
            logger.warning(
                f"generation_kwargs {', '.join(sorted(names))}: generate has no such options; left out"
            )
        self._unknown_told |= names

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _plain(
        self, context: str, visual: Callable[[Any], Any] | None, doc: Callable[[], Any] | None
    ) -> Prompt:
        visuals = visual(doc()) if visual and doc else None
        return from_text(context, visuals, self.image_token, self.system_prompt)

    @abstractmethod
    def _read(self, args: tuple[Any, ...]) -> _Call:
        """The arguments of a request for text."""


class VlmPruneSimple(VlmPrune):
    """Prompts from plain text and a list of images: ``--force_simple``, which tasks that score likelihoods need."""

    is_simple = True

    def _read(self, args: tuple[Any, ...]) -> _Call:
        # requests of several rounds have one part more, which makes the later prompts
        context, kwargs, visual, *text, doc_id, task, split = args
        doc = partial(self._doc, task, split, doc_id)

        def following(done: int, outputs: list[str], notes: Any) -> Any:
            visuals, prompt, over, kept, notes = text[0](
                doc(), previous_output=outputs, round_idx=done, previous_round_info=notes
            )
            if over:
                return None
            build = partial(from_text, prompt, visuals, self.image_token, self.system_prompt)
            return build, list(outputs if kept is None else kept), notes

        first = partial(self._plain, context, visual, doc)
        return _Call(f"{task} {split} {doc_id}", context, kwargs, first, following)


class VlmPruneChat(VlmPrune):
    """Prompts from chat messages, lmms-eval's default. Its tasks generate only."""

    is_simple = False

    def _read(self, args: tuple[Any, ...]) -> _Call:
        context, messages, kwargs, doc_id, task, split = args
        doc = partial(self._doc, task, split, doc_id)

        def first() -> Prompt:
            return from_messages(messages(doc()), self.image_token, self.system_prompt)

        def following(done: int, outputs: list[str], notes: Any) -> Any:
            given = messages(doc(), round_idx=done, previous_output=outputs, previous_round_info=notes)
            if not (isinstance(given, tuple) and len(given) == 4) or given[1]:
                return None
            turns, _, kept, notes = given
            build = partial(from_messages, turns, self.image_token, self.system_prompt)
            return build, list(outputs if kept is None else kept), notes

        return _Call(f"{task} {split} {doc_id}", context, kwargs, first, following)
