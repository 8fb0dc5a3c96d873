"""Two facts that need no training: lam = 0 is Adam, and what b3 > sqrt(b2) does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam3_optax import ThirdMoment, scale_by_adam3
from study.moments import FORMS
from study.tasks import Task

EPSILON = float(jnp.finfo(jnp.float32).eps)
DECAYS = (0.9, 0.999)
RATE = 1e-3


def identity(task: Task, steps: int) -> dict[str, Any]:
    """Returns how far AdaM3 with lam = 0 is from AdamW, step by step.

    AdamW trains; each form with lam = 0 takes each of its steps, from its moments and
    with its gradients. The new m and v must be Adam's to an ulp of what they are the
    sum of (m may cancel), which is what a compiler's choice of order makes. The update
    differs by Optax's rounding of 1 - bᵗ: against Adam's formula in double precision it
    must be right to 4 ulp.

    Raises:
        AssertionError: It is not so.
    """
    adam = optax.scale_by_adam(*DECAYS)
    forms: dict[str, Any] = {
        form: scale_by_adam3(*DECAYS, lam=0.0, third_moment=form) for form in FORMS
    }
    rest = optax.chain(
        optax.add_decayed_weights(1e-2), optax.scale_by_learning_rate(RATE)
    )

    @jax.jit
    def step(params: Any, states: Any, key: jax.Array) -> Any:
        gradient = jax.grad(task.loss)(params, task.batch(key, data))
        mu, nu = states["adam"].mu, states["adam"].nu
        u, states["adam"] = adam.update(gradient, states["adam"])
        ours = {}
        for form, rule in forms.items():
            before = states[form]._replace(m=mu, v=nu)
            ours[form], states[form] = rule.update(gradient, before)
        update, states["rest"] = rest.update(u, states["rest"], params)
        return optax.apply_updates(params, update), states, u, ours, gradient

    params, data = task.init(jax.random.key(0)), task.data(jax.random.key(2))
    states = {x: rule.init(params) for x, rule in forms.items()}
    states |= {"adam": adam.init(params), "rest": rest.init(params)}
    keys = jax.random.split(jax.random.key(1), steps)
    found: dict[str, dict[str, float]] = {
        form: {"moments_ulp": 0.0, "update_ulp": 0.0, "optax_update": 0.0}
        for form in forms
    }
    for t, key in enumerate(keys, 1):
        before = _double(states["adam"].mu)
        params, states, theirs, ours, gradient = step(params, states, key)
        theirs, mu, nu = (_double(x) for x in (theirs, *states["adam"][1:]))
        summed = DECAYS[0] * np.abs(before) + (1 - DECAYS[0]) * np.abs(
            _double(gradient)
        )
        c1, c2 = (1 - float(b) ** t for b in DECAYS)
        for form, worst in found.items():
            m, v = _double(states[form].m), _double(states[form].v)
            update = _double(ours[form])
            exact = m / c1 / (np.sqrt(v / c2) + 1e-8)
            for name, error in (
                ("moments_ulp", max(_ulps(m, mu, summed), _ulps(v, nu, nu))),
                ("update_ulp", _ulps(update, exact, exact)),
                ("optax_update", _ulps(update, theirs, theirs) * EPSILON),
            ):
                worst[name] = max(worst[name], float(f"{error:.4g}"))
    for form, worst in found.items():
        assert worst["moments_ulp"] <= 1, (form, worst)
        assert worst["update_ulp"] <= 4, (form, worst)
    return {"steps": steps, "forms": found}


def _double(tree: Any) -> np.ndarray:
    """Returns all elements of a tree in double precision."""
    leaves = [np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves).astype(np.float64)


def _ulps(found: np.ndarray, wanted: np.ndarray, size: np.ndarray) -> float:
    """Returns the largest difference, in units of float32's last place of a size.

    The size counts as no smaller than the smallest normal number over that unit, for
    units of what is smaller are not relative.
    """
    size = np.maximum(np.abs(size), float(jnp.finfo(jnp.float32).tiny) / EPSILON)
    return float(np.max(np.abs(found - wanted) / size) / EPSILON)


def blow_up(b2: float, b3: list[float], steps: int) -> list[dict[str, Any]]:
    """Returns the largest update after one gradient of 1, for each form and b3.

    In learning rates, with tau = 1 and lam = .01, over so many steps of zero gradient.
    """
    rows = []
    for form in FORMS:
        sizes, steps_at = jax.jit(_largest, static_argnums=(0, 1, 3))(
            form, b2, jnp.asarray(b3, jnp.float32), steps
        )
        for decay, size, step in zip(b3, sizes, steps_at, strict=True):
            row = {"form": form, "b2": b2, "b3": decay}
            rows.append(row | {"largest": float(f"{size:.6g}"), "after": int(step)})
    return rows


def _largest(
    form: ThirdMoment, b2: float, b3: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Returns for each b3 the largest update, and after how many steps it came."""

    def one(b3: jax.Array) -> tuple[jax.Array, jax.Array]:
        rule = scale_by_adam3(0.9, b2, b3=b3, third_moment=form)

        def step(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            u, state = rule.update(jnp.where(t == 0, 1.0, 0.0), state)
            return state, jnp.abs(u)

        sizes = jax.lax.scan(step, rule.init(jnp.zeros(())), jnp.arange(steps))[1]
        return sizes.max(), sizes.argmax()

    return jax.vmap(one)(b3)
