"""CHAIR of captions: overall, with intervals, and caption by caption. The formulas are in :mod:`.rates`."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_prune.eval.chair.ground_truth import object_named
from vlm_prune.eval.chair.mentions import CaptionReader, Mention, token_spans
from vlm_prune.eval.chair.rates import bootstrap_sums, rates
from vlm_prune.eval.coco import ImageId


@dataclass(frozen=True, slots=True)
class CaptionScore:
    """One caption: what it mentions and what of it is hallucinated."""

    image_id: ImageId
    caption: str
    truth: frozenset[str]
    tokens: list[str]
    words: list[str]
    mentions: list[Mention]

    @property
    def hallucinated(self) -> list[Mention]:
        """The mentions of objects that are not in the image."""
        return [mention for mention in self.mentions if mention.object not in self.truth]

    @property
    def repetition(self) -> float:
        """Share of the caption's 4-grams that it has said before."""
        count = len(self.tokens) - 3
        if count < 1:
            return 0.0
        tokens = self.tokens
        return 1 - len(set(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))) / count

    def counts(self) -> tuple[float, ...]:
        """The numbers all rates are made of, in the order of :func:`rates`."""
        found = {mention.object for mention in self.mentions}
        wrong = len(self.hallucinated)
        known, right = len(self.truth), len(found & self.truth)
        return (
            1,
            wrong > 0,
            wrong,
            len(self.mentions),
            right,
            known,
            len(found),
            len(self.words),
            self.repetition,
        )

    def metrics(self) -> dict[str, float]:
        """The rates of this caption alone; 0 where a rate has nothing to divide by."""
        return {name: float(value) for name, value in rates(np.array(self.counts(), dtype=float))[0].items()}

    def spans(self, mentions: Iterable[Mention] | None = None) -> list[tuple[int, int]]:
        """``(start, end)`` in characters of mentions, by default the hallucinated ones, to mark them in the caption."""
        spans = token_spans(self.caption, self.tokens)
        marked = self.hallucinated if mentions is None else mentions
        return [(spans[m.token][0], spans[m.token + m.width - 1][1]) for m in marked]

    def as_official(self) -> dict[str, Any]:
        """The record the official script writes, with the marked characters and all rates added."""
        wrong = self.hallucinated
        rate = self.metrics()
        return {
            "image_id": self.image_id,
            "caption": self.caption,
            "mscoco_hallucinated_words": [[m.word, m.object] for m in wrong],
            "mscoco_gt_words": sorted(self.truth),
            "mscoco_generated_words": [m.object for m in self.mentions],
            "hallucination_idxs": [m.official_index for m in wrong],
            "hallucination_spans": self.spans(),
            "words": self.words,
            "metrics": {
                "CHAIRs": int(rate["chair_s"]),
                "CHAIRi": rate["chair_i"],
                "Recall": rate["recall"],
                "Precision": rate["precision"],
                "F1": rate["f1"],
                "Len": rate["length"],
                "Repetition": rate["repetition"],
            },
        }


@dataclass(frozen=True)
class ChairResult:
    """Rates over all captions, their intervals, and each caption's detail."""

    variant: str
    metrics: dict[str, float]
    undefined: list[str]
    intervals: dict[str, tuple[float, float]]
    settings: dict[str, Any]
    counts: dict[str, int]
    captions: list[CaptionScore]
    warnings: list[str]

    def summary(self) -> dict[str, Any]:
        """Everything but the captions, ready for JSON."""
        return {
            **self.metrics,
            "variant": self.variant,
            "undefined": self.undefined,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            **self.settings,
            **self.counts,
            "warnings": self.warnings,
        }


def _scored(
    captions: Iterable[tuple[ImageId, str]], truth: Mapping[ImageId, Collection[str]], reader: CaptionReader
) -> Iterator[CaptionScore]:
    objects: dict[ImageId, frozenset[str]] = {}
    for image, caption in captions:
        if image not in objects:
            if image not in truth:
                raise ValueError(
                    f"image {image!r} has no ground truth; pass an empty set if nothing is in it"
                )
            objects[image] = frozenset(object_named(name, reader) for name in truth[image])
        yield CaptionScore(image, caption, objects[image], *reader.read(caption))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Many small objects set off the garbage collector, which takes longer than the scores if torch is loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def score_captions(
    captions: Iterable[tuple[ImageId, str]],
    truth: Mapping[ImageId, Collection[str]],
    reader: CaptionReader | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> ChairResult:
    """CHAIR of captions, any vocabulary.

    Args:
        captions: ``(image id, caption)``; an empty caption counts as a caption that mentions nothing.
        truth: image id -> the objects in it, in the words of the reader's vocabulary.
        reader: default: the official reading of COCO's objects.
        samples: bootstrap draws for the intervals; 0 for none.
        seed: of those draws.
        confidence: share of the draws inside an interval.

    Raises:
        ValueError: no captions, an image without ground truth, or an object the vocabulary does not know.
    """
    reader = reader or CaptionReader()
    if samples < 0 or not 0 < confidence < 1:
        raise ValueError(f"samples >= 0 and 0 < confidence < 1 are allowed, got {samples} and {confidence}")
    with _no_collection():
        scored = list(_scored(captions, truth, reader))
    if not scored:
        raise ValueError("there are no captions to score")
    counts = np.array([score.counts() for score in scored], dtype=float)
    metrics, undefined = rates(counts.sum(axis=0))
    intervals: dict[str, tuple[float, float]] = {}
    if samples:
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        for name, values in rates(bootstrap_sums(counts, samples, seed))[0].items():
            low, high = np.quantile(values, tails)
            intervals[name] = (float(low), float(high))
    return ChairResult(
        variant=reader.variant,
        metrics={name: float(value) for name, value in metrics.items()},
        undefined=undefined,
        intervals=intervals,
        settings={"bootstrap_samples": samples, "bootstrap_seed": seed, "confidence": confidence},
        counts={
            "n_captions": len(scored),
            "n_images": len({score.image_id for score in scored}),
            "n_object_words": int(counts[:, 3].sum()),
            "n_hallucinated_words": int(counts[:, 2].sum()),
            "n_hallucinated_captions": int(counts[:, 1].sum()),
        },
        captions=scored,
        warnings=_repeats(scored),
    )


def _repeats(scored: Sequence[CaptionScore]) -> list[str]:
    """A warning of images with several captions, as a file that was written twice has them."""
    count = Counter(score.image_id for score in scored)
    if not (several := [image for image, number in count.items() if number > 1]):
        return []
    same = len(scored) - len({(score.image_id, score.caption) for score in scored})
    first = f"{several[0]!r} with {count[several[0]]}"
    warning = (
        f"{len(several)} of {len(count)} images have several captions, first image {first}; "
        f"{same} captions repeat another one of their image word by word. All are counted (the "
        "official script takes one an image): leave one for each image if the file was written more than once"
    )
    return [warning]
