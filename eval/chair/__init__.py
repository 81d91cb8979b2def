"""CHAIR: object hallucination in captions, equal to the official script without its dependencies.

Read in this order: ``tokens`` and ``singular`` (words), ``vocabulary`` (which words are objects),
``mentions`` (the objects of a caption), ``ground_truth`` (the objects of an image), ``rates`` (the formulas),
``score``.
"""

from vlm_prune.eval.chair.captions import (
    only_images,
    read_captions,
    read_image_ids,
    sample_image_ids,
    write_image_ids,
)
from vlm_prune.eval.chair.ground_truth import coco_truth
from vlm_prune.eval.chair.mentions import VARIANTS, CaptionReader, Mention, Reading
from vlm_prune.eval.chair.score import CaptionScore, ChairResult, score_captions
from vlm_prune.eval.chair.vocabulary import Vocabulary
from vlm_prune.eval.coco import image_id

__all__ = [
    "VARIANTS",
    "CaptionReader",
    "CaptionScore",
    "ChairResult",
    "Mention",
    "Reading",
    "Vocabulary",
    "coco_truth",
    "image_id",
    "only_images",
    "read_captions",
    "read_image_ids",
    "sample_image_ids",
    "score_captions",
    "write_image_ids",
]
