"""``python -m vlm_prune``: the command line, for launchers that start a module."""

from .cli import app

app(prog_name="vlm-prune")
