"""Covariance matrices before distances are taken with them: shrunk, made correlations, and factored."""

import pytest
import torch

from lightning_cl.heads import correlation, shrink
from lightning_cl.heads.covariances import cholesky, square_root

EXAMPLE = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)


def _samples(count, width, seed=0):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_shrinking_adds_a_share_of_the_mean_variance():
    expected = torch.tensor([[14.5, 2.0], [2.0, 13.5]], dtype=torch.float64)
    assert torch.equal(shrink(EXAMPLE, 3), expected)


def test_shrinking_adds_a_share_of_the_mean_covariance():
    matrix = torch.tensor([[4.0, 1.0, 2.0], [1.0, 4.0, 3.0], [2.0, 3.0, 4.0]])
    assert torch.equal(shrink(matrix, 0, 0.5), torch.tensor([[4.0, 2.0, 3.0], [2.0, 4.0, 4.0], [3.0, 4.0, 4.0]]))


def test_each_matrix_is_shrunk_on_its_own():
    both = torch.stack([EXAMPLE, 10 * EXAMPLE])
    torch.testing.assert_close(shrink(both, 3, 1), torch.stack([shrink(EXAMPLE, 3, 1), shrink(10 * EXAMPLE, 3, 1)]))


def test_a_single_feature_has_no_covariance_to_shrink():
    assert torch.equal(shrink(torch.tensor([[2.0]]), 1, 1), torch.tensor([[4.0]]))


def test_correlations_of_the_example_are_those_of_the_paper():
    matrix = correlation(shrink(EXAMPLE, 3))
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(0.14295, abs=1e-5)
    assert torch.equal(matrix.diagonal(), torch.ones(2, dtype=torch.float64))


def test_correlations_are_those_of_the_samples():
    samples = _samples(50, 4) @ _samples(4, 4, seed=1)
    torch.testing.assert_close(correlation(samples.T.cov()), samples.T.corrcoef())


def test_a_feature_that_does_not_vary_has_no_correlations():
    matrix = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(correlation(matrix), torch.eye(2).expand(2, 2, 2))


def test_factors_of_positive_definite_matrices_give_them_back_to_rounding():
    matrices = torch.stack([_samples(9, 5, seed).T.cov() for seed in range(4)])
    factors = cholesky(matrices)
    torch.testing.assert_close(factors @ factors.mT, matrices, atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("samples", [2, 5, 15])
def test_a_matrix_of_fewer_samples_than_features_gets_the_least_jitter(samples):
    matrix = _samples(samples, 16).T.cov()[None]
    factors = cholesky(matrix)
    expected = matrix + 1e-8 * matrix[0].diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(factors @ factors.mT, expected, atol=1e-12, rtol=0)


def test_only_the_matrices_that_need_it_get_jitter():
    whole, flat = _samples(50, 8).T.cov(), _samples(4, 8).T.cov()
    assert torch.equal(cholesky(torch.stack([whole, flat]))[0], cholesky(whole[None])[0])


def test_features_of_very_different_scale_need_no_jitter():
    matrix = torch.diag(torch.tensor([1e12, 1.0, 1e-12], dtype=torch.float64))[None]
    factors = cholesky(matrix)
    torch.testing.assert_close(factors @ factors.mT, matrix, atol=0, rtol=1e-14)


def test_a_matrix_with_negative_eigenvalues_gets_as_much_as_it_needs():
    matrix = torch.tensor([[[1.0, 50.0], [50.0, 1.0]]], dtype=torch.float64)
    factors = cholesky(matrix)
    torch.testing.assert_close(factors @ factors.mT, matrix + 100 * torch.eye(2))


def test_a_matrix_of_zeros_is_as_wide_as_the_others_ask_for():
    factors = cholesky(torch.stack([torch.zeros(2, 2), 4 * torch.eye(2)]).double())
    torch.testing.assert_close(factors[0], 2e-4 * torch.eye(2).double())
    alone = cholesky(torch.zeros(1, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(alone[0], 1e-4 * torch.eye(2).double())


def test_factoring_leaves_the_matrices_alone():
    matrices = torch.zeros(2, 3, 3, dtype=torch.float64)
    cholesky(matrices)
    assert not matrices.any()


def test_a_square_root_is_symmetric_also_of_a_singular_matrix():
    matrix = _samples(3, 6).T.cov()
    root = square_root(matrix)
    torch.testing.assert_close(root @ root, matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(root, root.T, atol=1e-12, rtol=0)
