"""How a bad call has to fail."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from torch import nn

from tests.models import fingerprint


@contextmanager
def refuses(model, error, *words):
    """The block raises ``error`` with all ``words`` in its message, computes nothing and changes nothing."""
    ran: list[str] = []
    kinds = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding)
    handles = [
        m.register_forward_pre_hook(lambda m, _: ran.append(type(m).__name__))
        for m in model.modules()
        if isinstance(m, kinds)
    ]
    before = fingerprint(model)
    with pytest.raises(error) as caught:
        yield
    assert fingerprint(model) == before
    for handle in handles:
        handle.remove()
    assert ran == []
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
