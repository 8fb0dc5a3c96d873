"""AdaM3 in libraries that take an Optax optimizer. `make test-clients` installs them.

docs/clients.md has a row for each test. Libraries that the other tests need anyway are
tested in test_interop.py and test_client_patterns.py.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adam3_optax import adam3w
from tests import clients
from tests.clients import ALL, IN_FLOAT32, RATE, X, Y, client, mean_square, trains
from tests.settings import F32, assert_close, normal, structure

CLIENTS = "haiku keras numpyro optimistix jaxopt blackjax flowjax netket penzai"
if not any(map(find_spec, f"{CLIENTS} levanter tunix maxtext".split())):
    pytest.skip("no client is here: make test-clients", allow_module_level=True)
# Clients mix types and ranks, and warn.
pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),
]


@trains(*ALL)
def test_haiku(optimizer: Any, dtype: Any) -> Any:
    hk = client("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 1])(x)))
    params = model.init(jax.random.key(0), X)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(
            lambda p: mean_square(model.apply(p, X.astype(dtype)))
        )(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(20):
        params, state, value = step(params, state)
        yield value


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    return client("keras")


@pytest.mark.usefixtures("keras")
@trains(*ALL)
def test_keras(optimizer: Any, dtype: Any) -> Any:
    keras = client("keras")
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(32, "tanh", dtype=jnp.dtype(dtype).name)
    last = keras.layers.Dense(1, dtype=jnp.dtype(dtype).name)
    model = keras.Sequential([hidden, last])
    model.build((None, 16))
    params = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, others: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            found, new = model.stateless_call(params, others, X)
            return mean_square(found), new

        (value, others), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), others, state, value

    for _ in range(20):
        params, others, state, value = step(params, others, state)
        yield value
    for variable, value in zip(model.trainable_variables, params, strict=True):
        variable.assign(value)
    yield mean_square(jnp.asarray(model(X)))


def test_keras_takes_no_optax_optimizer(keras: Any) -> None:
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="Could not interpret optimizer"):
        model.compile(optimizer=adam3w(RATE), loss="mse")


@trains(*ALL)
def test_numpyro(optimizer: Any, dtype: Any) -> Any:
    numpyro = client("numpyro")
    dist = client("numpyro.distributions")
    infer = client("numpyro.infer")

    def model(x: Any, y: Any) -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros(16), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    def guide(x: Any, y: Any) -> None:
        loc = numpyro.param("loc", jnp.full(16, 0.5, dtype)).astype(F32)
        scale = numpyro.param("scale", jnp.full(16, -2.0, dtype)).astype(F32)
        numpyro.sample("w", dist.Normal(loc, jnp.exp(scale)).to_event(1))

    svi = infer.SVI(model, guide, optimizer, infer.Trace_ELBO())
    found = svi.run(jax.random.key(0), 30, X, Y[:, 0], progress_bar=False)
    assert found.params["loc"].dtype == dtype
    return found.losses


def affine(dtype: Any) -> Any:
    """Returns the parameters of an affine function."""
    return {"kernel": jnp.zeros((16, 1), dtype), "bias": jnp.ones(1, dtype)}


def loss_of(params: Any, x: Any) -> Any:
    dtype = params["kernel"].dtype
    return mean_square(x.astype(dtype) @ params["kernel"] + params["bias"])


@trains(*IN_FLOAT32)
def test_optimistix(optimizer: Any, dtype: Any) -> Any:
    optx = client("optimistix")
    start = affine(dtype)
    solver = optx.OptaxMinimiser(optimizer, rtol=1e-8, atol=1e-8)
    options = {"max_steps": 50, "throw": False}
    found = optx.minimise(loss_of, solver, start, X, **options)
    return loss_of(start, X), loss_of(found.value, X)


@trains(*ALL)
def test_jaxopt(optimizer: Any, dtype: Any) -> Any:
    jaxopt = client("jaxopt")
    start = affine(dtype)
    solver = jaxopt.OptaxSolver(loss_of, optimizer, maxiter=50, tol=0.0)
    found, _ = solver.run(start, x=X)
    return loss_of(start, X), loss_of(found, X)


def log_density(x: Any) -> Any:
    return -0.5 * jnp.sum((x.astype(F32) - 1.0) ** 2 / jnp.arange(1.0, 9.0))


@pytest.mark.parametrize("kind", ["meanfield_vi", "fullrank_vi"])
def test_blackjax_variational(kind: str) -> None:
    blackjax = client("blackjax")

    def train(optimizer: Any, dtype: Any) -> Any:
        algorithm = getattr(blackjax, kind)(log_density, optimizer, 64)
        state, step = algorithm.init(jnp.full(8, 3.0, dtype)), jax.jit(algorithm.step)
        for key in jax.random.split(jax.random.key(0), 60):
            state, _ = step(key, state)
            yield jnp.mean((state.mu - 1.0) ** 2)

    clients.check(train, clients.FLOAT32)


@trains(*ALL)
def test_blackjax_svgd(optimizer: Any, dtype: Any) -> Any:
    blackjax = client("blackjax")
    algorithm = blackjax.svgd(jax.grad(log_density), optimizer)
    state = algorithm.init(3.0 + normal(32, 8, seed=2).astype(dtype))
    step = jax.jit(algorithm.step)
    for _ in range(40):
        state = step(state)
        assert state.particles.dtype == dtype
        yield jnp.mean((state.particles.astype(F32).mean(0) - 1.0) ** 2)


def test_blackjax_chees() -> None:
    # It tunes one number, the length of trajectories.
    warmup = client("blackjax").chees_adaptation(log_density, num_chains=8)
    arguments = jax.random.key(0), normal(8, 8, seed=3), 0.5, adam3w(RATE)
    (_, found), _ = warmup.run(*arguments, num_steps=20)
    assert jnp.isfinite(found["step_size"])


@trains(*IN_FLOAT32)
def test_flowjax(optimizer: Any, dtype: Any) -> Any:
    flows = client("flowjax.flows")
    distributions = client("flowjax.distributions")
    fit = client("flowjax.train").fit_to_data
    key, base = jax.random.key(0), distributions.Normal(jnp.zeros(2))
    make = flows.masked_autoregressive_flow
    flow = make(key, base_dist=base, flow_layers=1, nn_width=8)
    data = normal(200, 2, seed=4) * jnp.array([0.3, 2.0]) + 1.0
    options = {"max_epochs": 6, "batch_size": 50, "show_progress": False}
    _, losses = fit(key, flow, data, optimizer=optimizer, **options)
    return losses["train"]


@pytest.fixture
def netket(monkeypatch: pytest.MonkeyPatch) -> Any:
    # It would switch on float64 for all tests.
    monkeypatch.setenv("NETKET_ENABLE_X64", "0")
    before = cast(Any, jax.config).jax_enable_x64
    module = client("netket")
    jax.config.update("jax_enable_x64", before)
    return module


def ground_state(dtype: Any, optimizer: Any, steps: int = 20) -> Any:
    """Returns the energies of an Ising chain on the way to its ground state."""
    nk = client("netket")
    hilbert = nk.hilbert.Spin(s=0.5, N=6)
    hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(6), h=1.0, dtype=dtype)
    model = nk.models.RBM(alpha=4, param_dtype=dtype)
    state = nk.vqs.FullSumState(hilbert, model, seed=0)
    driver = nk.driver.VMC(hamiltonian, optimizer, variational_state=state)
    energies: list[float] = []

    def note(step: int, log: Any, driver: Any) -> bool:
        energies.append(20.0 + float(np.real(driver.energy.mean)))  # above zero
        return True

    driver.run(steps, show_progress=False, callback=note)
    assert all(x.dtype == dtype for x in jax.tree.leaves(state.parameters))
    return energies


@pytest.mark.usefixtures("netket")
@trains(*IN_FLOAT32)
def test_netket_real(optimizer: Any, dtype: Any) -> Any:
    return ground_state(dtype, optimizer)


@pytest.mark.usefixtures("netket")
@trains(*IN_FLOAT32)
def test_netket_complex(optimizer: Any, dtype: Any) -> Any:
    with pytest.raises(ValueError, match="split_real_and_imaginary"):
        ground_state(jnp.complex64, adam3w(RATE), 1)
    split = optax.contrib.split_real_and_imaginary(optimizer)
    return ground_state(jnp.complex64, split)


@trains(*ALL)
def test_penzai(optimizer: Any, dtype: Any) -> Any:
    pz = client("penzai.pz")
    training = client("penzai.toolshed.basic_training")
    mlp = client("penzai.models.simple_mlp").MLP
    model = mlp.from_config(jax.random.key(0), [16, 32, 1])
    for parameter in pz.unbind_params(model)[1]:
        parameter.value = jax.tree.map(lambda x: x.astype(dtype), parameter.value)

    def loss(model: Any, state: Any, rng: Any) -> Any:
        x = pz.nx.wrap(X.astype(dtype)).tag("batch", "features")
        value = mean_square(model(x).unwrap("batch", "features"))
        return value, state, {"loss": value}

    key, build = jax.random.key(1), training.StatefulTrainer.build
    trainer = build(root_rng=key, model=model, optimizer_def=optimizer, loss_fn=loss)
    return [trainer.step()["loss"] for _ in range(20)]


@trains(*ALL)
def test_tunix(optimizer: Any, dtype: Any) -> Any:
    trainers = client("tunix.sft.peft_trainer")

    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.first = nnx.Linear(16, 32, param_dtype=dtype, rngs=rngs)
            self.last = nnx.Linear(32, 1, param_dtype=dtype, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(jnp.tanh(self.first(x)))

    model: Any = Model()
    steps = {"max_steps": 12, "gradient_accumulation_steps": 2}
    config = trainers.TrainingConfig(eval_every_n_steps=1000, **steps)
    trainer = trainers.PeftTrainer(model, optimizer, config)
    trainer = trainer.with_loss_fn(lambda model, x: mean_square(model(x)))
    trainer = trainer.with_gen_model_input_fn(lambda x: {"x": x})
    yield mean_square(model(X))
    trainer.train([X] * 24)
    assert model.first.kernel[...].dtype == dtype
    yield mean_square(model(X))


@trains(*IN_FLOAT32)
def test_levanter(optimizer: Any, dtype: Any) -> Any:
    init, hax = client("levanter.trainer_state").TrainerState.init, client("haliax")
    axes = hax.Axis("In", 16), hax.Axis("Out", 1)
    model = hax.nn.Linear.init(*axes, key=jax.random.key(0))
    state = init(optimizer, model, key=jax.random.key(1), model_averaging=None)

    @eqx.filter_jit
    def step(state: Any) -> Any:
        def loss(model: Any) -> Any:
            found = model(hax.named(X, (hax.Axis("B", 64), axes[0])))
            return mean_square(found.array)

        value, gradients = eqx.filter_value_and_grad(loss)(state.model)
        state, _ = state.take_step(gradients, key=state.training_key, loss=value)
        return state, value

    for _ in range(20):
        state, value = step(state)
        yield value


def test_levanter_decays_and_injects() -> None:
    # A config of the user's own, in the form of levanter's: a schedule injected, a mask
    # for the decay.
    config = client("levanter.optim.config").OptimizerConfig
    hax = client("haliax")

    @config.register_subclass("adam3_injected")
    @dataclass(frozen=True)
    class Adam3Config(config):  # type: ignore[misc, valid-type]
        def build(self, num_train_steps: int) -> Any:
            return optax.inject_hyperparams(adam3w, static_args="mask")(
                self.lr_scheduler(num_train_steps),
                third_moment=None,
                weight_decay=self.weight_decay,
                mask=self.build_weight_decay_mask(),
            )

    axes = hax.Axis("In", 16), hax.Axis("Out", 1)
    model = hax.nn.Linear.init(*axes, key=jax.random.key(0))
    optimizer = Adam3Config(learning_rate=RATE, warmup=0.0).build(10)
    zero = jax.tree.map(jnp.zeros_like, model)
    updates, state = optimizer.update(zero, optimizer.init(model), model)
    assert state.hyperparams["learning_rate"] == jnp.float32(RATE)
    np.testing.assert_allclose(
        updates.weight.array, -RATE * 0.1 * model.weight.array, rtol=1e-5
    )
    assert not updates.bias.array.any()


def test_maxtext_builds_it_in_place_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    # The line: MaxText calls optax.adamw by name, with mu_dtype.
    helpers = client("maxtext.optimizers.optimizers")

    def ours(*args: Any, mu_dtype: Any, **kwargs: Any) -> Any:
        return adam3w(*args, m_dtype=mu_dtype, b3=0.9, **kwargs)

    monkeypatch.setattr(helpers.optax, "adamw", ours)
    adam = {"adam_b1": 0.9, "adam_b2": 0.95, "adam_eps": 1e-8, "adam_eps_root": 0.0}
    decay = {"adam_weight_decay": 0.1, "adamw_mask": ["bias"], "mu_dtype": "float32"}
    spikes = {"skip_step_interval": 4, "skip_step_scaling_factor": 2.0}
    numbers: Any = adam | decay | spikes
    config = SimpleNamespace(opt_type="adamw", skip_step_on_spikes=True, **numbers)
    optimizer = helpers.get_optimizer(config, optax.constant_schedule(RATE))
    params = {"kernel": normal(4, 8, seed=0), "bias": normal(8, seed=1)}
    mask = {"kernel": True, "bias": False}
    plain = adam3w(RATE, 0.9, 0.95, b3=0.9, weight_decay=0.1, mask=mask)
    state, alone = optimizer.init(params), plain.init(params)
    g = jax.tree.map(lambda p: jnp.sin(7 * p), params)
    for loss in (1.1, 1.0, 0.9, 50.0):
        updates, state = optimizer.update(g, state, params, loss=loss)
        want, alone = plain.update(g, alone, params)
        if loss == 50:
            want = jax.tree.map(jnp.zeros_like, g)
        assert_close(updates, want)
    assert bool(state["is_skipped"])


def test_maxtext_shards_by_the_field_mu() -> None:
    # Its ZeRO-1 looks for the first moment under Adam's name.
    helpers = client("maxtext.utils.sharding")
    train_state = client("maxtext.common.train_state_nnx").TrainStateNNX
    config = SimpleNamespace(shard_optimizer_over_data=True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, adam3w(RATE), wrt=nnx.Param)
        state = nnx.state(train_state(model, optimizer))
        shardings: Any = nnx.get_named_sharding(state, mesh)
    adam3 = shardings.optimizer.opt_state[0]
    adam3["m"] = jax.tree.map(lambda _: split, adam3["m"])
    with pytest.raises(NotImplementedError, match="Could not find Adam"):
        helpers.maybe_update_params_sharding_with_opt(config, shardings)
    # The line: m also stands under the name it knows, for as long as it looks.
    adam3["mu"] = adam3["m"]
    _, found = helpers.maybe_update_params_sharding_with_opt(config, shardings)
    del found.optimizer.opt_state[0]["mu"]
    assert {*jax.tree.leaves(found.model)} == {split}
    assert structure(found) == structure(state)
