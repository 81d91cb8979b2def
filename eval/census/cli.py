"""``python -m vlm_prune.eval.census.cli``: runs the census and writes docs/families.json and docs/families.md.

With names of model types, only their rows are made again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

from .check import check
from .page import page
from .shrink import TYPES

FOUND = Path("docs/families.json")


def main(names: list[str]) -> int:
    """Run the census; returns 1 if a row is wrong."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = json.loads(FOUND.read_text())["rows"] if names else {}
    for model_type in names or sorted(TYPES):
        rows[model_type] = check(model_type).plain()
        print(f"{model_type}: {json.dumps(rows[model_type], ensure_ascii=False)}", flush=True)
    found = {"transformers": transformers.__version__, "rows": rows}
    FOUND.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    FOUND.with_suffix(".md").write_text(page(found))
    return int(any(row["outcome"] == "wrong" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
