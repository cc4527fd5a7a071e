"""Corruptions of photographs, against a plain reference; and who decides how a sample is corrupted."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_corruptions import CONSTANTS, _reference_corrupt, _reference_distribution
from scipy import stats
from sklearn.datasets import load_sample_images

from lightning_cl.corruptions import CORRUPTIONS, batch, check_corruption, corrupt
from lightning_cl.corruptions.draws import Draws
from lightning_cl.hashing import mix

NOISES = ["gaussian_noise", "impulse_noise", "shot_noise"]
RANDOM = [*NOISES, "elastic_transform", "fog", "glass_blur", "motion_blur"]
# Their published constants do not rise in everything: what grows with their severities is tested on its own.
UNORDERED = ["elastic_transform", "glass_blur", "motion_blur"]


@pytest.fixture(scope="module")
def photos():
    """Two photographs of 640x424 pixels."""
    return torch.stack([torch.from_numpy(np.array(photo)) for photo in load_sample_images().images]).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def images(photos):
    """24 pieces of the photographs, of 32x32 pixels."""
    return cut(photos, 32)


def cut(photos, height, width=None):
    """Shrink photographs to a quarter, and cut out the first 24 pieces, or as many as there are."""
    width = width or height
    small = F.avg_pool2d(photos.float(), 4).round().byte()
    pieces = small.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)
    return pieces.reshape(-1, 3, height, width)[:24]


def distances(images, name):
    """Return how far each severity takes images, in the mean."""
    ids = torch.arange(len(images))
    return [float((corrupt(images, name, s, ids).double() - images).abs().mean()) for s in range(1, 6)]


def assert_equals_reference(images, name, severity):
    ids = torch.arange(len(images)) + 40
    for row, corrupted in enumerate(corrupt(images, name, severity, ids, seed=3)):
        draws = Draws(ids[row : row + 1], name, seed=3)
        reference = _reference_corrupt(images[row].numpy(), name, severity, draws)
        assert np.abs(corrupted.numpy().astype(int) - reference).max() <= 1


def test_corruptions_stand_in_alphabetical_order():
    assert tuple(sorted(CONSTANTS)) == CORRUPTIONS


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - set(NOISES)))
def test_corruption_equals_the_reference(images, name, severity):
    assert_equals_reference(images[::8], name, severity)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - set(NOISES)))
def test_corruption_of_grey_images_equals_the_reference(images, name):
    assert_equals_reference(images[::12, :1], name, 4)


@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (24, 40)])
@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - set(NOISES)))
def test_corruption_of_other_sizes_equals_the_reference(photos, name, shape):
    assert_equals_reference(cut(photos, *shape)[:2], name, 5)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("level", [0, 6, 130, 250])
def test_noise_has_the_distribution_of_the_reference(name, severity, level):
    images = torch.full((32, 3, 32, 32), level, dtype=torch.uint8)
    noisy = corrupt(images, name, severity, torch.arange(32))
    probabilities = _reference_distribution(level, name, severity)
    counts = torch.bincount(noisy.flatten().long(), minlength=256).numpy()
    expected = probabilities * images.numel()
    often = expected > 10
    assert np.all(np.abs(counts - expected)[often] <= 5 * np.sqrt(expected[often]))
    assert abs(counts[~often].sum() - expected[~often].sum()) <= 5 * np.sqrt(expected[~often].sum()) + 1e-6


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_channels_places_and_samples_is_unrelated(name):
    images = torch.full((3, 3, 64, 64), 100, dtype=torch.uint8)
    noisy = corrupt(images, name, 5, torch.arange(3)).flatten(2).flatten(0, 1)
    related = torch.corrcoef(torch.cat([noisy, noisy.roll(1, 1), noisy.roll(64, 1)]).double()).fill_diagonal_(0)
    assert related.abs().max() < 0.08  # five standard deviations


def test_draws_are_uniform_between_zero_and_one():
    numbers = Draws(torch.arange(100), "fog", 0).uniform(500).flatten()
    assert 0 < numbers.min() < numbers.max() < 1
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > 0.01


def test_draws_are_hashes_of_the_id_and_never_change():
    (numbers,) = Draws(torch.tensor([11]), "fog", seed=2).uniform(3).tolist()
    key = mix(2, *b"fog", 11)
    assert numbers == [((mix(key + place) >> 11) + 0.5) / 2**52 for place in range(3)]


def test_draws_that_follow_each_other_are_those_of_one_call():
    ids = torch.tensor([5, -2])
    draws, all_at_once = Draws(ids, "fog", 1), Draws(ids, "fog", 1).uniform(11)
    assert torch.equal(torch.cat([draws.uniform(2, 3).flatten(1), draws.uniform(5)], dim=1), all_at_once)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - set(UNORDERED)))
def test_higher_severity_changes_images_more(images, name):
    steps = np.diff([0, *distances(images, name)])
    assert (steps > 0).all()


def test_motion_blur_changes_images_more_until_only_its_radius_grows(images):
    # Severities 3 and 4 have one sigma, and the larger radius adds weights of less than a millionth.
    first, second, third, fourth, fifth = distances(images, "motion_blur")
    assert first < second < third < fifth
    assert fourth == pytest.approx(third, abs=0.01)


def test_glass_blur_changes_images_more_by_two_rounds_of_swaps_than_by_one(images):
    # Severity 4 blurs as little as severity 2. Within the same rounds only the blur grows, and hides what was swapped.
    changes = distances(images, "glass_blur")
    assert max(changes[:3]) < min(changes[3:])


@pytest.mark.parametrize(("less", "more"), [(2, 3), (4, 5)])
def test_glass_blur_takes_more_detail_by_a_larger_sigma(images, less, more):
    # Severities 1 and 2 are too narrow to blur at all.
    def detail(severity):
        return corrupt(images, "glass_blur", severity, torch.arange(len(images))).double().diff(dim=3).abs().mean()

    assert detail(more) < detail(less)


def test_elastic_transform_bends_more_with_severity():
    # Its first severities move images farther, but all in one piece. On a slope, values tell where pixels came from:
    # what a plane does not explain has been bent.
    slope = (8 * torch.arange(32, dtype=torch.uint8)).expand(40, 1, 32, 32)
    rows, columns = np.mgrid[8:24, 8:24].reshape(2, -1)
    plane = np.c_[rows, columns, np.ones(256)]
    bends = []
    for severity in range(1, 6):
        values = corrupt(slope, "elastic_transform", severity, torch.arange(40))[:, 0, 8:24, 8:24].flatten(1).T.numpy()
        fitted = plane @ np.linalg.lstsq(plane, values.astype(float), rcond=None)[0]
        bends.append(np.abs(values - fitted).mean())
    assert (np.diff([0, *bends]) > 0).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_zero_leaves_images_as_they_are(images, name):
    assert torch.equal(corrupt(images, name, 0, torch.arange(len(images))), images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_sample_is_corrupted_the_same_way_in_any_batch(images, name):
    ids = torch.arange(len(images)) * 7 - 3
    together = corrupt(images, name, 3, ids)
    assert torch.equal(corrupt(images.flip(0), name, 3, ids.flip(0)).flip(0), together)
    alone = [corrupt(image.unsqueeze(0), name, 3, ids[row : row + 1]) for row, image in enumerate(images)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_batch_that_is_worked_on_in_parts_gives_the_same(monkeypatch, images, name):
    ids = torch.arange(len(images))
    whole = corrupt(images, name, 5, ids)
    monkeypatch.setattr(batch, "_CHUNK", 5 * images[0].numel())
    assert torch.equal(corrupt(images, name, 5, ids), whole)


@pytest.mark.parametrize("name", RANDOM)
def test_other_ids_and_other_seeds_corrupt_in_another_way(images, name):
    same = images[:1].expand(2, -1, -1, -1)
    first, second = corrupt(same, name, 5, torch.tensor([0, 1]))
    reseeded = corrupt(same, name, 5, torch.tensor([0, 1]), seed=1)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, reseeded)
    assert not torch.equal(second, reseeded)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - set(RANDOM)))
def test_corruption_without_chance_ignores_ids_and_seed(images, name):
    ids = torch.arange(len(images))
    assert torch.equal(corrupt(images, name, 5, ids), corrupt(images, name, 5, ids + 99, seed=1))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_global_random_state_neither_counts_nor_changes(images, name):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        results.append(corrupt(images, name, 5, torch.arange(len(images))))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_memory_layout_of_the_images_does_not_matter(images, name):
    ids = torch.arange(len(images))
    scattered = images.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert not scattered.is_contiguous()
    assert torch.equal(corrupt(scattered, name, 5, ids), corrupt(images, name, 5, ids))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_that_are_given_stay_as_they_are(images, name):
    given = images.clone()
    corrupt(given, name, 5, torch.arange(len(images))).fill_(0)
    corrupt(given, name, 0, torch.arange(len(images))).fill_(0)
    assert torch.equal(given, images)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (2, 1, 1, 1), (2, 3, 2, 5), (1, 1, 3, 3)])
@pytest.mark.filterwarnings("error")
def test_few_images_and_tiny_images_keep_their_shape(name, shape):
    images = torch.zeros(shape, dtype=torch.uint8)
    corrupted = corrupt(images, name, 5, torch.arange(len(images)))
    assert corrupted.shape == shape
    assert corrupted.dtype == torch.uint8


@pytest.mark.parametrize("name", ["fog", "contrast", "gaussian_blur", "defocus_blur", "motion_blur", "glass_blur"])
def test_black_image_stays_black(name):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert not corrupt(images, name, 5, torch.tensor([0])).any()


@pytest.mark.parametrize("name", ["frost", "snow", "spatter", "Fog", ""])
def test_unknown_corruption_is_refused_with_those_that_are_known(name):
    with pytest.raises(ValueError, match=r"`corruption` must be one of brightness, .*, shot_noise, got .* photographs"):
        check_corruption(name, 1)


@pytest.mark.parametrize("severity", [-1, 6, 2.5, 3.0, True, "3"])
def test_severity_outside_zero_to_five_is_refused(severity):
    with pytest.raises(ValueError, match=r"`severity` must be a whole number from 0 .* to 5, got"):
        check_corruption("fog", severity)


def test_arguments_are_checked_without_images_too():
    with pytest.raises(ValueError, match="`severity`"):
        corrupt(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "fog", 6, torch.arange(0))
    check_corruption("fog", 0)


def test_floats_are_refused():
    with pytest.raises(ValueError, match=r"`images` must be of torch.uint8, .* got torch.float32"):
        corrupt(torch.zeros(1, 3, 4, 4), "fog", 1, torch.tensor([0]))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 2, 4, 4), (1, 4, 4, 4), (1, 4, 4, 3), (1, 1, 3, 4, 4)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"`images` must have the shape \(batch, channels, height, width\)"):
        corrupt(torch.zeros(shape, dtype=torch.uint8), "fog", 1, torch.tensor([0]))


@pytest.mark.parametrize("ids", [torch.arange(3), torch.tensor(0), torch.zeros(2, 1).long(), torch.zeros(2)])
def test_ids_that_are_not_one_integer_an_image_are_refused(ids):
    with pytest.raises(ValueError, match=r"`ids` must hold one integer for each of the 2 images, got torch"):
        corrupt(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "fog", 1, ids)
