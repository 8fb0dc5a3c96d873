"""Accuracy of low precision: the demo's language model, setting against setting.

`--of state` compares how m, v and s are stored, `--of parameters` how the parameters
are; `--of averages` tries `bfloat16_state` on Optax's optimizers. A seed sets batches
and initialisation, alike in all arms. Runs that are in the file are not repeated.

    python benchmarks/low_precision.py --of state --seeds 8 --out FOLDER
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator
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
PEAK = 4e-3  # of the learning rate
LONGER = 1.07  # Steps are so much longer where v has 8 bits: float32 is tried so, too.
OF_OPTAX = {"AdamW": (optax.adamw, 0.004), "Lion": (optax.lion, 0.0004, 0.001)}
OF_OPTAX |= {"Muon": (optax.contrib.muon, 0.004, 0.02)}  # with their peaks
Arm = tuple[str, Any, str]  # name, what makes an optimizer of a schedule, and the dtype
ADAMW = functools.partial(adam3w, third_moment=None)
wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))


def of_state() -> Iterator[Arm]:
    """Yields each form with each state, and AdamW with longer steps."""
    for form, (name, setting) in itertools.product(common.FORMS, SETTINGS.items()):
        if (form, setting) not in common.LEFT_OUT:
            stored = common.SETTINGS[setting].items()
            kept = {k: x for k, x in stored if form or k != "s_dtype"}
            make = functools.partial(adam3w, third_moment=form, **kept)
            yield f"{form}, {name}", make, "float32"
    longer = functools.partial(scaled, LONGER, ADAMW)
    yield f"None, float32, rate times {LONGER}", longer, "float32"


def of_parameters() -> Iterator[Arm]:
    """Yields AdamW with float32 parameters, and with bfloat16 ones in each setting."""
    yield "parameters, float32", ADAMW, "float32"
    yield "parameters, bfloat16 alone", ADAMW, "bfloat16"
    for x in (None, "int8", "int16"):
        make = functools.partial(lambda x, rate: bfloat16_parameters(ADAMW(rate), x), x)
        yield f"parameters, bfloat16, remainder {x}", make, "bfloat16"


def of_averages() -> Iterator[Arm]:
    """Yields optimizers of Optax at some peak rates, alone and in `bfloat16_state`."""
    for name, (make, *peaks) in OF_OPTAX.items():
        for peak in peaks:
            alone = functools.partial(scaled, peak / PEAK, make)
            wrapped = functools.partial(lambda f, rate: bfloat16_state(f(rate)), alone)
            yield f"{name} at {peak:g}, float32", alone, "float32"
            yield f"{name} at {peak:g}, bfloat16", wrapped, "float32"


def scaled(factor: float, make: Any, schedule: optax.Schedule) -> Any:
    return make(lambda count: factor * schedule(count))


def train(make: Any, dtype: str, seed: int, steps: int, corpus: Any) -> dict[str, Any]:
    """Trains from a seed's initialisation on its batches; losses are in float32."""
    optimizer = make(optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 10, steps))
    graph, params = nnx.split(char_lm.Transformer(len(corpus.alphabet), nnx.Rngs(seed)))
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
    every = {"state": of_state, "parameters": of_parameters, "averages": of_averages}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--of", choices=every, default="state")
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = char_lm.load(None)
    with (options.out / "runs.jsonl").open("a+") as file:
        file.seek(0)
        runs = [json.loads(line) for line in file]
        done = {(x["arm"], x["seed"], x["steps"]) for x in runs}
        for seed in range(options.seeds):
            for name, *arm in every[options.of]():
                if (name, seed, options.steps) not in done:
                    line = {"arm": name, "seed": seed, "steps": options.steps}
                    line |= train(*arm, seed, options.steps, corpus)
                    print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
