"""AdaM3 in float64 NumPy, from the equations alone, and bounds on float32 rounding.

Imports nothing of the package. `steps` is the reference; `float32_bounds` follows the
same equations with an error bound beside every quantity. A new form of the third moment
is a new case in `FORMS`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


class Form(NamedTuple):
    """What sets a form apart: s averages sign(d)·a^exponent, with a = |d| or |d| + eps.

    Attributes:
        exponent: The exponent.
        shifted: Whether a = |d| + eps.
        free_of_scale: Whether d = g - m̂ and b_t = lam·σ·clip(ŝ/σ^exponent); else
            d = g - m and b_t = lam·clip(s).
    """

    exponent: float
    shifted: bool = False
    free_of_scale: bool = False


FORMS = {
    "cubic": Form(3.0),
    "stabilized": Form(1.5, shifted=True),
    "standardized": Form(3.0, free_of_scale=True),
}


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
    form = FORMS[h.third_moment]
    gradients = np.asarray(gradients, np.float64)
    m, v, s = (np.zeros_like(gradients[0]) for _ in range(3))
    for t, g in enumerate(gradients, start=1):
        m = h.b1 * m + (1 - h.b1) * g
        v = h.b2 * v + (1 - h.b2) * g * g
        m_hat = m / (1 - h.b1**t)
        v_hat = v / (1 - h.b2**t)
        d = g - (m_hat if form.free_of_scale else m)
        a = np.abs(d) + (h.eps if form.shifted else 0.0)
        power = np.sign(d) * a**form.exponent
        s = h.b3 * s + (1 - h.b3) * power
        if form.free_of_scale:
            seen = v_hat > 0
            sigma = np.sqrt(np.where(seen, v_hat, 1.0))
            skewness = s / (1 - h.b3**t) / sigma**form.exponent
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
        aᵖ, p = 3 or 3/2        has the error p·(a + x)^(p-1)·x + 2e·aᵖ
        clip                    has at most the larger error of what it compares
        sqrt(v)                 has half of v's relative error, plus e

    and second-order terms are covered by a factor 1.01 on the whole.
    """
    form, e = FORMS[h.third_moment], 2.0**-24
    p = form.exponent
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
        d = np.abs(gradients[t - 1] - (m_hat if form.free_of_scale else new.m))
        x = (dm_hat if form.free_of_scale else dm) + e * d
        a, turned = d, np.zeros_like(d)
        if form.shifted:
            a = d + h.eps
            x = x + e * a
            # Where x may turn the sign of d, both values are off by as much.
            turned = np.where(x >= d, 2 * (a + x) ** p, 0.0)
        power = a**p
        dpower = p * (a + x) ** (p - 1) * x + 2 * e * power + turned
        a3 = 1 - h.b3
        ds = h.b3 * ds + a3 * dpower + 3 * e * (h.b3 * np.abs(s) + a3 * power)

        v_hat = new.v / c2
        rv_hat = np.divide(dv, new.v, out=np.zeros_like(v), where=new.v > 0) + 7 * e
        if form.free_of_scale:
            # σ is within rv_hat/2 + e; ŝ/σᵖ takes it p times, the term once more.
            sigma, rsigma = np.sqrt(v_hat), rv_hat / 2 + 2 * e
            skewness = np.abs(new.s) / c3 / sigma**p
            dskewness = ds / c3 / sigma**p + skewness * (p * rsigma + 10 * e)
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
