"""CHAIR: how much of what captions mention is not in the image (Rohrbach et al. 2018, arXiv 1809.02156).

For a caption c of image i let W(c) be its object words with repeats, G(i) the objects in the image, and H(c)
those words of W(c) that are not in G(i):

    chair_s    captions with H(c) not empty / captions
    chair_i    sum |H(c)| / sum |W(c)|
    recall     sum |set W(c) & G(i)| / sum |G(i)|
    precision  sum |set W(c) & G(i)| / sum |set W(c)|
    f1         2 precision recall / (precision + recall)
    length     tokens a caption, punctuation included, joined phrases counted once
    repetition mean over captions of 1 - different 4-grams / 4-grams (0 below four tokens)

All but ``length`` are fractions. The first two are the official script's, recall is
Maxlinn/CHAIR-metric-standalone's, precision, f1 and length are those of LALBJ/PAI's chair.py (which prints
length * 0.01). Intervals: percentiles over resampled captions.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def rates(sums: Floats) -> tuple[dict[str, Floats], list[str]]:
    """Rates from summed counts, and the names of those with nothing to divide by (they are 0).

    Args:
        sums: ``(..., 9)``: captions, hallucinating captions, hallucinated words, object words, objects
            recalled, objects in the images, different objects mentioned, tokens, repetition.
    """
    captions, bad, wrong, said, right, known, different, tokens, repeated = np.moveaxis(sums, -1, 0)
    undefined: list[str] = []

    def share(name: str, part: Floats, whole: Floats) -> Floats:
        if np.any(whole == 0):
            undefined.append(name)
        result: Floats = np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole != 0)
        return result

    recall, precision = share("recall", right, known), share("precision", right, different)
    return {
        "chair_s": share("chair_s", bad, captions),
        "chair_i": share("chair_i", wrong, said),
        "recall": recall,
        "precision": precision,
        "f1": share("f1", 2 * precision * recall, precision + recall),
        "length": share("length", tokens, captions),
        "repetition": share("repetition", repeated, captions),
    }, undefined


def bootstrap_sums(counts: Floats, samples: int, seed: int) -> Floats:
    """Sums ``(samples, 9)`` of ``counts`` ``(captions, 9)``, each over as many draws with replacement."""
    rng = np.random.default_rng(seed)
    n = len(counts)
    rows = max(1, (1 << 16) // n)  # draws at a time: few enough to stay in cache
    sums = []
    for start in range(0, samples, rows):
        draws = min(rows, samples - start)
        drawn = rng.integers(0, n, size=(draws, n)) + np.arange(draws)[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)
        sums.append(times @ counts)
    return np.concatenate(sums)
