"""docs/families.md: the census as a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHECKPOINTS = {
    "aya_vision": "Aya Vision 8B, 32B",
    "blip-2": "BLIP-2 OPT 2.7B",
    "chameleon": "Chameleon 7B",
    "cohere2_vision": "Command A Vision",
    "deepseek_vl": "DeepSeek-VL 1.3B, 7B",
    "emu3": "Emu3-Chat",
    "ernie4_5_vl_moe": "ERNIE 4.5 VL 28B-A3B",
    "gemma3": "Gemma 3 4B to 27B",
    "gemma4": "Gemma 4",
    "glm46v": "GLM-4.6V",
    "glm4v": "GLM-4.1V 9B Thinking",
    "glm4v_moe": "GLM-4.5V",
    "glm_ocr": "GLM-OCR",
    "got_ocr2": "GOT-OCR 2.0",
    "hunyuan_vl": "HunyuanOCR",
    "idefics2": "Idefics2 8B",
    "idefics3": "Idefics3 8B, Granite-Docling 258M",
    "instructblip": "InstructBLIP Vicuna 7B",
    "internvl": "InternVL 2.5, 3, 3.5",
    "janus": "Janus-Pro 1B, 7B",
    "kimi_k25": "Kimi K2.5",
    "lfm2_vl": "LFM2-VL 450M, 1.6B",
    "lighton_ocr": "LightOnOCR 1B",
    "llama4": "Llama 4 Scout, Maverick",
    "llava": "LLaVA-1.5 7B, 13B; Pixtral 12B",
    "llava_next": "LLaVA-NeXT (1.6)",
    "llava_next_video": "LLaVA-NeXT-Video 7B",
    "llava_onevision": "LLaVA-OneVision 0.5B, 7B",
    "minicpmv4_6": "MiniCPM-V 4.6",
    "mistral3": "Mistral Small 3.1, 3.2; Ministral 3",
    "mllama": "Llama 3.2 Vision 11B, 90B",
    "molmo2": "Molmo 2",
    "ovis2": "Ovis2 1B to 34B",
    "paddleocr_vl": "PaddleOCR-VL 0.9B",
    "paligemma": "PaliGemma, PaliGemma 2",
    "perception_lm": "Perception LM 1B to 8B",
    "qwen2_5_omni_thinker": "Qwen2.5-Omni (the thinker)",
    "qwen2_5_vl": "Qwen2.5-VL 3B to 72B",
    "qwen2_vl": "Qwen2-VL 2B to 72B",
    "qwen3_5": "Qwen3.5, Qwen3.6",
    "qwen3_5_moe": "Qwen3.5 and 3.6, mixtures of experts",
    "qwen3_vl": "Qwen3-VL 2B to 32B",
    "qwen3_vl_moe": "Qwen3-VL 30B-A3B, 235B-A22B",
    "smolvlm": "SmolVLM, SmolVLM2",
    "video_llama_3": "VideoLLaMA 3 2B, 7B",
    "video_llava": "Video-LLaVA 7B",
    "vipllava": "VipLLaVA 7B, 13B",
}
"""Checkpoints that people use, by model type."""

PLACES = {
    "tower": "tower, projector, decoder",
    "packed tower": "tower (packed images), merger, decoder",
    "features": "after the projector, decoder",
}

HEAD = """# Families

Every image-text-to-text class of transformers {version}, built small with random weights and tried out by
`make census`, which writes this page. A row *works* if, on one prompt with two images (or videos): `none` answers bit
for bit as the stock model does, in a forward, in `generate`, and in a second turn; `uniform` gives what the stock
decoder gives for the rows that are left, with original and, where a position is no place in the image, compact
positions; the other policies answer or are refused with a sentence; and `unprune` gives the stock model back bit for
bit. Sliding windows count rows: what is left sees as far as in the stock model on the shortened prompt.

{works} of the {built} classes that could be built work, {refused} are refused with the sentence below, {wrong} are
wrong. {missing} do not run small: nobody wrote a config for them, or stock code fails. (FastVLM,
Gemma 3n and Perception LM have towers of timm, with which their rows were made.)

*Places* are where policies may act. A family of which only the features are known ("after the projector") is read by
the general adapter ([`adapters/features.py`](../adapters/features.py)); policies that look into its tower, such as
FlowCut and VisionZip, are refused by `prune`.
"""


def page(found: Mapping[str, Any]) -> str:
    """The page, from what the census found."""
    rows: dict[str, dict[str, Any]] = dict(sorted(found["rows"].items()))
    by = {
        outcome: {name: row for name, row in rows.items() if row["outcome"] == outcome}
        for outcome in ("works", "refused", "wrong", "not built")
    }
    counts = {name.split()[0]: len(some) for name, some in by.items()}
    head = HEAD.format(
        version=found["transformers"],
        works=counts["works"],
        refused=counts["refused"],
        wrong=counts["wrong"],
        built=len(rows) - counts["not"],
        missing=counts["not"],
    )
    parts = [head, "## Work\n", _works(by["works"])]
    if by["wrong"]:
        parts += ["## Wrong\n", _reasons(by["wrong"])]
    parts += ["## Refused\n", _reasons(by["refused"]), "## Not built small\n", _reasons(by["not built"])]
    return "\n".join(parts)


def _works(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| model type | checkpoints | places | positions | refused |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        refused = ", ".join(f"`{policy}`" for policy in row.get("policies", {}))
        positions = ", ".join(row["positions"])
        lines.append(
            f"| `{name}` | {CHECKPOINTS.get(name, '')} | {PLACES[row['place']]} | {positions} | {refused} |"
        )
    return "\n".join(lines) + "\n"


def _reasons(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| model type | checkpoints | reason |", "| --- | --- | --- |"]
    for name, row in rows.items():
        reason = row["reason"].replace("|", "\\|")
        lines.append(f"| `{name}` | {CHECKPOINTS.get(name, '')} | {reason} |")
    return "\n".join(lines) + "\n"
