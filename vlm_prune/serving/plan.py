"""What an engine is asked to prune, read from its model config and checked before anything is loaded.

A budget depends on the configuration, the request and the size of an image alone, because vLLM lays out the prompt, its
positions and its cache before the vision tower has seen a pixel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..call.budget import Budget
from ..contract.anatomy import feature_layers, square
from ..contract.policy import Policy
from ..errors import BudgetError, PolicyError, UnsupportedModelError
from ..registry import did_you_mean, make_policies

KEY = "vlm_prune"
"""The key in ``hf_overrides`` that says how an engine prunes, and in ``mm_processor_kwargs`` for a request's budget."""


@dataclass(frozen=True)
class Tiles:
    """What the tower makes of one tile before pruning.

    Attributes:
        units: rows and columns of visual tokens; ``None`` where images have any size, and each is one tile.
        extra: CLS rows that the language model receives in addition to them.
        feature_layer: 0-based number of the tower layer whose output is consumed.
        tile: what a tile is to the user.
        mrope: whether a visual token's position is its place in the image.
    """

    units: tuple[int, int] | None
    extra: int
    feature_layer: int
    tile: str
    mrope: bool = False

    @property
    def tokens(self) -> int | None:
        """Visual tokens of one tile, where all tiles have the same number."""
        return None if self.units is None else self.units[0] * self.units[1] + self.extra


def llava_tiles(config: Any) -> Tiles:
    """Of a ``LlavaConfig`` with a CLIP tower."""
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"a {vision.model_type!r} tower, and only CLIP's (clip_vision_model) is supported")
    side = vision.image_size // vision.patch_size
    layers = feature_layers(config.vision_feature_layer, vision.num_hidden_layers)
    if len(layers) > 1:
        raise ValueError(
            f"features of several layers ({config.vision_feature_layer}), and only one is supported"
        )
    return Tiles((side, side), int(config.vision_feature_select_strategy == "full"), layers[0], "image")


def internvl_tiles(config: Any) -> Tiles:
    """Of an ``InternVLConfig``."""
    vision, merge = config.vision_config, round(1 / config.downsample_ratio)
    if config.vision_feature_layer not in (-1, vision.num_hidden_layers):
        raise ValueError(
            f"vision_feature_layer={config.vision_feature_layer}, and vLLM always takes the last one"
        )
    (height, width), (patch_height, patch_width) = square(vision.image_size), square(vision.patch_size)
    grid = height // patch_height // merge, width // patch_width // merge
    return Tiles(grid, 0, vision.num_hidden_layers - 1, "tile")


def qwen_tiles(config: Any) -> Tiles:
    """Of a ``Qwen2_5_VLConfig`` or a ``Qwen3VLConfig``."""
    return Tiles(None, 0, config.vision_config.depth - 1, "image", mrope=True)


FAMILIES = {
    "internvl": internvl_tiles,
    "llava": llava_tiles,
    "qwen2_5_vl": qwen_tiles,
    "qwen3_vl": qwen_tiles,
    "qwen3_vl_moe": qwen_tiles,
}
"""Each ``config.model_type`` that can be pruned in vLLM, with the function that reads its geometry."""


@dataclass(frozen=True)
class Plan:
    """The policy of an engine, and how many tokens of each tile it keeps.

    Attributes:
        policy: of the encode stage.
        budget: of requests that do not set one.
        ceiling: the largest budget that a request may set.
        tiles: what the tower makes of a tile.
    """

    policy: Policy
    budget: Budget
    ceiling: Budget
    tiles: Tiles

    def asked(self, request: Any = None) -> Budget:
        """The budget of a request with ``mm_processor_kwargs={"vlm_prune": request}``.

        Raises:
            BudgetError: ``request`` is not a budget, or not a possible one.
        """
        if request is None:
            return self.budget
        if not _is_budget(request):
            raise BudgetError(
                f'"{KEY}": {request!r}: a request sets its own budget by {{"tokens": 64}} or {{"ratio": 0.25}}; the '
                "policy and its settings belong to the engine."
            )
        budget = self._checked(request.get("tokens"), request.get("ratio"), 1.0, self.tiles)
        if self.tiles.tokens is not None:
            self.kept(budget, self.tiles.tokens)
        return budget

    def kept(self, budget: Budget, dense: int) -> int:
        """Visual tokens kept of a tile that has ``dense``.

        Raises:
            BudgetError: a request asks for more than the ceiling.
        """
        wanted, most = (x.units(dense - self.tiles.extra) + self.tiles.extra for x in (budget, self.ceiling))
        if wanted > most and budget != self.budget:
            raise BudgetError(
                f'"{KEY}": {_said(budget)} of the {dense} visual tokens of this {self.tiles.tile} are {wanted}, and '
                f"this server keeps {most} of them at most. Ask for less."
            )
        return min(wanted, most)

    def most(self, dense: int) -> int:
        """The most visual tokens that a request may keep of an image that has ``dense``."""
        each = self.tiles.tokens or dense
        return dense // each * self.kept(self.ceiling, each)

    def units(self, tokens: int) -> int:
        """Units that the tower keeps for ``tokens``, which include CLS where the language model receives it."""
        return tokens - self.tiles.extra

    def identity(self, budget: Budget) -> str:
        """All that decides which tokens of an image are kept: caches must distinguish it in addition to the pixels.

        Budgets that keep as many tokens have the same identity, where the number is known without the image.
        """
        kind, dense = type(self.policy), self.tiles.tokens
        share = [budget.tokens, budget.ratio] if dense is None else self.kept(budget, dense)
        return json.dumps(
            [f"{kind.__module__}.{kind.__qualname__}", asdict(self.policy), share],
            sort_keys=True,
            default=repr,
        )

    def __str__(self) -> str:
        tile, extra = self.tiles.tile, self.tiles.extra
        said = f"{self.policy.name} keeps {_said(self.budget)} of each {tile}"
        if (dense := self.tiles.tokens) is not None:
            said = (
                f"{self.policy.name} keeps {self.kept(self.budget, dense)} of {dense} tokens of each {tile}"
            )
        if extra:
            said += ", CLS among them"
        return f"{said}; requests may ask for {_said(self.ceiling)} at most"

    @staticmethod
    def _checked(tokens: Any, ratio: Any, default: float, tiles: Tiles) -> Budget:
        available = None if tiles.tokens is None else tiles.tokens - tiles.extra
        return Budget.checked(tokens, ratio, default, available, tiles.tile, tiles.extra)

    @classmethod
    def of(cls, config: Any) -> Plan | None:
        """The plan of an engine for a model with this ``config``; ``None`` if it is not asked to prune.

        Raises:
            PolicyError: what is given is not a policy, or one that cannot run in vLLM.
            BudgetError: the budget is not possible.
            UnsupportedModelError: the model's family cannot be pruned in vLLM.
        """
        given = getattr(config, KEY, None)
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise PolicyError(
                f'hf_overrides={{"{KEY}": {given!r}}}: a dictionary such as {{"policy": "flowcut", "tokens": 64}} is '
                "needed."
            )
        settings = dict(given)
        name, tokens, ratio, most = (
            settings.pop(key, None) for key in ("policy", "tokens", "ratio", "ceiling")
        )
        if not isinstance(name, str):
            raise PolicyError(
                f'hf_overrides={{"{KEY}": {given!r}}}: "policy" has to name one, such as "flowcut".'
            )
        policies = make_policies(name, settings)
        for policy in policies:
            check_served(policy)
        tiles = tiles_of(config)
        budget = cls._checked(tokens, ratio, policies[0].default_ratio, tiles)
        if most is not None and not _is_budget(most):
            raise BudgetError(
                f'"ceiling": {most!r}: the most that a request may ask for is {{"tokens": 256}} or {{"ratio": 0.5}}.'
            )
        ceiling = cls._checked((most or {}).get("tokens"), (most or {}).get("ratio"), 1.0, tiles)
        if (dense := tiles.tokens) is not None and budget.units(dense) > ceiling.units(dense):
            raise BudgetError(
                f'{_said(budget)} of each {tiles.tile} by default, and a "ceiling" of {_said(ceiling)}: the default '
                "has to be within it."
            )
        if policies[0].positions == "original" and not tiles.mrope:
            raise PolicyError(
                f'policy="{name}" with positions="original": vLLM numbers the tokens of a prompt without gaps. Use '
                'positions="compact".'
            )
        try:
            policy = policies[0].for_family(config.model_type, tiles.mrope)
            policy.tower_layers(tiles.feature_layer)
        except ValueError as error:
            raise PolicyError(f"{name} on {config.model_type}: {error}") from error
        return cls(policy, budget, ceiling, tiles)


def _is_budget(given: Any) -> bool:
    return isinstance(given, Mapping) and len(given) == 1 and given.keys() <= {"tokens", "ratio"}


def _said(budget: Budget) -> str:
    return f"{budget.tokens} tokens" if budget.ratio is None else f"{budget.ratio:.3g} of the tokens"


def tiles_of(config: Any) -> Tiles:
    """The geometry of a model that can be pruned in vLLM."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"vlm_prune cannot prune a model of type {str(kind)!r} in vLLM. {did_you_mean(str(kind), FAMILIES)} For "
            "other families prune the Hugging Face model, and send its embeddings: see "
            "vlm_prune.serving.image_embeds."
        )
    try:
        return FAMILIES[kind](config)
    except ValueError as error:
        raise UnsupportedModelError(f"vlm_prune cannot prune this {kind} model in vLLM: {error}.") from error


FEATURE_LAYER = 22
"""The consumed layer of an imaginary tower: a policy must not read layers after it."""


def check_served(policy: Policy) -> None:
    """Raise if a policy cannot run in vLLM, and say why."""
    if inside := policy.acts.inside:
        reason = {
            "entry": "vLLM encodes an image once for all prompts with it, and does not know the question then",
            "prefill": "vLLM's layers share one block table and the positions that were fixed at scheduling, so no "
            "layer can hold fewer tokens than another",
            "decode": "vLLM's layers share one block table, so a layer cannot lose keys on its own",
            "guide": "vLLM computes each prompt once, and has no second pass to compare with",
            "modulate": "vLLM's attention kernels do not expose head outputs or probabilities to edit",
        }[inside[0]]
        raise PolicyError(
            f'policy="{policy.name}" acts in the {inside[0]} stage, inside the language model: {reason}. Choose a '
            "policy that acts in the encode stage alone, such as flowcut, visionzip, agilepruner or divprune."
        )
    if any(layer > FEATURE_LAYER for layer in policy.tower_layers(FEATURE_LAYER)):
        raise PolicyError(
            f'policy="{policy.name}" reads the tower layer after the consumed one, which vLLM does not load. Choose '
            "a policy that reads the consumed layers alone, such as flowcut, visionzip, agilepruner or divprune."
        )
    if not policy.prunes:
        raise PolicyError(
            f'policy="{policy.name}" drops no tokens: leave "{KEY}" out of hf_overrides for the stock model. A '
            'request may ask for all tokens of a pruned engine by {"ratio": 1.0}.'
        )
    if type(policy).tower_grid is not Policy.tower_grid:
        raise PolicyError(
            f'policy="{policy.name}" shows the tower a smaller image, which vLLM\'s towers do not take, and keeps only '
            "certain numbers of tokens. Send smaller images, or choose pool, which averages tokens to any budget."
        )
