"""Guided decoding: a policy changes the logits of a model, often by comparing them with those of a second pass.

A second pass runs the same model, with all its policies, on the same text and another image, or none. It runs before
each forward, and its cache is a `Twin` of the caller's, so it follows beams, crops and copies of that cache.
All of this happens in the model's forward, not in ``generate``: sampling, beams, drafts and custom loops all see guided
logits.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from ..cache.layers import Twin, attach_twin, kv_bytes, twin_of
from ..cache.masks import is_prepared, padding_mask
from ..call import flops, stream
from ..call.encode_call import ride_of
from ..contract.anatomy import Anatomy
from ..contract.policy import Policy
from ..contract.views import GuideView
from ..errors import PolicyError, UnsupportedCallError
from ..versions import CACHE, cache_of
from .checks import TOKEN_TYPES

PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""Arguments that hold pixels, each with the argument that gives the grid of each image where pixels are packed."""

KEPT = ("use_cache", "logits_to_keep", "return_dict")
"""Arguments of a forward that are passed on to a second pass without images."""

_under_way: ContextVar[tuple[Guided, ...]] = ContextVar("vlm_prune_guided", default=())


@dataclass(eq=False)
class Guided:
    """One guided forward.

    Attributes:
        owner: the `Guidance` of the model.
        after: bool ``(batch, tokens)``, the rows of this call to guide; ``None`` guides none.
        second: logits of the second pass; its last rows correspond to those of this call.
        twin: the state of these sequences, to be attached to the caller's cache.
        second_pass: True while that pass is running.
        shows_hidden: whether the caller asked for hidden states.
    """

    owner: Any
    after: torch.Tensor | None = None
    second: torch.Tensor | None = None
    twin: Twin | None = None
    second_pass: bool = False
    shows_hidden: bool = False
    cost: dict[str, int] = field(default_factory=dict)


class Guidance:
    """The hooks on a model for the policy that guides its decoding."""

    def __init__(self, model: Any, anatomy: Anatomy, policy: Policy, session: Any):
        self.session = session  # first: a deep copy gets here before any other part, and copies in this order
        self.model, self.anatomy, self.policy = model, anatomy, policy
        self.early = tuple(sorted(policy.early_layers(len(anatomy.decoder_layers))))
        self.arguments = tuple(inspect.signature(model.forward).parameters)

    @property
    def about_text(self) -> bool:
        """Whether a second pass without images is under way in this thread."""
        return self.policy.second_pass == "text" and _inside(self)

    def install(self, handles: list[Any]) -> None:
        """Register the hooks; the first has to run before all others of the model."""
        handles.append(self.model.register_forward_pre_hook(self.enter, with_kwargs=True))
        handles.append(self.model.register_forward_hook(self.leave, with_kwargs=True, always_call=True))

    # --- before the forward ---

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run the second pass, and request the hidden states that the policy reads of the first."""
        if _inside(self):
            return None
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        by_name = given.get("return_dict")
        if not (getattr(self.model.config, "return_dict", True) if by_name is None else by_name):
            raise UnsupportedCallError(
                f"return_dict=False: {self.policy.name} needs the output by name. Leave it out."
            )
        guided = Guided(self)
        _under_way.set((*_under_way.get(), guided))
        rows = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if rows is None:
            return None  # stock code raises an error for this
        images, twin = self._images(given, rows), twin_of(cache_of(given))
        if images is not None or twin is not None:
            active = (
                rows.new_zeros(len(rows), dtype=torch.bool) if twin is None else twin.active.to(rows.device)
            )
            active = active if images is None else active | images.any(-1)
            guided.after = self._after(images, rows) & active[:, None]
            guided.twin = Twin(active)
            if self.policy.second_pass is not None:
                self._second(guided, given, images, twin)
        if not self.early or guided.after is None:
            return None
        guided.shows_hidden = bool(given.get("output_hidden_states"))
        return args, {**kwargs, "output_hidden_states": True}

    def _images(self, given: Mapping[str, Any], rows: torch.Tensor) -> torch.Tensor | None:
        """The rows of a call that hold visual tokens, bool ``(batch, length)``; ``None`` if there are none."""
        features = [x for x in (given.get("mm_encoder_outputs") or {}).values() if x is not None]
        pixels = [name for name in PIXELS if given.get(name) is not None]
        if not (features or pixels):
            if rows.dim() == 3 and rows.shape[1] > 1:
                raise UnsupportedCallError(
                    f"inputs_embeds of {rows.shape[1]} tokens without pixel_values: {self.policy.name} guides what "
                    "follows an image, and cannot tell which of these are visual tokens, or whether there are any. "
                    "Pass input_ids and pixel_values instead."
                )
            return None
        if rows.dim() == 3:
            masks = self.session.placeholders(self.anatomy.base, rows)
        else:
            masks = [rows == token for token in self.anatomy.image_tokens]
        return torch.stack(masks).any(0) if masks else None

    def _after(self, images: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """Rows that come after the last visual token: bool ``(batch, length)``."""
        if images is None:
            return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        return images.flip(-1).cumsum(-1).flip(-1) == 0

    # --- the second pass ---

    def _second(
        self, guided: Guided, given: dict[str, Any], images: torch.Tensor | None, twin: Twin | None
    ) -> None:
        """Run the model a second time, and leave all other state as it is."""
        guided.second_pass = True
        receipt = self.session.receipt
        try:
            self._run_second(guided, given, images, twin)
        finally:
            guided.second_pass = False
            if receipt is not None:
                self.session.publish(receipt)

    def _run_second(
        self, guided: Guided, given: dict[str, Any], images: torch.Tensor | None, twin: Twin | None
    ) -> None:
        cache: Cache | None = cache_of(given)
        if isinstance(given.get("logits_to_keep"), torch.Tensor):
            raise UnsupportedCallError(
                f"logits_to_keep is a tensor: {self.policy.name} compares the last rows of two passes. Give it as a "
                "number, or leave it out."
            )
        use_cache = given.get("use_cache", getattr(self.anatomy.decoder.config, "use_cache", True))
        held = None if twin is None else twin.cache
        if held is None and (cache is not None or use_cache):
            # rows before the first image are the same in both passes
            before = cache is not None and int(cache.get_seq_length()) > 0
            held = copy.deepcopy(cache) if before else DynamicCache(config=self.anatomy.decoder.config)
        known = None if twin is None else twin.mask
        real = self._mask(given, known)
        if self.policy.second_pass == "image":
            asked = self._about_other(given, real)
        else:
            asked, real = self._about_text(given, images, known, real, held)
        name = CACHE if CACHE in self.arguments else "past_key_values"
        with torch.no_grad():
            output = self.model(**asked, **{name: held})
        guided.second = output.logits
        if guided.twin is not None:
            guided.twin.cache, guided.twin.mask = held, real
        if images is not None:
            guided.cost = self._cost(asked, output, held)

    def _mask(self, given: dict[str, Any], known: torch.Tensor | None) -> torch.Tensor | None:
        """The padding mask of a call, also where ``generate`` has prepared another from it for a static cache."""
        mask: torch.Tensor | None = given.get("attention_mask")
        rows = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        if mask is None or not is_prepared(mask):
            return mask
        if rows.shape[1] == 1:  # a decoding step: only prompts are padded
            return None if known is None else torch.nn.functional.pad(known.to(rows.device), (0, 1), value=1)
        return padding_mask(mask, cache_of(given), blocks=False)

    def _about_other(self, given: dict[str, Any], mask: torch.Tensor | None) -> dict[str, Any]:
        """The arguments of a pass with distorted images, padded as ``mask`` says."""
        left_out = ("labels", "output_hidden_states", "past_key_values", CACHE)
        asked = {name: x for name, x in given.items() if name not in left_out}
        for name, grid in PIXELS.items():
            if asked.get(name) is not None:
                asked[name] = self._distorted(asked[name], asked.get(grid))
        if encoded := {k: x for k, x in (given.get("mm_encoder_outputs") or {}).items() if x is not None}:
            asked["mm_encoder_outputs"] = self._encoded(given, encoded)
        return {**asked, "attention_mask": mask}

    def _distorted(self, pixels: Any, grid: torch.Tensor | None) -> Any:
        """Distorted pixels: image by image in a packed tensor ``(patches, values)``, tile by tile otherwise."""
        if isinstance(pixels, list | tuple):
            return type(pixels)(self._distorted(x, None) for x in pixels)
        if pixels.dim() == 2:
            sizes = [len(pixels)] if grid is None else grid.prod(-1).tolist()
            return torch.cat([self.policy.distort(x[None])[0] for x in pixels.split(sizes)])
        tiles = pixels.flatten(0, -4) if pixels.dim() > 3 else pixels
        return self.policy.distort(tiles).view_as(pixels)

    def _encoded(self, given: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Any]:
        """What the feature methods return for distorted copies of the images that ``encoded`` came from."""
        found = {}
        for kind, output in encoded.items():
            ride = ride_of(output)
            if ride is None or ride.asked is None:
                raise UnsupportedCallError(
                    "The image features of this call are not all that the tower of this pruned model returned: chunked "
                    f"prefill takes a part, or they come from elsewhere. {self.policy.name} has to run the tower again "
                    "on another image. Leave prefill_chunk_size out, or encode the images with the pruned model."
                )
            method, arguments = ride.asked
            other = {**arguments}
            for name, grid in PIXELS.items():
                if other.get(name) is not None:
                    other[name] = self._distorted(other[name], other.get(grid))
            again = getattr(self.anatomy.base, method)(**other)
            copies = len(output.pooler_output) // len(again.pooler_output)
            found[kind] = again if copies == 1 else self._repeated(given, kind, again, copies)
        return found

    def _repeated(self, given: dict[str, Any], kind: str, output: Any, copies: int) -> Any:
        """Features of a batch, repeated as ``generate`` repeats them for beams or several samples."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        repeated = self.model._expand_multimodal_outputs(
            None if ids is None else ids[::copies],
            {kind: output},
            expand_size=copies,
            inputs_embeds=None if embeds is None else embeds[::copies],
        )
        return repeated[kind]

    def _about_text(
        self,
        given: dict[str, Any],
        images: torch.Tensor | None,
        known: torch.Tensor | None,
        mask: torch.Tensor | None,
        held: Cache | None,
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """The arguments of a pass without images, and the padding mask after it."""
        asked = {name: given[name] for name in KEPT if given.get(name) is not None}
        rows = {
            name: given[name]
            for name in ("input_ids", "inputs_embeds", *TOKEN_TYPES)
            if given.get(name) is not None
        }
        some = next(iter(rows.values()))
        batch, length = some.shape[:2]
        now = (
            some.new_ones(batch, length, dtype=torch.int64)
            if mask is None
            else mask[:, -length:].to(torch.int64)
        )
        if images is not None:  # text rows move to the end, where the rows to compare are
            left = ~images
            order = left.to(torch.int8).argsort(dim=-1, stable=True)[:, -int(left.sum(-1).max()) :]
            rows = {name: stream.compact(x, order) for name, x in rows.items()}
            now = (now * left).gather(1, order)
        if known is None and held is not None and (before := int(held.get_seq_length())):
            known = now.new_ones(batch, before) if mask is None else mask[:, :before].to(torch.int64)
        real = now if known is None else torch.cat([known.to(now.device), now], 1)
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -now.shape[1] :]
        return {**asked, **rows, "attention_mask": real, "position_ids": positions}, real

    def _cost(self, asked: dict[str, Any], output: Any, held: Cache | None) -> dict[str, int]:
        """Operations and KV bytes of the second pass over a prompt."""
        if self.policy.second_pass == "image" and (receipt := self.session.receipt) is not None:
            operations = receipt.flops
        else:
            rows, depth = asked["position_ids"], len(self.anatomy.decoder_layers)
            operations = len(rows) * flops.decoder_flops(self.anatomy.decoder.config, [rows.shape[1]] * depth)
        return {"guide_flops": operations, "guide_kv_bytes": 0 if held is None else kv_bytes(held)[0]}

    # --- after the forward ---

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the stock logits by guided ones; also called after an exception."""
        if _inside(self):
            return None
        guided = _pop(self)
        if guided is None or output is None:
            return None
        cache: Cache | None = cache_of(output)
        if guided.twin is not None and cache is not None:
            attach_twin(cache, guided.twin)
        if guided.cost and (receipt := self.session.receipt) is not None:
            receipt.guide_flops, receipt.guide_kv_bytes = (
                guided.cost["guide_flops"],
                guided.cost["guide_kv_bytes"],
            )
        hidden = output.hidden_states if self.early else None
        if self.early and not guided.shows_hidden:
            output.hidden_states = None
        if guided.after is None:
            return output
        logits, second = output.logits, guided.second
        count = logits.shape[1] if second is None else min(logits.shape[1], second.shape[1])
        after = guided.after.to(logits.device)
        if self.early and count > 1:  # the head is costly: compute only the rows that are guided
            count = min(count, max(int(after.sum(-1).max()), 1))
        old = logits[:, -count:]
        early: Mapping[int, torch.Tensor] = {}
        if hidden is not None:
            early = _Lazy(self.early, lambda layer: self._read(hidden[layer][:, -count:]).to(old.device))
        view = GuideView(
            old.float(), None if second is None else second[:, -count:].to(old.device).float(), early
        )
        new = self.policy.guide(view).to(old.dtype)
        new = torch.where(after[:, -count:, None], new, old)
        output.logits = new if count == logits.shape[1] else torch.cat([logits[:, :-count], new], 1)
        return output

    def _read(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's logits for ``hidden`` ``(batch, rows, channels)``, in fp32, scaled as stock code does."""
        head, config = self.model.get_output_embeddings(), self.anatomy.decoder.config
        logits: torch.Tensor = head(hidden.to(next(head.parameters()).device)).float()
        logits = (
            logits
            * (getattr(config, "logit_scale", None) or 1)
            / (getattr(config, "logits_scaling", None) or 1)
        )
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits


class _Lazy(Mapping[int, torch.Tensor]):
    """A mapping whose values are computed on access, and not kept."""

    def __init__(self, keys: tuple[int, ...], compute: Callable[[int], torch.Tensor]):
        self._keys, self._compute = keys, compute

    def __getitem__(self, key: int) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._compute(key)

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def guiding(policies: tuple[Policy, ...]) -> Policy | None:
    """The one of ``policies`` that guides decoding, if any does. Raises if several do."""
    found = [policy for policy in policies if policy.acts.guides]
    if len(found) > 1:
        raise PolicyError(
            f"{' and '.join(policy.name for policy in found)} both guide decoding: choose one of them, composed with "
            "policies of other stages."
        )
    return found[0] if found else None


def _inside(owner: Guidance) -> bool:
    """Whether a second pass of ``owner`` is running."""
    return any(guided.owner is owner and guided.second_pass for guided in _under_way.get())


def _pop(owner: Guidance) -> Guided | None:
    """End the innermost guided forward of ``owner``."""
    calls = _under_way.get()
    for number in reversed(range(len(calls))):
        if calls[number].owner is owner:
            _under_way.set(calls[:number])
            return calls[number]
    return None


def forget_guided(owner: Guidance) -> None:
    """Discard the forwards of ``owner`` that an interrupt may have left open in this thread."""
    _under_way.set(tuple(guided for guided in _under_way.get() if guided.owner is not owner))
