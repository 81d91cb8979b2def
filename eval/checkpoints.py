"""Checkpoints by name: how large the well-known ones are, how one is opened, and what to say when it is not there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from vlm_prune.eval.models import MODELS, load_model
from vlm_prune.saving import is_no_name, missing_model


@dataclass(frozen=True)
class Checkpoint:
    """What a published checkpoint costs, worked out from its shapes.

    Attributes:
        family: its ``config.model_type``.
        parameters: in billions.
        layers: of the language model.
        kv_size: elements of the keys of one token in one layer (key-value heads times head size).
        tokens: visual tokens of an image, unpruned: of one tile, or of 1024 x 768 pixels where images have any size.
    """

    family: str
    parameters: float
    layers: int
    kv_size: int
    tokens: int

    def gigabytes(self, bytes_per_weight: int = 2) -> float:
        """Size of the weights in GB (1e9 bytes). Checkpoints on the hub take two bytes a weight."""
        return self.parameters * bytes_per_weight

    def kv_megabytes(self, tokens: int, bytes_per_value: int = 2) -> float:
        """Size in MB (1e6 bytes) of the keys and values of ``tokens`` visual tokens."""
        return 2e-6 * self.layers * self.kv_size * tokens * bytes_per_value


CHECKPOINTS = {
    "llava-hf/llava-1.5-7b-hf": Checkpoint("llava", 7.06, 32, 4096, 576),
    "llava-hf/llava-1.5-13b-hf": Checkpoint("llava", 13.35, 40, 5120, 576),
    "llava-hf/vip-llava-7b-hf": Checkpoint("vipllava", 7.08, 32, 4096, 576),
    "llava-hf/llava-v1.6-vicuna-7b-hf": Checkpoint("llava_next", 7.06, 32, 4096, 576),
    "llava-hf/llava-v1.6-mistral-7b-hf": Checkpoint("llava_next", 7.57, 32, 1024, 576),
    "llava-hf/LLaVA-NeXT-Video-7B-hf": Checkpoint("llava_next_video", 7.06, 32, 4096, 576),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": Checkpoint("llava_onevision", 0.89, 24, 128, 729),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Checkpoint("llava_onevision", 8.03, 28, 512, 729),
    "OpenGVLab/InternVL3-1B-hf": Checkpoint("internvl", 0.94, 24, 128, 256),
    "OpenGVLab/InternVL3-2B-hf": Checkpoint("internvl", 2.09, 28, 256, 256),
    "OpenGVLab/InternVL3-8B-hf": Checkpoint("internvl", 7.94, 28, 512, 256),
    "Qwen/Qwen2-VL-2B-Instruct": Checkpoint("qwen2_vl", 2.21, 28, 256, 999),
    "Qwen/Qwen2-VL-7B-Instruct": Checkpoint("qwen2_vl", 8.29, 28, 512, 999),
    "Qwen/Qwen2.5-VL-3B-Instruct": Checkpoint("qwen2_5_vl", 3.75, 36, 256, 999),
    "Qwen/Qwen2.5-VL-7B-Instruct": Checkpoint("qwen2_5_vl", 8.29, 28, 512, 999),
    "Qwen/Qwen3-VL-2B-Instruct": Checkpoint("qwen3_vl", 2.13, 28, 1024, 768),
    "Qwen/Qwen3-VL-4B-Instruct": Checkpoint("qwen3_vl", 4.44, 36, 1024, 768),
    "Qwen/Qwen3-VL-8B-Instruct": Checkpoint("qwen3_vl", 8.77, 36, 1024, 768),
}
"""Well-known checkpoints of the supported families, by their name on the Hugging Face hub."""


def open_model(
    name: str, dtype: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A shipped test model by its name, or any checkpoint by its folder or hub name, with its processor.

    Args:
        name: one of `MODELS`, a folder, or a name on the hub.
        dtype: name of a torch dtype, or ``"auto"`` for the checkpoint's own. Default: float32 for shipped models; for
            others the checkpoint's own, or bfloat16 on a CPU, where float16 is slow.
        device: default: the CPU.

    Raises:
        ValueError: there is no such model, dtype or device; says which, and what to do.
    """
    place = _device(device or "cpu")
    chosen = _dtype(dtype)
    if name in MODELS and not Path(name).is_dir():
        model, processor = load_model(name, chosen if isinstance(chosen, torch.dtype) else torch.float32)
        return model.to(place), processor
    if is_no_name(name):
        raise ValueError(cannot_load(name))
    try:
        cached_file(name, "config.json")  # one file, so that a wrong name is not asked for file by file
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=chosen or (torch.bfloat16 if place.type == "cpu" else "auto")
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not Path(name).is_dir():
            raise
        raise ValueError(cannot_load(name, error)) from error
    return model.to(place).eval(), processor


def cannot_load(name: str, error: Exception | None = None) -> str:
    """What is missing where a model named ``name`` could not be loaded, and what to do."""
    known = CHECKPOINTS.get(name)
    return missing_model(name, error, CHECKPOINTS, f"{known.gigabytes():.1f} GB" if known else None)


def _dtype(name: str | None) -> torch.dtype | str | None:
    if name in (None, "auto"):
        return name
    allowed = ("float32", "bfloat16", "float16")
    if name not in allowed:
        raise ValueError(
            f"dtype {name!r}: choose one of {', '.join(allowed)}, or auto for the checkpoint's own."
        )
    found: torch.dtype = getattr(torch, name)
    return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: choose cpu, or cuda where there is a GPU.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch {torch.__version__} sees no GPU here. Choose cpu.")
    return device


def markdown() -> str:
    """The table of ``docs/checkpoints.md``: what each takes, unpruned and at a quarter of the tokens."""
    head = ("checkpoint", "weights, billions", "download GB", "memory GB", "in float32 GB", "visual tokens")
    rows = [[*head, "KV cache MB", "KV cache at 25 % MB"], ["---", *["---:"] * (len(head) + 1)]]
    for name, size in CHECKPOINTS.items():
        sizes = [f"{size.gigabytes():.1f}", f"{size.gigabytes():.1f}", f"{size.gigabytes(4):.1f}"]
        caches = [f"{size.kv_megabytes(tokens):.0f}" for tokens in (size.tokens, round(size.tokens / 4))]
        link = f"[`{name}`](https://huggingface.co/{name})"
        rows.append([link, f"{size.parameters:.2f}", *sizes, str(size.tokens), *caches])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
