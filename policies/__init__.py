"""Pruning policies, one file per paper: pure tensor functions first, then a small dataclass that uses them.

A policy works with tensors, grids and budgets; it knows no model. What it may look at is in ``views.py``, what it
returns (`Keep`) and when it is called (`Policy`) in ``base.py``.
"""
