"""Accuracy of low precision: the demo's language model, setting against setting.

`--of state` compares how m, v and s are stored, `--of parameters` how the parameters
are. Every arm sees, for each seed, the same initialisation and the same batches.
Results are appended to a file, one line a run; runs that are there already are not
repeated.

    python benchmarks/low_precision.py --of state --seeds 8 --out FOLDER
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import char_lm

from adam3_optax import adam3w, bfloat16_parameters

FORMS = (*char_lm.FORMS, None)
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "bfloat16"),
    "float8, v bfloat16": {
        "m_dtype": "float8",
        "v_dtype": "bfloat16",
        "s_dtype": "float8",
    },
    "float8": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "float8"),
}
# Steps are so much longer where v has 8 bits. So float32 is tried at this rate, too.
LONGER = 1.07


Arm = tuple[Any, str]  # what makes an optimizer of a schedule; the parameters' dtype


def arms_of_parameters() -> dict[str, Arm]:
    """Returns AdamW with float32 parameters, and with bfloat16 ones in each setting."""
    adamw = functools.partial(adam3w, third_moment=None)

    def wrapped(remainder: Any, schedule: Any) -> Any:
        return bfloat16_parameters(adamw(schedule), remainder)

    arms: dict[str, Arm] = {
        "parameters, float32": (adamw, "float32"),
        "parameters, bfloat16 alone": (adamw, "bfloat16"),
    }
    return arms | {
        f"parameters, bfloat16, remainder {x}": (
            functools.partial(wrapped, x),
            "bfloat16",
        )
        for x in (None, "int8", "int16")
    }


def arms_of_state() -> dict[str, Arm]:
    """Returns the optimizers by name, all with float32 parameters."""
    arms: dict[str, Arm] = {}
    for form in FORMS:
        for name, setting in SETTINGS.items():
            if form == "standardized" and setting.get("v_dtype") == "float8":
                continue  # refused: the skewness would be far too large
            if form is None:
                setting = {k: x for k, x in setting.items() if k != "s_dtype"}
            make = functools.partial(adam3w, third_moment=form, **setting)
            arms[f"{form}, {name}"] = (make, "float32")

    def faster(schedule: optax.Schedule) -> Any:
        return adam3w(lambda count: LONGER * schedule(count), third_moment=None)

    arms[f"None, float32, rate times {LONGER}"] = (faster, "float32")
    return arms


ARMS = {"state": arms_of_state, "parameters": arms_of_parameters}


def train(arm: Arm, seed: int, steps: int, corpus: Any) -> dict[str, Any]:
    """Trains from a seed's initialisation on its batches, and returns the result.

    The loss is computed in float32 in all arms, from the parameters as they are stored.
    """
    make, dtype = arm
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps)
    optimizer = make(schedule)
    model = char_lm.Transformer(len(corpus.alphabet), nnx.Rngs(seed))
    graph, params = nnx.split(model)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    state = optimizer.init(params)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, state: Any, largest: Any, windows: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, graph, windows)
        updates, state = optimizer.update(gradients, state, params)
        largest = jnp.maximum(largest, max_abs(updates))
        return optax.apply_updates(params, updates), state, largest, loss

    rng = np.random.default_rng(seed)
    largest, losses = jnp.zeros(()), []
    began = time.perf_counter()
    for _ in range(steps):
        starts = rng.integers(
            len(corpus.training) - char_lm.CONTEXT, size=char_lm.BATCH
        )
        windows = char_lm.windows_at(corpus.training, starts)
        params, state, largest, loss = step(params, state, largest, windows)
        losses.append(loss)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    trained = np.asarray(jnp.stack(losses))
    return {
        "validation": float(char_lm.evaluate(wide(params), graph, corpus.held_out)),
        "train": float(trained[-50:].mean()),
        "finite": bool(np.isfinite(trained).all()),
        "largest": float(largest),
        "seconds": seconds,
        "state_bytes": state_bytes,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
    }


def wide(params: Any) -> Any:
    """Returns parameters in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def loss_of(params: Any, graph: Any, windows: Any) -> jax.Array:
    """Returns the loss, computed in float32."""
    return char_lm.loss_of(wide(params), graph, windows)


def max_abs(tree: Any) -> jax.Array:
    """Returns the largest absolute value in a tree."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]))


def main() -> None:
    """Runs what is not in the record yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--of", choices=ARMS, default="state", help="what is compared")
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", default="", help="arms whose names contain this")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "runs.jsonl"
    done = set()
    if record.exists():
        rows = map(json.loads, record.read_text().splitlines())
        done = {(r["arm"], r["seed"], r["steps"]) for r in rows}
    corpus = char_lm.load(None)
    for seed in range(options.first, options.first + options.seeds):
        for name, arm in ARMS[options.of]().items():
            if options.only not in name or (name, seed, options.steps) in done:
                continue
            result = train(arm, seed, options.steps, corpus)
            line = {"arm": name, "seed": seed, "steps": options.steps, **result}
            with record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
