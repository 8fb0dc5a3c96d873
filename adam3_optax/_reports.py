"""What all reports have: counts of elements; statistics as scalars and as a table."""

import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Report:
    """Statistics of all elements together and of each leaf: a pytree.

    So it leaves jit, and can be made inside a training step. Subclasses have a
    `verdict()`, too: one sentence.

    Attributes:
        rows: Statistics with arrays in place of scalars: of all elements together, then
            of each leaf. `overall` and `leaves` take them apart.
        names: The path of each leaf in the parameters.
    """

    rows: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    topic: ClassVar[str]  # the default prefix of its scalars
    columns: ClassVar[Any]  # of its table: a title, and what it shows of the statistics

    @property
    def overall(self) -> Any:
        """The statistics of all elements together."""
        return self._at(0)

    @property
    def leaves(self) -> dict[str, Any]:
        """The statistics of each leaf, by its name."""
        return {name: self._at(i) for i, name in enumerate(self.names, start=1)}

    def _at(self, row: int) -> Any:
        fields = vars(self.rows).items()
        # The last axis has the rows. `jax.vmap` puts another axis before it.
        one = {k: x[row] if isinstance(x, tuple) else x[..., row] for k, x in fields}
        return type(self.rows)(**one)

    def on_host(self) -> Self:
        """Returns the report with arrays of NumPy."""
        if self.rows.elements.ndim > 1:
            raise ValueError(
                "jax.vmap made several reports: take one with jax.tree.map"
            )
        return jax.device_get(self)

    def scalars(
        self, prefix: str | None = None, *, leaves: bool = False
    ) -> dict[str, float]:
        """Returns the statistics as a flat dict of floats, for any logger.

        Args:
            prefix: Stands before each name. By default the report's topic and a slash,
                as in `third_moment/ratio`.
            leaves: Whether to add those of each leaf, as `third_moment/ratio['w']`.

        Returns:
            A float for each statistic, and for each statistic of each leaf. What is
            above 1e6, as a ratio to a momentum of nearly 0, is given as 1e6, so that it
            does not ruin a chart's axis. Counts are given as they are.
        """
        report = self.on_host()
        start = f"{self.topic}/" if prefix is None else prefix
        named = {"": report.overall, **(report.leaves if leaves else {})}
        counts = ("elements", "state_bytes")
        return {
            f"{start}{name}{leaf}": float(x) if name in counts else min(float(x), 1e6)
            for leaf, statistics in named.items()
            for name, x in dataclasses.asdict(statistics).items()
        }

    def table(self) -> str:
        """Returns a table as text: a line for each leaf, and one for all."""
        report = self.on_host()
        named = [*report.leaves.items(), ("all", report.overall)]
        rows = [["leaf", *(title for title, _ in self.columns)]]
        rows += [[name, *(show(x) for _, show in self.columns)] for name, x in named]
        width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            "  ".join([name.ljust(width), *map(str.rjust, cells, widths)])
            for name, *cells in rows
        )


def percent(share: Any) -> str:
    """Returns a share in per cent: 0% only if it is 0, and 100% only if it is 1."""
    x = float(share)
    if x in (0, 1):
        return f"{x:.0%}"
    return "<0.1%" if x < 0.001 else ">99.9%" if x > 0.999 else f"{x:.1%}"


def counts_of(leaves: list[list[Array]], *shape: int) -> Array:
    """Returns how many are true in each leaf's masks: a row for all, then one for each.

    Exact for a leaf, and then rounded to float32. One pass counts all its masks, which
    compiles and runs many times faster than one pass each. Each device of a sharded
    leaf sends one number only.

    Args:
        leaves: The masks of each leaf.
        shape: That of a row, which holds for no leaves, too.
    """

    def count(masks: list[Array]) -> list[Array]:
        return lax.reduce(
            [mask.astype(jnp.uint32) for mask in masks],
            [jnp.uint32(0)] * len(masks),
            lambda x, y: [a + b for a, b in zip(x, y, strict=True)],
            range(masks[0].ndim),
        )

    rows = jnp.array(list(map(count, leaves)), jnp.float32).reshape(-1, *shape)
    return jnp.concatenate([rows.sum(0, keepdims=True), rows])


def check_countable(name: str, x: Any) -> None:
    """Raises if a leaf has too many elements for a count of 32 bits."""
    sizes = jnp.shape(x)
    # `jax.export` has sizes that are not known yet.
    if all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= 2**32:
        raise ValueError(f"params{name} has 2³² elements or more: too many to count")
