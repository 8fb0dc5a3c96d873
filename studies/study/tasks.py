"""The tasks: small models whose training fits, hundreds of times, in an hour.

A task is pure functions that can be jitted. A run depends on its own seed alone:
parameters, data and batches are the same whatever the optimizer.
"""

import collections
import hashlib
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import char_input

Corpus, load = char_input.Corpus, char_input.load  # as the examples read their text

Tree = Any
Scores = dict[str, jax.Array]
HEADS = 4
RARE = 3  # a class with no more examples to train on is rare
DROPPED = 0.3  # of the n-grams of an example of `spelling`
_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Task(NamedTuple):
    """What is trained on. A batch has an even number of examples, in its first axis."""

    init: Callable[[jax.Array], Tree]  # from a key, parameters
    data: Callable[[jax.Array], Tree]  # from a key, `Data`; () where they are constants
    batch: Callable[[jax.Array, Tree], Tree]  # from a key and the data
    loss: Callable[..., jax.Array]  # its mean; a classifier's takes a `smoothing`, too
    validate: Callable[[Tree, Tree], Scores]  # what is held out: "loss" and more


class Sizes(NamedTuple):
    """The options of a task; each kind has some of them."""

    batch: int = 128
    # Of a classifier.
    classes: int = 512
    features: int = 128
    examples: int = 4096  # to train on; as many are held out
    distance: float = 0.0  # of two centres, in standard deviations of a cluster
    hidden: int = 0  # width of a hidden layer; 0 is none, which is softmax regression
    label_noise: float = 0.0  # share of labels, held-out ones, too, that are random
    # Of a language model.
    vocabulary: int = 0
    context: int = 0
    width: int = 0
    layers: int = 0


class Data(NamedTuple):
    """What a classifier is trained and validated on; `_out` is what is held out."""

    x: jax.Array
    y: jax.Array
    x_out: jax.Array
    y_out: jax.Array
    rare: jax.Array  # held-out examples of classes with at most `RARE` to train on


def fingerprint(corpus: Corpus) -> str:
    """Returns a digest of a text."""
    digest = hashlib.sha256("".join(corpus.alphabet).encode())
    for tokens in (corpus.training, corpus.held_out):
        digest.update(np.ascontiguousarray(tokens).tobytes())
    return digest.hexdigest()


def _uniform(key: jax.Array, count: int, below: int) -> jax.Array:
    """Returns whole numbers from 0; compiles faster than `jax.random.randint`."""
    bits = jax.random.bits(key, (count,), jnp.uint32)
    return (bits % jnp.uint32(below)).astype(jnp.int32)


def characters(corpus: Corpus, sizes: Sizes) -> Task:
    """A character-level transformer; 64 windows of the last tenth are held out."""
    rows = corpus.held_out[:, : sizes.context + 1]
    rows = rows[np.linspace(0, len(rows) - 1, min(64, len(rows)), dtype=int)]
    sizes = sizes._replace(vocabulary=len(corpus.alphabet))
    return _language_model(corpus.training, rows, sizes)


def words(corpus: Corpus, sizes: Sizes) -> Task:
    """A word-level transformer; rare words are one. 128 windows are held out."""
    found, known = _words_of(corpus, sizes.vocabulary - 1)
    index = {word: i for i, word in enumerate(known, 1)}
    tokens = np.array([index.get(word, 0) for word in found], np.int32)
    tokens, rest = np.split(tokens, [-(len(tokens) // 10)])
    starts = np.linspace(0, len(rest) - sizes.context - 1, 128, dtype=int)
    rows = rest[starts[:, None] + np.arange(sizes.context + 1)]
    return _language_model(tokens, rows, sizes)


def _words_of(corpus: Corpus, count: int) -> tuple[list[str], list[str]]:
    """Returns words and marks, without a text's last tenth, and the most frequent."""
    text = "".join(corpus.alphabet[token] for token in corpus.training)
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    known = [word for word, _ in collections.Counter(found).most_common(count)]
    if len(known) < count:
        raise ValueError(f"{len(known)} different words, but {count} are needed")
    return found, known


def _language_model(tokens: np.ndarray, held_out: np.ndarray, sizes: Sizes) -> Task:
    """Returns the task of predicting each next token."""
    width, vocabulary, context = sizes.width, sizes.vocabulary, sizes.context
    training, validation = jnp.asarray(tokens), jnp.asarray(held_out)

    def init(key: jax.Array) -> Tree:
        """Returns fresh parameters; a map's have variance 1 / (its inputs)."""
        count = width * (2 * vocabulary + context + 12 * width * sizes.layers)
        numbers = jax.random.normal(key, (count,))  # drawn at once: compiles faster
        used = 0

        def normal(inputs: int, outputs: int) -> jax.Array:
            nonlocal used
            used += inputs * outputs
            return numbers[used - inputs * outputs : used].reshape(inputs, outputs)

        def dense(inputs: int, outputs: int) -> jax.Array:
            return normal(inputs, outputs) / inputs**0.5

        return {
            "embed": 0.1 * normal(vocabulary, width),
            "position": 0.1 * normal(context, width),
            "output": dense(width, vocabulary),
            "norm": jnp.ones(width),
            "blocks": [
                {
                    "norm_1": jnp.ones(width),
                    "attend": dense(width, 3 * width),
                    "merge": dense(width, width),
                    "norm_2": jnp.ones(width),
                    "up": dense(width, 4 * width),
                    "down": dense(4 * width, width),
                }
                for _ in range(sizes.layers)
            ],
        }

    def draw(key: jax.Array, _: Tree) -> jax.Array:
        starts = _uniform(key, sizes.batch, len(tokens) - context)
        return training[starts[:, None] + jnp.arange(context + 1)[None]]

    def loss(params: Tree, windows: jax.Array) -> jax.Array:
        logits = _transformer(params, windows[:, :-1])
        return _cross_entropy(logits, windows[:, 1:]).mean()

    def validate(params: Tree, _: Tree) -> Scores:
        return {"loss": loss(params, validation)}

    return Task(init, lambda _: (), draw, loss, validate)


def _transformer(params: Tree, tokens: jax.Array) -> jax.Array:
    """Returns logits (batch, context, vocabulary) for tokens (batch, context)."""
    x = params["embed"][tokens] + params["position"][None]
    later = jnp.triu(jnp.ones((x.shape[1], x.shape[1]), bool), 1)
    for block in params["blocks"]:
        y = _norm(x, block["norm_1"]) @ block["attend"]
        q, k, v = jnp.split(y.reshape(*y.shape[:2], HEADS, -1), 3, axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(later[None, None], -1e30, scores))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = x + y @ block["merge"]
        hidden = jax.nn.gelu(_norm(x, block["norm_2"]) @ block["up"])
        x = x + hidden @ block["down"]
    return _norm(x, params["norm"]) @ params["output"]


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Returns features divided by their root mean square, times a gain."""
    size = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x / size * gain[None, None]


def softmax(_: Corpus, sizes: Sizes) -> Task:
    """Softmax regression on Gaussian clusters, class k with frequency 1/k."""
    classes, features = sizes.classes, sizes.features
    frequencies = 1 / np.arange(1, classes + 1)
    frequencies /= frequencies.sum()
    ends = jnp.asarray(frequencies.cumsum(), jnp.float32)
    spread = sizes.distance / (2 * features) ** 0.5

    def draw(key: jax.Array) -> Data:
        centres, *keys = jax.random.split(key, 5)
        centres = spread * jax.random.normal(centres, (classes, features))
        # From 0 to 1, the place in the cumulative frequencies: a label.
        places = jax.random.uniform(keys[0], (2, sizes.examples))
        labels = jnp.minimum(jnp.searchsorted(ends, places), classes - 1)
        noise = jax.random.normal(keys[1], (2, sizes.examples, features))
        return _drawn(keys[2], centres[labels] + noise, labels, sizes)

    return _classifier(draw, sizes)


def spelling(corpus: Corpus, sizes: Sizes) -> Task:
    """Which of the most frequent words of a text is it, by its letters?

    The features of a word count its n-grams, by the bucket that a fixed hash puts each
    in. Some n-grams of every example are dropped, so that words that share letters are
    hard to tell apart. A seed draws its examples with replacement: those to train on
    from the first two thirds of the words, and the held-out ones from the last third.
    """
    examples, features = sizes.examples, sizes.features
    found, known = _words_of(corpus, sizes.classes)
    index = {word: i for i, word in enumerate(known)}
    tokens = np.array([index[x] for x in found if x in index], np.int32)
    parts = [jnp.asarray(x) for x in np.split(tokens, [2 * len(tokens) // 3])]
    lists = [ngrams(word, features) for word in known]
    # A row a word, filled up with a bucket that does not exist.
    longest = max(map(len, lists))
    filled = [x + [features] * (longest - len(x)) for x in lists]
    buckets = jnp.asarray(filled, jnp.int32)

    def sample(key: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen, dropped = jax.random.split(key)
        labels = part[_uniform(chosen, examples, len(part))]
        kept = jax.random.uniform(dropped, (examples, longest)) >= DROPPED
        rows = jnp.arange(examples)[:, None]
        x = jnp.zeros((examples, features)).at[rows, buckets[labels]]
        return x.add(kept.astype(jnp.float32), mode="drop"), labels

    def draw(key: jax.Array) -> Data:
        *keys, noise = jax.random.split(key, 3)
        drawn = [sample(*x) for x in zip(keys, parts, strict=True)]
        x, labels = (jnp.stack(y) for y in zip(*drawn, strict=True))
        return _drawn(noise, x, labels, sizes)

    return _classifier(draw, sizes)


def ngrams(word: str, buckets: int) -> list[int]:
    """Returns the buckets of a word's n-grams of lengths 1 to 3, marks at its ends."""
    marked = f"<{word}>"
    found = [marked[i : i + n] for n in (1, 2, 3) for i in range(len(marked) - n + 1)]
    return [zlib.crc32(x.encode()) % buckets for x in found]


def _drawn(key: jax.Array, x: jax.Array, labels: jax.Array, sizes: Sizes) -> Data:
    """Returns data to train on and held-out ones, some labels replaced by random ones.

    Who is rare is told by the class that an example was drawn from.
    """
    which, what = jax.random.split(key)
    random = _uniform(what, labels.size, sizes.classes).reshape(labels.shape)
    replaced = jax.random.uniform(which, labels.shape) < sizes.label_noise
    y = jnp.where(replaced, random, labels.astype(jnp.int32))
    counts = jnp.zeros(sizes.classes, jnp.int32).at[labels[0]].add(1)
    return Data(x[0], y[0], x[1], y[1], counts[labels[1]] <= RARE)


def _classifier(source: Callable[[jax.Array], Data], sizes: Sizes) -> Task:
    """Returns the task of a classifier, linear or with one hidden layer."""
    classes, features, hidden = sizes.classes, sizes.features, sizes.hidden

    def init(key: jax.Array) -> Tree:
        bias = jnp.zeros(classes)
        if not hidden:  # at 0 the problem is convex, and needs no other start
            return {"output": jnp.zeros((features, classes)), "bias": bias}
        numbers = jax.random.normal(key, (features + classes, hidden))
        return {
            "hidden": numbers[:features] / features**0.5,
            "hidden_bias": jnp.zeros(hidden),
            "output": numbers[features:].T / hidden**0.5,
            "bias": bias,
        }

    def logits(params: Tree, x: jax.Array) -> jax.Array:
        if hidden:
            x = jax.nn.relu(x @ params["hidden"] + params["hidden_bias"][None])
        return x @ params["output"] + params["bias"][None]

    def draw(key: jax.Array, data: Data) -> Tree:
        chosen = _uniform(key, sizes.batch, len(data.y))
        return data.x[chosen], data.y[chosen]

    def loss(params: Tree, examples: Tree, smoothing: Any = None) -> jax.Array:
        found = logits(params, examples[0])
        nll = _cross_entropy(found, examples[1])
        if smoothing is not None:
            # So much of the label is shared by all classes alike.
            of_all = -jax.nn.log_softmax(found).mean(axis=-1)
            nll = (1.0 - smoothing) * nll + smoothing * of_all
        return nll.mean()

    def validate(params: Tree, data: Data) -> Scores:
        return scores(logits(params, data.x_out), data)

    return Task(init, source, draw, loss, validate)


def scores(logits: jax.Array, data: Data) -> Scores:
    """Returns loss and error of what is held out: of all, of rare and other classes."""
    wrong = (logits.argmax(axis=-1) != data.y_out).astype(jnp.float32)
    nll = _cross_entropy(logits, data.y_out)
    weights = jnp.full(len(data.y_out), 1 / len(data.y_out))
    found = {"loss": (weights * nll).sum(), "error": (weights * wrong).sum()}
    for name, members in (("rare", data.rare), ("frequent", ~data.rare)):
        share = jnp.where(members, weights, 0.0)
        share = share / share.sum()  # NaN without any
        found[f"loss_{name}"] = (share * nll).sum()
        found[f"error_{name}"] = (share * wrong).sum()
    return found


KINDS = {kind.__name__: kind for kind in (characters, words, softmax, spelling)}


def gradient_scale(task: Task) -> float:
    """Returns the root mean square of a task's gradient where training begins."""
    params, data = task.init(jax.random.key(0)), task.data(jax.random.key(2))
    gradient = jax.grad(task.loss)(params, task.batch(jax.random.key(1), data))
    elements = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
    return float(np.sqrt(np.mean(elements[elements != 0].astype(np.float64) ** 2)))
