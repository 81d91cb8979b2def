"""What pruning does to a tiny model: each promise tried out, beside the stock model's own answers."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vlm_prune import prune, unprune
from vlm_prune.contract.anatomy import FeatureTower, PackedTower
from vlm_prune.errors import PruningError
from vlm_prune.versions import CACHE, cache_of

from .prompts import prompt
from .shrink import TYPES, tiny_model

POLICIES: dict[str, dict[str, Any]] = {"flowcut": {}, "divprune": {}, "fastv": {"k": 1}, "vhr": {}}
"""One policy of every place: in the tower, after the projector, between decoder layers, at their attention."""

RATIO = 0.4
PER_ROW = ("token_type_ids", "mm_token_type_ids")
SAME = {"max_new_tokens": 4, "do_sample": False}


class Wrong(AssertionError):
    """Pruning broke a promise."""


@dataclass
class Row:
    """What became of a model type.

    Attributes:
        name: its class.
        outcome: "works", "refused" by `prune` or at the call, "not built" where the stock model does not run small, or
            "wrong".
        reason: the sentence it is refused with, or what went wrong.
        place: how far the engine looks in: "tower", "packed tower", or "features" that leave it.
        positions: the rules of positions under which the answer is that of the stock decoder on what is left.
        policies: of `POLICIES`, those that are refused, with the sentence.
    """

    name: str
    outcome: str = "not built"
    reason: str = ""
    place: str = ""
    positions: list[str] = field(default_factory=list)
    policies: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value}


@torch.no_grad()
def check(model_type: str) -> Row:
    """Try everything out on one model type."""
    row = Row(TYPES[model_type])
    try:
        model = tiny_model(model_type)
    except Exception as error:  # whatever stock code says about a config that nobody made for it
        row.reason = _short(error)
        return row
    if sentence := _refusal(model, "none"):
        row.outcome, row.reason = "refused", sentence
        return row
    try:
        inputs = prompt(model)
        stock = Stock.of(model, inputs)
    except Exception as error:
        row.reason = _short(error)
        return row
    try:
        _promises(model, inputs, stock, row)
    except PruningError as error:
        row.outcome, row.reason = "refused", str(error)
    except Exception as error:
        row.outcome, row.reason = "wrong", _short(error)
    return row


@dataclass
class Stock:
    """The stock model's answers: logits, tokens, and those of a second turn."""

    logits: torch.Tensor
    tokens: torch.Tensor
    later: torch.Tensor

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Any]) -> Stock:
        """What the model answers to ``inputs``."""
        logits = model(**inputs).logits
        if not logits.isfinite().all():
            raise ValueError("the stock model's logits are not finite")
        return cls(logits, model.generate(**inputs, **SAME), turns(model, inputs))

    def same(self, model: Any, inputs: dict[str, Any], what: str) -> None:
        """Raise unless the model answers bit for bit alike."""
        answers = model(**inputs).logits, model.generate(**inputs, **SAME), turns(model, inputs)
        if not all(map(torch.equal, answers, (self.logits, self.tokens, self.later))):
            raise Wrong(f"{what} is not the stock model bit for bit")


def turns(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """A prompt's answer, and that to a second question without an image."""
    first = model.generate(**inputs, **SAME, return_dict_in_generate=True)
    if (
        "pixel_values" in inspect.signature(model.generate).parameters
    ):  # this one takes no turn without an image
        return first.sequences
    ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    kinds = {
        name: torch.nn.functional.pad(inputs[name], (0, ids.shape[1] - inputs[name].shape[1]))
        for name in (*PER_ROW, "moe_mm_token_type_ids")
        if name in inputs
    }
    cache = {CACHE: cache_of(first)}
    more: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **kinds, **cache, **SAME
    )
    return more


def _promises(model: Any, inputs: dict[str, Any], stock: Stock, row: Row) -> None:
    prune(model, "none")
    tower = model.pruning._anatomy.tower
    row.place = "features" if isinstance(tower, FeatureTower) else "tower"
    row.place = "packed tower" if isinstance(tower, PackedTower) else row.place
    stock.same(model, inputs, "none")
    unprune(model)
    for rule in ("original", "compact"):
        if not _refusal(model, "uniform", positions=rule):
            _shortened(model, inputs, rule)
            row.positions.append(rule)
    for policy, settings in POLICIES.items():
        if sentence := _refusal(model, policy, **settings):
            row.policies[policy] = sentence
            continue
        prune(model, policy, **settings)
        try:
            if not model(**inputs).logits[:, -1].isfinite().all():
                raise Wrong(f"{policy}: the answer is not finite")
            turns(model, inputs)
        except PruningError as error:
            row.policies[policy] = str(error)
        finally:
            unprune(model)
    stock.same(model, inputs, "unprune")
    row.outcome = "works"


def _refusal(model: Any, policy: str, **settings: Any) -> str:
    """The sentence that `prune` refuses with; empty if it does not."""
    try:
        prune(model, policy, **settings)
    except PruningError as error:
        return str(error)
    unprune(model)
    return ""


def _shortened(model: Any, inputs: dict[str, Any], rule: str) -> None:
    """Raise unless `uniform` gives what the stock decoder gives for the rows that are left."""
    prune(model, "uniform", ratio=RATIO, positions=rule)
    decoder = model.pruning._anatomy.decoder
    tokens = torch.tensor(model.pruning._anatomy.image_tokens)
    try:
        ours, _, short = _watched(model, decoder, inputs)
        turns(model, inputs)
        receipt = model.pruning.receipt
    finally:
        unprune(model)
    _, given, whole = _watched(model, decoder, inputs)
    places = torch.isin(inputs["input_ids"][0], tokens).nonzero()[:, 0]
    units = [rows * columns for rows, columns in receipt.grids]
    if len(places) == sum(units):
        begin = [sum(units[:i]) for i in range(len(units))]
        kept = [first + n for first, numbers in zip(begin, receipt.kept, strict=True) for n in numbers]
        alive = torch.ones(whole.shape[1], dtype=torch.bool)
        alive[places] = False
        alive[places[torch.tensor(kept)]] = True
        rows = alive.nonzero()[:, 0]
    else:  # newlines among them: those rows that entered
        rows = _matched(short[0].flatten(1), whole[0].flatten(1))
    if not len(rows) == short.shape[1] < whole.shape[1]:
        raise Wrong(f"uniform: {short.shape[1]} rows entered the decoder where {len(rows)} are kept")
    expected = decoder(**_cut(model, inputs, given, rows, rule)).last_hidden_state
    error = (expected[0] - ours[0, rows]).abs().max() / expected.abs().max()
    if not error < 1e-4:
        raise Wrong(f"uniform, {rule} positions: {error:.1e} off the stock decoder on what is left")


def _watched(
    model: Any, decoder: Any, inputs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor]:
    """What leaves the decoder in a forward, the arguments that enter it, and the rows that enter its first layer."""
    left: list[torch.Tensor] = []
    given: list[dict[str, Any]] = []
    entered: list[torch.Tensor] = []
    handles = [
        decoder.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(dict(kwargs)), with_kwargs=True
        ),
        decoder.register_forward_hook(lambda _, args, output: left.append(output.last_hidden_state)),
        decoder.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: entered.append(_one(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        ),
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return left[0], given[0], entered[0]


def _one(hidden: torch.Tensor) -> torch.Tensor:
    """Rows ``(batch, rows, channels)``, the first stream of several."""
    return (hidden[0] if hidden.dim() == 4 and hidden.shape[1] == 1 else hidden).clone()


def _matched(short: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Where the rows ``short`` ``(left, channels)`` are among ``whole`` ``(rows, channels)``, in order."""
    found: list[int] = []
    for number, row in enumerate(whole):
        if len(found) < len(short) and torch.allclose(short[len(found)], row, atol=1e-5, rtol=1e-5):
            found.append(number)
    return torch.tensor(found)


def _cut(
    model: Any, inputs: dict[str, Any], given: dict[str, Any], rows: torch.Tensor, rule: str
) -> dict[str, Any]:
    """The decoder's arguments had the other rows never been there."""
    length = given["inputs_embeds"].shape[1]
    short = {
        name: _picked(x, rows, length) for name, x in given.items() if name not in (CACHE, "past_key_values")
    }
    short["use_cache"] = False
    if (visual := given.get("visual_pos_masks")) is not None:
        number = (visual[0].long().cumsum(0) - 1)[rows[visual[0][rows]]]
        short["deepstack_visual_embeds"] = [x[number] for x in given["deepstack_visual_embeds"]]
    positions = given.get("position_ids")
    if rule == "compact" and (positions is None or positions.dim() == 2):
        short["position_ids"] = torch.arange(len(rows))[None]
    elif positions is None:
        short["position_ids"] = rows[None]
    mask, ones = given.get("attention_mask"), torch.ones(1, len(rows), dtype=torch.long)
    if isinstance(mask, dict) or (mask is not None and mask.dim() == 4):
        # the model makes masks in front of its decoder: as it would for these rows
        kinds = {name: inputs[name][:, rows] for name in PER_ROW if name in inputs}
        made = {"config": model.config, "inputs_embeds": short["inputs_embeds"], "attention_mask": ones}
        short["attention_mask"] = model.create_masks_for_generate(
            **made, **{CACHE: None}, position_ids=None, is_first_iteration=True, **kinds
        )
    else:
        short["attention_mask"] = ones
    return short


def _picked(x: Any, rows: torch.Tensor, length: int) -> Any:
    """``x`` without the other rows, on whichever of its dimensions they are."""
    if isinstance(x, torch.Tensor):
        for dim, size in enumerate(x.shape):
            if size == length:
                return x.index_select(dim, rows)
    return x


def _short(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"
