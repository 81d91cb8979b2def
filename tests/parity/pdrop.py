"""PyramidDrop against its released code: the tokens of every stage, what leaves the decoder, its caches, decoding."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.parity._files import Golden, npz_cases
from tests.parity._given import recorded_model
from vlm_prune import pruned
from vlm_prune.policies.pyramiddrop import PyramidDrop, attention_of_row
from vlm_prune.policies.scores import last_row
from vlm_prune.versions import CACHE, cache_of

cases = npz_cases


@dataclass(frozen=True)
class Watched(PyramidDrop):
    """PyramidDrop that notes the scores of visual rows, and which of them stay, at every cut."""

    def prefill(self, view):
        keep = super().prefill(view)
        paid = attention_of_row(
            view.next_attention(),
            last_row(view.valid, view.visual),
            view.hidden.dtype if self.compat else None,
        )
        batch = len(keep)
        SEEN.append((paid[view.visual].view(batch, -1), keep[view.visual].view(batch, -1)))
        return keep


SEEN: list[tuple[torch.Tensor, torch.Tensor]] = []


@torch.no_grad()
def check(case: Path) -> None:
    golden = Golden(case)
    meta, half = golden.meta, golden.meta["dtype"] != "float32"
    close = {"atol": 2e-2, "rtol": 2e-2} if half else {"atol": 1e-4, "rtol": 1e-4}
    model, inputs = recorded_model(golden, meta["image_start"])
    full = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(full[:, -4:].float(), golden["full_last_hidden_tail"].float(), **close)

    layers, ratios = tuple(meta["layer_list"]), tuple(meta["image_token_ratio_list"][1:])
    # averaged over heads in full, scores of half precision may rank otherwise
    for compat in ("official",) if half else ("official", None):
        SEEN.clear()
        with pruned(model, Watched(layers=layers, ratios=ratios, compat=compat)):
            output = model.model(**inputs)
            images = check_stages(golden, **close)
            check_prefill(golden, model, output, images, **close)
            check_decode(golden, model, output, **close)


def check_stages(golden: Golden, **close: float) -> torch.Tensor:
    """Scores and choices at each cut; returns the tokens of each image that are left: ``(batch, tokens)``."""
    batch = len(golden["inputs_embeds"])
    left = torch.arange(golden.meta["n_visual"]).expand(batch, -1)
    for number, (paid, keep) in enumerate(SEEN):
        if f"stage{number}_score" in golden:
            torch.testing.assert_close(paid[0].float(), golden[f"stage{number}_score"].float(), **close)
        kept = keep.nonzero()[:, 1].view(batch, -1)
        assert torch.equal(kept, golden[f"stage{number}_kept_rel"].view(batch, -1)), f"stage {number}"
        left = left.gather(1, kept)
        assert torch.equal(left, golden[f"stage{number}_kept_abs"].view(batch, -1)), f"stage {number}"
    assert f"stage{len(SEEN)}_kept_rel" not in golden
    return left


def check_prefill(golden: Golden, model, output, images: torch.Tensor, **close: float) -> None:
    hidden, count = output.last_hidden_state, golden.meta["n_visual"]
    for b, start in enumerate(golden.meta["image_start"]):
        after = torch.arange(start + count, hidden.shape[1])
        rows = torch.cat([torch.arange(start), images[b] + start, after])
        torch.testing.assert_close(hidden[b, rows].float(), golden["last_hidden"][b].float(), **close)
        logits = hidden[b, rows].float() @ golden["lm_head"].float().T
        torch.testing.assert_close(logits, golden["logits"][b].float(), **close)
    assert model.pruning.receipt.decoder_tokens == golden["rows_per_layer"].tolist()
    layers = cache_of(output).layers
    assert [layer.keys.shape[2] for layer in layers] == golden["cache_len_prefill"].tolist()


def check_decode(golden: Golden, model, output, **close: float) -> None:
    """Every layer goes on counting its own rows."""
    for step, wanted in zip(golden["decode_embeds"], golden["decode_hidden"], strict=True):
        output = model.model(inputs_embeds=step.to(model.dtype)[:, None], **{CACHE: cache_of(output)})
        torch.testing.assert_close(output.last_hidden_state[:, 0].float(), wanted.float(), **close)
    lengths = [layer.keys.shape[2] for layer in cache_of(output).layers]
    assert lengths == golden["cache_len_after_decode"].tolist()
