"""What the tests of PAINT, VHR and VAR share: samples, a hand-made attention call, and whole attention maps."""

from dataclasses import replace

import torch

from tests.parity._modulated import Driver
from vlm_prune.contract.views import ModulateView
from vlm_prune.policies.paint import LOCAL, SUMMARY, Paint
from vlm_prune.policies.var import SINKS, VAR
from vlm_prune.policies.vhr import VHR

WIDTH, HEADS, KV_HEADS, DEPTH = 64, 8, 2, 4
DIM = 11
"""The dimension in which planted sinks are massive."""

ACTIVE = {
    "paint": Paint(alpha=0.6, beta=0.3, first_layer=1),
    "vhr": VHR(layers=(1, 2, 3)),
    "var": VAR(tau=4.0, first_layer=1, min_visual_mass=0.05, max_sink_share=0.9),
}


class Sample:
    """A random prompt with its image from ``start`` to ``end``, sinks at its first token and inside the image."""

    def __init__(self, seed, length=20, start=3, end=12):
        generator = torch.Generator().manual_seed(seed)
        self.embeds = torch.randn(1, length, WIDTH, generator=generator)
        self.embeds[:, [0, start + 1], DIM] += 40
        self.steps = torch.randn(3, 1, 1, WIDTH, generator=generator)
        self.visual = torch.zeros(1, length, dtype=torch.bool)
        self.visual[:, start:end] = True
        self.local = torch.rand(1, length, generator=generator) < 0.4
        self.local &= self.visual
        self.summary = self.visual & ~self.local & (torch.rand(1, length, generator=generator) < 0.3)

    def text_heads(self, model):
        text = Driver(model)
        text(self.embeds[:, ~self.visual[0]])
        return text.heads


def driver(model, policy, *samples, side="left"):
    """A driver for a batch of samples padded at one ``side``, its embeddings, and the attention mask."""
    width = max(s.embeds.shape[1] for s in samples)

    def padded(x):
        fill = (width - x.shape[1], 0)
        return torch.nn.functional.pad(
            x, (0,) * (2 * (x.dim() - 2)) + (fill if side == "left" else fill[::-1])
        )

    def batch(name):
        return torch.cat([padded(getattr(s, name)) for s in samples])

    mask = torch.cat([padded(torch.ones(1, s.embeds.shape[1], dtype=torch.long)) for s in samples])
    text = [s.text_heads(model) for s in samples]
    text_only = {layer: torch.cat([heads[layer] for heads in text]) for layer in range(DEPTH)}
    marks = {LOCAL: batch("local"), SUMMARY: batch("summary")}
    return Driver(model, policy, batch("visual"), marks, text_only), batch("embeds"), mask


def outputs(model, policy, *samples, together=False):
    """Hidden states of the prompt's last rows and of three decoding steps: ``(batch, rows, channels)``.

    ``together`` passes the three steps in one call, as draft verification does.
    """
    run, embeds, mask = driver(model, policy, *samples)
    shortest = min(s.embeds.shape[1] for s in samples)
    result = [run(embeds, mask).last_hidden_state[:, -shortest:]]
    steps = [torch.cat([s.steps[i] for s in samples]) for i in range(3)]
    for step in [torch.cat(steps, 1)] if together else steps:
        mask = torch.nn.functional.pad(mask, (0, step.shape[1]), value=1)
        result.append(run(step, mask).last_hidden_state)
    return torch.cat(result, 1)


def view(seed=0, batch=2, queries=9, keys=9, kv_heads=KV_HEADS, dtype=torch.float32, **fields):
    """A call with random contents: visual keys 2 to 4, the second sequence begins with two padding keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    visual = torch.zeros(batch, keys, dtype=torch.bool)
    visual[:, 2:5] = True
    valid = torch.ones_like(visual)
    valid[1:, :2] = False
    hidden = normal(batch, queries, WIDTH)
    for token in {0, 2, 3} & set(range(queries)):  # where key 0 is padding, 2 is the first token
        hidden[:, token, DIM] += 40
    query, key = normal(batch, HEADS, queries, 8), normal(batch, kv_heads, keys, 8)
    local, summary = torch.zeros_like(visual), torch.zeros_like(visual)
    local[:, 2:4], summary[:, 4] = True, True
    made = ModulateView(
        layer=2,
        depth=DEPTH,
        query=query,
        key=key,
        value=normal(batch, kv_heads, keys, 8),
        scaling=8**-0.5,
        output=torch.zeros(0),
        hidden=hidden,
        visual=visual,
        valid=valid,
        prefill=True,
        state={},
        carry={LOCAL: local, SUMMARY: summary},
        text_only=normal(batch, HEADS, 8),
    )
    made = replace(made, **fields)
    probabilities = naive_map(made)
    return replace(made, output=heads_of(probabilities, made).to(dtype))


def naive_map(view, logit_gain=None):
    """The whole map ``(batch, heads, queries, keys)``; ``logit_gain`` ``(batch, keys)`` lifts its last row."""
    key = view.key.double().repeat_interleave(view.query.shape[1] // view.key.shape[1], 1)
    logits = view.query.double() @ key.mT * view.scaling
    if logit_gain is not None:
        logits[:, :, -1] += logit_gain[:, None] * logits[:, :, -1].abs()
    seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(logits.shape[3] - logits.shape[2])
    seen = seen & view.valid[:, None, None]
    return logits.masked_fill(~seen, torch.finfo(torch.float64).min).softmax(-1)


def heads_of(probabilities, view):
    value = view.value.double().repeat_interleave(view.query.shape[1] // view.value.shape[1], 1)
    return (probabilities @ value).transpose(1, 2)


def naive_var(probabilities, view, policy):
    """VAR in loops, after the paper's formulas."""
    result, sinks = probabilities.clone(), view.carry[SINKS].bool()
    for b, h, q in torch.cartesian_prod(*map(torch.arange, probabilities.shape[:3])).tolist():
        weights = result[b, h, q]
        image, receivers = weights[view.visual[b]].sum(), view.visual[b] & ~sinks[b]
        inside = weights[view.visual[b] & sinks[b]].sum()
        looks = image >= policy.min_visual_mass and inside <= policy.max_sink_share * image
        if q < 5 or not looks or not receivers.any():
            continue
        budget = policy.move * weights[sinks[b]].sum()
        share = weights[receivers] / weights[receivers].sum()
        weights[sinks[b]] *= 1 - policy.move
        weights[receivers] += budget * share
    return result


def gain_of(policy, view):
    return policy.alpha * view.carry[LOCAL].double() + policy.beta * view.carry[SUMMARY].double()
