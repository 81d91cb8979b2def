"""Well-known checkpoints have the sizes that are quoted, and a name that leads nowhere is answered at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from vlm_prune.eval.checkpoints import CHECKPOINTS, open_model
from vlm_prune.eval.models import model_path
from vlm_prune.support import families

CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
INTERN_VIT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
}
QWEN2_5 = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
QWEN3_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
QWEN3_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}


def text(width, hidden, heads, layers, kv, words, tie=False, **more) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "vocab_size": words,
        "tie_word_embeddings": tie,
        **more,
    }


LLAMA_7B = text(4096, 11008, 32, 32, 32, 32064, model_type="llama")
LLAMA_13B = text(5120, 13824, 40, 40, 40, 32064, model_type="llama")
MISTRAL_7B = text(4096, 14336, 32, 32, 8, 32064, model_type="mistral")


def qwen2(*sizes, tie=False):
    return text(*sizes, tie, model_type="qwen2")


SHAPES: dict[str, tuple[Any, Any]] = {
    "llava-hf/llava-1.5-7b-hf": (CLIP_L, LLAMA_7B),
    "llava-hf/llava-1.5-13b-hf": (CLIP_L, LLAMA_13B),
    "llava-hf/vip-llava-7b-hf": (CLIP_L, LLAMA_7B),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (CLIP_L, LLAMA_7B),
    "llava-hf/llava-v1.6-mistral-7b-hf": (CLIP_L, MISTRAL_7B),
    "llava-hf/LLaVA-NeXT-Video-7B-hf": (CLIP_L, LLAMA_7B),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (SIGLIP, qwen2(896, 4864, 14, 24, 2, 152000, tie=True)),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": (SIGLIP, qwen2(3584, 18944, 28, 28, 4, 152000)),
    "OpenGVLab/InternVL3-1B-hf": (INTERN_VIT, qwen2(896, 4864, 14, 24, 2, 151674)),
    "OpenGVLab/InternVL3-2B-hf": (INTERN_VIT, qwen2(1536, 8960, 12, 28, 2, 151674)),
    "OpenGVLab/InternVL3-8B-hf": (INTERN_VIT, qwen2(3584, 18944, 28, 28, 4, 151674)),
    "Qwen/Qwen2-VL-2B-Instruct": ({"hidden_size": 1536}, text(1536, 8960, 12, 28, 2, 151936, True)),
    "Qwen/Qwen2-VL-7B-Instruct": ({"hidden_size": 3584}, text(3584, 18944, 28, 28, 4, 152064)),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        {**QWEN2_5, "out_hidden_size": 2048},
        text(2048, 11008, 16, 36, 2, 151936, True),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        {**QWEN2_5, "out_hidden_size": 3584},
        text(3584, 18944, 28, 28, 4, 152064),
    ),
    "Qwen/Qwen3-VL-2B-Instruct": (
        {**QWEN3_SMALL, "out_hidden_size": 2048},
        text(2048, 6144, 16, 28, 8, 151936, True, head_dim=128),
    ),
    "Qwen/Qwen3-VL-4B-Instruct": (
        {**QWEN3_SMALL, "out_hidden_size": 2560},
        text(2560, 9728, 32, 36, 8, 151936, True, head_dim=128),
    ),
    "Qwen/Qwen3-VL-8B-Instruct": (
        {**QWEN3_LARGE, "out_hidden_size": 4096},
        text(4096, 12288, 32, 36, 8, 151936, head_dim=128),
    ),
}
"""Vision and text configs as the checkpoints have them; the rest is transformers' default for the family."""


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_sizes_are_those_of_the_published_shapes(name):
    checkpoint = CHECKPOINTS[name]
    vision, words = SHAPES[name]
    config = hf.AutoConfig.for_model(
        checkpoint.family,
        vision_config=dict(vision),
        text_config=dict(words),
        tie_word_embeddings=words["tie_word_embeddings"],
    )
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    weights = sum(weight.numel() for weight in model.parameters()) / 1e9
    assert checkpoint.parameters == pytest.approx(weights, abs=0.006)
    head = words.get("head_dim", words["hidden_size"] // words["num_attention_heads"])
    assert (checkpoint.layers, checkpoint.kv_size) == (
        words["num_hidden_layers"],
        words["num_key_value_heads"] * head,
    )


def test_every_family_has_a_checkpoint():
    assert {checkpoint.family for checkpoint in CHECKPOINTS.values()} == set(families())  # of the matrix


def test_llava_7b_in_round_numbers():
    checkpoint = CHECKPOINTS["llava-hf/llava-1.5-7b-hf"]
    assert round(checkpoint.gigabytes(), 1) == 14.1
    # 2 (keys, values) x 32 layers x 4096 x 2 bytes = 0.5 MiB a token
    assert checkpoint.kv_megabytes(576) == pytest.approx(576 * 0.524288)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tiny-lava", ['Did you mean "tiny-llava"?', "no folder of that name"]),
        ("./nowhere", ["no folder of that name", "tiny-llava, tiny-internvl"]),
        ("llava-hf/llava-1.5-7b", ['Did you mean "llava-hf/llava-1.5-7b-hf"?', "HF_HUB_OFFLINE=1"]),
        ("llava-hf/llava-1.5-7b-hf", ["hf download llava-hf/llava-1.5-7b-hf", "14.1 GB"]),
    ],
)
def test_a_model_that_is_not_there(name, parts):
    with pytest.raises(ValueError, match="tiny-llava") as caught:
        open_model(name)
    for part in parts:
        assert part in str(caught.value)
    assert f'Did you mean "{name}"' not in str(caught.value)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        open_model(str(tmp_path))


def test_dtype_and_device():
    model, _ = open_model("tiny-llava", "bfloat16")
    assert model.dtype == torch.bfloat16
    model, processor = open_model(str(model_path("tiny-llava")))
    assert (model.dtype, model.training, processor.image_token) == (torch.bfloat16, False, "<image>")
    with pytest.raises(ValueError, match="choose one of float32, bfloat16, float16"):
        open_model("tiny-llava", "fp16")
    with pytest.raises(ValueError, match="choose cpu"):
        open_model("tiny-llava", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            open_model("tiny-llava", device="cuda")
