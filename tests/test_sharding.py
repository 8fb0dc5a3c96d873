"""One program, many devices: the numbers of one, and no more communication than needed.

Eight CPU devices are simulated, as data 4 x model 2.
"""

import re
from collections import Counter
from functools import cache, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from adam3_optax import adam3w, scale_by_adam3, state_shardings
from tests import settings
from tests.settings import AXES, FORMS, MIXED, STORAGE, assert_same, mesh_of, on, types

pytestmark = pytest.mark.usefixtures("on_cpu")

KINDS = [AxisType.Auto, AxisType.Explicit]
STEPS = 10
SHAPES = {"matrix": (64, 128), "vector": (256,), "scalar": ()}
# A shard has 32 elements at least. In smaller ones, which do not fill its vectors, the
# compiler contracts products and sums in another way, and results differ by an ulp.
# With all their axes, as JAX writes them on Explicit axes: P() would compile twice.
WHOLE = {"matrix": P(None, None), "vector": P(None), "scalar": P()}
ROWS = {"matrix": P("data", None), "vector": P("data"), "scalar": P()}
COLUMNS = {"matrix": P(None, "model"), "vector": P("model"), "scalar": P()}
BOTH = {"matrix": P("data", "model"), "vector": P(AXES), "scalar": P()}

# NumPy's, because to place an array of JAX on a mesh is a program of its own.
rng = np.random.default_rng(0)
PARAMS, *GRADIENTS = (
    {k: np.float32(rng.normal(size=n)) for k, n in SHAPES.items()}
    for _ in range(1 + STEPS)
)


def make(storage: Any, form: Any = FORMS[-1]) -> Any:
    return adam3w(1e-2, weight_decay=0.1, **{"third_moment": form, **storage})


def step(optimizer: Any, params: Any, state: Any, gradients: Any) -> Any:
    # Or the compiler may fuse the update with what made the gradients, and contract its
    # products and sums in another way. Leaf by leaf, or all would count as varying over
    # the axes of `shard_map` over which one does.
    gradients = jax.tree.map(lax.optimization_barrier, gradients)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def run(step: Any, carry: Any, gradients: Any = GRADIENTS) -> Any:
    for g in gradients:
        carry = step(*carry, g)
    return jax.device_get(carry)


jitted_step = jax.jit(step, static_argnums=0)


def on_one_device(
    optimizer: Any, params: Any = PARAMS, gradients: Any = GRADIENTS
) -> Any:
    carry = params, optimizer.init(params)
    return run(partial(jitted_step, optimizer), carry, gradients)


def assert_on(tree: Any, shardings: Any) -> None:
    for x, sharding in zip(*map(jax.tree.leaves, (tree, shardings)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding)


# What devices tell each other: read from the compiled program.

COLLECTIVES = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|"
    "collective-broadcast|send|recv"
)


def collectives(compiled: str) -> Counter[str]:
    """Returns the collectives of a program, counted by operand, by kind.

    By operand, for the compiler may combine several into one.
    """
    found = Counter[str]()
    for line in compiled.splitlines():
        call = re.search(rf" ({COLLECTIVES})(?:-start)?\(([^)]*)\)", line)
        if call:
            found[call[1]] += call[2].count("%")
    return found


def test_collectives_are_seen() -> None:
    # What would be missed here would be missed below.
    mesh = mesh_of(AxisType.Auto)
    x = jax.device_put(jnp.ones((8, 16)), on(mesh, P("data", "model")))
    whole, columns = on(mesh, P()), on(mesh, P(None, "data"))
    for function, out, kind in (
        (lambda x: x + 1, whole, "all-gather"),
        (jnp.sum, whole, "all-reduce"),
        (lambda x: jnp.roll(x, 1, 0), x.sharding, "collective-permute"),
        (lambda x: x + 1, columns, "all-to-all"),
    ):
        compiled = jax.jit(function, out_shardings=out).lower(x).compile().as_text()
        assert collectives(compiled or "")[kind] >= 1, kind


# The result of one device, bit for bit.

# Where parameters lie, where the state does, and what devices tell each other in a
# step. With ZeRO-1 they gather the matrix and the vector; the scalar is replicated.
WAYS: dict[str, Any] = {
    "data parallel": (WHOLE, WHOLE, {}),
    "rows": (ROWS, ROWS, {}),
    "columns": (COLUMNS, COLUMNS, {}),
    "fully sharded": (BOTH, BOTH, {}),
    "ZeRO-1": (WHOLE, ROWS, {"all-gather": 2}),
}
CASES = [
    *product(FORMS[-1:], ["mixed"], [*WAYS][1:], KINDS),
    (FORMS[-1], "mixed", "data parallel", AxisType.Auto),
    (FORMS[-1], "default", "fully sharded", AxisType.Auto),
    (settings.UNBOUNDED[0], "smallest", "fully sharded", AxisType.Explicit),
]


@cache
def expected(form: Any, name: str) -> Any:
    return on_one_device(make(STORAGE[name], form))


@pytest.mark.parametrize(("form", "name", "way", "kind"), CASES)
def test_jit_gives_the_result_of_one_device(
    form: Any, name: str, way: str, kind: Any
) -> None:
    optimizer, mesh = make(STORAGE[name], form), mesh_of(kind)
    specs, state_specs, told = WAYS[way]
    where = on(mesh, specs)
    where_state = state_shardings(optimizer, PARAMS, on(mesh, state_specs))

    def stepped(params: Any, state: Any, gradients: Any) -> Any:
        if kind is AxisType.Auto:
            return step(optimizer, params, state, gradients)
        mine = reshard((params, gradients), (state_specs, state_specs))
        params, state = step(optimizer, mine[0], state, mine[1])
        return reshard(params, specs), state

    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, where)
        state = jax.jit(optimizer.init, out_shardings=where_state)(params)
        jitted = jax.jit(stepped, out_shardings=(where, where_state))
        compiled = jitted.lower(params, state, params).compile()
        text = str(compiled.as_text())
        assert collectives(text) == told
        # An operation of the size of the whole leaf would cost each device all devices'
        # work and memory, as random bits on Explicit axes might.
        assert specs is WHOLE or "[64,128]" not in text
        for g in GRADIENTS:
            params, state = compiled(params, state, jax.device_put(g, where))
    got, want = jax.device_get((params, state)), expected(form, name)
    assert_same(got[1], want[1])
    assert_same(got[0], want[0])


# Gradients of each device, of small integers: their sum is the same in every order.
OF_DEVICES = [
    {k: np.float32(rng.integers(-8, 9, size=(8, *n))) for k, n in SHAPES.items()}
    for _ in range(STEPS)
]
MEANS = [jax.tree.map(lambda g: g.mean(0), of_devices) for of_devices in OF_DEVICES]


def test_pmap_gives_the_result_of_one_device() -> None:
    optimizer = make(MIXED)

    def stepped(params: Any, state: Any, gradients: Any) -> Any:
        return step(optimizer, params, state, lax.pmean(gradients, "devices"))

    def on_devices(count: int, gradients: Any) -> Any:
        start: Any = PARAMS, optimizer.init(PARAMS)
        carry = jax.tree.map(lambda x: np.stack([x] * count), start)
        parallel = jax.pmap(stepped, "devices", devices=jax.devices()[:count])
        return run(parallel, carry, gradients)

    # One device of `pmap`, for the compiler contracts products and sums in another way
    # in it than in `jit`.
    want = on_devices(1, [jax.tree.map(lambda g: g[None], g) for g in MEANS])
    got = on_devices(8, OF_DEVICES)
    assert_same(got, jax.tree.map(lambda x: np.concatenate([x] * 8), want))


def test_shard_map_gives_the_result_of_each_shard() -> None:
    # The optimizer sees a shard and no more, so the random bits are those of the shard:
    # the result is that of one device for each shard alone.
    optimizer, mesh = make(MIXED), mesh_of(AxisType.Auto)
    where = state_shardings(optimizer, PARAMS, on(mesh, ROWS))
    specs = ROWS, jax.tree.map(lambda sharding: sharding.spec, where)
    mapped = jax.shard_map(
        partial(step, optimizer), mesh=mesh, in_specs=(*specs, ROWS), out_specs=specs
    )
    got, _ = run(jax.jit(mapped), (PARAMS, optimizer.init(PARAMS)))
    for shard in range(4):

        def part(tree: Any, shard: int = shard) -> Any:
            return jax.tree.map(lambda x: np.split(x, 4)[shard] if x.ndim else x, tree)

        want, _ = on_one_device(optimizer, part(PARAMS), [*map(part, GRADIENTS)])
        assert_same(part(got), want)


# Where the state lies.


@pytest.mark.parametrize("kind", KINDS)
def test_state_follows_the_parameters_unasked(kind: Any) -> None:
    optimizer, mesh = make(MIXED), mesh_of(kind)
    where = on(mesh, BOTH)
    where_state = state_shardings(optimizer, PARAMS, where)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, where)
        state = optimizer.init(params)
        assert_on(state, where_state)
        jitted = jax.jit(optimizer.init)(params)
        if kind is AxisType.Explicit:
            assert_on(jitted, where_state)
            assert types(jitted) == types(state)
        else:  # why there is `state_shardings`
            assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(jitted))
        # An update leaves it there, compiled or not.
        for update in (optimizer.update, jax.jit(optimizer.update)):
            updates, after = update(params, state, params)
            assert_on((updates, after[0][:3]), (where, where_state[0][:3]))
            if kind is AxisType.Explicit:
                assert types((updates, after)) == types((params, state))


def test_explicit_shardings_need_no_mesh_context() -> None:
    # There the count, which belongs to no mesh, becomes replicated; the moments follow
    # the parameters. A state made before can be carried through a scan.
    optimizer = adam3w()
    sharding = on(mesh_of(AxisType.Explicit), P(None, "data"))
    params = jax.device_put(jnp.ones((2, 8)), sharding)

    @jax.jit
    def scanned(state: Any, params: Any) -> Any:
        def step(state: Any, _: None) -> tuple[Any, None]:
            return optimizer.update(params, state, params)[1], None

        return lax.scan(step, state, length=2)[0]

    state = optimizer.init(params)
    once = scanned(state, params)
    for after in (state, once, scanned(once, params)):
        for moment in settings.moments(after):
            assert types(moment) == types(params)


OURS = make(MIXED)
LABELS = {"matrix": "ours", "vector": "ours", "scalar": "none"}
OPTIMIZERS: dict[str, Any] = {
    "alone": OURS,
    "chained": optax.chain(optax.clip_by_global_norm(1.0), OURS, optax.trace(0.9)),
    "masked": optax.masked(OURS, partial(jax.tree.map, jnp.ndim)),
    "parted": optax.partition({"ours": OURS, "none": optax.set_to_zero()}, LABELS),
    "several steps": optax.MultiSteps(OURS, 2),
    "schedule-free": optax.contrib.schedule_free(OURS, 1e-2),
    "injected": optax.inject_hyperparams(adam3w)(optax.constant_schedule(0.1), **MIXED),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_shardings(name: str, standard_promotion: None) -> None:
    # `standard_promotion`, for Optax's schedules need it.
    optimizer, mesh = OPTIMIZERS[name], mesh_of(AxisType.Auto)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    found = state_shardings(optimizer, shapes, on(mesh, BOTH))
    state = jax.eval_shape(optimizer.init, shapes)
    assert settings.structure(state) == settings.structure(found)
    # As its parameter, and the rest is whole.
    of_shape = {(64, 128): P("data", "model"), (256,): P(AXES)}
    for x, sharding in zip(*map(jax.tree.leaves, (state, found)), strict=True):
        want = NamedSharding(mesh, of_shape.get(x.shape, P()))
        assert sharding.is_equivalent_to(want, x.ndim), x.shape
    assert Counter(x.shape for x in jax.tree.leaves(state))[64, 128] >= 3


def test_state_shardings_of_other_inputs() -> None:
    mesh, params, kind = mesh_of(AxisType.Explicit), PARAMS["matrix"], "unpinned_host"
    whole, rows = on(mesh, P()), on(mesh, P("data"))
    # In the host's memory: by the shardings, or asked for.
    host = state_shardings(OURS, params, rows.with_memory_kind(kind))
    assert host[0].m.memory_kind == kind
    assert state_shardings(OURS, params, rows, memory_kind=kind) == host
    # One for all; a None among the parameters, and plain numbers.
    found = state_shardings(scale_by_adam3(), {"a": None, "b": 1.0}, whole)
    assert found.m == {"a": None, "b": whole}
    # States of another shape than the parameters': factored.
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=16)
    assert whole in jax.tree.leaves(state_shardings(factored, PARAMS, on(mesh, BOTH)))


def test_state_shardings_refuses() -> None:
    mesh = mesh_of(AxisType.Auto)
    where, other = on(mesh, BOTH), on(mesh_of(AxisType.Explicit), P())
    flat, odd, five = optax.flatten(OURS), {"w": jnp.ones(6)}, 5
    imaginary = {"w": jnp.ones(4, jnp.complex64)}
    for message, make, params, *shardings in (
        ("must be a tree like param", OURS, PARAMS, {"matrix": where["matrix"]}),
        (r"\['matrix'\] .* got P", OURS, PARAMS, where | {"matrix": P("data")}),
        (r"\['scalar'\] does", OURS, PARAMS, where | {"scalar": where["matrix"]}),
        ("on one mesh, got 2 of them", OURS, PARAMS, where | {"vector": other}),
        ("memory_kind must be a string or None", OURS, PARAMS, where, five),
        (r"\['w'\] does not fit params", OURS, odd, on(mesh, P("data"))),
        ("on one mesh, got 0 of them", OURS, {}, {}),
        ("in trees like the parameters", flat, PARAMS, where),
        ("needs real parameters", OURS, imaginary, on(mesh, P())),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            state_shardings(make, params, *shardings)


# A training step lowers for TPU, CUDA, ROCm and CPU, without the hardware.

PLATFORMS = "tpu", "cuda", "rocm", "cpu"


def assert_portable(exported: export.Exported) -> None:
    """Asserts that a program asks nothing of the host, and no other precision."""
    module = exported.mlir_module()
    assert exported.platforms == PLATFORMS
    # StableHLO's own operations alone, and notes on where arrays lie.
    called = re.findall(r"custom_call @(\w+)|call_target_name = \"(\w+)\"", module)
    assert {name or other for name, other in called} <= {"Sharding"}
    assert not re.search(r"callback|infeed|outfeed|send|recv", module)
    assert not re.search(r"\bf64\b|xf64>", module)
    assert not re.search(r"tensor<[^>]*\?", module)
    assert not exported.disabled_safety_checks
    dtypes = {str(x.dtype) for x in (*exported.in_avals, *exported.out_avals)}
    assert dtypes <= {"float32", "bfloat16", "float8_e4m3fn", "uint8", "int32"}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *((form, "default") for form in FORMS),
        (settings.UNBOUNDED[0], "smallest"),
        (FORMS[-1], "mixed"),
        (None, "adam"),
    ],
)
def test_training_lowers_for_every_platform(form: Any, name: str) -> None:
    optimizer = make(STORAGE[name], form)
    init, stepped = jax.jit(optimizer.init), jax.jit(partial(step, optimizer))
    exported_init = export.export(init, platforms=PLATFORMS)(PARAMS)
    state = jax.eval_shape(init, PARAMS)
    exported = export.export(stepped, platforms=PLATFORMS)(PARAMS, state, PARAMS)
    assert_portable(exported_init)
    assert_portable(exported)
    if name == "smallest":
        # What was lowered is the program: run on the CPU, it gives the same bits.
        got, want = (PARAMS, exported_init.call(PARAMS)), (PARAMS, init(PARAMS))
        for _ in range(3):
            got, want = exported.call(*got, PARAMS), stepped(*want, PARAMS)
        assert_same(got, want)


def test_sharded_training_lowers_for_every_platform() -> None:
    optimizer = make(STORAGE["float8"])
    where = on(mesh_of(AxisType.Auto), BOTH)
    carried = where, state_shardings(optimizer, PARAMS, where)
    stepped = partial(step, optimizer)
    jitted = jax.jit(stepped, in_shardings=(*carried, where), out_shardings=carried)
    state = jax.eval_shape(optimizer.init, PARAMS)
    exported = export.export(jitted, platforms=PLATFORMS)(PARAMS, state, PARAMS)
    assert_portable(exported)
    assert exported.nr_devices == 8


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x: jnp.linalg.cholesky(x[None, None])[0, 0], jnp.float32),
        (lambda x: x.astype(jnp.float16), jnp.float32),
        (jnp.tanh, jnp.float64),
        (jnp.tanh, None),
    ],
    ids=["custom call", "half precision", "float64", "open shape"],
)
def test_what_is_not_portable_is_seen(function: Any, dtype: Any, x64: None) -> None:
    shape = () if dtype else export.symbolic_shape("n, 4")
    x = jax.ShapeDtypeStruct(shape, dtype or jnp.float32)
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(x)
    with pytest.raises(AssertionError):
        assert_portable(exported)
