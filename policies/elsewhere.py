"""Well-known methods of the field that are not among the policies, and the closest policy for each."""

from __future__ import annotations

import re

_KINDS: dict[str, tuple[str, str, str]] = {
    # kind: what methods of it do, the nearest policy, the methods' names
    "merge": (
        "merges similar tokens",
        "visionzip",
        "ToMe ToFu FOLDER PACT",
    ),
    "tower": (
        "chooses by the vision tower's own attention",
        "visionzip",
        "FasterVLM HiPrune VisionTrim PruneSID SinkPruner ApET HIRED GlobalCom2 VScan STD",
    ),
    "diverse": (
        "chooses tokens that differ from each other",
        "divprune",
        "GreedyPrune Cen-Prune OccamToken",
    ),
    "question": (
        "chooses by the question",
        "cdpruner",
        "TRIM EADP ProViP CATP",
    ),
    "decoder": (
        "drops tokens between decoder layers",
        "fastv",
        "FitPrune TopV V2Drop ATP-LLaVA FEATHER FiCoCo IVC-Prune DUET-VLM ViTCoP ZipVL",
    ),
    "exit": ("drops all visual tokens from a layer on", "dyvte", "VTW ShortV FlexExit"),
    "cache": (
        "evicts rows of the KV cache",
        "snapkv",
        "PrefixKV MEDA SparseMM AirCache MixKV TGV-KV AdaKV TOVA",
    ),
    "video": (
        "drops tokens that repeat from frame to frame",
        "vidcom2",
        "PruneVid HoliTom FlashVID FrameFusion EVS PixelPrune",
    ),
    "decoding": (
        "edits attention or logits against hallucination",
        "vcd",
        "ICD OPERA HALC DeCo M3ID ACD LayerCD",
    ),
    "trained": (
        "trains a smaller projector or new tokens, which this package does not",
        "pool",
        "TokenPacker VoCo-LLaMA LLaVA-Mini Matryoshka M3 QueCC LookupViT DynamicViT",
    ),
}


def plain(name: str) -> str:
    """A name in the form that spellings of it share."""
    return re.sub(r"[^a-z0-9+]", "", name.lower())


ELSEWHERE = {
    plain(name): (name, what, nearest) for what, nearest, names in _KINDS.values() for name in names.split()
}
"""Plain name -> how it is written, what it does, and the registered policy that comes nearest."""


def not_among(name: str) -> str:
    """A sentence about a method that is known but not here; empty for any other name."""
    found = ELSEWHERE.get(plain(name))
    if found is None:
        return ""
    written, what, nearest = found
    return (
        f'{written}, which {what}, is not among the policies; the nearest of them is "{nearest}". '
        "docs/contributing.md says how to add one. "
    )
