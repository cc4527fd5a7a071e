import pytest
import torch
from PIL import Image
from plain_bases import LABELS, PIXELS, FullData, PlainData, digits, ready, samples_in
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from lightning_cl.datamodules import ArrayData, Digits, DomainIncremental, Permute, Rotate


def _double(pixels):
    return pixels * 2


class Negative:
    def __call__(self, pixels):
        return -pixels


def _epoch(sequence, task):
    sequence.enter_task(task)
    return samples_in(sequence.train_dataloader())


def test_each_task_has_all_the_data_through_its_own_transform():
    sequence = ready(DomainIncremental(PlainData(shuffle=False), transforms=[None, _double, Negative()]))
    assert torch.equal(_epoch(sequence, 0)[0], PIXELS[:600])
    assert torch.equal(_epoch(sequence, 1)[0], PIXELS[:600] * 2)
    assert torch.equal(_epoch(sequence, 2)[0], -PIXELS[:600])
    for task in range(3):
        assert torch.equal(_epoch(sequence, task)[1], LABELS[:600])


def test_validation_and_test_data_pass_through_the_transforms_too():
    sequence = ready(DomainIncremental(FullData(), transforms=[None, Negative()]))
    assert torch.equal(samples_in(sequence.val_dataloader())[0], torch.cat([PIXELS[600:900], -PIXELS[600:900]]))
    sequence.setup("test")
    assert torch.equal(samples_in(sequence.test_dataloader())[0], torch.cat([PIXELS[900:1200], -PIXELS[900:1200]]))


def test_every_task_has_the_same_classes():
    sequence = ready(DomainIncremental(PlainData(), transforms=[None, _double]))
    assert [task.classes for task in sequence.tasks] == [tuple(range(10))] * 2
    assert sequence.num_classes == 10


def test_tasks_are_named_after_their_transforms():
    transforms = [None, _double, Negative(), Permute(seed=1), Rotate(30)]
    names = [task.name for task in ready(DomainIncremental(PlainData(), transforms=transforms)).tasks]
    assert names == ["unchanged", "_double", "Negative", "Permute(seed=1)", "Rotate(degrees=30)"]


def test_a_regression_stream_has_no_classes():
    base = PlainData(torch.utils.data.TensorDataset(PIXELS[:40], torch.rand(40)))
    sequence = ready(DomainIncremental(base, transforms=[None, _double]))
    assert sequence.num_classes is None
    assert [task.classes for task in sequence.tasks] == [None, None]


@pytest.mark.parametrize("transform", [Permute(seed=5), Rotate(90)], ids=repr)
def test_ready_transforms_work_on_uint8_images_a_batch_at_a_time(transform):
    plain, seen = (
        _epoch(ready(DomainIncremental(Digits(), transforms=[t], shuffle=False)), 0) for t in (None, transform)
    )
    assert seen[0].dtype == torch.uint8
    assert torch.equal(seen[0], torch.stack([transform(image) for image in plain[0]]))
    assert torch.equal(seen[1], plain[1])


def test_feature_vectors_are_permuted_each_for_itself(tmp_path):
    import numpy as np

    np.savez(tmp_path / "vectors.npz", images=PIXELS[:50].numpy(), labels=LABELS[:50].numpy())
    base = ArrayData(train=tmp_path / "vectors.npz", val_fraction=0.0, batch_size=16)
    permute = Permute(seed=2)
    vectors, labels = _epoch(ready(DomainIncremental(base, transforms=[permute], shuffle=False)), 0)
    assert torch.equal(vectors, torch.stack([permute(vector) for vector in PIXELS[:50]]))
    assert torch.equal(labels, LABELS[:50])


@pytest.mark.parametrize("transform", [Rotate(90), Permute(seed=1)], ids=repr)
def test_transforms_work_on_pil_images(transform):
    class Pictures(Dataset):
        targets = LABELS[:12].tolist()

        def __len__(self):
            return 12

        def __getitem__(self, index):
            return Image.fromarray(PIXELS[index].view(8, 8).byte().numpy()), self.targets[index]

    def collate(samples):
        images = [torch.as_tensor(functional.to_image(x) if isinstance(x, Image.Image) else x) for x, _ in samples]
        return torch.stack(images), torch.tensor([y for _, y in samples])

    base = PlainData(Pictures(), collate_fn=collate, shuffle=False, batch_size=12)
    images, _ = _epoch(ready(DomainIncremental(base, transforms=[transform])), 0)
    assert torch.equal(images, transform(PIXELS[:12].view(-1, 1, 8, 8).byte()))


def test_a_random_transform_gives_a_sample_the_same_look_again_and_another_in_the_next_task():
    def noise(pixels):
        return pixels + torch.rand(())

    sequence = ready(DomainIncremental(PlainData(shuffle=False), transforms=[noise, noise]))
    first, second = _epoch(sequence, 0)[0], _epoch(sequence, 1)[0]
    assert torch.equal(first, _epoch(sequence, 0)[0])
    assert not torch.equal(first, second)


def test_inputs_names_what_is_transformed():
    class Dicts(PlainData):
        def train_dataloader(self):
            samples = [{"left": PIXELS[i], "right": PIXELS[i], "label": int(LABELS[i])} for i in range(8)]
            return DataLoader(samples, batch_size=8)

    sequence = ready(DomainIncremental(Dicts(), transforms=[Negative()], inputs="left"))
    batch = next(iter(sequence.train_dataloader()))
    assert torch.equal(batch["left"], -PIXELS[:8])


def test_what_an_input_named_apart_shares_with_another_stays():
    class Dicts(PlainData):
        def train_dataloader(self):
            samples = [{"left": PIXELS[i], "right": PIXELS[i].clone(), "label": int(LABELS[i])} for i in range(8)]
            return DataLoader(samples, batch_size=8)

    sequence = ready(DomainIncremental(Dicts(), transforms=[Negative()], inputs="left"))
    assert torch.equal(next(iter(sequence.train_dataloader()))["right"], PIXELS[:8])


def test_tensor_data_pass_through_transforms_with_workers_alike():
    alone, helped = (
        _epoch(ready(DomainIncremental(PlainData(digits(0, 100), num_workers=n), transforms=[Permute(seed=1)])), 0)
        for n in (0, 1)
    )
    assert torch.equal(alone[0], helped[0])
