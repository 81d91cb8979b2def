"""Headless Chromium, driven by its command line alone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)

FIXED = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
    "--enable-logging=stderr",
    "--allow-file-access-from-files",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]

needs_chromium = pytest.mark.skipif(FOUND is None, reason=f"no Chromium on this machine ({', '.join(NAMES)})")


def chromium(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page without any network; raises if a script of it failed or something was refused."""
    done = subprocess.run(
        [str(FOUND), *FIXED, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    problems = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not problems, problems
    return done


def quoted(text: str) -> str:
    """A text as a JavaScript literal that may stand in a page."""
    return json.dumps(text).replace("<", "\\u003c")


def look(page: Path, width: int, height: int, *flags: str) -> np.ndarray:
    """What the page looks like at a width, also one below the least that a window has: ``(height, width, 3)``."""
    frame = page.with_name(f"{page.stem}-frame.html")
    frame.write_text(
        f'<body style="margin:0"><iframe src="{page.name}" style="border:0;width:{width}px;height:{height}px">'
    )
    out = page.with_suffix(".png")
    chromium(frame, f"--window-size={max(width, 600)},{height}", f"--screenshot={out}", *flags)
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB"))[:height, :width]


def ask(page: Path, script: str, width: int = 1200, height: int = 1000) -> Any:
    """What a script returns, run in the page once that is loaded, at a width."""
    probe, frame = page.with_name(f"{page.stem}-probe.html"), page.with_name(f"{page.stem}-ask.html")
    send = "parent.document.body.dataset.answer = JSON.stringify((() => {" + script + "})())"
    probe.write_text(
        page.read_text(encoding="utf-8") + f"<script>addEventListener('load', () => {{ {send} }})</script>"
    )
    frame.write_text(
        f'<body style="margin:0"><iframe src="{probe.name}" style="border:0;width:{width}px;height:{height}px">'
    )
    dom = chromium(frame, f"--window-size={max(width, 600)},{height}", "--dump-dom").stdout
    found = re.search(r'data-answer="([^"]*)"', dom)
    assert found, "the script has not answered"
    return json.loads(html.unescape(found[1]))


def pages(page: Path) -> int:
    """How many sheets the page takes in print."""
    out = page.with_suffix(".pdf")
    chromium(page, "--no-pdf-header-footer", f"--print-to-pdf={out}")
    return len(re.findall(rb"/Type\s*/Page\b", out.read_bytes()))
