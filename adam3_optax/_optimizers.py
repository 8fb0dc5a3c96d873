"""`adam3` and `adam3w`: AdaM3 chained with weight decay and a learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adam3_optax import _hyperparameters as hp
from adam3_optax._boxes import opened
from adam3_optax._checks import full_mask, leaves_like
from adam3_optax._rule import ThirdMoment
from adam3_optax._storage import DTypeSetting, computed_in
from adam3_optax._transform import scale_by_adam3


def adam3(
    learning_rate: hp.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    b3: jax.typing.ArrayLike = 0.999,
    lam: hp.ScalarOrSchedule = 0.01,
    tau: hp.ScalarOrSchedule = 1.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    third_moment: ThirdMoment | None = "cubic",
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.GradientTransformationExtraArgs:
    """The AdaM3 optimizer: Adam with a third moment that shifts the momentum.

    Its update is -learning_rate·u_t, with the u_t of `scale_by_adam3`, which describes
    the arguments from `b1` on, the state, the errors and the warning.

    Args:
        learning_rate: A number, a scalar array, or a schedule: a function of the count
            of steps before this one. The source recommends warm-up.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        b3: Decay of the third moment, in [0, 1).
        lam: Weight of the skewness term: any finite number, or a schedule.
        tau: Its threshold, in (0, inf], or a schedule.
        eps: Added to the denominator; in [0, inf).
        eps_root: Added under the root of the denominator; in [0, inf).
        third_moment: The form of the third moment, or None for Adam.
        m_dtype: How m is stored: None, `"float32"`, `"bfloat16"` or `"int8"`.
        v_dtype: How v is stored.
        s_dtype: How s is stored.

    Returns:
        A `GradientTransformationExtraArgs`. Updates have the gradients' dtype, whatever
        the learning rate's is: all is computed in float32 or wider, and rounded once.
        When an update is added to a bfloat16 parameter, one below 1/512 of it is lost,
        and one below 1/256 may be; `bfloat16_parameters` keeps them.

    Example:
        On the first step every element moves by the learning rate, nearly as with
        Adam: the cubic term has just begun.

        >>> import jax.numpy as jnp
        >>> from adam3_optax import adam3
        >>> optimizer = adam3(learning_rate=0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
        >>> bool(jnp.allclose(updates, jnp.array([-0.1, 0.1]), rtol=1e-3))
        True

    Source:
        `docs/algorithm.md`, section 1.
    """
    return _in_float32(
        scale_by_adam3(
            b1,
            b2,
            b3=b3,
            lam=lam,
            tau=tau,
            eps=eps,
            eps_root=eps_root,
            third_moment=third_moment,
            m_dtype=m_dtype,
            v_dtype=v_dtype,
            s_dtype=s_dtype,
        ),
        _scale_by_rate(learning_rate),
    )


def adam3w(
    learning_rate: hp.ScalarOrSchedule = 1e-3,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    b3: jax.typing.ArrayLike = 0.999,
    lam: hp.ScalarOrSchedule = 0.01,
    tau: hp.ScalarOrSchedule = 1.0,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: hp.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    third_moment: ThirdMoment | None = "cubic",
    m_dtype: DTypeSetting = None,
    v_dtype: DTypeSetting = None,
    s_dtype: DTypeSetting = None,
) -> optax.GradientTransformationExtraArgs:
    """`adam3` with decoupled weight decay, as `optax.adamw` is to `optax.adam`.

    Its update is -learning_rate·(u_t + weight_decay·θ), with the u_t of
    `scale_by_adam3`: the decay is multiplied by the learning rate.

    Args:
        learning_rate: A number, a scalar array, or a schedule, as in `adam3`.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        b3: Decay of the third moment, in [0, 1).
        lam: Weight of the skewness term: any finite number, or a schedule.
        tau: Its threshold, in (0, inf], or a schedule.
        eps: Added to the denominator; in [0, inf).
        eps_root: Added under the root of the denominator; in [0, inf).
        weight_decay: Any finite number, a scalar array, or a schedule.
        mask: Where to decay: a tree of booleans like the parameters, or a prefix of it
            with more than one boolean, or a function that makes such a tree from the
            parameters. None decays all. With `optax.inject_hyperparams`, name it in
            `static_args`: a function would be taken for a schedule there.
        third_moment: The form of the third moment, or None for Adam.
        m_dtype: How m is stored: None, `"float32"`, `"bfloat16"` or `"int8"`.
        v_dtype: How v is stored.
        s_dtype: How s is stored.

    Returns:
        A `GradientTransformationExtraArgs`, whose `update` needs the parameters. Dtypes
        and the caution on bfloat16 parameters are as in `adam3`. The decay is computed
        in float32 too, and rounded together with the rest of the update.

    Raises:
        ValueError: As `scale_by_adam3`; at update, no parameters.
        TypeError: As `scale_by_adam3`; a `mask` that arrives as a number.

    Example:
        Where the gradient is zero, only the decay acts.

        >>> import jax.numpy as jnp
        >>> from adam3_optax import adam3w
        >>> optimizer = adam3w(learning_rate=0.1, weight_decay=0.5)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(jnp.zeros(2), state, params)
        >>> bool(jnp.allclose(updates, -0.1 * 0.5 * params))
        True

    Source:
        `docs/algorithm.md`, section 1; Loshchilov and Hutter, arXiv 1711.05101.
    """
    # If a mask function was taken for a schedule, its result arrives here.
    if isinstance(mask, bool | int | float | np.generic | np.ndarray | jax.Array):
        raise TypeError(
            "mask must be a tree of booleans, not one alone, or a function that makes "
            f"one, got {mask}. With optax.inject_hyperparams, pass static_args='mask'."
        )
    return _in_float32(
        scale_by_adam3(
            b1,
            b2,
            b3=b3,
            lam=lam,
            tau=tau,
            eps=eps,
            eps_root=eps_root,
            third_moment=third_moment,
            m_dtype=m_dtype,
            v_dtype=v_dtype,
            s_dtype=s_dtype,
        ),
        _add_decayed_weights(weight_decay, mask),
        _scale_by_rate(learning_rate),
    )


def _add_decayed_weights(
    weight_decay: hp.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformation:
    """Adds decay to updates, with the rate and the parameters cast to their dtype.

    The state is that of `optax.add_decayed_weights`.
    """
    rate_at = hp.value_at("weight_decay", weight_decay)
    is_schedule = callable(weight_decay)

    def add(
        updates: optax.Updates, state: Any, params: optax.Params
    ) -> tuple[optax.Updates, optax.OptState]:
        rate = rate_at(state.count if is_schedule else 0)

        def decayed(
            path: tuple[Any, ...], u: jax.Array | None, p: jax.Array
        ) -> jax.Array | None:
            if u is None:
                return None
            p = opened(p)  # gradients may be plain where parameters are in boxes
            if u.shape != jnp.shape(p):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} has shape {jnp.shape(p)}, "
                    f"but its update has {u.shape}"
                )
            return u + jnp.asarray(rate, u.dtype) * jnp.asarray(p, u.dtype)

        treedef: Any  # JAX says Unknown
        us, treedef = jax.tree.flatten_with_path(updates, is_leaf=lambda x: x is None)
        ps = leaves_like(treedef, params, "params", "updates")
        new = [decayed(path, u, p) for (path, u), p in zip(us, ps, strict=True)]
        updates = treedef.unflatten(new)
        if is_schedule:
            state = state._replace(count=optax.safe_increment(state.count))
        return updates, state

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("weight decay needs params: pass them to update")
        if mask is None:
            return add(updates, state, params)
        return optax.masked(decay, chosen(params)).update(updates, state, params)

    # A mask function gets the parameters as they were passed: not cast, and not the
    # updates, which Optax would give it.
    def chosen(params: optax.Params) -> Any:
        return full_mask(mask(params) if callable(mask) else mask, params)

    init = optax.add_decayed_weights(rate_at if is_schedule else 0.0).init
    decay = optax.GradientTransformation(init, add)
    if mask is not None:
        init = optax.masked(decay, chosen).init
    return optax.GradientTransformation(init, update)


def _scale_by_rate(learning_rate: hp.ScalarOrSchedule) -> optax.GradientTransformation:
    """Scales by -learning_rate, cast to the updates' dtype: they are not promoted."""
    rate_at = hp.value_at("learning_rate", learning_rate)
    if callable(learning_rate):
        return optax.scale_by_learning_rate(rate_at)

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda u: -jnp.asarray(rate_at(0), u.dtype) * u, updates)

    return optax.stateless(scale)


def _in_float32(
    *parts: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Chains parts in float32 or wider; casts the result to the gradients' dtype."""
    chain = optax.chain(*parts)

    def widen(g: Any) -> Any:
        real = jnp.issubdtype(jnp.result_type(g), jnp.floating)
        return jnp.asarray(g).astype(computed_in(g)) if real else g

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        wide = jax.tree.map(widen, updates)
        wide, state = chain.update(wide, state, params, **extra_args)
        cast = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), wide, updates)
        return cast, state

    return optax.GradientTransformationExtraArgs(chain.init, update)
