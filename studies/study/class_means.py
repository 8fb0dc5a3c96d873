"""A classifier that needs no optimizer: the class means of a task's drawn data.

Where it is as good as what was trained, a task says little about optimizers.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from study.tasks import Data, Task, scores
from study.training import keys_of

Row = dict[str, Any]


def logits(
    x: jax.Array, data: Data, classes: int, shrinkage: Any, variance: Any
) -> jax.Array:
    """Returns the logits of a linear discriminant for examples x.

    A class of n examples has the prior of n + 1 of them and, as mean, that of its
    examples times n / (n + shrinkage): shrunk towards 0. All classes have the same
    variance, along all axes: log prior - |x - mean|² / (2·variance), less what is the
    same for all classes.

    Args:
        x: Features.
        data: What is learned from: its `x` and `y`.
        classes: How many there are.
        shrinkage: In examples.
        variance: Of a class, along each axis.
    """
    counts = jnp.zeros(classes).at[data.y].add(1.0)
    sums = jnp.zeros((classes, data.x.shape[1])).at[data.y].add(data.x)
    # A class without examples has a sum of 0, and so the mean 0.
    means = sums / jnp.maximum(counts + shrinkage, 1e-30)[:, None]
    prior = jnp.log((counts + 1.0) / (counts + 1.0).sum())
    fit = x @ means.T - 0.5 * (means * means).sum(axis=1)[None]
    return prior[None] + fit / variance


def evaluate(
    task: Task,
    shrinkages: list[float],
    variances: list[float],
    tuning: list[int],
    final: range,
) -> Row:
    """Returns the rule's scores on the seeds of finals.

    Shrinkage and variance are those with the lowest mean loss over the seeds of tuning,
    as a setting of an arm is. The data of a seed are those that the arms see.

    Args:
        task: A task that draws its data.
        shrinkages: To choose from.
        variances: Likewise.
        tuning: Seeds.
        final: Seeds.
    """
    classes = jax.eval_shape(task.init, jax.random.key(0))["bias"].size
    draw = jax.jit(lambda seed: task.data(keys_of(seed)[3]))

    @jax.jit
    def score(data: Data, shrinkage: Any, variance: Any) -> dict[str, jax.Array]:
        return scores(logits(data.x_out, data, classes, shrinkage, variance), data)

    grid = list(itertools.product(shrinkages, variances))
    losses = np.zeros(len(grid))
    for seed in tuning:
        of_seed = functools.partial(score, draw(jnp.uint32(seed)))
        losses += [float(of_seed(*map(float, x))["loss"]) for x in grid]
    best = grid[int(losses.argmin())]
    rows = [score(draw(jnp.uint32(x)), *map(float, best)) for x in final]
    found: Row = dict(zip(("shrinkage", "variance"), best, strict=True))
    found["edges"] = [
        name
        for name, x, all_of in zip(found, best, (shrinkages, variances), strict=True)
        if x in (min(all_of), max(all_of))
    ]
    found["tuning_loss"] = float(losses.min() / len(tuning))
    found["seeds"] = list(final)
    for name in rows[0]:
        values = [float(row[name]) for row in rows]
        found[name] = [x if np.isfinite(x) else None for x in values]
    return found
