"""A LLaVA with random weights, 576 visual tokens and a decoder of any width: no download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vlm_prune.eval.models import model_path

LARGE = 4096
"""Width from which on the decoder has as many layers as LLaVA-1.5-7B."""


def wide_model(folder: Path, width: int) -> Path:
    """tiny-llava's folder with other sizes and no weights; vLLM makes random ones with ``--load-format dummy``."""
    if width < 256 or width % 256:
        raise ValueError(f"--wide {width}: choose a multiple of 256, such as 1024 or 4096")
    stock = model_path("tiny-llava")
    folder.mkdir(parents=True)
    for file in [*stock.glob("*.json*"), stock / "chat_template.jinja"]:
        shutil.copy(file, folder)
    config = json.loads((stock / "config.json").read_text())
    config["image_seq_length"] = 576
    tower, heads = min(1024, width // 4), width // 64
    config["vision_config"].update(
        image_size=336,
        patch_size=14,
        hidden_size=tower,
        intermediate_size=4 * tower,
        num_attention_heads=tower // 64,
    )
    config["text_config"].update(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
    )
    if width >= LARGE:
        config["vision_config"]["num_hidden_layers"] = 24
        config["text_config"]["num_hidden_layers"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((stock / "processor_config.json").read_text())
    processor["patch_size"] = 14
    processor["image_processor"].update(crop_size={"height": 336, "width": 336}, size={"shortest_edge": 336})
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
