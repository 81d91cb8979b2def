"""Pruning policies, one file per paper: pure tensor functions first, then a small dataclass that puts them to work.

A policy knows tensors, grids and budgets; it knows no model. What it may look at is in ``views.py``, what it
answers (`Keep`) and when it is asked (`Policy`) in ``base.py``.
"""
