"""One compiled program for a task and a rule, which trains several lanes at once."""

import functools
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam3_optax import scale_by_adam3
from study import arms
from study.arms import Numbers, Rule, Setting
from study.tasks import Task, Tree


class StoppedError(Exception):
    """The training was interrupted; nothing of it is kept."""


class Lane(NamedTuple):
    """A training under way.

    Attributes:
        params: Parameters.
        state: The optimizer's.
        shadows: Two states of the standardized form, each of which sees the gradients
            of one half of each batch.
        step: Steps done.
    """

    params: Tree
    state: Tree
    shadows: Tree
    step: jax.Array


class Program:
    """Trains lanes: trials that differ in hyperparameters and seed alone.

    All depends on a lane's hyperparameters and seed, so that a lane trains as it would
    alone (to rounding), and two rules with the same seed see the same batches.
    """

    def __init__(
        self,
        task: Task,
        rule: Rule,
        *,
        steps: int,
        points: int,
        lanes: int,
        scale: float = 1.0,
    ) -> None:
        """Traces nothing yet; `compile` does.

        Args:
            task: What is trained on.
            rule: How.
            steps: A multiple of `points`.
            points: How often in a run the validation loss is logged.
            lanes: How many train at once.
            scale: See `arms.Setting`.
        """
        self.task, self.rule, self.scale = task, rule, scale
        self.steps, self.points, self.lanes = steps, points, lanes

    def train(
        self,
        trials: list[tuple[Numbers, int]],
        stop: threading.Event | None = None,
    ) -> list[dict[str, Any]]:
        """Returns what is logged of each trial.

        Args:
            trials: Hyperparameters and seed of each; no more than there are lanes.
            stop: Ends the training when set.

        Raises:
            StoppedError: `stop` was set.
        """
        # Lanes without a trial repeat the last one, and are thrown away.
        filled = trials + trials[-1:] * (self.lanes - len(trials))
        names = sorted(filled[0][0])
        h = {x: jnp.array([h[x] for h, _ in filled], jnp.float32) for x in names}
        keys = jax.vmap(keys_of)(jnp.array([x for _, x in filled], jnp.uint32))
        start, advance = self.compiled(tuple(names))
        params, data = fresh(self.task, self.lanes)(keys)
        began = time.perf_counter()  # without the compilation
        lane, logs = start(params, h, keys), []
        for _ in range(self.points):
            if stop is not None and stop.is_set():
                raise StoppedError
            lane, log = advance(lane, data, h, keys)
            logs.append(jax.tree.map(np.asarray, log))
        seconds = (time.perf_counter() - began) / len(trials)
        gathered = jax.tree.map(lambda *x: np.stack(x, axis=1), *logs)
        size = self.state_bytes(tuple(names))
        return [
            _row(jax.tree.map(lambda x, i=i: x[i], gathered))
            | {"seconds": round(seconds, 4), "state_bytes": size}
            for i in range(len(trials))
        ]

    @functools.cache  # noqa: B019  # programs live as long as the process
    def compiled(self, names: tuple[str, ...]) -> tuple[Any, Any]:
        """Returns the compiled start and the compiled chunk of steps."""
        shape = jax.ShapeDtypeStruct((self.lanes,), jnp.float32)
        h = dict.fromkeys(names, shape)
        keys = jax.eval_shape(
            jax.vmap(keys_of), jax.ShapeDtypeStruct((self.lanes,), jnp.uint32)
        )
        params, data = fresh(self.task, self.lanes).out_info
        of_lanes = functools.partial(over_lanes, lanes=self.lanes)
        start = jax.jit(of_lanes(self.start)).lower(params, h, keys).compile()
        advance = jax.jit(of_lanes(self.advance), donate_argnums=0)
        lane = jax.eval_shape(of_lanes(self.start), params, h, keys)
        return start, advance.lower(lane, data, h, keys).compile()

    def setting(self, h: Numbers, keys: jax.Array) -> Setting:
        """Returns what the rule may depend on."""
        return Setting(h, keys[2], self.steps, self.scale)

    def start(self, params: Tree, h: Numbers, keys: jax.Array) -> Lane:
        """Returns a lane before its first step."""
        state = arms.optimizer(self.rule, self.setting(h, keys)).init(params)
        shadows = jax.vmap(_shadow(h).init)(jnp.zeros((2, arms.flat(params).size)))
        return Lane(params, state, shadows, jnp.zeros((), jnp.int32))

    def advance(
        self, lane: Lane, data: Tree, h: Numbers, keys: jax.Array
    ) -> tuple[Lane, dict[str, jax.Array]]:
        """Returns the lane after the steps up to its next log point, and the log."""
        setting = self.setting(h, keys)
        optimizer = arms.optimizer(self.rule, setting)
        each = self.steps // self.points
        smoothing = {x: h[x] for x in ("smoothing",) if x in h}

        def step(lane: Lane, _: None) -> tuple[Lane, jax.Array]:
            batch = self.task.batch(jax.random.fold_in(keys[1], lane.step), data)
            losses, gradients = self.halves(lane.params, batch, smoothing)
            whole = jax.tree.map(lambda g: 0.5 * (g[0] + g[1]), gradients)
            updates, state = optimizer.update(whole, lane.state, lane.params)
            params = optax.apply_updates(lane.params, updates)
            flat = jax.vmap(arms.flat)(gradients)  # one leaf compiles faster than many
            _, shadows = jax.vmap(_shadow(h).update)(flat, lane.shadows)
            return Lane(params, state, shadows, lane.step + 1), losses.mean()

        lane, losses = jax.lax.scan(step, lane, length=each)
        found = self.task.validate(lane.params, data)
        log = {f"validation_{k}": v for k, v in found.items()}
        log |= {"training_loss": losses.mean()}
        log |= arms.mechanism(self.rule, lane.state, setting)
        return lane, log | {"agreement": arms.agreement(lane.shadows, _shadow_h(h))}

    def halves(
        self, params: Tree, batch: Tree, smoothing: Numbers
    ) -> tuple[jax.Array, Tree]:
        """Returns loss and gradient of either half of a batch; their mean is its own.

        So the two estimates of the skewness cost no further gradient.

        Args:
            params: Parameters.
            batch: A batch.
            smoothing: The smoothing of the labels, by its name, where the rule has one.
        """
        loss = functools.partial(self.task.loss, **smoothing)
        parts = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
        return jax.vmap(jax.value_and_grad(loss), (None, 0))(params, parts)

    def state_bytes(self, names: tuple[str, ...]) -> int:
        """Returns the bytes of the optimizer's state, of one lane."""
        h = dict.fromkeys(names, jax.ShapeDtypeStruct((), jnp.float32))
        keys = jax.eval_shape(keys_of, jax.ShapeDtypeStruct((), jnp.uint32))
        params = jax.eval_shape(lambda keys: self.task.init(keys[0]), keys)
        state = jax.eval_shape(self.start, params, h, keys).state
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@functools.cache
def fresh(task: Task, lanes: int) -> Any:
    """Returns what makes parameters and data of lanes: compiled once, for all rules.

    Random numbers are most of what there is to compile in a small program.
    """
    seeds = jax.ShapeDtypeStruct((lanes,), jnp.uint32)
    keys = jax.eval_shape(jax.vmap(keys_of), seeds)

    def make(keys: jax.Array) -> tuple[Tree, Tree]:
        return task.init(keys[0]), task.data(keys[3])

    return jax.jit(over_lanes(make, lanes)).lower(keys).compile()


def over_lanes(function: Callable[..., Tree], lanes: int) -> Callable[..., Tree]:
    """Returns a function that does for all lanes what the given one does for one.

    A single lane is not vectorized, for a CPU takes twice as long over an axis of 1.
    """
    if lanes > 1:
        return jax.vmap(function)

    def alone(*args: Tree) -> Tree:
        result = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], result)

    return alone


def keys_of(seed: jax.Array) -> jax.Array:
    """Returns the keys of parameters, batches, rule and data: of the seed alone."""
    key = jax.random.key(seed)
    # The first three are those of records made before there was a fourth.
    data = jax.random.fold_in(key, 3)
    return jnp.concatenate([jax.random.split(key, 3), data[None]])


def _shadow(h: Numbers) -> optax.GradientTransformation:
    """Returns the standardized form that estimates the skewness."""
    x = _shadow_h(h)
    return scale_by_adam3(x["b1"], x["b2"], b3=x["b3"], third_moment="standardized")


def _shadow_h(h: Numbers) -> Numbers:
    """Returns its hyperparameters: the run's own decays, where it has them."""
    rest = {"lam": 0.0, "tau": 1.0, "eps": 1e-8}
    return {"b1": 0.9, "b2": h["b2"], "b3": h.get("b3", h["b2"]), **rest}


def _row(log: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns a log for the record: what is not finite becomes None."""
    row: dict[str, Any] = {
        name: [float(f"{x:.8g}") if np.isfinite(x) else None for x in values]
        for name, values in log.items()
    }
    losses = [*row["validation_loss"], *row["training_loss"]]
    row["finite"] = None not in losses
    row["final"] = row["validation_loss"][-1] if row["finite"] else None
    return row
