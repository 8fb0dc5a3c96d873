"""AdaM3 in float64 NumPy, from the equations alone, and bounds on float32 rounding.

Imports nothing of the package. `steps` is the reference; `float32_bounds` follows the
same equations with an error bound beside every quantity.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


class Setting(NamedTuple):
    third_moment: str = "cubic"
    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.999
    lam: float = 0.01
    tau: float = 1.0
    eps: float = 1e-8
    eps_root: float = 0.0


class Step(NamedTuple):
    m: Array
    v: Array
    s: Array
    u: Array


def steps(gradients: Array, h: Setting) -> Iterator[Step]:
    """Yields the moments and the update after each gradient of a sequence."""
    gradients = np.asarray(gradients, np.float64)
    m, v, s = (np.zeros_like(gradients[0]) for _ in range(3))
    for t, g in enumerate(gradients, start=1):
        m = h.b1 * m + (1 - h.b1) * g
        v = h.b2 * v + (1 - h.b2) * g * g
        m_hat = m / (1 - h.b1**t)
        v_hat = v / (1 - h.b2**t)
        match h.third_moment:
            case "cubic":
                power = (g - m) ** 3
            case "stabilized":
                power = np.sign(g - m) * (np.abs(g - m) + h.eps) ** 1.5
            case "standardized":
                power = (g - m_hat) ** 3
        s = h.b3 * s + (1 - h.b3) * power
        if h.third_moment == "standardized":
            seen = v_hat > 0
            sigma = np.sqrt(np.where(seen, v_hat, 1.0))
            skewness = s / (1 - h.b3**t) / sigma**3
            b = np.where(seen, h.lam * sigma * np.clip(skewness, -h.tau, h.tau), 0.0)
        else:
            b = h.lam * np.sign(s) * np.minimum(np.abs(s), h.tau)
        yield Step(m, v, s, (m_hat + b) / (np.sqrt(v_hat + h.eps_root) + h.eps))


def float32_bounds(gradients: Array, h: Setting) -> Iterator[Step]:
    """Yields bounds on the distance of float32 arithmetic from `steps`.

    With e = 2⁻²⁴, half a unit in the last place, a sum or product of values with errors
    x and y carries the errors on and adds e times its result. So

        b·m + (1-b)·g           adds 3e of each summand (weight, product, sum)
        1/(1 - bᵗ)              is within 6e (a rounded 1-b, log1p, product, expm1)
        d³                      has the error 3d²x + 3|d|x² + x³ + 2e|d|³
        a^(3/2)                 has the error 3/2·sqrt(a + x)·x + 2e·a^(3/2)
        clip                    has at most the larger error of what it compares
        sqrt(v)                 has half of v's relative error, plus e

    and second-order terms are covered by a factor 1.01 on the whole.
    """
    e = 2.0**-24
    m, v, s = (np.zeros_like(gradients[0], dtype=np.float64) for _ in range(3))
    dm, dv, ds = m, v, s  # the bounds
    steps_ = steps(gradients, h)
    for t, (g, new) in enumerate(zip(gradients, steps_, strict=True), start=1):
        g = np.abs(np.asarray(g, np.float64))
        c1, c2, c3 = (1 - b**t for b in (h.b1, h.b2, h.b3))
        dm = h.b1 * dm + 3 * e * (h.b1 * np.abs(m) + (1 - h.b1) * g)
        dv = h.b2 * dv + e * (3 * h.b2 * v + 4 * (1 - h.b2) * g**2)

        m_hat = new.m / c1
        dm_hat = dm / c1 + 7 * e * np.abs(m_hat)
        standardized = h.third_moment == "standardized"
        d = np.abs(gradients[t - 1] - (m_hat if standardized else new.m))
        x = (dm_hat if standardized else dm) + e * d
        if h.third_moment == "stabilized":
            a = d + h.eps
            x = x + e * a
            # Where x may turn the sign of d, both values are off by as much.
            turned = np.where(x >= d, 2 * (a + x) ** 1.5, 0.0)
            power, dpower = a**1.5, 1.5 * np.sqrt(a + x) * x + 2 * e * a**1.5 + turned
        else:
            power, dpower = d**3, 3 * d**2 * x + 3 * d * x**2 + x**3 + 2 * e * d**3
        a3 = 1 - h.b3
        ds = h.b3 * ds + a3 * dpower + 3 * e * (h.b3 * np.abs(s) + a3 * power)

        v_hat = new.v / c2
        rv_hat = np.divide(dv, new.v, out=np.zeros_like(v), where=new.v > 0) + 7 * e
        if standardized:
            # σ is within rv_hat/2 + e; ŝ/σ³ takes it three times, the term once more.
            sigma, rsigma = np.sqrt(v_hat), rv_hat / 2 + 2 * e
            skewness = np.abs(new.s) / c3 / sigma**3
            dskewness = ds / c3 / sigma**3 + skewness * (3 * rsigma + 10 * e)
            unclipped = sigma * np.minimum(skewness, h.tau)
            db = sigma * dskewness + unclipped * (rsigma + 2 * e)
        else:
            unclipped = np.minimum(np.abs(new.s), h.tau)
            db = ds + e * unclipped
        b, db = abs(h.lam) * unclipped, abs(h.lam) * (db + e * unclipped)

        denominator = np.sqrt(v_hat + h.eps_root) + h.eps
        du = (dm_hat + db + e * (np.abs(m_hat) + b)) / denominator
        du = du + np.abs(new.u) * (rv_hat / 2 + 5 * e)
        yield Step(*(1.01 * x for x in (dm, dv, ds, du)))
        m, v, s = new.m, new.v, new.s
