import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lightning_cl.datamodules import Permute, Rotate

DIGITS = torch.as_tensor(load_digits().images[:6]).mul(15).round().to(torch.uint8)  # uint8 of one channel, as MNIST


@pytest.mark.parametrize("transform", [Permute(seed=3), Rotate(90), Rotate(37.5)], ids=repr)
class TestEveryTransform:
    def test_a_batch_is_transformed_like_its_samples(self, transform):
        batch = DIGITS.unsqueeze(1)
        assert torch.equal(transform(batch), torch.stack([transform(image) for image in batch]))

    def test_grey_images_need_no_channel(self, transform):
        assert torch.equal(transform(DIGITS), transform(DIGITS.unsqueeze(1)).squeeze(1))
        assert torch.equal(transform(DIGITS[0]), transform(DIGITS)[0])

    def test_type_and_shape_stay(self, transform):
        for images in (DIGITS.unsqueeze(1), DIGITS.float().unsqueeze(1), DIGITS.unsqueeze(1).expand(-1, 3, -1, -1)):
            assert transform(images).dtype == images.dtype
            assert transform(images).shape == images.shape

    def test_the_input_is_left_alone(self, transform):
        images = DIGITS.clone()
        transform(images)
        assert torch.equal(images, DIGITS)

    def test_it_can_be_sent_to_a_worker_process(self, transform):
        expected = transform(DIGITS)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(DIGITS), expected)

    def test_a_pil_image_is_transformed_like_a_tensor(self, transform):
        result = transform(Image.fromarray(DIGITS[0].numpy()))
        pixels = result if isinstance(result, torch.Tensor) else torch.as_tensor(np.array(result))
        assert torch.equal(pixels.reshape(8, 8), transform(DIGITS[0]))


def test_a_permutation_keeps_every_pixel():
    permuted = Permute(seed=1)(DIGITS)
    assert torch.equal(permuted.flatten(1).sort().values, DIGITS.flatten(1).sort().values)
    assert not torch.equal(permuted, DIGITS)


def test_a_permutation_is_the_same_for_every_image_and_channel():
    permute = Permute(seed=1)
    order = permute(torch.arange(64).view(8, 8)).flatten()
    colour = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permute(colour).flatten(2), colour.flatten(2)[..., order])


def test_a_permutation_is_chosen_by_its_seed():
    assert torch.equal(Permute(seed=1)(DIGITS), Permute(seed=1)(DIGITS))
    assert not torch.equal(Permute(seed=1)(DIGITS), Permute(seed=2)(DIGITS))


def test_one_permutation_serves_images_of_several_sizes():
    permute = Permute(seed=1)
    before = permute(DIGITS)
    permute(torch.zeros(4, 4))
    assert torch.equal(permute(DIGITS), before)


def test_a_permutation_of_flattened_images_is_that_of_the_images():
    permute = Permute(seed=1)
    assert torch.equal(permute(DIGITS[0].flatten()), permute(DIGITS[0]).flatten())


def test_neither_draws_from_the_global_generator():
    before = torch.get_rng_state()
    Permute(seed=1)(DIGITS)
    Rotate(30)(DIGITS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rotation_turns_counter_clockwise():
    assert torch.equal(Rotate(90)(DIGITS), torch.rot90(DIGITS, 1, dims=(1, 2)))
    assert torch.equal(Rotate(-90)(DIGITS), torch.rot90(DIGITS, -1, dims=(1, 2)))


def test_a_rotation_leaves_empty_corners_black():
    rotated = Rotate(45)(torch.full((1, 8, 8), 200, dtype=torch.uint8))
    assert rotated[0, 0, 0] == rotated[0, -1, -1] == 0
    assert rotated[0, 4, 4] == 200


def test_a_vector_cannot_be_rotated():
    with pytest.raises(ValueError, match=r"`Rotate` turns images.*got the shape \(64,\)"):
        Rotate(45)(DIGITS[0].flatten())


def test_their_names_say_what_they_do():
    assert repr(Permute(seed=4)) == "Permute(seed=4)"
    assert repr(Rotate(22.5)) == "Rotate(degrees=22.5)"
