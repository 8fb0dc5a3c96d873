"""How exact float8 state is, measured through the optimizers of the package.

Updates and s are compared with those of float32 state, on 4,096 elements with learning
rate 1. In each case all states get the same gradients. An error is the root mean square
of the difference over that of float32's. The slope is that of the line through 0,
against float32's: 1.07 means that steps are 7% too long.

    python benchmarks/float8.py --out FOLDER
"""

import argparse
import functools
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import rare_classes

from adam3_optax import Float8Warning, adam3, adam3w, convert_state

STATES = {  # how m, v and s are stored; the first is what the others are compared with
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "float8, v bfloat16": ("float8", "bfloat16", "float8"),
    "all float8": ("float8", "float8", "float8"),
}
SHAPE = (4_096,)
Line = dict[str, Any]


def settings(state: str, form: Any) -> dict[str, Any]:
    """Returns the arguments of a state."""
    names = ("m_dtype", "v_dtype", "s_dtype")[: 3 if form else 2]
    return {"third_moment": form, **dict(zip(names, STATES[state], strict=False))}


def follow(
    name: str, gradient: Any, windows: Any, form: Any = None, **options: float
) -> Iterator[Line]:
    """Yields what is measured, for gradients that a key and the step (from 1) make."""
    arms = {x: adam3(1.0, **options, **settings(x, form)) for x in STATES}

    def step(states: Any, t: jax.Array) -> Any:
        g = gradient(jax.random.fold_in(jax.random.key(0), t), t)
        exact, found, new = {}, {}, {}
        for arm, optimizer in arms.items():
            u, new[arm] = optimizer.update(g, states[arm])
            m, v, s, _ = convert_state(new[arm], third_moment=form)[0]
            seen = {"update": -u, "s": s} if form else {"update": -u}
            found[arm] = {"means": [jnp.mean(x) for x in (m, v, seen.get("s", 0.0))]}
            for of, x in seen.items():
                y = exact.setdefault(of, x)  # float32 comes first
                squares = [jnp.mean(z) for z in ((x - y) ** 2, y**2, x * y)]
                found[arm][of] = [*squares, jnp.max(jnp.abs(x))]
        return new, found

    start = {arm: optimizer.init(jnp.zeros(SHAPE)) for arm, optimizer in arms.items()}
    times = jnp.arange(1, windows[-1][1] + 1)
    found = jax.jit(lambda: jax.lax.scan(step, start, times)[1])()
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    given = ", ".join(f"{x} = {options[x]:g}" for x in options)
    for arm, (first, last) in itertools.product(STATES, windows):
        row = jax.tree.map(lambda x, a=first, b=last: x[a - 1 : b], found[arm])
        steps = f"{first:,} to {last:,}"
        case = {"gradients": name, "options": given, "state": arm, "steps": steps}
        means = {f"mean {'mvs'[i]}": x.mean() for i, x in enumerate(row.pop("means"))}
        for of, (error, square, product, largest) in row.items():
            line = case | {"of": of, "rms of float32's": square.mean() ** 0.5}
            line["error"] = (error.mean() / square.mean()) ** 0.5
            line["slope"] = product.mean() / square.mean()
            yield line | {"largest": largest.max(), **means}


def normal(key: jax.Array, t: Any = 0) -> jax.Array:
    """Returns normal gradients, whatever the step."""
    return jax.random.normal(key, SHAPE)


def sized(size: Any) -> Any:
    """Returns normal gradients times a function of the step."""
    return lambda key, t: normal(key) * size(t)


def hit(share: float, mean: float = 0.0) -> Any:
    """Returns normal gradients in a share of the steps of each element, else 0."""
    lot = functools.partial(jax.random.bernoulli, p=share, shape=SHAPE)
    return lambda key, t: (normal(key) + mean) * lot(jax.random.fold_in(key, 1))


GRADIENTS: dict[str, Any] = {
    "normal": normal,
    "normal, mean 3": lambda key, t: normal(key) + 3.0,
    "normal, mean 0.5, mean square 1": lambda key, t: normal(key) * 0.75**0.5 + 0.5,
    "1 + exponential": lambda key, t: 1.0 + jax.random.exponential(key, SHAPE),
    "in 1% of steps": hit(0.01),
    "in 0.1% of steps, mean 1": hit(0.001, 1.0),
    "Student's t, 2 degrees": lambda key, t: jax.random.t(key, 2.0, SHAPE),
    "slow sine": lambda key, t: jnp.ones(SHAPE) + jnp.sin(t / 500.0) / 2,
    "log-normal sizes": lambda key, t: normal(key) * jnp.exp(normal(jax.random.key(1))),
    "Cauchy": lambda key, t: jax.random.cauchy(key, SHAPE),
}


def updates() -> Iterator[Line]:
    """Yields errors of the update, without a third moment."""
    decays = ((0.9, 0.999), (0.9, 0.95), (0.99, 0.999), (0.999, 0.999))
    windows = ((1, 3_000), (3_001, 6_000))
    for name, (b1, b2) in itertools.product(GRADIENTS, decays):
        yield from follow(name, GRADIENTS[name], windows, b1=b1, b2=b2)


def cut() -> Iterator[Line]:
    """Yields errors of the cubic form, where s begins beyond 448 sigma³."""
    windows = ((1, 1), (2, 10), (11, 100), (101, 1_000), (1_001, 6_000))
    for b2, b3 in ((0.9999, 0.999), (0.999, 0.9)):
        yield from follow("normal", normal, windows, "cubic", b1=0.9, b2=b2, b3=b3)


def limits() -> Iterator[Line]:
    """Yields errors of the update where gradients change size, or have odd sizes."""
    windows: Any = ((2_001, 2_001), (2_002, 2_011), (2_012, 3_000), (3_001, 22_000))
    for x in (1e3, 1e4, 1e6, 1e8):
        gradient = sized(lambda t, x=x: jnp.where(t == 2_001, x, 1.0))
        yield from follow(f"normal, times {x:g} in step 2,001", gradient, windows)
    # Here float32's update is about 1e-5, 1e-4, 1e-3, 1e-2 and 0.2.
    windows = [(x, x + 99) for x in (9_500, 14_200, 18_800, 23_400, 40_000)]
    gradient = sized(lambda t: jnp.where(t > 2_000, 1e-6, 1.0))
    yield from follow("normal, times 1e-6 from 2,001", gradient, windows, eps=1e-12)
    yield from follow("in 0.01% of steps", hit(1e-4), ((30_001, 60_000),))
    for x, eps in ((1e8, 1e-8), (1e9, 1e-8), (1e-10, 0.0), (1e-12, 0.0)):
        gradient = sized(lambda t, x=x: x)
        yield from follow(f"normal, times {x:g}", gradient, ((1, 6_000),), eps=eps)


def averages() -> Iterator[Line]:
    """Yields means of m, v and s over their truth, for 1 + exponential gradients."""
    # A gradient has the cumulants 2, 1, 2. m is a sum of such numbers, and so is g - m,
    # with the weights 0.9, and -0.1·0.9ᵏ of the gradients before.
    truth = {"m": 2.0, "v": 5.0, "s": 2 * 0.9**3 * (1 - 0.1**3 / (1 - 0.9**3))}

    name, window = "1 + exponential", (20_001, 200_000)
    for line in follow(name, GRADIENTS[name], (window,), "cubic"):
        yield line | {f"mean {x}": line[f"mean {x}"] / y for x, y in truth.items()}


def losses() -> Iterator[Line]:
    """Yields held-out losses on `examples/rare_classes.py`, of 16 seeds."""
    train = jax.jit(rare_classes.train, static_argnums=0)
    seeds = [(seed, *rare_classes.data(seed)) for seed in range(16)]
    # The standardized form refuses the last state.
    for form, states in ((None, [*STATES]), ("standardized", [*STATES][:-1])):
        arms: dict[str, Any] = {x: (0.02, settings(x, form)) for x in states}
        arms["float32, rate times 1.07"] = (0.0214, {"third_moment": form})
        exact: Any = None
        for name, (peak, setting) in arms.items():
            optimizer = adam3w(rare_classes.rate(peak), **setting)
            trained = [train(optimizer, x, seed) for seed, x, _ in seeds]
            pairs = zip(trained, seeds, strict=True)
            found = np.array([float(rare_classes.loss(p, *y)) for p, (*_, y) in pairs])
            exact = found if exact is None else exact
            d, half = found - exact, stats.t.ppf(0.975, 15) * stats.sem(found - exact)
            line = {"third moment": str(form), "state": name, "loss": found.mean()}
            line |= {"minus float32's": d.mean(), "95%, from": d.mean() - half}
            yield line | {"to": d.mean() + half, "each": found.tolist()}


def main() -> None:
    """Measures all, and writes lines of JSON and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", Float8Warning)
    every, text = "", "# float8 against float32\n"
    for part in (updates, cut, limits, averages, losses):
        name, lines = part.__name__, list(part())
        print(f"{name}: {len(lines)} lines", flush=True)
        every += "".join(json.dumps({"part": name, **line}) + "\n" for line in lines)
        head = [x for x in lines[0] if x != "each"]
        rows = [head, ["---"] * len(head), *([x[y] for y in head] for x in lines)]
        text += f"\n## {name.capitalize()}\n\n"
        for row in rows:
            cells = [f"{x:.4g}" if isinstance(x, float) else x for x in row]
            text += f"| {' | '.join(cells)} |\n"
        (out / "float8.jsonl").write_text(every, encoding="utf-8")
        (out / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
