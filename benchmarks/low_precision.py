"""Accuracy of low-precision state: the demo's language model, setting against setting.

Every arm sees, for each seed, the same initialisation and the same batches. Results are
appended to a file, one line a run; runs that are there already are not repeated.

    python benchmarks/low_precision.py --seeds 8 --out FOLDER
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

from adam3_optax import adam3w

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 m, s": {"m_dtype": "bfloat16", "s_dtype": "bfloat16"},
    "bfloat16": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "bfloat16"),
    "int8": dict.fromkeys(("m_dtype", "v_dtype", "s_dtype"), "int8"),
}


def arms() -> dict[str, Any]:
    """Returns the optimizers by name, each a function of the schedule."""
    ours = {
        f"{form}, {name}": functools.partial(adam3w, third_moment=form, **setting)
        for form in char_lm.FORMS
        for name, setting in SETTINGS.items()
    }
    return ours | {
        "adamw, float32": optax.adamw,
        "adamw, mu bfloat16": functools.partial(optax.adamw, mu_dtype=jnp.bfloat16),
    }


def train(make: Any, seed: int, steps: int, corpus: Any) -> dict[str, Any]:
    """Trains from a seed's initialisation on its batches, and returns the result."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps)
    optimizer = make(schedule)
    model = char_lm.Transformer(len(corpus.alphabet), nnx.Rngs(seed))
    graph, params = nnx.split(model)
    state = optimizer.init(params)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, state: Any, largest: Any, windows: Any) -> Any:
        loss, gradients = jax.value_and_grad(char_lm.loss_of)(params, graph, windows)
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
        "validation": float(char_lm.evaluate(params, graph, corpus.held_out)),
        "train": float(trained[-50:].mean()),
        "finite": bool(np.isfinite(trained).all()),
        "largest": float(largest),
        "seconds": seconds,
        "state_bytes": state_bytes,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
    }


def max_abs(tree: Any) -> jax.Array:
    """Returns the largest absolute value in a tree."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]))


def main() -> None:
    """Runs what is not in the record yet."""
    parser = argparse.ArgumentParser(description=__doc__)
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
        for arm, make in arms().items():
            if options.only not in arm or (arm, seed, options.steps) in done:
                continue
            result = train(make, seed, options.steps, corpus)
            line = {"arm": arm, "seed": seed, "steps": options.steps, **result}
            with record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
