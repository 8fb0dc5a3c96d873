"""Statistics of paired differences: intervals, p-values, equivalence, power."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray
RESAMPLES = 9999


class Comparison(NamedTuple):
    """An arm against the baseline, over paired seeds.

    Attributes:
        n: Pairs.
        difference: Mean of arm minus baseline.
        sd: Standard deviation of the differences.
        interval: 95% t interval of the mean difference.
        bootstrap: 95% bootstrap interval (percentiles) of the same.
        p: Of the paired t test that the mean is 0, two-sided.
        p_equivalence: Of the two one-sided t tests that it is beyond the margin.
        detectable: The difference found with a power of 80%: 2.8·sd/sqrt(n).
    """

    n: int
    difference: float
    sd: float
    interval: tuple[float, float]
    bootstrap: tuple[float, float]
    p: float
    p_equivalence: float
    detectable: float


def compare(arm: Values, baseline: Values, margin: float) -> Comparison:
    """Returns the comparison of paired losses; the margin is that of equivalence.

    Differences that are all alike have no spread: their test is exact.

    Raises:
        ValueError: Fewer than two pairs, or lengths that differ.
    """
    if len(arm) != len(baseline) or len(arm) < 2:
        raise ValueError(f"two pairs at least, got {len(arm)} and {len(baseline)}")
    d = np.asarray(arm, np.float64) - np.asarray(baseline, np.float64)
    n, mean, sd = len(d), float(d.mean()), float(d.std(ddof=1))
    if np.ptp(d) == 0:
        same, p = (mean, mean), float(mean == 0)
        return Comparison(n, mean, 0.0, same, same, p, float(abs(mean) >= margin), 0.0)
    test = stats.ttest_1samp(d, 0.0)
    low, high = test.confidence_interval(0.95)
    drawn = stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Comparison(
        n=n,
        difference=mean,
        sd=sd,
        interval=(float(low), float(high)),
        bootstrap=(float(drawn.low), float(drawn.high)),
        p=float(test.pvalue),
        p_equivalence=equivalence(d, margin),
        detectable=2.8 * sd / math.sqrt(n),
    )


def equivalence(differences: Values, margin: float) -> float:
    """Returns the p of two one-sided t tests that the mean lies beyond ±margin."""
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return float(max(above, below))


def holm(p: Values) -> list[float]:
    """Returns Holm's adjusted p-values, in the order given."""
    count = len(p)
    adjusted, largest = [0.0] * count, 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (count - rank) * float(p[index])))
        adjusted[index] = largest
    return adjusted


def verdict(difference: float, p: float, p_equivalence: float, alpha: float) -> str:
    """Returns what adjusted p-values say of a difference in loss."""
    equivalent = p_equivalence < alpha
    if p < alpha:
        side = "better" if difference < 0 else "worse"
        return f"{side}, within the margin" if equivalent else side
    return "equivalent" if equivalent else "undecided"


def steps_to(target: float, losses: Values, steps: int) -> float | None:
    """Returns after how many steps a loss is at a target or below; None if never.

    Between two log points the loss is taken for linear.

    Args:
        target: The loss.
        losses: At the log points, evenly spaced, the last one after all steps.
        steps: Of the whole run.
    """
    each = steps / len(losses)
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return each
            before = losses[i - 1]
            return each * (i + (before - target) / (before - loss))
    return None
