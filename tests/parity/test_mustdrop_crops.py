"""The kind of case that the folder of golden data need not have: a LLaVA-NeXT image in flat crops under MustDrop.

Its expected values are put together from halves that other golden cases hold to the released code: the tower on a
batch of crops (``vision_03``), and the decoder on embeddings with a given key set (``prefill_*``), with the crops laid
out one after another by hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import mustdrop
from tests.parity._files import Golden
from tests.parity._given import embeds_model
from vlm_prune import prune
from vlm_prune.call.encode_call import RIDE, encoding
from vlm_prune.policies.mustdrop import KEY, MustDrop

WIDTH, SIDE, PATCH, CROPS, LAYERS, TOWER = 16, 126, 14, 3, 16, 4
LIMITS = (0.012, 0.03)
PROMPT = [1, 5, 6, 7, -200, 10, 11, 12, 13, 14]


def random_weights(draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of tower, projector and decoder, by the names of the released checkpoints."""

    def normal(*shape: int, scale: float = 0.25) -> torch.Tensor:
        return scale * torch.randn(shape, generator=draw)

    ones, zeros = torch.ones(WIDTH), torch.zeros(WIDTH)
    tower, rows = "vision_tower.vision_model.", (SIDE // PATCH) ** 2 + 1
    found = {
        tower + "embeddings.class_embedding": normal(WIDTH),
        tower + "embeddings.patch_embedding.weight": normal(WIDTH, 3, PATCH, PATCH, scale=0.05),
        tower + "embeddings.position_embedding.weight": normal(rows, WIDTH),
        **{f"{tower}{name}.weight": ones for name in ("pre_layrnorm", "post_layernorm")},
        **{f"{tower}{name}.bias": zeros for name in ("pre_layrnorm", "post_layernorm")},
        **{f"model.mm_projector.{n}.weight": normal(WIDTH, WIDTH) for n in (0, 2)},
        **{f"model.mm_projector.{n}.bias": normal(WIDTH) for n in (0, 2)},
        "model.embed_tokens.weight": normal(64, WIDTH, scale=1.0),
        "model.norm.weight": ones,
        "lm_head.weight": normal(64, WIDTH),
    }
    for number in range(TOWER):
        layer = f"{tower}encoder.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {
                f"{layer}self_attn.{name}.weight": normal(WIDTH, WIDTH),
                f"{layer}self_attn.{name}.bias": zeros,
            }
        for name, shape in {"fc1": (2 * WIDTH, WIDTH), "fc2": (WIDTH, 2 * WIDTH)}.items():
            found |= {
                f"{layer}mlp.{name}.weight": normal(*shape),
                f"{layer}mlp.{name}.bias": torch.zeros(shape[0]),
            }
        for name in ("layer_norm1", "layer_norm2"):
            found |= {f"{layer}{name}.weight": ones, f"{layer}{name}.bias": zeros}
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{layer}self_attn.{name}.weight"] = normal(WIDTH, WIDTH, scale=0.5)
        for name, shape in {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}.items():
            found[f"{layer}mlp.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = ones
    return found


def crops(draw: torch.Generator) -> torch.Tensor:
    """Smooth crops with one even corner, so that windows merge in each."""
    coarse = torch.randn(CROPS, 3, 9, 9, generator=draw)
    coarse[:, :, :4, :4] = 1.0
    return torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="nearest")


@torch.no_grad()
def expected(weights: dict[str, torch.Tensor], images: torch.Tensor) -> dict[str, Any]:
    """What a file of the kind holds, from the two halves."""
    tower = {name: value for name, value in weights.items() if name.startswith("vision_tower.")}
    halves = mustdrop.model_like(images, tower, weights)
    prefix = "vision_tower.vision_model."
    halves.model.vision_tower.load_state_dict(
        {name.removeprefix(prefix): value for name, value in tower.items()}, strict=False
    )
    prune(halves, MustDrop(compat="official"))
    with encoding(halves.pruning):  # a tower called by itself is a stock one
        seen = halves.model.vision_tower(images, output_hidden_states=True)
    features = seen.hidden_states[-2][:, 1:]
    live = ~features[..., 0].isnan()
    merged = features[live].view(CROPS, -1, WIDTH)
    first, second = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))
    for linear, number in ((first, 0), (second, 2)):
        linear.weight.copy_(weights[f"model.mm_projector.{number}.weight"])
        linear.bias.copy_(weights[f"model.mm_projector.{number}.bias"])
    flat = second(torch.nn.functional.gelu(first(merged))).flatten(end_dim=1)
    marks = getattr(seen, RIDE).carry[KEY].view(CROPS, -1)[:, : merged.shape[1]] > 0
    keys = marks.flatten().nonzero()[:, 0]

    start, count = PROMPT.index(-200), len(flat)
    table = weights["model.embed_tokens.weight"]
    embeds = torch.cat([table[PROMPT[:start]], flat, table[PROMPT[start + 1 :]]])[None]
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 32, "num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 4,
        "rms_eps": 1e-5, "rope_theta": 10000.0,
    }  # fmt: skip
    given = object.__new__(Golden)
    given.arrays = {name: np.array(value) for name, value in sizes.items()}
    decoder = {n: x for n, x in weights.items() if not n.startswith(("vision_tower.", "model.mm_projector."))}
    given.arrays |= {f"w/{name}": value.numpy() for name, value in decoder.items()}
    model, inputs = embeds_model(given, embeds, start, count)
    prune(
        model,
        mustdrop.KeysGiven(compat="official", positions="compact", thresholds=LIMITS, merge_threshold=2.0),
    )
    with mustdrop.keys(keys):
        output = model.model(**inputs)
    hidden, receipt = output.last_hidden_state, model.pruning.receipt
    rows = (hidden[0].abs().sum(-1) > 0).nonzero()[:, 0]
    left = [layer - (len(PROMPT) - 1) for layer in receipt.decoder_tokens]
    return {
        "v_token_start": start,
        "img_seq": count,
        "image_num": CROPS,
        "final_token_abs": rows.numpy(),
        "prefill_final_hidden": hidden[:, rows].numpy(),
        "num_token_per_layer": np.array([*left[1:], left[-1]]),
        "cache_len_layer0": receipt.decoder_tokens[0],
        "generated": np.array([[1, int(model.lm_head(hidden[:, -1])[0, :64].argmax())]]),
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    draw = torch.Generator().manual_seed(3)
    weights, images = random_weights(draw), crops(draw)
    arrays = {
        "images": images[None].numpy(),
        "input_ids": np.array([PROMPT]),
        "global_thr": np.array(LIMITS[0]),
        "individual_thr": np.array(LIMITS[1]),
        **expected(weights, images),
        **{f"w/{name}": value.numpy() for name, value in weights.items()},
    }
    path = tmp_path_factory.mktemp("golden") / "e2e_02_next_crops.npz"
    np.savez(path, **arrays)
    return path


def test_flat_crops_are_compared(case):
    golden = Golden(case)
    count = int(golden["img_seq"])
    assert count % CROPS == 0
    assert count < CROPS * (SIDE // PATCH) ** 2, "no window was merged: nothing is tested"
    assert len(golden["final_token_abs"]) < count, "no token was dropped in the decoder: nothing is tested"
    mustdrop.check(case)


@pytest.mark.parametrize("name", ["final_token_abs", "prefill_final_hidden", "num_token_per_layer"])
def test_a_file_with_other_values_fails(case, name, tmp_path):
    with np.load(case) as file:
        arrays = {key: file[key] for key in file.files}
    arrays[name] = np.roll(arrays[name], 1, axis=-1)
    np.savez(tmp_path / "e2e_03.npz", **arrays)
    with pytest.raises((AssertionError, IndexError)):
        mustdrop.check(tmp_path / "e2e_03.npz")
