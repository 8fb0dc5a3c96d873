"""Where the third moment acts: a linear classifier with many rare classes.

Class k of 512 has frequency 1/k, so most classes have few examples. AdamW and AdaM3, in
its standardized form, train the same model on the same batches. A small lam helps; with
a larger one, frequent classes pay for rare ones. One seed, nothing tuned:
docs/evidence.md has the study.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adam3_optax import adam3w

CLASSES, FEATURES, EXAMPLES, BATCH, STEPS = 512, 128, 4096, 128, 1000
RARE = 3  # a class with at most so many examples to train on
DISTANCE = 9.0  # of two centres, in standard deviations of a cluster
Data = tuple[jax.Array, jax.Array]


def data(seed: int) -> tuple[Data, Data]:
    """Returns examples with labels: those to train on, and those held out."""
    keys = jax.random.split(jax.random.key(2 * seed), 5)
    spread = DISTANCE / (2 * FEATURES) ** 0.5
    centres = jax.random.normal(keys[0], (CLASSES, FEATURES)) * spread
    logits = jnp.log(1 / jnp.arange(1, CLASSES + 1))

    def draw(label_key: jax.Array, noise_key: jax.Array) -> Data:
        labels = jax.random.categorical(label_key, logits, shape=(EXAMPLES,))
        noise = jax.random.normal(noise_key, (EXAMPLES, FEATURES))
        return centres[labels] + noise, labels

    return draw(keys[1], keys[2]), draw(keys[3], keys[4])


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = x @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(optimizer: optax.GradientTransformation, examples: Data, seed: int) -> Any:
    x, y = examples

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        chosen = jax.random.randint(key, (BATCH,), 0, EXAMPLES)
        gradients = jax.grad(loss)(params, x[chosen], y[chosen])
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": jnp.zeros((FEATURES, CLASSES)), "bias": jnp.zeros(CLASSES)}
    batches = jax.random.split(jax.random.key(2 * seed + 1), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]


def rate(peak: float) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, STEPS // 10, STEPS)


def main() -> None:
    examples, (x_out, y_out) = data(seed=0)
    rare = jnp.bincount(examples[1], length=CLASSES)[y_out] <= RARE
    optimizers = {"AdamW": optax.adamw(rate(0.02))}
    for lam in (0.003, 0.01, 0.03):
        ours = adam3w(rate(0.02), lam=lam, third_moment="standardized")
        optimizers[f"AdaM3, lam {lam}"] = ours
    print(f"{'held-out':16}    loss  errors    rare  others")
    for name, optimizer in optimizers.items():
        params = jax.jit(train, static_argnums=0)(optimizer, examples, 0)
        wrong = (x_out @ params["kernel"] + params["bias"]).argmax(-1) != y_out
        rates = [wrong.mean(), wrong[rare].mean(), wrong[~rare].mean()]
        shown = "  ".join(f"{r:6.1%}" for r in rates)
        print(f"{name:16}  {loss(params, x_out, y_out):6.3f}  {shown}")
    print("One seed, nothing tuned. Against AdamW tuned as hard, over 20 seeds,")
    print("such tasks gained 1.2% at most, and one lost 4.2%: docs/evidence.md.")


if __name__ == "__main__":
    main()
