"""Heads on features inside a network."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_cl.heads.exit_heads import ConvExitHead, LinearExitHead, PooledExitHead, build_exit_head

SHAPES = [(7,), (5, 7), (6, 8, 8), (6, 9, 5), (6, 1, 1), (3, 2, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("head", ["pool", "conv", "linear"])
def test_every_head_gives_logits_for_every_kind_of_features(head, shape):
    features = torch.randn(4, *shape)
    assert build_exit_head(head, features, 10, seed=0)(features).shape == (4, 10)


@pytest.mark.parametrize(
    ("head", "shape", "kind"),
    [
        ("pool", (6, 8, 8), PooledExitHead),
        ("conv", (6, 8, 8), ConvExitHead),
        ("linear", (6, 8, 8), LinearExitHead),
        ("pool", (5, 7), LinearExitHead),
        ("conv", (7,), LinearExitHead),
    ],
)
def test_a_head_suits_its_features(head, shape, kind):
    assert type(build_exit_head(head, torch.zeros(1, *shape), 10, seed=0)) is kind


def test_weights_are_a_function_of_the_seed_and_draw_from_no_generator():
    features, states = torch.zeros(1, 6, 8, 8), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        states.append(build_exit_head("conv", features, 10, seed=3).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    other = build_exit_head("conv", features, 10, seed=4).state_dict()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert not torch.equal(tensor, other[name])


def test_pooling_is_a_learnt_mixture():
    head = PooledExitHead((2, 8, 8), 3)
    features = torch.randn(5, 2, 8, 8)
    for alpha in (-0.5, 0.0, 0.3, 1.0):
        nn.init.constant_(head.alpha, alpha)
        pooled = alpha * functional.max_pool2d(features, 2) + (1 - alpha) * functional.avg_pool2d(features, 2)
        torch.testing.assert_close(head(features), head.classifier(pooled.flatten(1)))
    head(features).sum().backward()
    assert head.alpha.grad is not None


@pytest.mark.parametrize("size", [(28, 28), (16, 8), (14, 14), (3, 9)])
def test_pooling_in_windows_of_one_size_gives_what_pooling_in_training_gives(size):
    head = PooledExitHead((3, *size), num_classes=5)
    features = torch.randn(2, 3, *size)
    torch.testing.assert_close(head.eval()(features), head.train()(features))
    as_images_come = features.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(head.eval()(as_images_come), head.train()(features))


def test_the_share_of_the_largest_begins_between_0_and_1():
    alphas = torch.stack([build_exit_head("pool", torch.zeros(1, 2, 4, 4), 2, seed).alpha for seed in range(200)])
    assert 0 <= alphas.min() < 0.1
    assert 0.9 < alphas.max() <= 1


def test_a_linear_head_reads_the_class_token():
    head, features = LinearExitHead((5, 7), 3), torch.randn(2, 5, 7)
    assert torch.equal(head(features), head.classifier(features[:, 0]))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.LazyLinear(10)

    def forward(self, features):
        return self.linear(self.norm(features).flatten(1))


def test_a_head_of_the_users_own_is_copied_and_finds_its_size():
    own, features = Normed(), torch.randn(4, 6, 3, 3) + 5
    heads = [build_exit_head(own, features, 10, seed) for seed in (0, 1)]
    assert heads[0].linear.in_features == 54
    assert heads[0](features).shape == (4, 10)
    assert not torch.equal(heads[0].linear.weight, heads[1].linear.weight)
    assert own.linear.in_features == 0
    fresh = build_exit_head(own, features, 10, seed=0)
    assert fresh.training
    assert not fresh.norm.running_mean.any()


def test_a_head_of_the_users_own_keeps_the_weights_that_it_was_given():
    own = nn.Sequential(nn.Flatten(), nn.Linear(54, 10))
    nn.init.constant_(own[1].weight, 0.25)
    for seed in (0, 1):
        copied = build_exit_head(own, torch.zeros(2, 6, 3, 3), 10, seed)
        assert torch.equal(copied[1].weight, own[1].weight)
        assert torch.equal(copied[1].bias, own[1].bias)
        assert copied[1].weight is not own[1].weight


@pytest.mark.parametrize(
    ("head", "features"),
    [(nn.Linear(5, 10), (4, 6)), (nn.BatchNorm2d(6), (4, 6)), (nn.Flatten(3), (4, 6, 3))],
    ids=["width", "dimensions", "flattened"],
)
def test_a_head_of_the_users_own_for_other_features_is_refused(head, features):
    shape = ", ".join(map(str, features[1:]))
    message = rf"`head` \({type(head).__name__}\) does not take features of shape \(batch, {shape}\): .*`nn.LazyLinear`"
    with pytest.raises(ValueError, match=message):
        build_exit_head(head, torch.zeros(features), 10, seed=0)


def test_a_head_of_the_users_own_has_the_precision_of_its_features():
    copied = build_exit_head(nn.Linear(6, 10).double(), torch.zeros(4, 6), 10, seed=0)
    assert copied.weight.dtype == torch.float32


@pytest.mark.parametrize("head", [nn.Identity(), nn.Flatten(), nn.LazyLinear(10)], ids=str)
def test_a_head_that_gives_no_logits_is_refused(head):
    with pytest.raises(ValueError, match=r"`head` must give logits of shape \(4, 10\), got \(4, "):
        build_exit_head(head, torch.randn(4, 6, 3, 3), 10, seed=0)


def test_features_of_a_shape_that_no_head_is_known_for():
    with pytest.raises(ValueError, match=r"`head='pool'` is for features .* got \(2, 3, 4, 5, 6\)"):
        build_exit_head("pool", torch.zeros(2, 3, 4, 5, 6), 10, seed=0)
