"""Flash attention through transformers' own dispatch code, with kernels in torch beneath: turns equal those of sdpa."""

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

from vlm_prune import pruned
from vlm_prune.versions import CACHE, cache_of

from .models import make, prompt

PROMPTS = {"one": [(3, -1, 5)], "ragged": [(3, -1, 5), (2, -1, 1, -1, 4)], "ends with an image": [(3, -1)]}


def attend(query, key, value, scale, causal):
    """One sequence, ``(rows, heads, head_dim)``; the last query and the last key are the same token."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    if causal:
        rows, keys = scores.shape[1:]
        late = torch.arange(keys) > torch.arange(rows)[:, None] + keys - rows
        scores = scores.masked_fill(late, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **kwargs):
    return torch.stack([attend(*x, softmax_scale, causal) for x in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), **kwargs,
):  # fmt: skip
    ends = zip(cu_seqlens_q.tolist()[:-1], cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist()[:-1],
               cu_seqlens_k.tolist()[1:], strict=True)  # fmt: skip
    return torch.cat([attend(q[a:b], k[c:d], v[c:d], softmax_scale, causal) for a, b, c, d in ends])


@pytest.fixture
def kernels(monkeypatch):
    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    found = flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: (found, (process, dict)))


def conversation(model, layout):
    """The last logits of three turns: two with images, one with text."""
    cache, masks, seen = None, [], []
    for seed in range(3):
        turn = prompt("llava", layout if seed < 2 else [(4,)] * len(layout), seed=seed)
        masks.append(turn.mask)
        inputs = {**turn.inputs, "attention_mask": torch.cat(masks, 1)}
        output = model(**inputs, **({} if cache is None else {CACHE: cache}), use_cache=True)
        cache = cache_of(output)
        seen.append(output.logits[:, -1])
    return torch.stack(seen)


@pytest.mark.parametrize("layout", PROMPTS)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("policy", ["uniform", "flowcut", "fastv"])
def test_conversations_are_those_of_sdpa(kernels, policy, positions, layout):
    settings = {"k": 1} if policy == "fastv" else {}
    model, found = make("llava"), {}
    for kind in ("sdpa", "flash_attention_2"):
        model.model.language_model.config._attn_implementation_internal = kind
        with torch.no_grad(), pruned(model, policy, ratio=0.3, positions=positions, **settings):
            found[kind] = conversation(model, PROMPTS[layout])
            dense = {**prompt("llava", PROMPTS[layout]).inputs, "use_cache": False}
            found[kind] = torch.cat([found[kind], model(**dense).logits[None, :, -1]])
    torch.testing.assert_close(found["flash_attention_2"], found["sdpa"], atol=1e-4, rtol=1e-4)


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors."""
    pytest.importorskip("triton")
    from vlm_prune.kernels import ops

    at, order = torch.zeros(1), []

    class Device:
        def __init__(self, x):
            order.append(("device of", x is at))

        def __enter__(self):
            order.append("there")

        def __exit__(self, *_):
            order.append("back")

    monkeypatch.setattr(torch.cuda, "device_of", Device)
    assert ops.on_its_device(lambda x, y: order.append("launch") or y)(at, 5) == 5
    assert order == [("device of", True), "there", "launch", "back"]
