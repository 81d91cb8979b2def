"""Throughput of a vLLM engine, dense against pruned, in this process: see docs/serving.md.

    python examples/bench_vllm.py                  # the shipped tiny-llava
    python examples/bench_vllm.py --wide           # random weights, 576 visual tokens, a decoder of width 1024
    python examples/bench_vllm.py --model llava-hf/llava-1.5-7b-hf --tokens 64

Every request brings an image of its own, so no cache helps. Both engines answer the same requests with as many tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vlm_prune.eval.models import model_path
from vlm_prune.eval.scenes import make_scene


def main() -> None:
    """Measure and print one row per engine."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument(
        "--model", default=str(model_path("tiny-llava")), help="folder or name of a checkpoint"
    )
    parse.add_argument("--wide", action="store_true", help="a larger LLaVA of random weights instead")
    parse.add_argument("--policy", default="flowcut")
    parse.add_argument("--tokens", type=int, default=64)
    parse.add_argument("--requests", type=int, default=32)
    parse.add_argument("--new-tokens", type=int, default=8)
    parse.add_argument("--rounds", type=int, default=3)
    parse.add_argument("--dtype", default="auto")
    given = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = wide_model(Path(folder) / "wide") if given.wide else given.model
        plan = {"policy": given.policy, "tokens": given.tokens}
        rows = [
            measure(model, name, overrides, given) for name, overrides in (("dense", {}), ("pruned", plan))
        ]
    dense, pruned = rows
    print(f"{'':8} {'prompt tokens':>13} {'requests/s':>11} {'prompt tokens/s':>16}")
    for row in rows:
        print(f"{row['name']:8} {row['prompt']:13} {row['rate']:11.2f} {row['prompt'] * row['rate']:16.0f}")
    print(f"pruned / dense: {pruned['rate'] / dense['rate']:.2f} times the requests per second")


def measure(model: str, name: str, plan: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Median rate over the rounds, of one engine that is shut down again. The first round warms up."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        model=model,
        dtype=given.dtype,
        load_format="dummy" if given.wide else "auto",
        hf_overrides={"vlm_prune": plan} if plan else {},
        max_model_len=1024,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=given.new_tokens, ignore_eos=True)
    times, prompt = [], 0
    for turn in range(given.rounds + 1):
        requests = [
            {
                "prompt": "USER: <image>\nPlease describe this image in detail. ASSISTANT:",
                "multi_modal_data": {"image": make_scene((turn, number)).image},
            }
            for number in range(given.requests)
        ]
        begin = time.perf_counter()
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        times.append(time.perf_counter() - begin)
        prompt = len(outputs[0].prompt_token_ids)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"name": name, "prompt": prompt, "rate": given.requests / median(times[1:])}


def wide_model(folder: Path) -> str:
    """tiny-llava's folder with other sizes and no weights: 24 x 24 patches, 8 decoder layers of width 1024."""
    stock = model_path("tiny-llava")
    folder.mkdir()
    for file in stock.glob("*.json*"):
        shutil.copy(file, folder)
    shutil.copy(stock / "chat_template.jinja", folder)
    config = json.loads((stock / "config.json").read_text())
    config["image_seq_length"] = 576
    config["vision_config"].update(image_size=336, patch_size=14, hidden_size=256, intermediate_size=1024)
    config["text_config"].update(
        hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, head_dim=64
    )
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((stock / "processor_config.json").read_text())
    processor["patch_size"] = 14
    processor["image_processor"].update(crop_size={"height": 336, "width": 336}, size={"shortest_edge": 336})
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return str(folder)


if __name__ == "__main__":
    main()
