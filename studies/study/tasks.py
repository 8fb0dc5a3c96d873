"""The tasks: small models whose training fits, hundreds of times, in an hour.

A task is pure functions that can be jitted. Its data are constants, made from fixed
seeds, or drawn from the seed of the run. So a run depends on its own seed alone:
parameters, data and batches are the same whatever the optimizer.
"""

import collections
import inspect
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from study.texts import Corpus, windows_of

Tree = Any


class Task(NamedTuple):
    """What is trained on.

    Attributes:
        init: From a key, parameters. Leaves named "embed" and "output" are the ends of
            a model.
        data: From a key, the data of one training, which draws them once: a `Data`,
            or () where they are constants.
        batch: From a key and the data, a tree of arrays with the examples along the
            first axis, an even number of them.
        loss: From parameters and a batch, the mean loss over its examples. A
            classifier's takes a `smoothing` of the labels as well.
        validate: From parameters and the data, a dictionary of numbers; "loss" is the
            mean negative log-likelihood over held-out examples (of the quadratic, the
            loss itself).
    """

    init: Callable[[jax.Array], Tree]
    data: Callable[[jax.Array], Tree]
    batch: Callable[[jax.Array, Tree], Tree]
    loss: Callable[..., jax.Array]
    validate: Callable[[Tree, Tree], dict[str, jax.Array]]


class Data(NamedTuple):
    """What a classifier is trained and validated on.

    Attributes:
        x: Features to train on, an example a row.
        y: Their labels.
        x_out: The same, held out.
        y_out: Their labels.
        weights: Of the held-out examples in a mean: they add up to 1.
        rare: Which held-out examples are of a class with at most `RARE` examples to
            train on; None where data are constants.
    """

    x: jax.Array
    y: jax.Array
    x_out: jax.Array
    y_out: jax.Array
    weights: jax.Array
    rare: jax.Array | None = None


RARE = 3  # a class with no more examples to train on is rare


def no_data(key: jax.Array) -> Tree:
    """Returns the data of a task whose data are constants: nothing is drawn."""
    del key
    return ()


# --- Language models ----------------------------------------------------------------


def characters(
    corpus: Corpus,
    *,
    characters: int = 0,
    recall: bool = False,
    batch: int = 16,
    context: int = 32,
    width: int = 48,
    layers: int = 1,
    heads: int = 4,
    windows: int = 64,
) -> Task:
    """A character-level transformer, with embedding and output apart (untied).

    Args:
        corpus: The text.
        characters: Length of the training text; 0 takes all of it. A short one is
            memorised.
        recall: Whether to validate on the training text itself: how well it has been
            memorised. Held-out loss would favour whatever memorises least.
        batch: Windows a step.
        context: Characters a window.
        width: Of the features.
        layers: Of the transformer.
        heads: Of the attention.
        windows: To validate on, evenly spread over the last tenth of the text.
    """
    tokens = corpus.training[: characters or None]
    if recall:
        validation = windows_of(tokens, context, windows)
    else:
        validation = _evenly(corpus.held_out[:, : context + 1], windows)
    sizes = _Sizes(len(corpus.alphabet), context, width, layers, heads)
    return _language_model(tokens, validation, batch, sizes)


def words(
    corpus: Corpus,
    *,
    vocabulary: int = 1024,
    batch: int = 16,
    context: int = 16,
    width: int = 48,
    layers: int = 1,
    heads: int = 4,
    windows: int = 128,
) -> Task:
    """A word-level transformer with embedding and output apart (untied).

    Words, and marks one by one, in lower case; the vocabulary is the most frequent
    ones, and all others are one unknown word. The last tenth of the training text is
    held out.

    Args:
        corpus: The text.
        vocabulary: Words that are told apart, with the unknown one.
        batch: Windows a step.
        context: Words a window.
        width: Of the features.
        layers: Of the transformer.
        heads: Of the attention.
        windows: To validate on.
    """
    found = _words_of(corpus)
    if len(found) < 100 * context:
        raise ValueError(f"{len(found)} words, but {100 * context} are needed")
    known = [word for word, _ in collections.Counter(found).most_common(vocabulary - 1)]
    index = {word: i for i, word in enumerate(known, 1)}
    tokens = np.array([index.get(word, 0) for word in found], np.int32)
    tokens, rest = np.split(tokens, [-(len(tokens) // 10)])
    sizes = _Sizes(vocabulary, context, width, layers, heads)
    return _language_model(tokens, windows_of(rest, context, windows), batch, sizes)


def _words_of(corpus: Corpus) -> list[str]:
    """Returns the words and marks of a text, without its last tenth of characters."""
    text = "".join(corpus.alphabet[token] for token in corpus.training)
    return re.findall(r"\w+|[^\w\s]", text.lower())


class _Sizes(NamedTuple):
    """How large a transformer is."""

    vocabulary: int
    context: int
    width: int
    layers: int
    heads: int


def _language_model(
    tokens: np.ndarray, held_out: np.ndarray, batch: int, sizes: _Sizes
) -> Task:
    """Returns the task of predicting each next token."""
    context = sizes.context
    if len(tokens) <= context + 1:
        raise ValueError(f"{len(tokens)} tokens to train on, but context is {context}")
    training, validation = jnp.asarray(tokens), jnp.asarray(held_out)

    def draw(key: jax.Array, _: Tree) -> jax.Array:
        starts = _uniform(key, batch, len(tokens) - context)
        return training[starts[:, None] + jnp.arange(context + 1)[None]]

    def loss(params: Tree, windows: jax.Array) -> jax.Array:
        logits = _transformer(params, windows[:, :-1], sizes.heads)
        return _cross_entropy(logits, windows[:, 1:]).mean()

    def validate(params: Tree, _: Tree) -> dict[str, jax.Array]:
        return {"loss": loss(params, validation)}

    return Task(
        lambda key: _transformer_init(key, sizes), no_data, draw, loss, validate
    )


def _transformer_init(key: jax.Array, sizes: _Sizes) -> Tree:
    """Returns fresh parameters; a map's have variance 1 / (its inputs)."""
    width, rows = sizes.width, sizes.vocabulary + sizes.context
    count = width * (rows + sizes.vocabulary + 12 * width * sizes.layers)
    numbers = jax.random.normal(key, (count,))  # drawn at once: compiles faster
    used = 0

    def normal(inputs: int, outputs: int) -> jax.Array:
        nonlocal used
        used += inputs * outputs
        return numbers[used - inputs * outputs : used].reshape(inputs, outputs)

    def dense(inputs: int, outputs: int) -> jax.Array:
        return normal(inputs, outputs) / inputs**0.5

    return {
        "embed": 0.1 * normal(sizes.vocabulary, width),
        "position": 0.1 * normal(sizes.context, width),
        "output": dense(width, sizes.vocabulary),
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


def _transformer(params: Tree, tokens: jax.Array, heads: int) -> jax.Array:
    """Returns logits (batch, context, vocabulary) for tokens (batch, context)."""
    x = params["embed"][tokens] + params["position"][None]
    later = jnp.triu(jnp.ones((x.shape[1], x.shape[1]), bool), 1)
    for block in params["blocks"]:
        y = _norm(x, block["norm_1"]) @ block["attend"]
        q, k, v = jnp.split(y.reshape(*y.shape[:2], heads, -1), 3, axis=-1)
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


def _uniform(key: jax.Array, count: int, below: int) -> jax.Array:
    """Returns whole numbers from 0; compiles faster than `jax.random.randint`."""
    bits = jax.random.bits(key, (count,), jnp.uint32)
    return (bits % jnp.uint32(below)).astype(jnp.int32)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the negative log-likelihood of each label."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


# --- Classifiers --------------------------------------------------------------------


def softmax(
    *,
    classes: int = 256,
    examples: int = 8192,
    features: int = 64,
    distance: float = 6.0,
    batch: int = 128,
    label_noise: float = 0.0,
    data: int = 0,
    fresh: bool = False,
) -> Task:
    """Softmax regression on Gaussian clusters, class k with frequency 1/k.

    Args:
        classes: How many.
        examples: To train on; as many to validate, drawn in the same way.
        features: Dimension of the space.
        distance: Mean distance between two centres, in standard deviations of a
            cluster along the line that joins them.
        batch: Examples a step.
        label_noise: Probability that a label, also a held-out one, is replaced by one
            of all classes, all equally likely.
        data: Seed of centres and examples.
        fresh: Whether each training draws its own centres and examples instead.
    """
    frequencies = 1 / np.arange(1, classes + 1)
    frequencies /= frequencies.sum()
    sizes = examples, features, distance / (2 * features) ** 0.5, label_noise

    def init(key: jax.Array) -> Tree:
        del key  # at 0 the problem is convex, and has no other start worth a seed
        return _linear_init(features, classes)

    if fresh:
        return _classifier(init, _linear, _clusters(frequencies, *sizes), batch)
    rng = np.random.default_rng(data)
    centres = rng.normal(size=(classes, features)) * distance / (2 * features) ** 0.5

    def sample() -> tuple[np.ndarray, np.ndarray]:
        labels = rng.choice(classes, size=examples, p=frequencies)
        x = centres[labels] + rng.normal(size=(examples, features))
        return x.astype(np.float32), _with_noise(labels, classes, label_noise, rng)

    weights = np.full(examples, 1 / examples)
    return _classifier(init, _linear, _constant(sample(), sample(), weights), batch)


def _clusters(
    frequencies: np.ndarray,
    examples: int,
    features: int,
    spread: float,
    label_noise: float,
) -> Callable[[jax.Array], Data]:
    """Returns what draws Gaussian clusters: centres, examples, labels and their noise.

    Args:
        frequencies: Of the classes.
        examples: To train on, and as many to validate.
        features: Dimension of the space.
        spread: Standard deviation of a centre along each axis.
        label_noise: See `softmax`.
    """
    classes, ends = len(frequencies), jnp.asarray(frequencies.cumsum(), jnp.float32)

    def draw(key: jax.Array) -> Data:
        centres, *keys = jax.random.split(key, 5)
        centres = spread * jax.random.normal(centres, (classes, features))
        # From 0 to 1, the place in the cumulative frequencies: a label.
        places = jax.random.uniform(keys[0], (2, examples))
        labels = jnp.minimum(jnp.searchsorted(ends, places), classes - 1)
        noise = jax.random.normal(keys[1], (2, examples, features))
        x = centres[labels] + noise
        y = _replace(keys[2], labels, classes, label_noise)
        return _drawn(x, y, labels, classes)

    return draw


def spelling(
    corpus: Corpus,
    *,
    classes: int = 512,
    examples: int = 4096,
    features: int = 128,
    hidden: int = 0,
    batch: int = 128,
    label_noise: float = 0.0,
) -> Task:
    """Which of the most frequent words of a text is it, by its letters?

    The features of a word count its character n-grams of lengths 1 to 3, with marks of
    its two ends, by the bucket that a fixed hash puts each in. Every n-gram of every
    example is dropped with probability .3, so that words that share letters are hard
    to tell apart.

    Words are those of `words`. A seed draws its examples to train on from the first
    two thirds of them, and the held-out ones from the last third: disjoint parts of
    the file, in which the same words have other frequencies. It draws with replacement
    and an example is its word alone, so that seeds share occurrences; which n-grams
    are dropped is always drawn anew.

    Args:
        corpus: The text.
        classes: Words that are told apart; all others are left out.
        examples: To train on; as many to validate.
        features: Buckets of the hash.
        hidden: Width of a hidden layer; 0 is none, which is softmax regression.
        batch: Examples a step.
        label_noise: Probability that a label, also a held-out one, is replaced by one
            of all words, all equally likely.
    """
    found = _words_of(corpus)
    known = [word for word, _ in collections.Counter(found).most_common(classes)]
    if len(known) < classes:
        raise ValueError(f"{len(known)} different words, but {classes} are needed")
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
        return _drawn(x, _replace(noise, labels, classes, label_noise), labels, classes)

    def init(key: jax.Array) -> Tree:
        if not hidden:
            return _linear_init(features, classes)
        return _hidden_init(key, features, hidden, classes)

    return _classifier(init, _hidden if hidden else _linear, draw, batch)


DROPPED = 0.3  # of the n-grams of an example of `spelling`


def ngrams(word: str, buckets: int) -> list[int]:
    """Returns the buckets of a word's n-grams of lengths 1 to 3, marks at its ends.

    >>> len(ngrams("to", 128))  # of "<to>": four, three and two
    9
    """
    marked = f"<{word}>"
    found = [marked[i : i + n] for n in (1, 2, 3) for i in range(len(marked) - n + 1)]
    return [zlib.crc32(x.encode()) % buckets for x in found]


def digits(
    *,
    width: int = 64,
    batch: int = 64,
    long_tail: bool = False,
    label_noise: float = 0.0,
) -> Task:
    """An MLP with one hidden layer on scikit-learn's digits, a third of them held out.

    Args:
        width: Of the hidden layer.
        batch: Images a step.
        long_tail: Whether of digit k (0 is 1, ..., 9 is 10) only 1/k of the images is
            kept. The held-out ones are all kept, and weighted to match.
        label_noise: Probability that a label, also a held-out one, is replaced by one
            of all digits, all equally likely.
    """
    data = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(data.target))
    x = (data.data[order] / 16).astype(np.float32)
    y = data.target[order]
    cut = 2 * len(y) // 3
    frequencies = np.ones(10)
    keep = np.arange(cut)
    if long_tail:
        frequencies = 1 / np.arange(1, 11)
        largest = min(np.bincount(y[:cut], minlength=10))
        counts = np.maximum(1, np.round(largest * frequencies)).astype(int)
        members = [np.flatnonzero(y[:cut] == k)[: counts[k]] for k in range(10)]
        keep = np.concatenate(members)
    shares = np.bincount(y[cut:], minlength=10)
    weights = (frequencies / shares)[y[cut:]]
    training = x[keep], _with_noise(y[keep], 10, label_noise, rng)
    held_out = x[cut:], _with_noise(y[cut:], 10, label_noise, rng)

    def init(key: jax.Array) -> Tree:
        return _hidden_init(key, 64, width, 10)

    examples = _constant(training, held_out, weights / weights.sum())
    return _classifier(init, _hidden, examples, batch)


def _linear_init(features: int, classes: int) -> Tree:
    """Returns the parameters of a linear classifier, 0."""
    return {"output": jnp.zeros((features, classes)), "bias": jnp.zeros(classes)}


def _linear(params: Tree, x: jax.Array) -> jax.Array:
    """Returns the logits of a linear classifier."""
    return x @ params["output"] + params["bias"][None]


def _hidden_init(key: jax.Array, features: int, width: int, classes: int) -> Tree:
    """Returns fresh parameters of a classifier with one hidden layer."""
    numbers = jax.random.normal(key, (features + classes, width))
    return {
        "hidden": numbers[:features] / features**0.5,
        "hidden_bias": jnp.zeros(width),
        "output": numbers[features:].T / width**0.5,
        "bias": jnp.zeros(classes),
    }


def _hidden(params: Tree, x: jax.Array) -> jax.Array:
    """Returns the logits of a classifier with one hidden layer."""
    hidden = jax.nn.relu(x @ params["hidden"] + params["hidden_bias"][None])
    return hidden @ params["output"] + params["bias"][None]


def _classifier(
    init: Callable[[jax.Array], Tree],
    logits: Callable[[Tree, jax.Array], jax.Array],
    source: Data | Callable[[jax.Array], Data],
    batch: int,
) -> Task:
    """Returns the task of a classifier, whose data are constants or drawn by a key."""
    constant = source if isinstance(source, Data) else None

    def draw(key: jax.Array, data: Tree) -> Tree:
        x, y = (constant or data)[:2]
        chosen = _uniform(key, batch, len(y))
        return x[chosen], y[chosen]

    def loss(params: Tree, examples: Tree, smoothing: Any = None) -> jax.Array:
        found = logits(params, examples[0])
        nll = _cross_entropy(found, examples[1])
        if smoothing is not None:
            # So much of the label is shared by all classes alike.
            of_all = -jax.nn.log_softmax(found).mean(axis=-1)
            nll = (1.0 - smoothing) * nll + smoothing * of_all
        return nll.mean()

    def validate(params: Tree, data: Tree) -> dict[str, jax.Array]:
        data = constant or data
        return scores(logits(params, data.x_out), data)

    made = source if callable(source) else no_data
    return Task(init, made, draw, loss, validate)


def scores(logits: jax.Array, data: Data) -> dict[str, jax.Array]:
    """Returns loss and error over held-out examples, and of drawn data those by class.

    "rare" is of the examples of rare classes, "frequent" of the others; NaN without
    any.
    """
    weights = data.weights
    wrong = (logits.argmax(axis=-1) != data.y_out).astype(jnp.float32)
    nll = _cross_entropy(logits, data.y_out)
    found = {"loss": (weights * nll).sum(), "error": (weights * wrong).sum()}
    if data.rare is not None:
        for name, members in (("rare", data.rare), ("frequent", ~data.rare)):
            share = jnp.where(members, weights, 0.0)
            share = share / share.sum()
            found[f"loss_{name}"] = (share * nll).sum()
            found[f"error_{name}"] = (share * wrong).sum()
    return found


def _constant(
    training: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
) -> Data:
    """Returns data that are the same for all seeds."""
    arrays = map(jnp.asarray, (*training, *held_out))
    return Data(*arrays, jnp.asarray(weights, jnp.float32))


def _drawn(x: jax.Array, y: jax.Array, classes_of: jax.Array, classes: int) -> Data:
    """Returns data that were drawn; along the first axis: to train on, held out.

    Args:
        x: Features.
        y: Labels, noise included.
        classes_of: The classes that the examples are of, whatever their labels. By
            them is told who is rare, for noise makes no example of a class.
        classes: How many there are.
    """
    counts = jnp.zeros(classes, jnp.int32).at[classes_of[0]].add(1)
    weights = jnp.full(y.shape[1], 1 / y.shape[1])
    rare = counts[classes_of[1]] <= RARE
    return Data(x[0], y[0], x[1], y[1], weights, rare)


def _replace(
    key: jax.Array, labels: jax.Array, classes: int, noise: float
) -> jax.Array:
    """Returns labels, some of them replaced by random ones."""
    which, what = jax.random.split(key)
    random = _uniform(what, labels.size, classes).reshape(labels.shape)
    replaced = jax.random.uniform(which, labels.shape) < noise
    return jnp.where(replaced, random, labels.astype(jnp.int32))


def _with_noise(
    labels: np.ndarray, classes: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns labels, some of them replaced by random ones."""
    replaced = rng.random(len(labels)) < noise
    random = rng.integers(classes, size=len(labels))
    return np.where(replaced, random, labels).astype(np.int32)


# --- The quadratic ------------------------------------------------------------------


def quadratic(*, elements: int = 1024, batch: int = 2, shape: int = 2) -> Task:
    """x²/2 for each of many independent elements, with skewed noise in its gradient.

    The gradient is x + noise, of variance 1 and of skewness 2 / sqrt(shape·batch): the
    mean of a batch of centred gamma variables. `stationary_point` says where AdaM3
    settles.

    Args:
        elements: How many.
        batch: Gamma variables a step.
        shape: Of the gamma distribution: a whole number; 1 is the exponential one.
    """

    def draw(key: jax.Array, _: Tree) -> jax.Array:
        uniform = jax.random.uniform(key, (shape, batch, elements), minval=1e-30)
        return (-jnp.log(uniform).sum(axis=0) - shape) * (batch / shape) ** 0.5

    def loss(params: Tree, noise: jax.Array) -> jax.Array:
        x = params["x"][None]
        return (0.5 * x * x + noise * x).sum(axis=1).mean()

    def validate(params: Tree, _: Tree) -> dict[str, jax.Array]:
        x = params["x"]
        return {"loss": 0.5 * (x * x).mean(), "mean": x.mean()}

    return Task(lambda _: {"x": jnp.zeros(elements)}, no_data, draw, loss, validate)


def stationary_point(skewness: float, lam: float, tau: float, b1: float) -> float:
    """Returns where the standardized form settles on the quadratic, in closed form.

    The mean update is 0 where the mean momentum, x, is the opposite of the term,
    lam·sqrt(v)·clip(γ, ±tau), with v = 1 + x². γ is the skewness that AdaM3 sees.
    d = g - m is b1·(g - what m was before): a sum of b1 and of -b1·(1-b1)·b1ʲ, j = 0,
    1, ..., times independent noises n. Their third powers add up to
    3·b1⁴/(1 + b1 + b1²) of E[n³]; and v^(3/2) divides.

    Args:
        skewness: Of the noise, whose variance is 1.
        lam: Weight of the term.
        tau: Its threshold.
        b1: Decay of the first moment.
    """
    third = skewness * 3 * b1**4 / (1 + b1 + b1**2)
    x = 0.0
    for _ in range(100):  # a contraction, for |lam|·tau < 1
        v = 1 + x * x
        x = -lam * v**0.5 * float(np.clip(third / v**1.5, -tau, tau))
    return x + 0.0  # not -0


# --- From a name --------------------------------------------------------------------

TASKS: dict[str, Callable[..., Task]] = {
    "characters": characters,
    "words": words,
    "softmax": softmax,
    "spelling": spelling,
    "digits": digits,
    "quadratic": quadratic,
}
OF_TEXT = ("characters", "words", "spelling")
OF_CLASSES = ("softmax", "spelling", "digits")  # their loss takes a smoothing


def make(kind: str, options: dict[str, Any], corpus: Corpus) -> Task:
    """Returns a task.

    Raises:
        ValueError: No such kind or option, an odd batch, or too short a text.
    """
    check(kind, options)
    return TASKS[kind](*((corpus,) if kind in OF_TEXT else ()), **options)


def check(kind: str, options: dict[str, Any]) -> None:
    """Raises where a kind or an option of a task is unknown or of a wrong type."""
    if kind not in TASKS:
        raise ValueError(f"kind must be one of {', '.join(TASKS)}, got {kind!r}")
    allowed = inspect.signature(TASKS[kind]).parameters
    for name, value in options.items():
        if name not in allowed or name == "corpus":
            names = ", ".join(x for x in allowed if x != "corpus")
            raise ValueError(f"{kind} has no option {name!r}; it has {names}")
        wanted = type(allowed[name].default)
        if type(value) is not wanted and not (wanted is float and value in (0, 1)):
            raise ValueError(f"{name} must be of type {wanted.__name__}, got {value!r}")
    if options.get("fresh") and "data" in options:
        raise ValueError("data is the seed of constant data, but these are fresh")
    if options.get("batch", 2) % 2:
        raise ValueError(f"batch must be even, got {options['batch']}: halves are used")


def gradient_scale(task: Task) -> float:
    """Returns the root mean square of a task's gradient where its training begins.

    Of one batch, of one draw of the data: a constant of the task.
    """
    params, data = task.init(jax.random.key(0)), task.data(jax.random.key(2))
    gradient = jax.grad(task.loss)(params, task.batch(jax.random.key(1), data))
    elements = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
    return float(np.sqrt(np.mean(elements[elements != 0].astype(np.float64) ** 2)))


def _evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns so many rows, evenly spread; all, where there are fewer."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=int)]
