"""Classifiers of frozen features, fitted and judged on the device in float32.

Letters of shapes: m training images, n images to classify, d feature width, k classes, g settings of a grid, s sets of
features (blocks) that are fitted at once. Labels are 0 to k - 1. A linear classifier is (weights [d, k], bias [k]) of
features that are standardized by the mean and scale of the training images, as by a batch norm without affine
parameters (MAE, arXiv 2111.06377, appendix A).

All is on one device, one set of features at a time: ImageNet's 1.28 million of 768 numbers are 3.9 GB there, and about
twice that while they are standardized or filled up. Logits are computed in parts of `ROWS` images. Ridge regression
alone is solved on the host, in float64.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

ROWS = 4096  # images whose logits, and queries whose similarities, are computed at a time
KEYS = 16384  # training images that these are compared with at a time
MEMORY = 10  # pairs that L-BFGS remembers
EXACT = jax.lax.Precision.HIGHEST  # float32 as it is, where accelerators would take fewer bits


Anywhere = Array | np.ndarray  # what the device takes, or has


class Linear(NamedTuple):
    weights: Float[Array, "... d k"]
    bias: Float[Array, "... k"]


def statistics(features: Float[np.ndarray, "m d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """(mean, scale) over the images, float32: the scale is the deviation, or 1 of a feature that does not vary."""
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
    """The rank of each image's class among its logits, 0 for the highest, by each classifier [*g].

    A class that only ties with another comes after it. A classifier that is not finite finds nothing.
    """

    def rank(x, label):
        logits = jnp.einsum("d,...dk->...k", x, classifier.weights, precision=EXACT) + classifier.bias
        return (~(logits < logits[..., label, None])).sum(axis=-1) - 1

    return jax.lax.map(lambda row: rank(*row), (features, labels), batch_size=ROWS)


def accuracies(ranks: Int[Anywhere, " n"], classes: int) -> dict[str, float | None]:
    """top1 and top5 in 0..1; top5 is None where there are no more than five classes."""
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
    """Linear classifiers [s, g] of standardized features, one for each setting of each set, all trained at once.

    SGD with momentum 0.9 and a cosine from learning_rates x batch / 256 to zero; from weights of zero; decay of the
    weights, not of the bias. Every epoch is a permutation of the images by `key`, the same for all; what is left of
    one after its last whole batch is dropped. A setting that diverges ends as NaN.
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
    inverse_regularizations: Float[Anywhere, " g"],
    start: Linear | None = None,
    *,
    classes: int,
    iterations: int = 1000,
    tolerance: float = 1e-4,
) -> Linear:
    """Multinomial logistic regression of standardized features: the classifier [g] of each `C` C.

    What is minimized is scikit-learn's: the sum over images of cross entropy, times C, and half the squared weights
    (the bias is free). By L-BFGS, the first C from `start`, by default zero, each other from where the one before it
    ended, until no derivative of that sum, divided by C and m, is above `tolerance`, the loss does not fall any more in
    float32, or so many iterations are done.
    """
    count, width = features.shape
    parts = -(-count // ROWS)
    rows = -(-count // parts)
    pad = parts * rows - count
    x = jnp.pad(features, ((0, pad), (0, 0))).reshape(parts, rows, width)
    y = jnp.pad(labels, (0, pad), constant_values=-1).reshape(parts, rows)

    @jax.checkpoint  # else the logits of all images would be kept for the gradient
    def add(total, part, p):
        x, y = part
        logits = jnp.matmul(x, p[:-1], precision=EXACT) + p[-1]  # p: [d + 1, k], the bias last
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(y, 0))
        return total + jnp.where(y >= 0, losses, 0).sum()  # the last part is filled up

    def fit(start, strength):
        def objective(p):
            total, _ = jax.lax.scan(lambda total, part: (add(total, part, p), None), jnp.float32(0), (x, y))
            return total / count + 0.5 * (p[:-1] ** 2).sum() / (strength * count)

        return minimize(objective, start, iterations, tolerance)

    first = jnp.zeros((width + 1, classes)) if start is None else jnp.vstack(start)
    _, found = jax.lax.scan(lambda p, strength: (fit(p, strength),) * 2, first, inverse_regularizations)
    return Linear(found[:, :-1], found[:, -1])


def minimize(objective: Callable, start: Float[Array, "..."], iterations: int, tolerance: float) -> Float[Array, "..."]:
    """Where a smooth `objective` is least, by L-BFGS from `start`.

    It ends when no derivative is above `tolerance`, when the objective does not fall any more in float32, or after so
    many iterations.
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
    """Ridge regression of one-hot targets on standardized features: the classifier [g] of each regularization.

    The squared errors' mean over images and `regularization` times the squared weights are minimized; the bias is free.
    In closed form, all by one eigendecomposition of the features' covariance, which is summed in float64: its least
    eigenvalues are below what float32 tells apart, and a regularization may be too.
    """
    (count, width), labels = features.shape, np.asarray(labels)
    gram, sums = np.zeros((width, width)), np.zeros((classes, width))  # sums: of the features of each class
    for start in range(0, count, ROWS):
        own = labels[start : start + ROWS]
        order = np.argsort(own, kind="stable")
        there, first = np.unique(own[order], return_index=True)
        x = np.asarray(features[start : start + ROWS], np.float64)[order]
        gram += x.T @ x
        sums[there] += np.add.reduceat(x, first)
    center, shares = sums.sum(axis=0) / count, np.bincount(labels, minlength=classes) / count
    values, vectors = np.linalg.eigh(gram / count - np.outer(center, center))
    turned = vectors.T @ (sums.T / count - np.outer(center, shares))
    weights = np.stack([vectors @ (turned / (np.maximum(values, 0) + r)[:, None]) for r in regularizations])
    return Linear(jnp.float32(weights), jnp.float32(shares - center @ weights))


def nearest_classes(
    train: Float[Anywhere, "m d"],
    labels: Int[Anywhere, " m"],
    queries: Float[Anywhere, "n d"],
    *,
    classes: int,
    neighbors: tuple[int, ...] = (10, 20, 100, 200),
    temperature: int | float = 0.07,
) -> Int[np.ndarray, "g n 5"]:
    """The five classes with the most votes among an image's nearest neighbors, for each number of them; -1 for none.

    Cosine similarity; each neighbor votes for its class with weight exp(similarity / temperature) (Wu et al. 2018,
    arXiv 1805.01978; numbers and temperature are DINO's). Of equal votes the lowest class is first. At most so many
    similarities as `ROWS` x `KEYS` are held at once. More neighbors than there are images are all images.
    """
    count = tuple(min(number, len(labels)) for number in neighbors)
    return np.asarray(
        _nearest_classes(train, labels, queries, jnp.float32(temperature), classes=classes, neighbors=count)
    )


@partial(jax.jit, static_argnames=("classes", "neighbors"))
def _nearest_classes(train, labels, queries, temperature, *, classes, neighbors):
    def unit(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    most, (count, width) = max(neighbors), train.shape
    parts = -(-count // KEYS)
    size = max(-(-count // parts), most)
    pad = parts * size - count
    keys = jnp.pad(unit(train), ((0, pad), (0, 0))).reshape(parts, size, width)
    there = (jnp.arange(parts * size) < count).reshape(parts, size)
    places = jnp.arange(parts * size).reshape(parts, size)
    rows = min(ROWS, len(queries))
    blocks = -(-len(queries) // rows)
    unit_queries = jnp.pad(unit(queries), ((0, blocks * rows - len(queries)), (0, 0)))

    def classes_of(queries):
        def merge(best, part):
            keys, there, places = part
            similarity = jnp.where(there, jnp.matmul(queries, keys.T, precision=EXACT), -jnp.inf)
            found, at = jax.lax.top_k(similarity, most)
            similarities = jnp.concatenate([best[0], found], axis=1)
            indices = jnp.concatenate([best[1], places[at]], axis=1)
            kept, at = jax.lax.top_k(similarities, most)
            return (kept, jnp.take_along_axis(indices, at, axis=1)), None

        none = (jnp.full((rows, most), -jnp.inf), jnp.zeros((rows, most), int))
        (similarities, indices), _ = jax.lax.scan(merge, none, (keys, there, places))
        weights = jnp.exp((similarities - similarities[:, :1]) / temperature)
        row = jnp.arange(rows)[:, None]

        def vote(number):
            votes = jnp.zeros((rows, classes)).at[row, labels[indices[:, :number]]].add(weights[:, :number])
            votes, first = jax.lax.top_k(votes, min(5, classes))
            first = jnp.where(votes > 0, first, -1)
            return jnp.pad(first, ((0, 0), (0, 5 - first.shape[1])), constant_values=-1)

        return jnp.stack([vote(number) for number in neighbors])

    found = jax.lax.map(classes_of, unit_queries.reshape(blocks, rows, width))  # blocks g rows 5
    return jnp.moveaxis(found, 1, 0).reshape(len(neighbors), -1, 5)[:, : len(queries)]


def found_ranks(found: Int[np.ndarray, "n 5"], labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The rank of each image's class among the first five; 5 where it is not one of them."""
    right: Bool[np.ndarray, "n 5"] = found == labels[:, None]
    return np.where(right.any(axis=1), right.argmax(axis=1), 5)


def choose_setting(ranks: Int[Anywhere, "n g"]) -> tuple[Float[np.ndarray, " g"], int]:
    """(top-1 of each setting, the first of the best)."""
    top1 = (np.asarray(ranks) < 1).mean(axis=0)
    return top1, int(top1.argmax())
