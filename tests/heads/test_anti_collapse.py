import pytest
import torch

from lightning_cl.heads import anti_collapse_loss


def features_with(covariance, rows=50):
    """Draw features whose sample covariance is exactly the one that is wanted."""
    noise = torch.randn(rows, len(covariance), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes, _ = torch.linalg.qr(noise - noise.mean(0))
    root = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64))
    return axes * (rows - 1) ** 0.5 @ root.t() + 7


@pytest.mark.parametrize(
    ("covariance", "bound", "loss"),
    [
        ([[1, 0], [0, 1]], 1, -1.0),
        ([[0.25, 0], [0, 4]], 1, -0.75),
        ([[4, 2], [2, 3]], 1, -1.0),
        ([[4, 2], [2, 3]], 10, -(2 + 2**0.5) / 2),
        ([[3, 2], [2, 4]], 10, -(3**0.5 + (8 / 3) ** 0.5) / 2),
    ],
)
def test_the_loss_is_the_bounded_diagonal_of_the_cholesky_factor(covariance, bound, loss):
    assert anti_collapse_loss(features_with(covariance), bound).item() == pytest.approx(loss, abs=1e-12)


def test_the_loss_has_the_bound_as_its_least_value():
    assert anti_collapse_loss(100 * features_with([[4, 2], [2, 3]]), bound=0.5).item() == -0.5


def test_a_descent_spreads_collapsed_features():
    generator = torch.Generator().manual_seed(1)
    line = torch.randn(64, 1, generator=generator) @ torch.randn(1, 4, generator=generator)
    features = (line + 0.01 * torch.randn(64, 4, generator=generator)).requires_grad_()
    assert torch.linalg.matrix_rank(features.detach().t().cov(), rtol=1e-3) == 1
    optimizer = torch.optim.SGD([features], lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        anti_collapse_loss(features).backward()
        optimizer.step()
    assert torch.linalg.matrix_rank(features.detach().t().cov(), rtol=1e-3) == 4


def test_features_that_stand_still_give_finite_gradients():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(64, 4, generator=generator)
    features[:, 2] = 0
    features.requires_grad_()
    loss = anti_collapse_loss(features)
    loss.backward()
    assert -1 < loss.item() < 0
    assert torch.isfinite(features.grad).all()


def test_features_that_are_not_finite_are_not_hidden():
    features = torch.full((8, 2), torch.nan)
    assert torch.isnan(anti_collapse_loss(features))


def test_half_precision_features_are_factorised_in_single_precision():
    assert anti_collapse_loss(torch.randn(16, 4).to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_batch_that_is_not_larger_than_the_width_is_refused_with_both_sizes(rows):
    with pytest.raises(ValueError, match=f"got {rows} samples and 4 features. Use a larger batch, or a narrower layer"):
        anti_collapse_loss(torch.randn(rows, 4))


def test_features_of_an_image_are_refused():
    with pytest.raises(ValueError, match=r"must have the shape \(batch, width\), got \(8, 2, 3, 3\)"):
        anti_collapse_loss(torch.randn(8, 2, 3, 3))
