"""K-means units on clouds of points."""

from __future__ import annotations

import torch

from zipper_lm.codecs.kmeans import fit_centroids, means, nearest

CENTRES = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


def test_centroids_lie_in_the_clouds_and_are_nearest_to_them() -> None:
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(300) % 3
    points = CENTRES[which] + torch.randn(300, 2, generator=generator)
    found = fit_centroids(points, 3, seed=0)
    order = nearest(CENTRES, found)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert (found[order] - CENTRES).abs().max() < 0.5
    assert torch.equal(nearest(points, found), order[which])
    assert torch.equal(found, fit_centroids(points, 3, seed=0))


def test_means_by_unit_and_of_all_where_there_are_none() -> None:
    vectors = torch.tensor([[1.0], [3.0], [8.0]])
    assert means(vectors, torch.tensor([2, 2, 0]), 3)[:, 0].tolist() == [8.0, 4.0, 2.0]
