"""Measure time and memory of a map: `python -m synpipe_tests.bench.projection --rows 103511`.

The vectors are simulated to resemble those of an encoder: clusters of unequal size, each with ten directions of its own,
and noise in all directions. The bench measures the seeded fit, which the pipeline uses and which runs on one core. With
`--threads` it also measures an unseeded fit on that many threads, and with `--more` the placing of further vectors.
"""

import argparse
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from synpipe.analysis.projection import ProjectionSpec, fit_map

CLUSTERS, OWN_DIRECTIONS, NOISE = 200, 10, 0.2


def vectors_like_an_encoders(rows: int, dimensions: int, seed: int) -> np.ndarray:
    """Simulate vectors: float32 (rows, dimensions). The clusters are the same for every seed."""
    return clusters_like_an_encoders(rows, dimensions, seed)[0]


def clusters_like_an_encoders(rows: int, dimensions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Simulate vectors, float32 (rows, dimensions), with the number of the cluster of each: (rows,)."""
    of_clusters, random = np.random.default_rng(0), np.random.default_rng(seed)
    centres = of_clusters.normal(size=(CLUSTERS, dimensions))
    bases = of_clusters.normal(size=(CLUSTERS, OWN_DIRECTIONS, dimensions)) / OWN_DIRECTIONS**0.5
    shares = of_clusters.dirichlet(np.full(CLUSTERS, 0.5))
    cluster = random.choice(CLUSTERS, rows, p=shares)
    vectors = NOISE * random.normal(size=(rows, dimensions)).astype(np.float32)
    for number in range(CLUSTERS):
        of_cluster = cluster == number
        own = random.normal(size=(int(of_cluster.sum()), OWN_DIRECTIONS))
        vectors[of_cluster] += centres[number] + own @ bases[number]
    return vectors, cluster


def measure(what: str, work: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"  {what:<44} {wall:8.1f} s {cpu:8.1f} CPU s   peak so far {peak:5.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=103_511, help="as many as SynOminous had")
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--more", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    chosen = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version(name)}" for name in ("umap-learn", "pynndescent", "numba", "numpy")))
    vectors = vectors_like_an_encoders(chosen.rows, chosen.dimensions, seed=1)
    print(f"{vectors.shape[0]:,} × {vectors.shape[1]}")
    measure("import and compile (500 vectors)", lambda: fit_map(vectors[:500], ProjectionSpec()))
    fits = []
    measure("fit, seeded", lambda: fits.append(fit_map(vectors, ProjectionSpec())))
    if chosen.more:
        more = vectors_like_an_encoders(chosen.more, chosen.dimensions, seed=2)
        place = fits[0][1]
        measure("placing 100, with the search index", lambda: place(more[:100]))
        measure(f"placing {chosen.more:,}", lambda: place(more))
    if chosen.threads:
        measure(f"fit, unseeded, {chosen.threads} threads", lambda: _unseeded(vectors, chosen.threads))


def _unseeded(vectors: np.ndarray, threads: int) -> None:
    import umap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        umap.UMAP(n_neighbors=15, metric="cosine", init="pca", n_jobs=threads).fit(vectors)


if __name__ == "__main__":
    main()
