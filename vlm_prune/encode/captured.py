"""The tower part of a call, captured: a feature method with tower and projector, and the choices of policies there.

A replay computes the features. What the engine knows of the tiles (`EncodeCall`, with the receipt) is copied from the
recorded call, so everything after it works as after an eager one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from ..call.encode_call import Encoding, encoding, let_ride
from ..call.forward_call import check_rows
from ..call.receipt import TOWER_PART
from ..call.timing import Stopwatch
from ..capture.copies import rebuilt
from ..capture.device import NotCapturable
from ..capture.graphs import Graphs, Recorded
from ..capture.region import Region

MOST_PIXELS = 32 * 3 * 336 * 336
"""The most pixel values with which a call is captured. A graph holds the features that the tower makes of them."""


class CapturedTower:
    """Computes feature methods of one model with ``graphs``.

    ``roots`` are the modules that compute, ``base`` is the module with these methods, ``own`` are the ids of our hooks.
    """

    def __init__(self, graphs: Graphs, session: Any, roots: list[nn.Module], base: nn.Module, own: set[int]):
        self.graphs, self.session = graphs, session
        self.region = Region(roots, own, base)

    def run(
        self, method: str, stock: Callable[..., Any], given: Mapping[str, Any], under_way: Encoding
    ) -> Any:
        """What ``stock(**given)`` returns, with holes; ``under_way`` ends up as after the stock method.

        Raises:
            NotCapturable: nothing has been computed, and it has to run eagerly.
        """
        version = self.region.check()
        inputs, values, key = split_arguments(given)
        attention = [
            getattr(getattr(x, "config", None), "_attn_implementation", None) for x in self.region.roots
        ]

        def compute(static: dict[str, torch.Tensor]) -> tuple[Any, Any]:
            with encoding(self.session, under_way.arrangement, once=under_way.once) as recording:
                recording.recording = True
                output = stock(**{**values, **static})
            call = recording.ended if recording.ended is not None else recording.call
            if call is None:
                raise NotCapturable("the method did not go through the vision tower and the projector")
            return output, call

        if (arrangement := under_way.arrangement) is not None:
            # the stock code packs images by these, which come from arguments whose values are in the key
            key = (*key, tuple(arrangement.images))
        device = next(iter(inputs.values())).device
        stopwatch = Stopwatch(device)

        def take(recorded: Recorded) -> tuple[Any, Any]:
            mine = {id(static): inputs[name] for name, static in recorded.inputs.items()}
            made: tuple[Any, Any] = rebuilt(recorded.result, mine, device)
            return made

        full = (TOWER_PART, version, method, *attention, *key)
        output, call = self.graphs.run(full, inputs, compute, take)
        call.stopwatch, call.receipt._tower_ms = stopwatch, stopwatch.stop()
        if hasattr(output, "keys"):
            let_ride(output, call)
        if arrangement is None:
            under_way.done = under_way.once
        else:
            if under_way.forward is not None:
                check_rows(under_way.forward, [span.rows for span in call.spans])
            under_way.call = call
        return output, call


def split_arguments(
    given: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any], tuple[Hashable, ...]]:
    """The arguments that a graph reads at each replay, the other arguments, and the key that identifies these.

    Integers such as the sizes of images decide shapes, so a graph holds for their values alone: they are copied to the
    host, where stock code reads them anyway.

    Raises:
        NotCapturable: an argument is of a type that can be neither.
    """
    inputs: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    key: list[Hashable] = []
    for name, x in given.items():
        if name in ("output_hidden_states", "output_attentions") and x:
            raise NotCapturable(f"{name} is asked for")
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            inputs[name] = x
            continue
        if isinstance(x, torch.Tensor):
            x = x.cpu()
            key.append((name, x.shape, x.dtype, tuple(x.flatten().tolist())))
        else:
            key.append((name, _frozen(name, x)))
        values[name] = x
    if not inputs:
        raise NotCapturable("it gets no pixels as a tensor")
    if (numbers := sum(x.numel() for x in inputs.values())) > MOST_PIXELS:
        raise NotCapturable(
            f"{numbers} pixel values keep the device busy anyway, and a graph would hold their features"
        )
    if len({x.device for x in inputs.values()}) > 1:
        raise NotCapturable("its inputs are on several devices")
    return inputs, values, tuple(key)


def _frozen(name: str, x: Any) -> Hashable:
    if x is None or isinstance(x, bool | int | float | str | torch.dtype):
        return x
    if isinstance(x, list | tuple):
        return tuple(_frozen(name, item) for item in x)
    raise NotCapturable(f"{name} is a {type(x).__name__}")
