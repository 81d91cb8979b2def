"""No attention map is ever built, and the largest tensors grow with the number of tokens, not with its square."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import FAMILIES, IMAGE, make
from tests.reference import POLICIES, budget
from vlm_prune import pruned


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, and which one it was."""

    def __init__(self):
        super().__init__()
        self.numel, self.name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            # a view costs nothing: count storage, not shape
            if isinstance(tensor, torch.Tensor):
                numel = tensor.untyped_storage().nbytes() // tensor.element_size()
                if numel > self.numel:
                    self.numel, self.name = numel, f"{func}: {tuple(tensor.shape)}"
        return output


def widest(family, policy, tiles, size, attention="sdpa"):
    """The largest tensor of tower and prefill for tiles of ``size`` pixels, in a model of hardly any width."""
    thin = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 4}
    model = make(family, attention, size=size, **thin)
    image = torch.full((1, model.config.image_seq_length * tiles), IMAGE)
    ids = torch.cat([torch.full((1, 3), 5), image, torch.full((1, 4), 6)], 1)
    contrast = torch.tensor([0.2, 3.0])[:tiles, None, None, None]
    pixels = torch.randn(tiles, 3, size, size, generator=torch.Generator().manual_seed(0)) * contrast
    largest = Largest()
    with pruned(model, policy, **budget(policy)), largest:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, logits_to_keep=1)
    return largest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
@pytest.mark.parametrize("tiles", [1, 2])
@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_tokens(tiles, policy, family):
    patches = 64 * 64
    largest = widest(family, policy, tiles, size=256)
    # the decoder's MLP, the widest, has 48 numbers a token
    assert largest.numel <= 64 * tiles * patches < patches**2 / 8, largest.name


@torch.no_grad()
def test_this_would_notice_an_attention_map():
    patches = 32 * 32
    assert widest("llava", "flowcut", 1, size=128, attention="eager").numel >= patches**2
