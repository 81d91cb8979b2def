"""A policy's `modulate` at work inside a stock language model, without the engine.

The golden cases of the modulation papers are bare decoders fed with embeddings: no tower, and nothing to prune. A
`Driver` opens attention sites for the time of a forward and asks the policy what the engine would ask it.
"""

import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import LlamaConfig

from vlm_prune.contract.views import ModulateView
from vlm_prune.sites import Site
from vlm_prune.versions import CACHE, cache_of


def stock_model(cls, golden, prefix="sd."):
    """A stock model of class ``cls`` with a golden file's config and weights."""
    model = cls(LlamaConfig(**json.loads(str(golden.arrays["cfg"])))).eval()
    missing, unexpected = model.load_state_dict(golden.prefixed(prefix), strict=False)
    assert not [name for name in missing if "embed_tokens" not in name]
    assert not [name for name in unexpected if "rotary_emb" not in name]
    return model


@dataclass
class Driver:
    """Runs a stock Llama with a policy's modulation.

    ``visual`` ``(batch, prompt)`` marks visual tokens, ``carry`` are values ``(batch, prompt)`` for them; ``text_only``
    maps layers to head outputs. ``heads`` collects the last row's stock head outputs of every layer.
    """

    model: torch.nn.Module
    policy: object = None
    visual: torch.Tensor | None = None
    carry: dict = field(default_factory=dict)
    text_only: dict = field(default_factory=dict)

    def __post_init__(self):
        self.decoder = getattr(self.model, "model", self.model)
        depth = len(self.decoder.layers)
        self.layers = set(self.policy.modulate_layers(depth)) if self.policy else set()
        self.hidden, self.state, self.kept, self.heads, self.past = {}, {}, {}, {}, None

    @contextmanager
    def _installed(self):
        with ExitStack() as stack:
            for number, layer in enumerate(self.decoder.layers):
                hook = layer.register_forward_pre_hook(
                    lambda _, args, n=number: self.hidden.update({n: args[0]})
                )
                stack.callback(hook.remove)
                stack.callback(Site(layer.self_attn, number, lambda *_: None, self._edit).close)
            yield

    @torch.no_grad()
    def __call__(self, embeds, attention_mask=None):
        """One forward of ``embeds`` ``(batch, length, channels)`` after what was passed before; the model's output.

        ``attention_mask`` covers the whole sequence.
        """
        self.valid, self.prefill = attention_mask, self.past is None
        with self._installed():
            output = self.model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=self._positions(embeds, attention_mask),
                **{CACHE: self.past},
                use_cache=True,
            )
        self.past = cache_of(output)
        return output

    def _positions(self, embeds, mask):
        past = self.past.get_seq_length() if self.past is not None else 0
        if mask is None:
            return torch.arange(past, past + embeds.shape[1])[None]
        return (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]

    def _edit(self, layer, query, key, value, scaling, output):
        keys = key.shape[2]
        self.heads[layer] = output[:, -1]
        if layer not in self.layers:
            return output
        known = self.kept.setdefault(layer, {"visual": self.visual, **self.carry})
        known = {name: pad(x, (0, keys - x.shape[1])) for name, x in known.items()}
        view = ModulateView(
            layer=layer,
            depth=len(self.decoder.layers),
            query=query,
            key=key,
            value=value,
            scaling=scaling,
            output=output,
            hidden=self.hidden[layer],
            visual=known["visual"],
            valid=None if self.valid is None else self.valid.bool(),
            prefill=self.prefill,
            state=self.state.setdefault(layer, {}),
            carry={name: x for name, x in known.items() if name != "visual"},
            text_only=self.text_only.get(layer),
        )
        edited = self.policy.modulate(view)
        self.kept[layer] = {"visual": known["visual"], **view.carry}
        return output if edited is None else edited
