"""How exact float8 state is: updates and moments against those of float32 state.

All is measured through `adam3` with learning rate 1, on 4,096 elements. In each part
every arm gets the same gradients. An error is the root mean square of the difference to
float32's, over the root mean square of float32's. The slope is that of a line through 0,
float8's against float32's, minus 1: by how much steps are too long.

    python benchmarks/float8.py --out FOLDER

writes a line a number to FOLDER/float8.jsonl, and all tables to FOLDER/results.md.
"""

import argparse
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from scipy import stats

from adam3_optax import Float8Warning, adam3, adam3w, convert_state

STATES = {  # how m, v and s are stored; the first is what all are compared with
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "float8, v bfloat16": ("float8", "bfloat16", "float8"),
    "float8": ("float8", "float8", "float8"),
}
ELEMENTS = 4_096
MEASURES = ("error", "float32's", "product", "largest")
Line = dict[str, Any]


def settings(state: str, form: Any) -> dict[str, Any]:
    """Returns the arguments of a state."""
    m, v, s = STATES[state]
    return dict(third_moment=form, m_dtype=m, v_dtype=v, s_dtype=s if form else None)


def follow(gradient: Any, steps: int, form: Any = None, **options: Any) -> Any:
    """Returns what each arm did at each step.

    That is, for each arm, arrays of one number a step: of the update and of s the
    mean squared difference to float32's, float32's mean square, the mean product, and
    the largest; and the means of m, v and s.
    """
    arms = {name: adam3(1.0, **options, **settings(name, form)) for name in STATES}
    params = jnp.zeros(ELEMENTS)

    def step(states: Any, t: jax.Array) -> Any:
        g = gradient(jax.random.fold_in(jax.random.key(0), t), t)
        after = {name: arm.update(g, states[name], params) for name, arm in arms.items()}
        found, exact = {}, {}
        for name, (u, state) in after.items():
            m, v, s, _ = convert_state(state, third_moment=form)[0]
            s = s if form else jnp.zeros_like(m)
            for of, x in (("update", -u), ("s", s)):
                y = exact.setdefault(of, x)  # the first arm is float32's
                means = [jnp.mean(z) for z in ((x - y) ** 2, y**2, x * y)]
                row = dict(zip(MEASURES, [*means, jnp.max(jnp.abs(x))], strict=True))
                found.setdefault(name, {})[of] = row
            found[name]["means"] = [jnp.mean(x) for x in (m, v, s)]
        return {name: state for name, (_, state) in after.items()}, found

    start = {name: arm.init(params) for name, arm in arms.items()}
    times = jnp.arange(1, steps + 1)
    found = jax.jit(lambda: jax.lax.scan(step, start, times)[1])()
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def compared(row: Any, first: int, last: int) -> Line:
    """Returns the error and the slope over steps from `first` to `last`, 1 the first."""
    part = {name: x[first - 1 : last] for name, x in row.items()}
    square = part["float32's"].mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        error, slope = part["error"].mean() / square, part["product"].mean() / square
    return {
        "steps": f"{first:,} to {last:,}" if last > first else f"{first:,}",
        "rms": square**0.5,
        "error": error**0.5,
        "slope - 1": slope - 1,
        "largest": part["largest"].max(),
    }


def normal(key: jax.Array, t: Any = 0) -> jax.Array:
    """Returns normal gradients, for which the step is no matter."""
    return jax.random.normal(key, (ELEMENTS,))


def hit(share: float, mean: float = 0.0) -> Any:
    """Returns a gradient that is 0 but for a share of the steps of each element."""

    def gradient(key: jax.Array, t: Any) -> jax.Array:
        is_hit = jax.random.uniform(jax.random.fold_in(key, 1), (ELEMENTS,)) < share
        return (normal(key) + mean) * is_hit

    return gradient


GRADIENTS: dict[str, Any] = {
    "normal": normal,
    "normal, mean of 3 sigma": lambda key, t: normal(key) + 3.0,
    "normal, mean 0.5, mean square 1": lambda key, t: normal(key) * 0.75**0.5 + 0.5,
    "in 1% of steps": hit(0.01),
    "in 0.1% of steps, mean 1": hit(0.001, 1.0),
    "Student's t, 2 degrees": lambda key, t: jax.random.t(key, 2.0, (ELEMENTS,)),
    "a slow sine": lambda key, t: jnp.ones(ELEMENTS) * (1 + 0.5 * jnp.sin(t / 500.0)),
    "sizes log-normal": lambda key, t: normal(key) * jnp.exp(normal(jax.random.key(1))),
    "Cauchy": lambda key, t: jax.random.cauchy(key, (ELEMENTS,)),
}
DECAYS = ((0.9, 0.999), (0.9, 0.95), (0.99, 0.999), (0.999, 0.999))


def of_updates() -> Any:
    """Yields errors of the update without a third moment, in the last half of a run."""
    for (name, gradient), (b1, b2) in itertools.product(GRADIENTS.items(), DECAYS):
        for state, row in follow(gradient, 6_000, b1=b1, b2=b2).items():
            late = compared(row["update"], 3_001, 6_000)
            largest = row["update"]["largest"].max()  # of the whole run
            arm = {"gradient": name, "b1": b1, "b2": b2, "state": state}
            yield {**arm, **late, "largest": largest}


def of_cut() -> Any:
    """Yields errors of the cubic form where s begins beyond 448 sigma³."""
    windows = ((1, 1), (2, 10), (11, 100), (101, 1_000), (1_001, 6_000))
    for decays in ((0.9, 0.9999, 0.999), (0.9, 0.999, 0.9)):
        b = dict(zip(("b1", "b2", "b3"), decays, strict=True))
        for state, row in follow(normal, 6_000, "cubic", **b).items():
            for of, window in itertools.product(("s", "update"), windows):
                yield {**b, "state": state, "of": of, **compared(row[of], *window)}


def of_limits() -> Any:
    """Yields errors of the update where gradients change size, or have odd sizes."""
    struck, cases = 2_001, {}
    for spike in (1e3, 1e4, 1e6, 1e8):
        cases[f"one of {spike:,.0f} sigma in step {struck:,}"] = (
            lambda key, t, spike=spike: jnp.where(t == struck, spike, normal(key)),
            ((struck, struck), (2_002, 2_011), (2_012, 3_000), (3_001, 22_000)),
            {},
        )
    falls = [(x, x + 99) for x in (9_500, 14_200, 18_800, 23_400, 28_000, 39_901)]
    cases["a millionth from step 2,001"] = (
        lambda key, t: normal(key) * jnp.where(t < struck, 1.0, 1e-6),
        falls,
        {"eps": 1e-12},
    )
    cases["in 0.01% of steps"] = (hit(1e-4), ((30_001, 60_000),), {})
    for size, eps in ((1e8, 1e-8), (1e9, 1e-8), (1e-10, 0.0), (1e-12, 0.0)):
        cases[f"normal, times {size:.0e}, eps = {eps:g}"] = (
            lambda key, t, size=size: normal(key) * size,
            ((3_001, 6_000),),
            {"eps": eps},
        )
    for name, (gradient, windows, options) in cases.items():
        found = follow(gradient, windows[-1][1], **options)
        for state, window in itertools.product(STATES, windows):
            line = compared(found[state]["update"], *window)
            yield {"gradient": name, "state": state, **line}


def of_averages() -> Any:
    """Yields how far averages of m, v and s are from the truth, in 200,000 steps."""
    # Of 1 + an exponential number, whose cumulants are 2, 1, 2. m is a weighted sum of
    # such numbers, and so is g - m_t: weights 0.9, and -0.1·0.9^k of those before.
    truth = np.array([2.0, 5.0, 2 * 0.9**3 * (1 - 0.1**3 / (1 - 0.9**3))])
    steps, first = 200_000, 20_001

    def gradient(key: jax.Array, t: Any) -> jax.Array:
        return 1.0 + jax.random.exponential(key, (ELEMENTS,))

    for state, row in follow(gradient, steps, "cubic").items():
        means = np.array([x[first - 1 :].mean() for x in row["means"]]) / truth - 1
        of = {f"mean of {x} / truth - 1": y for x, y in zip("mvs", means, strict=True)}
        yield {"state": state, **of, **compared(row["update"], first, steps)}


def held_out(optimizer: Any, seed: jax.Array) -> jax.Array:
    """Returns the loss on the task of `examples/rare_classes.py`, with a seed's data."""
    classes, features, examples, batch, steps = 512, 128, 4_096, 128, 1_000
    keys = jax.random.split(jax.random.key(seed), 6)
    spread = 9.0 / (2 * features) ** 0.5
    centres = jax.random.normal(keys[0], (classes, features)) * spread

    def draw(label: jax.Array, noise: jax.Array) -> Any:
        logits = -jnp.log(jnp.arange(1.0, classes + 1))
        y = jax.random.categorical(label, logits, shape=(examples,))
        return centres[y] + jax.random.normal(noise, (examples, features)), y

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = x @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    x, y = draw(keys[1], keys[2])

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        chosen = jax.random.randint(key, (batch,), 0, examples)
        gradients = jax.grad(loss)(params, x[chosen], y[chosen])
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": jnp.zeros((features, classes)), "bias": jnp.zeros(classes)}
    start = (params, optimizer.init(params))
    trained = jax.lax.scan(step, start, jax.random.split(keys[5], steps))[0][0]
    return loss(trained, *draw(keys[3], keys[4]))


def of_rare_classes() -> Any:
    """Yields held-out losses of 16 seeds, minus float32's, with 95% intervals."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.02, 100, 1_000)
    for form in (None, "standardized"):
        arms = {
                x: adam3w(rate, **settings(x, form))
                for x in [*STATES][: 4 if form is None else 3]  # v in 8 bits is refused
            }
        faster = adam3w(lambda count: 1.07 * rate(count), third_moment=form)
        exact = None
        for name, arm in {**arms, "float32, rate times 1.07": faster}.items():
            run = jax.jit(lambda seed, arm=arm: held_out(arm, seed))
            losses = np.array([float(run(seed)) for seed in range(16)])
            exact = losses if exact is None else exact
            d = losses - exact
            half = stats.t.ppf(0.975, 15) * stats.sem(d)
            line = {"third_moment": str(form), "state": name, "loss": losses.mean()}
            ends = {"low": d.mean() - half, "high": d.mean() + half}
            yield {**line, "minus float32": d.mean(), **ends, "losses": losses.tolist()}


PARTS = {
    "updates": of_updates,
    "cut": of_cut,
    "limits": of_limits,
    "averages": of_averages,
    "rare classes": of_rare_classes,
}


def markdown(lines: list[Line]) -> str:
    """Returns a table a part, without the losses of single seeds."""
    tables = []
    for part in PARTS:
        rows = [x for x in lines if x["part"] == part]
        if not rows:
            continue
        names = [x for x in rows[0] if x not in ("part", "losses")]
        cells = [[f"{x[y]:.4g}" if isinstance(x[y], float) else str(x[y]) for y in names] for x in rows]
        body = [f"| {' | '.join(x)} |" for x in [names, ["---"] * len(names), *cells]]
        tables.append("\n".join([f"## {part.capitalize()}", "", *body]))
    return "# float8 against float32\n\n" + "\n\n".join(tables) + "\n"


def main() -> None:
    """Measures the parts that are asked for, and writes all tables anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=[*PARTS])
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "float8.jsonl"
    lines = [json.loads(x) for x in record.read_text().splitlines()] if record.exists() else []
    lines = [x for x in lines if x["part"] not in options.only]
    warnings.simplefilter("ignore", Float8Warning)
    for part in options.only:
        for found in PARTS[part]():
            lines.append({"part": part, **found})
            Console().print(lines[-1])
        record.write_text("".join(json.dumps(x) + "\n" for x in lines))
        (options.out / "results.md").write_text(markdown(lines))


if __name__ == "__main__":
    main()
