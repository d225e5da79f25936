"""K-means units: fit centroids on vectors, find the nearest one, average what each unit stands for.

Letters: N vectors of width D, K units.
"""

from __future__ import annotations

import math

import numpy as np
import torch

_BATCH, _ROUNDS = 4096, 120  # a fixed effort, so that hours of sound cost little more than minutes
ENOUGH = _BATCH * _ROUNDS
"""Vectors that `fit_centroids` looks at, counting repeats: more need not be gathered."""


def fit_centroids(vectors: torch.Tensor, units: int, seed: int) -> torch.Tensor:
    """Centroids, float32 [K, D], of vectors, float [N, D], N >= K (mini-batch k-means, Sculley 2010)."""
    from sklearn.cluster import MiniBatchKMeans  # a second or two, of every command that has a codec

    batch = min(_BATCH, len(vectors))
    kmeans = MiniBatchKMeans(
        units,
        batch_size=batch,
        max_iter=math.ceil(_ROUNDS * batch / len(vectors)),
        n_init=1,
        init_size=4 * units,
        random_state=seed,
    ).fit(vectors.numpy())
    return torch.from_numpy(kmeans.cluster_centers_.astype(np.float32))


def nearest(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid by Euclidean distance, long [N]."""
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in vectors.split(_BATCH)])


def means(vectors: torch.Tensor, ids: torch.Tensor, units: int) -> torch.Tensor:
    """Mean of the vectors [N, D] of each unit, float32 [K, D]; of all, where a unit has none."""
    count = torch.bincount(ids, minlength=units)[:, None]
    total = torch.zeros(units, vectors.shape[1]).index_add_(0, ids, vectors)
    return torch.where(count > 0, total / count.clamp_min(1), vectors.mean(0))
