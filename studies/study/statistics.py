"""Statistics of paired differences, and what tuning says beside the best setting."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

Values = Sequence[float] | np.ndarray
COUNTS = (8, 16, 32)  # of settings, beside all of them
SMALL_EPS, LARGE_EPS = 1e-5, 1e-4


class Comparison(NamedTuple):
    """An arm against the baseline, over paired seeds."""

    n: int
    difference: float  # mean of arm minus baseline
    sd: float  # of the differences
    interval: tuple[float, float]  # 95% t interval of the mean difference
    bootstrap: tuple[float, float]  # 95% percentiles of the same
    p: float  # of the paired t test that the mean is 0, two-sided
    p_equivalence: float  # of two one-sided t tests that it is beyond the margin
    detectable: float  # with a power of 80%: 2.8·sd/sqrt(n)


def compare(arm: Values, baseline: Values, margin: float) -> Comparison:
    """Returns the comparison of paired losses; where all differ alike, it is exact."""
    d = np.asarray(arm, np.float64) - np.asarray(baseline, np.float64)
    n, mean, sd = len(d), float(d.mean()), float(d.std(ddof=1))
    if np.ptp(d) == 0:
        same, p = (mean, mean), float(mean == 0)
        return Comparison(n, mean, 0.0, same, same, p, float(abs(mean) >= margin), 0.0)
    test = stats.ttest_1samp(d, 0.0)
    rng = np.random.default_rng(0)
    drawn = stats.bootstrap((d,), np.mean, method="percentile", rng=rng)
    intervals = test.confidence_interval(0.95), drawn.confidence_interval
    both = [(float(low), float(high)) for low, high in intervals]
    rest = float(test.pvalue), equivalence(d, margin), 2.8 * sd / math.sqrt(n)
    return Comparison(n, mean, sd, *both, *rest)


def equivalence(differences: Values, margin: float) -> float:
    """Returns the p of two one-sided t tests that the mean lies beyond ±margin."""
    return float(DescrStatsW(differences).ttost_mean(-margin, margin)[0])


def holm(p: Values) -> list[float]:
    """Returns Holm's adjusted p-values, in the order given."""
    return [float(x) for x in multipletests(p, method="holm")[1]]


def verdict(difference: float, p: float, p_equivalence: float, alpha: float) -> str:
    """Returns what adjusted p-values say of a difference in loss."""
    equivalent = p_equivalence < alpha
    if p < alpha:
        side = "better" if difference < 0 else "worse"
        return f"{side}, within the margin" if equivalent else side
    return "equivalent" if equivalent else "undecided"


def best_of(losses: Values, count: int) -> float | None:
    """Returns the expected best loss of some settings, drawn without repetition.

    None if the best of a draw may be one that diverged, whose loss is infinite.
    """
    total, ordered = len(losses), sorted(losses)
    # The best of a draw is the i-th of all if i is drawn, and else later ones alone.
    chances = [
        math.comb(total - 1 - i, count - 1) / math.comb(total, count)
        for i in range(total - count + 1)
    ]
    found = sum(p * x for p, x in zip(chances, ordered, strict=False))
    return found if math.isfinite(found) else None


def best_by_eps(settings: list[dict[str, float]], losses: Values) -> dict[str, Any]:
    """Returns the lowest loss with a small and with a large eps; None without any."""
    tried = [(h.get("eps", math.nan), x) for h, x in zip(settings, losses, strict=True)]
    tried = [(eps, x) for eps, x in tried if math.isfinite(x)]
    return {
        "small": min((x for eps, x in tried if eps < SMALL_EPS), default=None),
        "large": min((x for eps, x in tried if eps > LARGE_EPS), default=None),
    }
