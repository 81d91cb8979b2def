"""One pruned model: its settings, its hooks, and how to undo them. Users see it as ``model.pruning``."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .call.encode_call import ride_of
from .call.forward_call import ForwardCall, begin_forward, current_forward, end_forward, forget_calls
from .call.receipt import MEAN_QUERY, Receipt
from .call.rows import Rows
from .capture.graphs import Graphs
from .composition import Composition
from .config import to_config
from .contract.anatomy import Anatomy, FeatureTower, PackedTower, Tower
from .contract.stages import Stages
from .encode.assembler import FEATURE_METHODS, Assembler, FeatureMethod
from .encode.captured import CapturedTower
from .encode.features import FeatureEncoder
from .encode.fixed import Encoder
from .encode.packed import PackedEncoder
from .errors import StateError, UnsupportedCallError
from .language.captured import CapturedPrefill
from .language.checks import TOKEN_TYPES, brings_features, check_chunk, check_forward, count_placeholders
from .language.decoder import Decoder
from .language.drafts import expect_drafts, take_drafts
from .language.entry import Entry
from .language.guidance import Guidance, forget_guided, guiding
from .language.kinds import check_decoder, mask_maker
from .language.layers import DecoderLayers
from .language.loss import Loss
from .registry import POLICIES, policy_class
from .saving import Saver
from .versions import CHUNKS_BRING_IMAGES, cache_of, takes_encoded

_pruned: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Pruning]] = weakref.WeakKeyDictionary()
"""For each module that has hooks, the pruning that they belong to."""


class Pruning:
    """The pruning of one model: its policies and its hooks.

    Attributes:
        policies: in the order in which they were written, with their settings.
        budget: how many visual tokens they keep. It belongs to the first policy that drops tokens; any other takes
            its own default, as a share of what reaches it.
        family: the model family.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        composition: Composition,
        wrapper: nn.Module | None = None,
        capture: bool = False,
    ):
        check_unshared(anatomy)
        self._model, self._wrapper, self._anatomy, self._composition = model, wrapper, anatomy, composition
        self.policies, self.budget, self.family = composition.policies, composition.budget, anatomy.family
        self._receipts: weakref.WeakKeyDictionary[threading.Thread, Receipt] = weakref.WeakKeyDictionary()
        self._live_rows: weakref.WeakKeyDictionary[threading.Thread, Rows] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []
        self.graphs = Graphs() if capture else None

        tower, projector = anatomy.tower, cast(nn.Module, anatomy.projector)
        self._encoder: Encoder | PackedEncoder | FeatureEncoder
        if isinstance(tower, FeatureTower):
            self._encoder = FeatureEncoder(tower, anatomy.base, composition, self)
        elif isinstance(tower, PackedTower):
            self._encoder = PackedEncoder(tower, projector, composition, self)
        else:
            self._encoder = Encoder(tower, projector, composition, self, anatomy.front)
        if anatomy.features:
            self._encoder.check_shared()
        deepstack = 0 if isinstance(tower, Tower) else len(tower.deepstack)
        check_decoder(anatomy.decoder, composition.positions)
        masks = mask_maker(model)
        layers = DecoderLayers(
            anatomy.decoder, anatomy.decoder_layers, composition, deepstack, self, blocks=masks is not None
        )
        self._layers = layers if layers else None
        entry = None if composition.entry is None else Entry(composition.entry)
        self.marked = not anatomy.computes_on
        self._decoder = Decoder(
            anatomy.decoder,
            len(anatomy.decoder_layers),
            composition.positions,
            self._layers,
            self,
            entry,
            masks,
        )
        # what looks at the prompt in the decoder must see all of it, without drafts after it
        self._reads_prompt = self._layers is not None or entry is not None
        guide = guiding(composition.policies)
        self._guidance = None if guide is None else Guidance(model, anatomy, guide, self)
        self._claim()
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruning:
        """A copy of a pruned model is pruned independently; a copy of one of its parts cannot be.

        Raises:
            StateError: only a part is copied, as PEFT does with ``modules_to_save``.
        """
        if not any(id(x) in memo for x in (self._model, self._wrapper, self._anatomy.base)):
            raise StateError(
                f"A part of a model is being copied that {self.name} prunes (by PEFT's modules_to_save?): copy the "
                "whole model, or unprune(model) first and prune it afterwards."
            )
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        twin._claim()
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Hooks into a model cannot be pickled.

        Raises:
            StateError: always; `copy.deepcopy` does not go through here.
        """
        raise StateError(
            "A pruned model cannot be pickled, as torch.save(model) and multiprocessing would: save it by "
            "model.save_pretrained(folder) and load it by vlm_prune.from_pretrained(folder), or prune it in the other "
            "process. copy.deepcopy(model) works."
        )

    @property
    def name(self) -> str:
        """The policies' names, joined by "+"."""
        return self._composition.name

    def __repr__(self) -> str:
        kept = "all tokens"
        if self._composition.owner is not None:
            per = "image" if self.budget.joint else self._anatomy.tile
            kept = (
                f"ratio={self.budget.ratio:.3g}"
                if self.budget.tokens is None
                else f"tokens={self.budget.tokens}"
            )
            kept += f" per {per}"
        captured = ", captured" if self.graphs is not None else ""
        return f"<Pruning: {self.name} on {self.family}, {kept}, stages {', '.join(self.acts)}{captured}>"

    @property
    def acts(self) -> Stages:
        """The stages in which any of the policies acts."""
        return self._composition.acts

    @property
    def positions(self) -> str:
        """The rule for the RoPE positions of kept tokens: "original" or "compact"."""
        return self._composition.positions

    @property
    def config(self) -> dict[str, Any]:
        """Policies, budget and settings as a JSON-compatible dict: ``prune(other, config=...)`` prunes the same way.

        Raises:
            PolicyError: a policy object is of a class that is not registered, or has a setting that is no plain value.
        """
        return to_config(self._composition, self.graphs is not None)

    def _install(self) -> None:
        base = self._anatomy.base
        # what the user saves is the model, or the PEFT model around it
        self._handles += [Saver(m, self) for m in (self._model, self._wrapper) if m is not None]
        self._handles.append(Loss(self._model, self))
        if self._guidance is not None:
            self._guidance.install(self._handles)
        # older versions of transformers, and some families, encode images inside the first forward
        self._takes_encoded = takes_encoded(self._model)
        if not CHUNKS_BRING_IMAGES:
            self._handles.append(self._model.register_forward_pre_hook(self._see_chunk, with_kwargs=True))
        if self._reads_prompt:
            self._handles.append(self._model.register_forward_pre_hook(self._see_drafts, with_kwargs=True))
        self._handles += [
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            base.register_forward_hook(self._leave, always_call=True),
        ]
        self._encoder.install(self._handles)
        arranging = {feature.method: feature for feature in self._anatomy.features}
        inside = not isinstance(self._encoder, FeatureEncoder)  # which replaces the methods itself
        for method in {*FEATURE_METHODS, *arranging} if inside else ():
            if method in arranging:
                self._handles.append(Assembler(base, arranging[method], self._encoder))
            elif hasattr(base, method):
                self._handles.append(FeatureMethod(base, method, self._encoder))
        self._decoder.install(self._handles)
        if self._layers is not None:
            self._layers.install(self._handles)
        if self.graphs is not None:
            self._capture(self.graphs)

    def _capture(self, graphs: Graphs) -> None:
        """Compute by graphs what can be."""
        tower, own = self._anatomy.tower, {h.id for h in self._handles if isinstance(h, RemovableHandle)}
        if isinstance(self._encoder, Encoder):
            roots = [cast(Any, tower).module, cast(nn.Module, self._anatomy.projector)]
            self._encoder.capture = CapturedTower(graphs, self, roots, cast(Any, self._anatomy.base), own)
        elif isinstance(self._encoder, PackedEncoder):
            self._encoder.capture = "the tower packs images of any size into one sequence"
        else:
            self._encoder.capture = "only what leaves the feature method is known of this family"
        why_not = None if self._layers is None else f"{self.name} acts between the decoder's layers"
        decoder = self._anatomy.decoder
        self._handles.append(CapturedPrefill(decoder, graphs, self, own, why_not))

    def _claim(self) -> None:
        for module in _hooked(self._anatomy):
            _pruned[module] = weakref.ref(self)

    def remove(self) -> None:
        """Undo everything; the model is as it was before."""
        forget_calls(self)
        if self._guidance is not None:
            forget_guided(self._guidance)
        for module in _hooked(self._anatomy):
            _pruned.pop(module, None)
        for handle in self._handles:
            handle.remove()
        sites = self._encoder.sites + (self._layers.sites if self._layers is not None else [])
        for site in sites:
            site.close()
        self._handles.clear()
        if self.graphs is not None:
            self.graphs.clear()
        self._encoder.sites = []
        if self._layers is not None:
            self._layers.sites = []

    # --- the receipt ---

    @property
    def receipt(self) -> Receipt | None:
        """What the last call with images did in this thread; ``None`` before the first."""
        return self._receipts.get(threading.current_thread())

    def new_receipt(self, grids: list[tuple[int, int]], targets: list[int]) -> Receipt:
        """A receipt for a call that begins."""
        return Receipt(
            policy=self.name,
            family=self.family,
            tile=self._anatomy.tile,
            grids=grids,
            targets=targets,
            positions=self._composition.positions,
            tower_size=(self._anatomy.tower.width, self._anatomy.tower.weights),
            stand_in=self._stand_in(),
            text_config=self._anatomy.decoder.config,
        )

    def _stand_in(self) -> str | None:
        """What takes the place of a CLS token that a policy asks for and the tower does not have."""
        asked = any(policy.reads_cls for policy in self.policies)
        return MEAN_QUERY if asked and not self._anatomy.tower.has_cls else None

    def names_late(self) -> list[str]:
        """Policies that can choose after tiles are assembled into images: what an error can offer instead."""
        return [name for name in POLICIES if policy_class(name).late]

    def publish(self, receipt: Receipt) -> None:
        """Make a receipt the current one of this thread."""
        self._receipts[threading.current_thread()] = receipt

    # --- for the loss ---

    def leave_live_rows(self, rows: Rows) -> None:
        """Tell the loss of this forward which rows are left."""
        self._live_rows[threading.current_thread()] = rows

    def take_live_rows(self) -> Rows | None:
        """The rows left by the forward that just ended in this thread; ``None`` if it dropped none."""
        return self._live_rows.pop(threading.current_thread(), None)

    # --- hooks around a forward ---

    def _see_chunk(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse chunks of a prompt whose images an older version of transformers has dropped."""
        check_chunk(self._anatomy, kwargs)

    def _see_drafts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Recognise a prompt with drafts after it: assisted decoding asks for the logits of each draft."""
        keep, given = kwargs.get("logits_to_keep"), kwargs.get("mm_encoder_outputs") or {}
        encoded = any(ride_of(output) is not None for output in given.values())
        if not encoded and not self._takes_encoded:
            encoded = kwargs.get("pixel_values") is not None or kwargs.get("pixel_values_videos") is not None
        if not encoded or not isinstance(keep, int) or cache_of(kwargs) is None:
            keep = 1
        expect_drafts(max(keep - 1, 0), self)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward: note which tiles come with it."""
        if torch.compiler.is_compiling() and current_forward(self) is None and not brings_features(kwargs):
            check_forward(self._anatomy, kwargs)
            return  # a decoding step, compiled: `torch.compile` cannot write context variables
        call = ForwardCall(owner=self)
        begin_forward(call, module)
        self._live_rows.pop(threading.current_thread(), None)
        call.drafts = take_drafts(self) if self._reads_prompt else 0
        if args:
            kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        check_forward(self._anatomy, kwargs)
        call.given = kwargs.get("attention_mask")
        call.types = next((kwargs[name] for name in TOKEN_TYPES if kwargs.get(name) is not None), None)
        if self._layers is not None:
            self._layers.check_recompute()
        if self._anatomy.features:
            call.placeholders = count_placeholders(self._anatomy, kwargs)
        given = kwargs.get("mm_encoder_outputs") or {}
        # where there are two kinds of placeholders, videos have the second; images are encoded first
        videos = len(self._anatomy.image_tokens) - 1
        call.kinds = [0] * (kwargs.get("pixel_values") is not None)
        call.kinds += [videos] * (kwargs.get("pixel_values_videos") is not None)
        for name, output in given.items():
            if (ride := ride_of(output)) is not None:
                ride.kind = videos if name == "video" else 0
                call.encoded.append(ride)
            elif output is not None:
                if self._reads_prompt:
                    raise UnsupportedCallError(
                        f"The image features of this call are not all that the tower of this pruned model returned: "
                        f"chunked prefill takes a part, or they come from elsewhere. {self.name} decides inside the "
                        "decoder, where it needs whole images and the text after them. Leave prefill_chunk_size out, "
                        "encode the images with the pruned model, or choose a policy of the encode stage alone."
                    )
                call.unknown_features = True
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if embeds is not None:
            call.unknown_features = True
        if self._reads_prompt and ids is not None and ids.shape[1] > 1:
            call.image_masks = [ids == token for token in self._anatomy.image_tokens]
        elif self._reads_prompt and embeds is not None and embeds.shape[1] > 1:
            call.image_masks = self.placeholders(module, embeds)
            if not call.image_masks and not (self._guidance is not None and self._guidance.about_text):
                raise UnsupportedCallError(
                    f"inputs_embeds of {embeds.shape[1]} tokens, none of them an image placeholder: {self.name} acts "
                    "on visual tokens inside the decoder and cannot tell which these are, or whether there are any. "
                    "Pass input_ids and pixel_values instead."
                )

    def placeholders(self, base: Any, embeds: torch.Tensor) -> list[torch.Tensor]:
        """Placeholders of each kind in embeddings ``(batch, length, channels)``; empty if there are none."""
        ids = torch.tensor(self._anatomy.image_tokens, device=embeds.device)
        known = base.get_input_embeddings()(ids).to(embeds.dtype)
        mask = (embeds[:, :, None] == known).all(-1)
        return list(mask.unbind(-1)) if mask.any() else []

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a forward, including after an exception."""
        if current_forward(self) is not None:
            end_forward(self)


def _hooked(anatomy: Anatomy) -> list[nn.Module]:
    """The modules of a model on which there may be hooks while it is pruned."""
    tower, decoder = anatomy.tower, [anatomy.base, anatomy.decoder, *anatomy.decoder_layers]
    if isinstance(tower, FeatureTower) or anatomy.projector is None:
        return decoder
    front = [] if anatomy.front is None else [anatomy.front]
    return [*decoder, anatomy.projector, *front, tower.module, *tower.layers, *tower.attentions]


def check_unshared(anatomy: Anatomy) -> None:
    """Raise if the model shares a module with another one that is pruned now."""
    for module in _hooked(anatomy):
        other = _pruned[module]() if module in _pruned else None
        if other is not None:
            raise StateError(
                f"This model shares a {type(module).__name__} with another one, a {type(other._model).__name__} that "
                f"is pruned by {other.name}: of models that share a module, one can be pruned at a time, and the "
                "others stay as they are. unprune the other model first, or give this one a module of its own "
                "(copy.deepcopy)."
            )
