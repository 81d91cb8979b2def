"""Dropping tokens between decoder layers equals a decoder that is walked layer by layer with the rows taken out."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from vlm_prune import Policy, prune, unprune
from vlm_prune.versions import CACHE, cache_of

IMAGE, UNITS = 60, 16


@dataclass(frozen=True)
class DropAt(Policy):
    """Keeps, after each of ``layers``, every ``stride``-th of the visual tokens still there, by content."""

    name: ClassVar[str] = "drop-at"
    stages: ClassVar[tuple[str, ...]] = ("prefill",)

    layers: tuple[int, ...] = (0, 2)
    trimmed: tuple[int, ...] = ()
    threshold: float = 0.0

    def prefill_layers(self, depth):
        return self.layers

    def evicted_layers(self, depth):
        return self.trimmed

    def evict(self, view):
        return view.remaining

    def prefill(self, view):
        return view.hidden[..., 0] > self.threshold


def make(text: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    common = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[text](**common)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=4, projection_dim=8,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=config, image_token_id=IMAGE)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
    return model


def prompt(before: int, after: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(1, IMAGE, (before + after,), generator=g).tolist()
    ids = torch.tensor([text[:before] + [IMAGE] * UNITS + text[before:]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=g)}


@torch.no_grad()
def walk(model, inputs, policy, steps):
    """Greedy ids and the last logits of the prompt, recomputed from the start at every step, without a cache."""
    decoder = model.model.language_model
    features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    ids, first, new = inputs["input_ids"], None, []
    kept: dict[int, torch.Tensor] = {}
    for _ in range(steps):
        h = model.get_input_embeddings()(ids)
        visual = (ids == IMAGE)[0]
        h = h.masked_scatter((ids == IMAGE)[..., None], features)
        position = torch.arange(ids.shape[1])[None]
        for i, layer in enumerate(decoder.layers):
            n = h.shape[1]
            mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
            h = layer(h, attention_mask=mask, position_ids=position,
                      position_embeddings=decoder.rotary_emb(h, position))  # fmt: skip
            if i in policy.layers:
                if i not in kept:
                    kept[i] = h[0, :, 0] > policy.threshold
                keep = ~visual
                keep[: len(kept[i])] |= kept[i]
                h, visual, position = h[:, keep], visual[keep], position[:, keep]
                if policy.positions == "compact":
                    position = torch.arange(h.shape[1])[None]
        logits = model.lm_head(decoder.norm(h))[0, -1]
        first = logits if first is None else first
        new.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
    return first, new


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_walk(text, positions, implementation):
    model, inputs = make(text), prompt(3, 5, 1)
    policy = DropAt(positions=positions)
    logits, ids = walk(model, inputs, policy, 5)
    model.set_attn_implementation(implementation)
    prune(model, policy)
    out = model(**inputs)
    torch.testing.assert_close(out.logits[0, -1], logits, atol=2e-4, rtol=1e-4)
    lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
    assert lengths[0] > lengths[1] == lengths[2] > lengths[3]
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == ids
    assert model.pruning.receipt.decoder_tokens == lengths
    unprune(model)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_batch_equals_singles(positions):
    model = make("qwen2")
    rows = [prompt(3, 5, 1), prompt(1, 9, 2), prompt(2, 4, 3)]
    policy = DropAt(positions=positions)
    prune(model, policy)
    single = [model.generate(**r, max_new_tokens=5, do_sample=False)[0, -5:] for r in rows]
    first = [model(**r).logits[0, -1] for r in rows]
    width = max(r["input_ids"].shape[1] for r in rows)
    ids = torch.stack(
        [torch.nn.functional.pad(r["input_ids"][0], (width - r["input_ids"].shape[1], 0)) for r in rows]
    )
    batch = {
        "input_ids": ids, "attention_mask": (ids != 0).long(),
        "pixel_values": torch.cat([r["pixel_values"] for r in rows]),
    }  # fmt: skip
    torch.testing.assert_close(model(**batch).logits[:, -1], torch.stack(first), atol=2e-4, rtol=1e-4)
    together = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, -5:]
    assert together.tolist() == torch.stack(single).tolist()
    beams = model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=3)[:, -5:]
    alone = [model.generate(**r, max_new_tokens=5, do_sample=False, num_beams=3)[0, -5:] for r in rows]
    assert beams.tolist() == torch.stack(alone).tolist()


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_second_turn_equals_fresh(positions):
    model, inputs = make("llama"), prompt(3, 5, 1)
    prune(model, DropAt(positions=positions))
    first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    reused = model.generate(input_ids=more, **{CACHE: cache_of(first)}, max_new_tokens=4, do_sample=False)
    fresh = model.generate(
        input_ids=more, pixel_values=inputs["pixel_values"], max_new_tokens=4, do_sample=False
    )
    assert reused.tolist() == fresh.tolist()


def test_trimmed_layers_hold_the_survivors_only():
    model, inputs = make("llama"), prompt(3, 5, 1)
    prune(model, DropAt(trimmed=(0, 1, 2)))
    out = model(**inputs)
    lengths = {layer.keys.shape[2] for layer in cache_of(out).layers}
    assert len(lengths) == 1
    assert (
        model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1]
        == inputs["input_ids"].shape[1] + 3
    )


def test_keeping_all_is_bit_identical():
    model, inputs = make("llama"), prompt(3, 5, 1)
    stock = model(**inputs).logits
    prune(model, DropAt(threshold=-torch.inf))
    assert torch.equal(model(**inputs).logits, stock)
