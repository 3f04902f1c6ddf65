"""Unit-length embedding vectors, read from a file: some rows, a projection to the plane, nearest neighbors.

Shape letters: n rows, d embedding width, q queries, k neighbors.
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from simmim_jax.errors import ConfigError, DataError
from simmim_jax.tools.embed import embeddings


def evenly_spaced(count: int, limit: int) -> Int[np.ndarray, " n"]:
    """Return `limit` evenly spaced rows of `count`, or all if there are fewer."""
    limit = min(limit, count)
    return np.arange(limit, dtype=np.int64) * count // limit


def to_unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def read_vectors(path: Path, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
    """Read the given rows, in ascending order, as unit vectors. One chunk of the file at a time is in memory."""
    parts, start = [], 0
    for chunk in embeddings.read_embeddings(path):
        first, last = np.searchsorted(rows, (start, start + len(chunk)))
        parts.append(to_unit(chunk[rows[first:last] - start]))
        start += len(chunk)
    return np.concatenate(parts)


def project(method: str, vectors: Float[np.ndarray, "n d"], seed: int, where: str = "") -> Float[np.ndarray, "n 2"]:
    """Project to the plane by "pca", "tsne" or "umap". Positions are centered, within -1..1.

    Raises ConfigError for too few vectors, and DataError if all are equal.
    """
    if len(vectors) < 2:
        raise ConfigError(f"a map of {len(vectors)} image", "--limit", "give 2 or more")
    if len(vectors) < 5 and method != "pca":
        raise ConfigError(f"{method} of {len(vectors)} images", "--method", "give --method=pca")
    if not np.ptp(vectors, axis=0).any():  # t-SNE crashes on these
        raise DataError("all embeddings are the same", where, "check whether the run collapsed")

    def components(count: int) -> np.ndarray:
        solver = "full" if len(vectors) < 2000 else "randomized"
        return PCA(min(count, *vectors.shape), svd_solver=solver, random_state=seed).fit_transform(vectors)

    if method == "tsne":
        perplexity, threads = min(30.0, (len(vectors) - 1) / 3), max(1, (os.cpu_count() or 1) // 2)
        with threadpool_limits(threads, user_api="openmp"):  # on shared cores, OpenMP threads wait for each other
            positions = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(components(50))
    elif method == "umap":
        import umap  # optional

        neighbors = min(15, len(vectors) - 1)
        positions = umap.UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1).fit_transform(vectors)
    else:
        positions = components(2)
        positions = np.pad(positions, ((0, 0), (0, 2 - positions.shape[1])))
    positions = np.asarray(positions, np.float64)
    positions -= (positions.max(axis=0) + positions.min(axis=0)) / 2
    return positions / max(np.abs(positions).max(), 1e-12)


def nearest_rows(
    path: Path, queries: Int[np.ndarray, " q"], k: int
) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
    """Return (rows, cosine similarities) of the k nearest other rows of each query, nearest first.

    Ties keep the order of the rows. One chunk of the file at a time is in memory.
    """
    own = read_vectors(path, np.sort(queries))[np.argsort(np.argsort(queries))]
    rows, similarities = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    start = 0
    for chunk in embeddings.read_embeddings(path):
        index = np.arange(start, start + len(chunk))
        similarity = own @ to_unit(chunk).T
        similarity[queries[:, None] == index] = -np.inf  # the query itself
        rows = np.concatenate([rows, np.broadcast_to(index, similarity.shape)], axis=1)
        similarities = np.concatenate([similarities, similarity], axis=1)
        best = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        rows, similarities = np.take_along_axis(rows, best, 1), np.take_along_axis(similarities, best, 1)
        start += len(chunk)
    return rows, similarities
