"""The census of families: every image-text-to-text class of transformers, built small, pruned and compared with stock.

`shrink` builds them, `prompts` writes inputs for them, `check` tries them out, `page` writes docs/families.md. Run it
with ``make census``.
"""
