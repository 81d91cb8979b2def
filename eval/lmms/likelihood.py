"""How likely a continuation is, scored as the model would generate it: token by token, on the pruned prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, ProcessorMixin

from vlm_prune.eval.lmms.prompts import Prompt, collate, special_tokens_wanted


@torch.no_grad()
def score_batch(
    model: PreTrainedModel, processor: ProcessorMixin, prompts: Sequence[Prompt], continuations: Sequence[str]
) -> list[tuple[float, bool]]:
    """Sum of the log-probabilities of each continuation's tokens, and whether greedy decoding would give just these.

    The tokens are forced on ``generate`` one by one, so that policies which look at the last token of the prompt, or at
    the row that predicts the next one, see what they see when the model answers.

    Raises:
        ValueError: a continuation is empty.
    """
    forced = [
        _continuation(processor, prompt.text(processor), text)
        for prompt, text in zip(prompts, continuations, strict=True)
    ]
    output = model.generate(
        **collate(processor, prompts).to(model.device, model.dtype),
        max_new_tokens=max(map(len, forced)),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=None,  # no token ends a row: all are given
        pad_token_id=processor.tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([_Force(forced)]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    sums, greedy = [0.0] * len(forced), [True] * len(forced)
    for step, logits in enumerate(output.logits):
        logs = logits.float().log_softmax(-1)
        best = logits.argmax(-1).tolist()
        for row, ids in enumerate(forced):
            if step < len(ids):
                sums[row] += logs[row, ids[step]].item()
                greedy[row] &= best[row] == ids[step]
    return list(zip(sums, greedy, strict=True))


def _continuation(processor: ProcessorMixin, prompt: str, text: str) -> list[int]:
    """Token ids of ``text`` after ``prompt``: a space between them belongs to the first token of the continuation."""
    special = special_tokens_wanted(processor, prompt)
    before = processor.tokenizer(prompt, add_special_tokens=special)["input_ids"]
    whole = processor.tokenizer(prompt + text, add_special_tokens=special)["input_ids"]
    ids: list[int] = whole[len(before) :]
    if not ids:
        raise ValueError(f"The continuation {text!r} has no tokens, so it has no likelihood.")
    return ids


class _Force(LogitsProcessor):
    """Makes the given token of each row the only possible one; rows that have no more repeat their last."""

    def __init__(self, tokens: Sequence[Sequence[int]]):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = [ids[min(self.step, len(ids) - 1)] for ids in self.tokens]
        self.step += 1
        index = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, index, 0.0)
