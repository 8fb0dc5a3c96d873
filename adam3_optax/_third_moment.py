"""What `third_moment_report` returns: statistics, and words for them."""

import dataclasses
import math
from typing import Any

import jax

from adam3_optax._report import Report, percent
from adam3_optax._rule import FORMS, ThirdMoment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one leaf, or of all, over the elements that have had a gradient.

    Scalars of shape () and type float32; NaN where no element has had a gradient.

    Attributes:
        skewness: Median of |ŝ|/v̂^(3/2); of |ŝ|/v̂^(3/4) in the stabilized form.
        skewness_tail: Its 0.999 quantile.
        ratio: Median of |b_t|/|m̂|, the skewness term against the momentum.
        ratio_tail: Its 0.999 quantile; inf where m̂ is 0 and b_t is not.
        clipped: Share of elements whose term is clipped at tau.
        without_effect: Share of elements whose term is at most half a unit in the last
            place of m̂, so that m̂ + b_t rounds to m̂, or to its neighbour at most.
        elements: How many elements have had a gradient.
        state_bytes: Bytes in which m, v and s are stored: a Python int.
    """

    skewness: jax.Array
    skewness_tail: jax.Array
    ratio: jax.Array
    ratio_tail: jax.Array
    clipped: jax.Array
    without_effect: jax.Array
    elements: jax.Array
    state_bytes: Any = dataclasses.field(metadata={"static": True})

    def _at(self, row: int) -> "Statistics":
        # The last axis has the rows. `jax.vmap` puts another axis before it.
        one = jax.tree.map(lambda x: x[..., row], self)
        return dataclasses.replace(one, state_bytes=self.state_bytes[row])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThirdMomentReport(Report):
    """What `third_moment_report` found.

    Where the state holds several states of AdaM3, a leaf's name comes after the path of
    its own.

    Attributes:
        lam: The largest |lam| of these states at the step: 0 is Adam.
        third_moment: The form.
    """

    lam: jax.Array
    third_moment: ThirdMoment = dataclasses.field(metadata={"static": True})

    topic = "third_moment"
    columns = (
        ("elements", lambda x: f"{int(x.elements):,}"),
        ("skewness", lambda x: f"{float(x.skewness):.1e}"),
        ("(tail)", lambda x: f"{float(x.skewness_tail):.1e}"),
        ("|b|/|m|", lambda x: f"{float(x.ratio):.1e}"),
        ("(tail)", lambda x: f"{float(x.ratio_tail):.1e}"),
        ("clipped", lambda x: percent(x.clipped)),
        ("no effect", lambda x: percent(x.without_effect)),
        ("bytes", lambda x: f"{x.state_bytes:,}"),
    )

    def verdict(self) -> str:
        """Returns one sentence: whether the third moment does anything here.

        It says the first of these that holds: no element has had a gradient; NaN in
        0.1% of elements or more; lam = 0; no effect on half of the elements or more; a
        median ratio |b_t|/|m̂| above 1; half or more clipped; a median ratio below
        0.001; none of these.
        """
        x = self.on_host().overall
        ratio, tail = float(x.ratio), float(x.ratio_tail)
        silent, clipped = float(x.without_effect), float(x.clipped)
        found = f"median ratio {ratio:.0e}"
        if not float(x.elements):
            return "No element has had a gradient yet: there is nothing to say."
        if math.isnan(tail):
            return "The state holds NaN: there is nothing to say of the third moment."
        if not float(self.lam):
            return (
                "The third moment changes nothing, for lam is 0: this step is Adam's."
            )
        if silent >= 0.5:
            where = "" if silent == 1 else f" in {percent(silent)} of the elements"
            remedy = (
                "a larger lam or tau, or more skewed gradients, would change that"
                if FORMS[self.third_moment].bounded
                else "rescale the loss, or use third_moment='standardized'"
            )
            return (
                f"With these gradients the third moment changes nothing{where}: "
                f"{found}, .999 quantile {tail:.0e}; {remedy}."
            )
        if ratio > 1:
            return f"The skewness term outweighs the momentum: {found}."
        if clipped >= 0.5:
            return (
                f"The skewness term is clipped in {percent(clipped)} of the elements, "
                f"where only its sign counts: {found}."
            )
        if ratio < 1e-3:
            return f"The third moment hardly shifts the momentum: {found}."
        return f"The third moment shifts the momentum: {found}."
