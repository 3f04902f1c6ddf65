"""Classifiers of frozen features: linear probe, logistic and ridge regression, k-NN.

Shape letters: m training images, n images to classify, d feature width, c classes, g settings of a grid, s sets of
features (blocks) that are fitted at once. Labels are 0 to c - 1. A linear classifier reads features that are
standardized by the mean and scale of the training images, as by a batch norm without affine parameters (MAE, arXiv
2111.06377, appendix A).

Everything is float32 on one device, one set of features at a time, except ridge regression: float64 on the host.
ImageNet's 1.28 million x 768 features are 3.9 GB on the device, and twice that while they are standardized or padded.
Logits are computed for `ROWS` images at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

ROWS = 4096  # images whose logits or similarities are computed at a time
KEYS = 16384  # training images that k-NN compares them with at a time
MEMORY = 10  # gradient pairs that L-BFGS keeps
MAX_VOTED = 5  # classes that k-NN returns
EXACT = jax.lax.Precision.HIGHEST  # full float32: accelerators use fewer bits by default

Anywhere = Array | np.ndarray  # on the device or on the host


class Linear(NamedTuple):
    weights: Float[Array, "... d c"]
    bias: Float[Array, "... c"]


def statistics(features: Float[np.ndarray, "m d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Return float32 (mean, scale) over the images. The scale of a constant feature is 1, of others their deviation."""
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), KEYS):
        total += features[start : start + KEYS].sum(axis=0, dtype=np.float64)
    mean = total / len(features)
    squares = np.zeros_like(mean)
    for start in range(0, len(features), KEYS):
        squares += ((features[start : start + KEYS] - mean) ** 2).sum(axis=0)
    deviation = np.sqrt(squares / len(features))
    varies = deviation > 10 * np.finfo(np.float32).eps * np.abs(mean)
    return mean.astype(np.float32), np.where(varies, deviation, 1).astype(np.float32)


@jax.jit
def standardize(
    features: Float[Anywhere, "m d"], mean: Float[Anywhere, " d"], scale: Float[Anywhere, " d"]
) -> Float[Array, "m d"]:
    return (features.astype(jnp.float32) - mean) / scale


@jax.jit
def ranks(features: Float[Anywhere, "n d"], labels: Int[Anywhere, " n"], classifier: Linear) -> Int[Array, "n ..."]:
    """Return the rank of the true class among the logits of each classifier [*g]; 0 is the highest logit.

    Ties rank the true class last, and so do logits that are not finite.
    """

    def rank(x, label):
        logits = jnp.einsum("d,...dk->...k", x, classifier.weights, precision=EXACT) + classifier.bias
        return (~(logits < logits[..., label, None])).sum(axis=-1) - 1

    return jax.lax.map(lambda row: rank(*row), (features, labels), batch_size=ROWS)


def accuracies(ranks: Int[Anywhere, " n"], classes: int) -> dict[str, float | None]:
    """Return top1 and top5 in 0..1. top5 is None for five classes or fewer."""
    ranks = np.asarray(ranks)
    return {"top1": float((ranks < 1).mean()), "top5": float((ranks < 5).mean()) if classes > 5 else None}


@partial(jax.jit, static_argnames=("classes", "batch_size", "epochs"))
def sweep(
    features: Float[Anywhere, "s m d"],
    labels: Int[Anywhere, " m"],
    learning_rates: Float[Anywhere, "s g"],
    weight_decays: Float[Anywhere, "s g"],
    key: Key[Array, ""],
    *,
    classes: int,
    batch_size: int = 1024,
    epochs: int = 100,
) -> Linear:
    """Train linear classifiers [s, g] of standardized features: one for each setting of each set, all at once.

    SGD with momentum 0.9 and a cosine schedule from learning_rate x batch_size / 256 to zero, from zero weights. Weight
    decay applies to the weights, not to the bias. All classifiers see the same permutation of the images in an epoch,
    drawn from `key`; an incomplete last batch is dropped. A setting that diverges ends as NaN.
    """
    count, width = features.shape[1:]
    batch_size = min(batch_size, count)
    steps = count // batch_size
    schedule = optax.cosine_decay_schedule(batch_size / 256, epochs * steps)

    def loss(classifier, x, y):
        logits = jnp.matmul(x, classifier.weights, precision=EXACT) + classifier.bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def train(features, learning_rate, weight_decay):
        def step(carry, indices):
            classifier, momentum, n = carry
            gradient = jax.grad(loss)(classifier, features[indices], labels[indices])
            gradient = gradient._replace(weights=gradient.weights + weight_decay * classifier.weights)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
            rate = learning_rate * schedule(n)
            return (jax.tree.map(lambda p, m: p - rate * m, classifier, momentum), momentum, n + 1), None

        def epoch(carry, n):
            order = jax.random.permutation(jax.random.fold_in(key, n), count)[: steps * batch_size]
            return jax.lax.scan(step, carry, order.reshape(steps, batch_size))

        zeros = Linear(jnp.zeros((width, classes)), jnp.zeros(classes))
        return jax.lax.scan(epoch, (zeros, zeros, 0), jnp.arange(epochs))[0][0]

    grid = jax.vmap(train, in_axes=(None, 0, 0))
    return jax.vmap(grid)(features, learning_rates, weight_decays)


@partial(jax.jit, static_argnames=("classes", "iterations", "tolerance"))
def logistic_path(
    features: Float[Anywhere, "m d"],
    labels: Int[Anywhere, " m"],
    C: Float[Anywhere, " g"],
    start: Linear | None = None,
    *,
    classes: int,
    iterations: int = 1000,
    tolerance: float = 1e-4,
) -> Linear:
    """Fit multinomial logistic regression of standardized features for each C. Return the classifiers [g].

    The objective is scikit-learn's: C times the summed cross entropy, plus half the squared weights without the bias.
    L-BFGS fits the first C from `start` (zero by default) and each further C from the solution before it. It stops if
    no derivative of the objective / (C m) is above `tolerance`, if the loss does not fall in float32, or after
    `iterations`.
    """
    count, width = features.shape
    parts = -(-count // ROWS)
    rows = -(-count // parts)
    pad = parts * rows - count
    x = jnp.pad(features, ((0, pad), (0, 0))).reshape(parts, rows, width)
    y = jnp.pad(labels, (0, pad), constant_values=-1).reshape(parts, rows)

    @jax.checkpoint  # otherwise the logits of all images are kept for the gradient
    def add(total, part, p):
        x, y = part
        logits = jnp.matmul(x, p[:-1], precision=EXACT) + p[-1]  # p: [d + 1, k], the bias last
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
        return total + jnp.where(y >= 0, losses, 0).sum()  # -1: padding of the last part

    def fit(start, strength):
        def objective(p):
            total, _ = jax.lax.scan(lambda total, part: (add(total, part, p), None), jnp.float32(0), (x, y))
            return total / count + 0.5 * (p[:-1] ** 2).sum() / (strength * count)

        return minimize(objective, start, iterations, tolerance)

    first = jnp.zeros((width + 1, classes)) if start is None else jnp.vstack(start)
    _, found = jax.lax.scan(lambda p, strength: (fit(p, strength),) * 2, first, C)
    return Linear(found[:, :-1], found[:, -1])


def minimize(objective: Callable, start: Float[Array, "..."], iterations: int, tolerance: float) -> Float[Array, "..."]:
    """Minimize a smooth `objective` by L-BFGS from `start`.

    It stops if no derivative is above `tolerance`, if the objective does not fall in float32, or after `iterations`.
    """
    solver = optax.lbfgs(memory_size=MEMORY)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def iterate(carry):
        p, state, n, _ = carry
        value, gradient = value_and_grad(p, state=state)
        updates, state = solver.update(gradient, state, p, value=value, grad=gradient, value_fn=objective)
        fell = optax.tree.get(state, "value") < value
        steep = jnp.abs(optax.tree.get(state, "grad")).max() > tolerance
        return optax.apply_updates(p, updates), state, n + 1, fell & steep

    begin = (start, solver.init(start), jnp.int32(0), jnp.bool_(True))
    return jax.lax.while_loop(lambda carry: carry[3] & (carry[2] < iterations), iterate, begin)[0]


def ridge_path(
    features: Float[Anywhere, "m d"], labels: Int[Anywhere, " m"], regularizations: tuple[float, ...], *, classes: int
) -> Linear:
    """Fit ridge regression of one-hot targets on standardized features. Return the classifier [g] of each strength.

    The objective is the mean squared error plus `regularization` times the squared weights without the bias. The closed
    form needs one eigendecomposition of the covariance. It is float64, because float32 does not resolve the smallest
    eigenvalues and regularizations.
    """
    (count, width), labels = features.shape, np.asarray(labels)
    gram, sums = np.zeros((width, width)), np.zeros((classes, width))  # sums: of the features in each class
    for start in range(0, count, ROWS):
        own = labels[start : start + ROWS]
        order = np.argsort(own, kind="stable")
        present, first = np.unique(own[order], return_index=True)
        x = np.asarray(features[start : start + ROWS], np.float64)[order]
        gram += x.T @ x
        sums[present] += np.add.reduceat(x, first)
    center, frequency = sums.sum(axis=0) / count, np.bincount(labels, minlength=classes) / count
    values, vectors = np.linalg.eigh(gram / count - np.outer(center, center))
    projected = vectors.T @ (sums.T / count - np.outer(center, frequency))
    weights = np.stack([vectors @ (projected / (np.maximum(values, 0) + r)[:, None]) for r in regularizations])
    return Linear(jnp.float32(weights), jnp.float32(frequency - center @ weights))


def nearest_classes(
    train: Float[Anywhere, "m d"],
    labels: Int[Anywhere, " m"],
    queries: Float[Anywhere, "n d"],
    *,
    classes: int,
    k: tuple[int, ...] = (10, 20, 100, 200),
    temperature: int | float = 0.07,
) -> Int[np.ndarray, "g n 5"]:
    """Return the five classes with the most votes of the k nearest neighbors, for each k; -1 for no class.

    Neighbors by cosine similarity vote with weight exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978; k
    and temperature as in DINO). Of equal votes the lowest class is first. k above m means all images. At most `ROWS` x
    `KEYS` similarities are in memory.
    """
    k = tuple(min(number, len(labels)) for number in k)
    return np.asarray(_nearest_classes(train, labels, queries, jnp.float32(temperature), classes=classes, k=k))


@partial(jax.jit, static_argnames=("classes", "k"))
def _nearest_classes(train, labels, queries, temperature, *, classes, k):
    def unit(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    max_k, (count, width) = max(k), train.shape
    parts = -(-count // KEYS)
    size = max(-(-count // parts), max_k)
    pad = parts * size - count
    keys = jnp.pad(unit(train), ((0, pad), (0, 0))).reshape(parts, size, width)
    places = jnp.arange(parts * size).reshape(parts, size)
    rows = min(ROWS, len(queries))
    blocks = -(-len(queries) // rows)
    unit_queries = jnp.pad(unit(queries), ((0, blocks * rows - len(queries)), (0, 0)))

    def classes_of(queries):
        def merge(best, part):
            keys, places = part
            similarity = jnp.where(places < count, jnp.matmul(queries, keys.T, precision=EXACT), -jnp.inf)
            found, at = jax.lax.top_k(similarity, max_k)
            similarities = jnp.concatenate([best[0], found], axis=1)
            indices = jnp.concatenate([best[1], places[at]], axis=1)
            kept, at = jax.lax.top_k(similarities, max_k)
            return (kept, jnp.take_along_axis(indices, at, axis=1)), None

        none = (jnp.full((rows, max_k), -jnp.inf), jnp.zeros((rows, max_k), int))
        (similarities, indices), _ = jax.lax.scan(merge, none, (keys, places))
        weights = jnp.exp((similarities - similarities[:, :1]) / temperature)
        row = jnp.arange(rows)[:, None]

        def vote(number):
            votes = jnp.zeros((rows, classes)).at[row, labels[indices[:, :number]]].add(weights[:, :number])
            votes, first = jax.lax.top_k(votes, min(MAX_VOTED, classes))
            first = jnp.where(votes > 0, first, -1)
            return jnp.pad(first, ((0, 0), (0, MAX_VOTED - first.shape[1])), constant_values=-1)

        return jnp.stack([vote(number) for number in k])

    found = jax.lax.map(classes_of, unit_queries.reshape(blocks, rows, width))  # blocks g rows 5
    return jnp.moveaxis(found, 1, 0).reshape(len(k), -1, MAX_VOTED)[:, : len(queries)]


def class_ranks(voted: Int[np.ndarray, "n 5"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the rank of the true class among the five of `nearest_classes`; 5 if it is none of them."""
    right: Bool[np.ndarray, "n 5"] = voted == labels[:, None]
    return np.where(right.any(axis=1), right.argmax(axis=1), MAX_VOTED)


def choose_setting(ranks: Int[Anywhere, "n g"]) -> tuple[Float[np.ndarray, " g"], int]:
    """Return (top-1 of each setting, index of the first best setting)."""
    top1 = (np.asarray(ranks) < 1).mean(axis=0)
    return top1, int(top1.argmax())
