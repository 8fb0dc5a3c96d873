"""The mask of the decay sees the parameters as they were passed; errors name leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adam3_optax import adam3w
from tests.settings import BF16, F32, first_step, structure

PARAMS = {"w": jnp.full((2, 2), 2.0, BF16), "b": jnp.ones(2, F32)}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
DECAYED = BF16(-0.1)  # with rate 0.1 and decay 0.5
SCHEDULE = optax.constant_schedule(0.5)


def narrow(params: Any) -> Any:
    """Returns where parameters are bfloat16, which is lost if they were cast."""
    return jax.tree.map(lambda p: p.dtype == BF16, params)


@pytest.mark.parametrize("decay", [0.5, SCHEDULE], ids=["number", "schedule"])
def test_a_mask_sees_the_very_parameters(decay: Any) -> None:
    seen: list[Any] = []

    def mask(params: Any) -> Any:
        seen.append(params)
        return narrow(params)

    optimizer = adam3w(0.1, weight_decay=decay, mask=mask)
    state = optimizer.init(PARAMS)
    # The state is that of Optax.
    theirs = optax.add_decayed_weights(decay, narrow).init(PARAMS)
    assert structure(state[1]) == structure(theirs)
    for _ in range(2):
        updates, state = optimizer.update(ZEROS, state, PARAMS)
        np.testing.assert_array_equal(updates["w"], DECAYED)
        np.testing.assert_array_equal(updates["b"], 0.0)
    assert len(seen) == 3
    assert all(params is PARAMS for params in seen)


TRUE = [True, np.True_, np.array(True), jnp.array(True)]


@pytest.mark.parametrize(
    "mask", [narrow, None, *({"w": x, "b": False, "n": True} for x in TRUE)]
)
def test_the_others_decay_where_a_gradient_is_none(mask: Any) -> None:
    optimizer = adam3w(0.1, weight_decay=0.5, mask=mask)
    params = PARAMS | {"n": jnp.arange(3)}
    updates, _ = first_step(optimizer, ZEROS | {"b": None, "n": None}, params)
    np.testing.assert_array_equal(updates["w"], DECAYED)
    assert updates["b"] is updates["n"] is None


def test_what_optax_calls_otherwise_is_named() -> None:
    # In Optax's order a fourth number would be eps; here b3 came next.
    make: Any = adam3w
    with pytest.raises(TypeError, match=r"positional.* Name all after b2"):
        make(1e-3, 0.9, 0.95, 1e-8)
    for name in ("mu_dtype", "nesterov"):
        with pytest.raises(TypeError, match=f"{name}.* mu_dtype is m_dtype here"):
            make(1e-3, **{name: None})


LEAF, TREE = r"mask\['b'\] must be a boolean", "mask must be a tree like params, or a "
TRACED, SHAPE = (
    "mask.* not depend on traced",
    r"params\['b'\] has shape .* its update has",
)


@pytest.mark.parametrize(
    ("mask", "params", "message"),
    [
        *(({"w": True, "b": x}, PARAMS, LEAF) for x in ("no", 1, np.ones(2, bool))),
        *((x, PARAMS, TREE) for x in ({"w": True}, [True, False])),
        (lambda params: jax.tree.map(jnp.any, params), PARAMS, TRACED),
        (None, PARAMS | {"b": jnp.ones((2, 2))}, SHAPE),
        (None, {"w": PARAMS["w"]}, "params must be a tree like updates"),
    ],
)
def test_what_does_not_fit_is_named(mask: Any, params: Any, message: str) -> None:
    for made in (mask, mask if mask is None or callable(mask) else lambda _: mask):
        optimizer = adam3w(mask=made)

        def update(params: Any, optimizer: Any = optimizer) -> Any:
            return optimizer.update(ZEROS, optimizer.init(PARAMS), params)

        with pytest.raises((TypeError, ValueError), match=message):
            jax.jit(update)(params)
