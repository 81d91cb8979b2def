"""The encode stage of models whose tower the engine cannot hook: tokens are chosen among finished features.

A `FeatureReader` replaces the model's feature method, as `assembler.Assembler` does: after the stock method it asks the
policies about each tile, and re-opens holes in what it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..call import stream
from ..call.encode_call import EncodeCall, Offer, current_encoding, encoding, let_ride
from ..call.timing import Stopwatch
from ..composition import Composition
from ..contract.anatomy import FeatureTower
from ..contract.keep import Keep
from ..contract.views import FeaturesView
from ..errors import UnsupportedCallError, UnsupportedModelError
from ..kernels import gather_rows
from .assembler import FeatureMethod
from .stage import EncodeStage, content_key

MEDIA = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
"""Argument names of stock models for what a feature method encodes."""


class FeatureEncoder(EncodeStage):
    """The encode stage for one model and one policy, at the end of its feature methods.

    Raises:
        UnsupportedModelError: a policy looks into the tower.
    """

    def __init__(self, tower: FeatureTower, base: Any, composition: Composition, session: Any):
        for policy in composition.policies:
            if policy.needs_tower:
                raise UnsupportedModelError(
                    f"{policy.name} looks into the vision tower, and vlm_prune can only see of {session.family} "
                    "what comes out of it. Choose a policy that decides after the tower (divprune, random, uniform) or "
                    "inside the decoder (fastv, vhr)."
                )
        super().__init__(tower, None, composition, session)
        self.tower, self.base = tower, base

    def install(self, handles: list[Any]) -> None:
        """Replace the feature methods; what must be undone goes to ``handles`` at once."""
        for method in self.tower.methods:
            handles.append(FeatureReader(self.base, method, self))

    def choose(
        self, given: Mapping[str, Any], features: list[torch.Tensor]
    ) -> tuple[EncodeCall, list[torch.Tensor]]:
        """Ask about the tiles of a call; returns its ``features`` ``(..., channels)`` with holes.

        ``given`` are the feature method's arguments by name.
        """
        grids = self.tower.sizes(given, [tuple(x.shape[:-1]) for x in features])
        sizes = [rows * columns for rows, columns in grids]
        total = sum(x.shape[:-1].numel() for x in features)
        if sum(sizes) != total:
            raise UnsupportedCallError(
                f"{self.session.family}: the model made {total} rows of image features, but its inputs imply "
                f"{sum(sizes)}. Use the stock model for this call: unprune(model)."
            )
        media = frames_of(given, len(sizes))
        targets = self.frame_targets(sizes, media)
        pixels = next(given[name] for name in MEDIA if given.get(name) is not None)
        call = EncodeCall(
            grids=grids,
            targets=targets,
            pixels=pixels,
            stopwatch=Stopwatch(features[0].device),
            receipt=self.session.new_receipt(grids, targets),
            trusted=False,
        )
        if not call.whole:
            rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in features])
            keys = tile_keys(pixels, len(sizes), rows.device)
            opened = self._choose(call, rows, keys, media if self.together else [1] * len(sizes))
            if self.composition.entry is not None:
                self._offer(call, rows, keys)
            parts = opened.split([x.shape[:-1].numel() for x in features])
            features = [part.view(x.shape) for part, x in zip(parts, features, strict=True)]
        call.record_tower(list, list)
        return call, features

    def _offer(self, call: EncodeCall, rows: torch.Tensor, keys: torch.Tensor) -> None:
        """Offer the tokens of each tile to the decoder's entry."""
        first = 0
        for number, tile in enumerate(rows.split(call.units)):
            places = torch.arange(first, first + len(tile), device=rows.device)[None]
            first += len(tile)
            if call.targets[number] < len(tile):
                key = keys[number : number + 1]
                call.offers.append(
                    Offer(tile[None], places, [number], call.grids[number], call.targets[number], key, {})
                )

    def _choose(
        self, call: EncodeCall, rows: torch.Tensor, keys: torch.Tensor, together: list[int]
    ) -> torch.Tensor:
        """Ask about tile after tile of ``rows`` ``(all tokens, channels)``; returns them with holes.

        ``together`` are the tiles that one choice is made among.
        """
        keeps: list[Keep] = []
        parts = []
        units = iter(rows.split(call.units))
        for frames in together:
            first = len(keeps)
            tile, grid = torch.cat([next(units) for _ in range(frames)]), call.grids[first]
            target, key = sum(call.targets[first : first + frames]), keys[first : first + 1]
            if frames > 1:
                grid, key = (1, len(tile)), keys[first : first + frames].sum(0, keepdim=True)
            view = FeaturesView(tile[None], grid, target, key, None, {}, frames=frames)
            keep = self.ask_final(view) if target < len(tile) else None
            if keep is None:
                keep, opened = Keep(torch.arange(len(tile), device=tile.device)[None]), tile
            else:
                live = gather_rows(tile[None], keep.index) if keep.rows is None else keep.rows.to(tile.dtype)
                live = live + stream.overflow(tile[None])
                opened = stream.open_holes(live, keep.index, len(tile), keep.valid)[0]
            if frames > 1:
                masks = keep.mask(len(tile)).view(frames, -1)
                keeps += [Keep.from_mask(mask[None], masks.shape[1]) for mask in masks]
            else:
                keeps.append(keep)
            parts.append(opened)
        call.keeps = keeps
        return torch.cat(parts)


class FeatureReader(FeatureMethod):
    """Replaces a feature method of a tower that the engine cannot hook."""

    encoder: FeatureEncoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock method returns, with holes where tokens are dropped."""
        if current_encoding(self.encoder.session) is not None:  # videos that are encoded as images are
            return self.stock(*args, **kwargs)
        given = self.__signature__.bind(*args, **kwargs).arguments
        with encoding(self.encoder.session, forward=self._forward()) as under_way:
            output = self._compute(under_way, args, kwargs)
            features = features_of(output)
            several = [features] if isinstance(features, torch.Tensor) else list(features)
            call, opened = self.encoder.choose({**given.pop("kwargs", {}), **given}, several)
            if call.keeps is not None:
                output = _replaced(output, features, opened)
            if isinstance(output, ModelOutput):
                let_ride(output, call)
            self.encoder.end(call)
        return self.note(output, args, kwargs)


def frames_of(given: Mapping[str, Any], tiles: int) -> list[int]:
    """How many of the ``tiles`` that came of a call are one video each, or one image.

    Of videos by their frames, in ``video_grid_thw`` or in pixels ``(videos, frames, channels, height, width)``; where
    these do not add up, each tile is alone.
    """
    pixels, sizes = given.get("pixel_values_videos"), given.get("video_grid_thw")
    frames = [1] * tiles
    if pixels is not None and sizes is not None:
        frames = sizes[:, 0].tolist()  # stock code waits for them too
    elif isinstance(pixels, torch.Tensor) and pixels.dim() == 5:
        frames = [pixels.shape[1]] * len(pixels)
    return frames if sum(frames) == tiles else [1] * tiles


def field_of(output: ModelOutput) -> str:
    """Where the features are in what a feature method returned."""
    return "last_hidden_state" if output.get("pooler_output") is None else "pooler_output"


def features_of(output: Any) -> Any:
    """The features, a tensor or several, in what a feature method returned."""
    if isinstance(output, ModelOutput):
        return output[field_of(output)]
    # with return_dict=False, the tower's output comes before them
    return output[1] if isinstance(output, tuple) and len(output) > 1 else output


def _replaced(output: Any, features: Any, opened: list[torch.Tensor]) -> Any:
    """What a feature method returned, with ``opened`` in place of its ``features``."""
    new: Any = opened[0] if isinstance(features, torch.Tensor) else type(features)(opened)
    if isinstance(output, ModelOutput):
        setattr(output, field_of(output), new)
        return output
    return new if output is features else (output[0], new, *output[2:])


def tile_keys(pixels: Any, tiles: int, device: torch.device) -> torch.Tensor:
    """A number per tile that depends on its pixels alone, int64 ``(tiles,)``; 0 where tiles cannot be told apart."""
    several = [pixels]
    if isinstance(pixels, torch.Tensor) and pixels.dim() == 5:
        flat = pixels.flatten(0, 1)
        several += [flat, flat[(flat != 0).flatten(1).any(-1)]]  # without the black ones that fill prompts up
    for given in several:
        if isinstance(given, torch.Tensor) and len(given) == tiles:
            return content_key(given).to(device)
    return torch.zeros(tiles, dtype=torch.int64, device=device)
