"""Folders for vLLM that compute exactly what the shipped models do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlm_prune.eval.models import model_path


def with_twice_the_heads(name: str, folder: Path) -> Path:
    """A shipped model with a head of zeros behind each key head of its decoder, so that two ranks can share them."""
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
