"""What the tests share: forms, formats, trees, meshes and helpers.

The forms are taken from the package here alone. A new one needs no edit of a test but a
case in `reference.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from adam3_optax import _formats, _rule
from tests import reference

FORMS: tuple[Any, ...] = tuple(_rule.FORMS)
EACH_FORM = pytest.mark.parametrize("form", FORMS)
BOUNDED = [form for form in FORMS if reference.FORMS[form].free_of_scale]
UNBOUNDED = [form for form in FORMS if form not in BOUNDED]
# In every form an isolated gradient has no late effect with these, and none warns.
SAFE: dict[str, Any] = {"b1": 0.9, "b2": 0.95, "b3": 0.9}


# How moments are stored.


def all_at(setting: Any) -> dict[str, Any]:
    return dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), setting)


# "mixed" has every other format: where moments do not meet, it stands for all.
MIXED: dict[str, Any] = {**all_at("float8"), "v_dtype": "float32"}
MIXED |= {"s_dtype": "bfloat16"}
STORAGE: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": all_at("bfloat16"),
    "float8": all_at("float8") | {"v_dtype": "bfloat16"},
    "mixed": MIXED,
    "smallest": all_at("float8"),  # not for a bounded form
    "adam": {"third_moment": None},  # with no s at all
}
# As much memory as Adam's.
ADAMS_MEMORY: dict[str, Any] = {"m_dtype": "bfloat16", "s_dtype": "bfloat16"}


def each_storage(*names: str) -> pytest.MarkDecorator:
    """Returns the parametrization over some of these."""
    return pytest.mark.parametrize("storage", [STORAGE[x] for x in names], ids=names)


EACH_STORAGE = each_storage("default", "bfloat16", "float8", "mixed", "adam")


def without_s(storage: dict[str, Any]) -> dict[str, Any]:
    """Returns the same for `third_moment=None`."""
    return {k: x for k, x in storage.items() if k != "s_dtype"} | {"third_moment": None}


def loaded(state: Any, form: Any = "cubic") -> Any:
    """Returns the moments of a state of one leaf, as numbers."""
    formats = _formats.formats_of(state.moments, _rule.FORMS.get(form))
    found = _formats.loaded(formats, state.moments)
    return _rule.Moments(*(np.asarray(x, np.float64) for x in found))


# Parameters and gradients.

BF16, F16, F32, F64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64


def normal(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), F32)


def noise(i: Any, shape: Any = (16, 256)) -> jax.Array:
    """Returns normal noise of step i."""
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)


PARAMS = {"w": normal(4, 32, seed=0), "b": normal(4, seed=1)}
# Squares are skewed, so that the third moment matters.
GRADIENTS = [
    {"w": normal(4, 32, seed=i) ** 2 - 0.5, "b": normal(4, seed=i) ** 2 - 0.5}
    for i in range(6)
]


# Steps.


def first_step(optimizer: Any, gradients: Any, params: Any = None) -> tuple[Any, Any]:
    """Returns the first updates and state; the gradients may stand for parameters."""
    params = gradients if params is None else params
    return optimizer.update(gradients, optimizer.init(params), params)


@partial(jax.jit, static_argnums=0)
def step(optimizer: Any, params: Any, state: Any, g: Any, **extra: Any) -> Any:
    """Returns the parameters and the state after a compiled step."""
    update = optax.with_extra_args_support(optimizer).update
    updates, state = update(g, state, params, **extra)
    return optax.apply_updates(params, updates), state


def train(
    optimizer: Any, params: Any = PARAMS, gradients: Any = GRADIENTS, **extra: Any
) -> Any:
    """Returns the parameters and the state after a step for each gradient."""
    state = optimizer.init(params)
    for g in gradients:
        params, state = step(optimizer, params, state, g, **extra)
    return params, state


def scan(optimizer: Any, params: Any, gradients: Any) -> Any:
    """Returns the same, from a scan over stacked gradients."""

    def body(carry: Any, g: Any) -> tuple[Any, None]:
        return step(optimizer, *carry, g), None

    return jax.lax.scan(body, (params, optimizer.init(params)), gradients)[0]


def run(optimizer: Any, gradient: Any, shape: Any, steps: int) -> Any:
    """Returns the updates and the last state, of gradients that are a function of i."""

    def body(state: Any, i: Any) -> Any:
        u, state = optimizer.update(gradient(i), state)
        return state, u

    state = optimizer.init(jnp.zeros(shape))
    scanned = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(steps)))
    state, updates = scanned(state)
    return np.asarray(updates, np.float64), state


def moments(state: Any) -> list[Any]:
    """Returns the fields m, v and s of the one AdaM3 in a state, or m and v of Adam."""
    fields = [optax.tree.get(state, name) for name in "mvs"]
    return [x for x in fields if not isinstance(x, optax.EmptyState)]


# Comparisons.


def types(tree: Any) -> Any:
    """Returns shapes, types, weak types and shardings."""
    return jax.tree.map(jax.typeof, tree)


def structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def assert_close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    """Asserts equal structures and types, and numbers that are near."""
    assert structure(got) == structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        # NumPy compares its own types alone.
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * 1e-2)


assert_same = partial(assert_close, rtol=0.0)


def assert_finite(tree: Any) -> None:
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


# Eight devices, as data 4 x model 2.

AXES = "data", "model"


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), AXES, axis_types=(kind, kind))


def on(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    return jax.tree.map(partial(NamedSharding, mesh), specs)
