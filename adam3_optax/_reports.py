"""What all reports have: counts of elements; statistics as scalars and as a table."""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Report(abc.ABC):
    """Statistics of all elements together and of each leaf: a pytree.

    So it leaves jit, and can be made inside a training step.

    Attributes:
        rows: Statistics with arrays in place of scalars: of all elements together, then
            of each leaf. `overall` and `leaves` take them apart.
        names: The path of each leaf in the parameters.
    """

    rows: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    @abc.abstractmethod
    def topic(self) -> str:
        """What it is about: the default prefix of its scalars."""

    @property
    @abc.abstractmethod
    def columns(self) -> Sequence[tuple[str, Callable[[Any], str]]]:
        """The columns of its table: a title, and what it shows of the statistics."""

    @abc.abstractmethod
    def verdict(self) -> str:
        """Returns one sentence."""

    @property
    def overall(self) -> Any:
        """The statistics of all elements together."""
        return self.rows._at(0)

    @property
    def leaves(self) -> dict[str, Any]:
        """The statistics of each leaf, by its name."""
        return {name: self.rows._at(i) for i, name in enumerate(self.names, start=1)}

    def on_host(self) -> Self:
        """Returns the report with arrays of NumPy."""
        if self.rows.elements.ndim > 1:
            raise ValueError(
                f"the report's elements have shape {self.rows.elements.shape}: it is "
                "of several optimizers, as made by jax.vmap; take one with jax.tree.map"
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
            A float for each statistic, and for each statistic of each leaf.
        """
        report = self.on_host()
        start = f"{self.topic}/" if prefix is None else prefix
        named = {"": report.overall, **(report.leaves if leaves else {})}
        return {
            f"{start}{name}{leaf}": float(value)
            for leaf, statistics in named.items()
            for name, value in dataclasses.asdict(statistics).items()
        }

    def table(self) -> str:
        """Returns a table as text: a line for each leaf, and one for all."""
        report = self.on_host()
        rows = [["leaf", *(title for title, _ in self.columns)]]
        for name, x in [*report.leaves.items(), ("all", report.overall)]:
            rows.append([name, *(show(x) for _, show in self.columns)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        adjusted = [
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
            for row in rows
        ]
        return "\n".join(map("  ".join, adjusted))


def percent(share: Any) -> str:
    """Returns a share in per cent; 0% and 100% are said of none and of all alone."""
    x = float(share)
    if math.isnan(x):
        return "nan"
    if x in (0, 1):
        return f"{x:.0%}"
    return "<0.1%" if x < 0.001 else ">99.9%" if x > 0.999 else f"{x:.1%}"


def counts_of(masks: list[Array]) -> list[Array]:
    """Returns how many are true in each mask, exact before it is rounded to float32.

    One pass counts all masks, which compiles and runs many times faster than one pass
    each. Each device of a sharded leaf sends one number only.
    """
    counted = lax.reduce(
        [mask.astype(jnp.uint32) for mask in masks],
        [jnp.uint32(0)] * len(masks),
        lambda x, y: [a + b for a, b in zip(x, y, strict=True)],
        range(masks[0].ndim),
    )
    return [count.astype(jnp.float32) for count in counted]


def as_table(rows: list[list[Array]], *shape: int) -> Array:
    """Returns rows of counts as an array, also if there are none."""
    return jnp.array(rows, jnp.float32).reshape(-1, *shape)


def check_countable(name: str, x: Any) -> None:
    """Raises if a leaf has too many elements for a count of 32 bits."""
    shape = jnp.shape(x)
    known = all(isinstance(size, int) for size in shape)  # `jax.export` has others
    if known and math.prod(shape) >= 2**32:
        raise ValueError(f"params{name} has 2³² elements or more: too many to count")
