"""Recognizes handwritten digits with Flax Linen, weight decay on the matrices alone.

`TrainState` takes `adam3w` as it takes any Optax optimizer. The images come with
scikit-learn, so nothing is downloaded.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from adam3_optax import adam3w

BATCH, EPOCHS = 64, 20


class Network(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits (batch, 10) of images (batch, 64)."""
        hidden = nn.relu(nn.Dense(128)(images))
        return nn.Dense(10)(hidden)


def matrices(params: optax.Params) -> optax.Params:
    """Returns where to decay: biases are left alone."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


@jax.jit
def step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, jax.Array]:
    """Returns the state after a batch and the loss before it."""

    def loss_of(params: optax.Params) -> jax.Array:
        logits = state.apply_fn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=gradients), loss


@jax.jit
def accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of digits recognized."""
    return (state.apply_fn(state.params, images).argmax(axis=1) == labels).mean()


def main() -> None:
    """Trains, and prints the accuracy on digits not trained on."""
    digits, labels = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(
        digits.astype(np.float32) / 16, labels, stratify=labels, random_state=0
    )
    network = Network()
    state = TrainState.create(
        apply_fn=network.apply,
        params=network.init(jax.random.key(0), images[:1]),
        tx=adam3w(3e-3, third_moment=None, weight_decay=1e-2, mask=matrices),
    )
    rng = np.random.default_rng(0)
    for epoch in range(1, EPOCHS + 1):
        losses = []
        order = rng.permutation(len(images))
        for batch in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            state, loss = step(state, images[batch], labels[batch])
            losses.append(loss)
        print(f"epoch {epoch:2}  training loss {jnp.stack(losses).mean():.3f}")
    print(f"test accuracy {accuracy(state, test_images, test_labels):.1%}")


if __name__ == "__main__":
    main()
