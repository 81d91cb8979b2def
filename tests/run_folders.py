"""A small run folder, written by hand, whose every text tries to break out of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_prune.eval.runs.folder import RunFolder, write_json, write_lines

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'\"{{7*7}}$x^2$"
"""A text that a page must show as it is."""

RED, BLUE = (200, 30, 30), (30, 30, 200)
SIZE = (120, 80)
MODELS = ("one", f"two {EVIL}")
POLICIES = {"none": (("encode",), 1.0), f"cut {EVIL}": (("encode",), 0.5), "inside": (("prefill",), 0.5)}
QUESTION, ANSWER = f"Is there a dog? {EVIL}", f"no dog {EVIL} but a cat"


def tiles(model: str, policy: str) -> list[dict[str, Any]]:
    """Model one crops the middle square; model two cuts two tiles and adds a thumbnail."""
    square = {"box": [20, 0, 100, 80], "grid": [4, 4]}
    pair = [{"box": [0, 0, 60, 80], "grid": [2, 2]}, {"box": [60, 0, 120, 80], "grid": [2, 2]}]
    whole = {"box": [0, 0, 120, 80], "grid": [2, 2]}
    kinds = [square] if model == "one" else [*pair, whole]
    kept = None if policy in ("none", "inside") else [0, 1]
    last = [0] if policy == "inside" else None
    return [{**tile, "kept": kept, "last": last} for tile in kinds]


def record(model: str, policy: str, kind: str, number: int) -> dict[str, Any]:
    """One line of ``samples.jsonl``."""
    mine = tiles(model, policy)
    every = [tile["grid"][0] * tile["grid"][1] for tile in mine]
    answer = ANSWER if policy == "none" else f"a dog {EVIL}"
    start = answer.index("dog")
    mention = {"word": "dog", "object": f"dog {EVIL}", "span": [start, start + 3], "hallucinated": True}
    scores = {
        "pope": {"said": "no", "correct": policy == "none"},
        "chair": {"mentions": [mention]},
    }
    return {
        "id": f"{number} {EVIL}",
        "split": "adversarial",
        "image": {"path": f"images/{number % 2}.png", "size": list(SIZE), "id": "0"},
        "question": QUESTION,
        "label": "no" if kind == "pope" else ["cat", EVIL],
        "answer": answer,
        "tiles": mine,
        "tokens": sum(n if t["kept"] is None else len(t["kept"]) for n, t in zip(every, mine, strict=True)),
        "visual_tokens": sum(every),
        "scores": scores[kind],
    }


def make_folder(
    path: Path, speed: bool = True, policies: tuple[str, ...] = tuple(POLICIES), samples: int = 4
) -> RunFolder:
    """Write a run of two models, the policies, and the tasks ``pope``, ``captions`` and ``speed``."""
    (path / "images").mkdir(parents=True)
    for number, colour in enumerate((RED, BLUE)):
        Image.new("RGB", SIZE, colour).save(path / "images" / f"{number}.png")
    rows: list[dict[str, Any]] = []
    times: dict[str, Any] = {}
    for m, model in enumerate(MODELS):
        for p, policy in enumerate(policies):
            stages, ratio = POLICIES[policy]
            for kind, task in (("pope", "pope"), ("chair", "captions"), ("speed", "speed")):
                cell = f"{m}.{p}.{kind}"
                records = [record(model, policy, kind, i) for i in range(samples)] if kind != "speed" else []
                metrics = {
                    "pope": {"accuracy": 0.9 - 0.1 * p, "f1": 0.8 - 0.1 * p, "yes_ratio": 0.5},
                    "chair": {"f1": 0.7, "recall": 0.6, "chair_s": 0.1 * p, "chair_i": 0.05, "length": 12.0},
                    "speed": {"kv_bytes": 2**20 * (3 - p), "kv_bytes_dense": 3 * 2**20},
                }[kind]
                one = record(model, policy, "pope", 0)
                row = {
                    "cell": cell, "model": model, "policy": policy, "task": task, "kind": kind, "n": samples,
                    "stages": list(stages), "budget": {"ratio": ratio}, "tokens": float(one["tokens"]),
                    "visual_tokens": float(one["visual_tokens"]), "metrics": metrics, "undefined": [],
                    "intervals": {"f1": [0.6, 0.9]} if kind != "speed" else {},
                    "warnings": [f"3 answers say neither {EVIL}"] if kind == "pope" and p == 1 else [],
                }  # fmt: skip
                if kind == "speed":
                    if not speed:
                        continue
                    times[cell] = {"prefill_ms": 30.0 - 5 * p, "prefill_ratio": 1 - p / 6}
                else:
                    write_lines(path / "cells" / cell / "samples.jsonl", records)
                rows.append(row)
    write_json(path / "results.json", rows)
    if speed:
        write_json(path / "times.json", times)
    failed = {
        "cell": "x",
        "model": EVIL,
        "policy": EVIL,
        "budget": {"tokens": 64},
        "task": EVIL,
        "error": EVIL,
    }
    write_json(path / "failed.json", [failed])
    (path / "config.yaml").write_text(f"# {EVIL}\nmodels: []\n")
    return RunFolder(path)


def make_crowd(path: Path, names: Sequence[str], ratios: Sequence[float] = (0.5, 0.25, 0.125)) -> RunFolder:
    """A run of many policies on one model, its figures without its samples; half of its cells have a warning."""
    rows: list[dict[str, Any]] = []
    times: dict[str, Any] = {}
    for p, policy in enumerate(names):
        for ratio in (1.0,) if policy == "none" else ratios:
            tokens = 256 * ratio
            score = 1 - (1 - ratio) ** 2 * (0.1 + 0.03 * ((7 * p) % 11))
            common = {
                "model": "one", "policy": policy, "stages": ["encode"], "tokens": tokens, "visual_tokens": 256.0,
                "budget": {} if policy == "none" else {"ratio": ratio}, "n": 24, "undefined": [],
            }  # fmt: skip
            for kind in ("pope", "chair", "speed"):
                metrics = {
                    "pope": {"accuracy": score, "f1": score - 0.02, "yes_ratio": 0.5},
                    "chair": {
                        "f1": score**2,
                        "recall": score,
                        "chair_s": 1 - score,
                        "chair_i": 0.1,
                        "length": 12.0,
                    },
                    "speed": {"kv_bytes": tokens * 8192, "kv_bytes_dense": 2.0**21},
                }[kind]
                cell = f"{p}.{ratio}.{kind}"
                warnings = [f"{p + 2} answers say neither yes nor no"] if kind == "pope" and p % 2 else []
                intervals = {"f1": [0.6, 0.9], "accuracy": [0.6, 0.9]} if kind == "pope" else {}
                rows.append(
                    {**common, "cell": cell, "task": kind, "kind": kind, "metrics": metrics, "intervals": intervals,
                     "warnings": warnings}
                )  # fmt: skip
            times[f"{p}.{ratio}.speed"] = {"prefill_ms": 10 + tokens / 9 + p % 5, "prefill_ratio": ratio}
    write_json(path / "results.json", rows)
    write_json(path / "times.json", times)
    return RunFolder(path)
