"""What tuning says beside the best setting: fewer settings, and settings as they are.

Losses are those of tuning: the mean over its seeds of the held-out loss, None where a
run diverged.
"""

import math

import numpy as np

COUNTS = (8, 16, 32)
SMALL_EPS, LARGE_EPS = 1e-5, 1e-4


def best_of(losses: list[float | None], count: int) -> float | None:
    """Returns the expected loss of the best of some settings, drawn without repetition.

    A setting that diverged is worse than all others. None if the best of a draw may be
    one of these.

    Args:
        losses: Of all settings.
        count: How many are drawn.
    """
    total = len(losses)
    ordered = sorted(math.inf if x is None else x for x in losses)
    # The best of a draw is the i-th of all if i is drawn, and else later ones alone.
    chances = [
        math.comb(total - 1 - i, count - 1) / math.comb(total, count)
        for i in range(total - count + 1)
    ]
    found = sum(p * x for p, x in zip(chances, ordered, strict=False))
    return found if math.isfinite(found) else None


def best_by_eps(
    settings: list[tuple[dict[str, float], float | None]],
) -> dict[str, float | None]:
    """Returns the lowest loss with a small and with a large eps; None without any.

    Args:
        settings: Each with its loss.
    """
    tried = [(h.get("eps", math.nan), x) for h, x in settings if x is not None]
    small = [x for eps, x in tried if eps < SMALL_EPS]
    large = [x for eps, x in tried if eps > LARGE_EPS]
    return {"small": min(small, default=None), "large": min(large, default=None)}


def matched(
    ours: list[float | None], theirs: list[float | None]
) -> tuple[float, float | None]:
    """Returns how often an arm beats the baseline where all that both have is equal.

    Also the median of the relative difference. A setting that diverged is infinitely
    bad; where both did, nothing is compared.

    Args:
        ours: Losses of the arm, setting by setting.
        theirs: Those of the baseline, at the same settings.
    """
    a, b = (np.array([math.inf if x is None else x for x in y]) for y in (ours, theirs))
    seen = np.isfinite(a) | np.isfinite(b)
    a, b = a[seen], b[seen]
    relative = np.where(
        np.isfinite(b), a / np.where(np.isfinite(b), b, 1.0) - 1.0, -1.0
    )
    middle = float(np.median(relative)) if len(relative) else math.nan
    better = float((a < b).mean()) if len(a) else math.nan
    return better, middle if math.isfinite(middle) else None
