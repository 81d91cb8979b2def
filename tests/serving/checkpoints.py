"""Folders for vLLM: shipped models that two ranks can share, and a random one of a family that none is shipped of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vlm_prune.eval.models import model_path


def with_twice_the_heads(name: str, folder: Path) -> Path:
    """A shipped model with a head of zeros after each key head of its decoder, so that two ranks can share them."""
    shutil.copytree(model_path(name), folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    keys = text["num_key_value_heads"]
    for heads in ("num_key_value_heads", "num_attention_heads"):
        text[heads] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for key, weight in weights.items():
        if "language_model" in key and "self_attn" in key:
            rows = weight.T if ".o_proj" in key else weight
            each = rows.unflatten(0, (keys, -1))
            rows = torch.stack([each, torch.zeros_like(each)], 1).flatten(0, 2)
            weights[key] = (rows.T if ".o_proj" in key else rows).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_adapter(name: str, folder: Path, rank: int = 4) -> tuple[Path, Path]:
    """A LoRA adapter of the decoder of a shipped model, and the model with it merged in: two folders."""
    adapter, merged = folder / "adapter", folder / "merged"
    adapter.mkdir()
    shutil.copytree(model_path(name), merged)
    weights, lora = load_file(merged / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for key in [
        key
        for key in weights
        if "language_model" in key and key.endswith(("q_proj.weight", "up_proj.weight"))
    ]:
        outer, inner = weights[key].shape
        down = torch.randn(rank, inner, generator=generator) / inner**0.5
        up = torch.randn(outer, rank, generator=generator) / 8
        module = f"base_model.model.{key.removesuffix('.weight')}"
        lora |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        weights[key] += up @ down
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "up_proj"]}
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "bias": "none", "task_type": "CAUSAL_LM"})
    )
    save_file(lora, adapter / "adapter_model.safetensors")
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return adapter, merged


def random_qwen(kind: str, folder: Path) -> Path:
    """A random Qwen-VL of a ``config.model_type``. Its head sizes suit vLLM's CPU kernels.

    Qwen2.5-VL has windows of 2 x 2 units and whole images in turns, Qwen3-VL hands two layers to the decoder's first.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny-llava"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>"]})
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<image>",
            "video": "<video>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    text = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "out_hidden_size": 128,
        "intermediate_size": 192,
        "num_heads": 4,
        "patch_size": 14,
    }
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1, 3]}
    else:
        text |= {"head_dim": 32}
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
    if kind == "qwen3_vl_moe":
        text |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        }
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for table in (model.lm_head, model.get_input_embeddings()):
        torch.nn.init.normal_(table.weight, std=0.5)  # with less, every prompt has the same answer
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if "self_attn" in name and name.endswith("proj.weight"):
                weight.mul_(5)  # with less, positions make no difference worth the name
            if "experts" in name:
                weight.mul_(3)
        for merger in getattr(model.model.visual, "deepstack_merger_list", ()):
            merger.linear_fc2.weight.mul_(10)  # the same of what goes to the first layers
    model.save_pretrained(folder)
    if kind == "qwen3_vl_moe":  # published ones, which vLLM reads, have them the other way round
        weights = load_file(folder / "model.safetensors")
        experts = {key: x.transpose(1, 2).contiguous() for key, x in weights.items() if "mlp.experts." in key}
        save_file(weights | experts, folder / "model.safetensors", metadata={"format": "pt"})
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 80)
    if kind == "qwen2_5_vl":
        processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())
    else:
        processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(patch_size=14))
    processor.save_pretrained(folder)
    return folder
