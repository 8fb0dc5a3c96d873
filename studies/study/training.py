"""Compiled programs: what trains a task by a rule, and class means without training."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from study import arms
from study.arms import Numbers, Setting
from study.tasks import Data, Task, Tree, scores

Run = tuple[Tree, Tree, jax.Array]  # parameters, the optimizer's state, steps done


class Program(NamedTuple):
    """Trains; rules with the same seed see the same parameters, data and batches."""

    task: Task
    rule: str
    steps: int  # a multiple of `points`
    points: int  # how often in a run the validation loss is logged
    scale: float  # see `arms.Setting`

    def train(self, h: Numbers, seed: int) -> dict[str, Any]:
        """Returns what is logged of a trial: curves, and what is not finite as None."""
        h = {name: jnp.float32(x) for name, x in h.items()}
        keys = keys_of(jnp.uint32(seed))
        params, data = fresh(self.task)(keys)
        start, advance = compiled(self)
        run, logs = start(params, h, keys), []
        size = sum(x.nbytes for x in jax.tree.leaves(run[1]))
        for _ in range(self.points):
            run, log = advance(run, data, h, keys)
            logs.append(jax.tree.map(float, log))
        row: dict[str, Any] = {x: [_digits(log[x]) for log in logs] for x in logs[0]}
        row["finite"] = None not in [*row["validation_loss"], *row["training_loss"]]
        row["final"] = row["validation_loss"][-1] if row["finite"] else None
        return row | {"state_bytes": size}

    def optimizer(self, h: Numbers, keys: jax.Array) -> optax.GradientTransformation:
        """Returns the rule with its schedule."""
        return arms.optimizer(self.rule, Setting(h, keys[2], self.steps, self.scale))

    def start(self, params: Tree, h: Numbers, keys: jax.Array) -> Run:
        """Returns a run before its first step."""
        state = self.optimizer(h, keys).init(params)
        return params, state, jnp.zeros((), jnp.int32)

    def advance(
        self, run: Run, data: Tree, h: Numbers, keys: jax.Array
    ) -> tuple[Run, dict[str, jax.Array]]:
        """Returns the run after the steps up to its next log point, and the log."""
        optimizer = self.optimizer(h, keys)
        smoothing = {x: h[x] for x in ("smoothing",) if x in h}
        loss = jax.value_and_grad(functools.partial(self.task.loss, **smoothing))

        def step(run: Run, _: None) -> tuple[Run, jax.Array]:
            params, state, count = run
            batch = self.task.batch(jax.random.fold_in(keys[1], count), data)
            # By halves, as the records' trainings did: so they are the same to the bit.
            halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
            losses, gradients = jax.vmap(loss, (None, 0))(params, halves)
            gradient = jax.tree.map(lambda g: 0.5 * (g[0] + g[1]), gradients)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state, count + 1), losses.mean()

        run, losses = jax.lax.scan(step, run, length=self.steps // self.points)
        found = self.task.validate(run[0], data)
        log = {f"validation_{k}": v for k, v in found.items()}
        log |= {"training_loss": losses.mean()}
        return run, log | arms.mechanism(self.rule, run[1], h)


def _digits(x: float) -> float | None:
    """Returns the eight digits that are logged; None for what is not finite."""
    return float(f"{x:.8g}") if np.isfinite(x) else None


@functools.cache
def compiled(program: Program) -> tuple[Any, Any]:
    """Returns the compiled start and chunk of steps, once for all trials."""
    return jax.jit(program.start), jax.jit(program.advance, donate_argnums=0)


@functools.cache
def fresh(task: Task) -> Any:
    """Returns what makes parameters and data: compiled once, for all rules."""
    return jax.jit(lambda keys: (task.init(keys[0]), task.data(keys[3])))


@jax.jit
def keys_of(seed: jax.Array) -> jax.Array:
    """Returns the keys of parameters, batches, rule and data: of the seed alone."""
    key = jax.random.key(seed)
    data = jax.random.fold_in(key, 3)
    return jnp.concatenate([jax.random.split(key, 3), data[None]])


def class_means(
    task: Task, shrinkage: Any, variance: Any, tuning: list[int], final: list[int]
) -> dict[str, Any]:
    """Returns the scores of a linear discriminant on the seeds of finals.

    A class of n examples has the prior of n + 1 of them and, as mean, that of its
    examples times n / (n + shrinkage). All classes have the same variance along all
    axes. Both numbers are those with the lowest mean loss over the seeds of tuning, as
    a setting of an arm is.
    """

    @jax.jit
    def score(data: Data, shrinkage: Any, variance: Any) -> dict[str, jax.Array]:
        counts = jnp.zeros(classes).at[data.y].add(1.0)
        sums = jnp.zeros((classes, data.x.shape[1])).at[data.y].add(data.x)
        # A class without examples has a sum of 0, and so the mean 0.
        means = sums / jnp.maximum(counts + shrinkage, 1e-30)[:, None]
        prior = jnp.log((counts + 1.0) / (counts + 1.0).sum())
        # log prior - |x - mean|² / (2·variance), less what all classes have alike.
        fit = data.x_out @ means.T - 0.5 * (means * means).sum(axis=1)[None]
        return scores(prior[None] + fit / variance, data)

    classes = jax.eval_shape(task.init, jax.random.key(0))["bias"].size
    drawn = {x: fresh(task)(keys_of(jnp.uint32(x)))[1] for x in (*tuning, *final)}
    grid = list(itertools.product(map(float, shrinkage), map(float, variance)))
    losses = [np.mean([score(drawn[x], *at)["loss"] for x in tuning]) for at in grid]
    best = grid[int(np.argmin(losses))]
    rows = [jax.tree.map(float, score(drawn[x], *best)) for x in final]
    chosen = dict(zip(("shrinkage", "variance"), best, strict=True))
    found = {x: [None if np.isnan(y[x]) else y[x] for y in rows] for x in rows[0]}
    return {**chosen, "tuning_loss": float(min(losses)), "seeds": final, **found}
