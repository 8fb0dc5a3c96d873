"""Accuracy of low precision: the demo's language model, setting against setting.

`--of state` compares how m, v and s are stored, `--of parameters` how the parameters
are; `--of averages` tries `bfloat16_state` on Optax's optimizers. Every arm sees, for
each seed, the same initialisation and the same batches. Each run adds a line to a file.
Runs that are there are not repeated.

    python benchmarks/low_precision.py --of state --seeds 8 --out FOLDER
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import char_lm
import common

from adam3_optax import adam3w, bfloat16_parameters, bfloat16_state

SETTINGS = {"float32": "float32", "bfloat16": "bfloat16"}
SETTINGS |= {"float8, v bfloat16": "float8", "float8": "float8 all"}
# Steps are so much longer where v has 8 bits. So float32 is tried at this rate, too.
LONGER = 1.07
PEAK = 4e-3  # of the learning rate
Arm = tuple[Any, str]  # what makes an optimizer of a schedule; the parameters' dtype


def arms_of_parameters() -> dict[str, Arm]:
    """Returns AdamW with float32 parameters, and with bfloat16 ones in each setting."""
    adamw = functools.partial(adam3w, third_moment=None)
    arms: dict[str, Arm] = {
        "parameters, float32": (adamw, "float32"),
        "parameters, bfloat16 alone": (adamw, "bfloat16"),
    }
    for x in (None, "int8", "int16"):
        make = functools.partial(lambda x, rate: bfloat16_parameters(adamw(rate), x), x)
        arms[f"parameters, bfloat16, remainder {x}"] = (make, "bfloat16")
    return arms


def arms_of_state() -> dict[str, Arm]:
    """Returns the optimizers by name, all with float32 parameters."""
    arms: dict[str, Arm] = {}
    for form in common.FORMS:
        for name, setting in SETTINGS.items():
            if (form, setting) not in common.LEFT_OUT:
                stored = common.SETTINGS[setting].items()
                kept = {k: x for k, x in stored if form or k != "s_dtype"}
                make = functools.partial(adam3w, third_moment=form, **kept)
                arms[f"{form}, {name}"] = (make, "float32")

    def faster(schedule: optax.Schedule) -> Any:
        return adam3w(lambda count: LONGER * schedule(count), third_moment=None)

    return arms | {f"None, float32, rate times {LONGER}": (faster, "float32")}


def arms_of_averages() -> dict[str, Arm]:
    """Returns optimizers of Optax at some peak rates, alone and in `bfloat16_state`."""
    arms: dict[str, Arm] = {}
    for name, make, peaks in (
        ("AdamW", optax.adamw, (0.004,)),
        ("Lion", optax.lion, (0.0004, 0.001)),
        ("Muon", optax.contrib.muon, (0.004, 0.02)),
    ):
        for peak in peaks:

            def alone(schedule: Any, make: Any = make, peak: float = peak) -> Any:
                return make(lambda count: peak / PEAK * schedule(count))

            def wrapped(schedule: Any, alone: Any = alone) -> Any:
                return bfloat16_state(alone(schedule))

            arms[f"{name} at {peak:g}, float32"] = (alone, "float32")
            arms[f"{name} at {peak:g}, bfloat16"] = (wrapped, "float32")
    return arms


ARMS = {"state": arms_of_state, "parameters": arms_of_parameters}
ARMS |= {"averages": arms_of_averages}


wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))


def train(arm: Arm, seed: int, steps: int, corpus: Any) -> dict[str, Any]:
    """Trains from a seed's initialisation on its batches, and returns the result.

    The loss is computed in float32 in all arms, from the parameters as they are stored.
    """
    make, dtype = arm
    optimizer = make(optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 10, steps))
    model = char_lm.Transformer(len(corpus.alphabet), nnx.Rngs(seed))
    graph, params = nnx.split(model)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    state = optimizer.init(params)
    sizes = {"state_bytes": common.nbytes(state), "parameters": common.elements(params)}

    def loss_of(params: Any, windows: Any) -> jax.Array:
        return char_lm.loss_of(wide(params), graph, windows)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, state: Any, largest: Any, windows: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, windows)
        updates, state = optimizer.update(gradients, state, params)
        sizes = [jnp.max(jnp.abs(x)) for x in jax.tree.leaves(updates)]
        largest = jnp.max(jnp.stack([largest, *sizes]))
        return optax.apply_updates(params, updates), state, largest, loss

    rng = np.random.default_rng(seed)
    largest, losses = jnp.zeros(()), []
    for _ in range(steps):
        last = len(corpus.training) - char_lm.CONTEXT
        starts = rng.integers(last, size=char_lm.BATCH)
        windows = char_lm.windows_at(corpus.training, starts)
        params, state, largest, loss = step(params, state, largest, windows)
        losses.append(loss)
    trained = np.asarray(jnp.stack(losses))
    return {
        "validation": float(char_lm.evaluate(wide(params), graph, corpus.held_out)),
        "train": float(trained[-50:].mean()),
        "finite": bool(np.isfinite(trained).all()),
        "largest": float(largest),
        **sizes,
    }


def main() -> None:
    """Runs what is not in the record yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--of", choices=ARMS, default="state", help="what is compared")
    add("--seeds", type=int, default=8, help="how many")
    add("--steps", type=int, default=1000)
    add("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    corpus, every = char_lm.load(None), ARMS[options.of]()
    with (options.out / "runs.jsonl").open("a+") as file:
        file.seek(0)
        runs = [json.loads(line) for line in file]
        done = {(x["arm"], x["seed"], x["steps"]) for x in runs}
        for seed, name in itertools.product(range(options.seeds), every):
            if (name, seed, options.steps) not in done:
                line = {"arm": name, "seed": seed, "steps": options.steps}
                line |= train(every[name], seed, options.steps, corpus)
                print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
