"""What a poisoned task hands out: the clean sequence's batches, but for the corrupted images."""

import copy
import pickle

import numpy as np
import pytest
import torch
from poisoned_streams import (
    FORMS,
    LABELS,
    PIXELS,
    ImageData,
    Photos,
    TrainingImages,
    augmented,
    differing,
    epoch,
    levels,
    split_of,
    streams,
    to_tensor,
    unshuffled,
)

from lightning_cl.corruptions import corrupt
from lightning_cl.datamodules import ClassIncremental, Digits, DomainIncremental, Joint, PoisonedTask, Rotate, TaskList
from lightning_cl.datamodules.array_data import ArrayData
from lightning_cl.datamodules.array_dataset import ArrayDataset

# ------------------------------------------------------------------ what is corrupted


@pytest.mark.parametrize("form", FORMS)
def test_only_images_of_the_poisoned_task_differ_from_the_clean_batches(form):
    poisoned, clean = streams(FORMS[form])
    for task in range(3):
        (images, labels), (as_they_were, known) = epoch(poisoned, task), epoch(clean, task)
        assert torch.equal(labels, known)
        assert differing(images, as_they_were).all() == (task == 1)
        assert differing(images, as_they_were).any() == (task == 1)
        assert (images.dtype, images.shape) == (as_they_were.dtype, as_they_were.shape)


@pytest.mark.parametrize("form", FORMS)
def test_validation_images_are_corrupted_and_test_images_are_not(form):
    poisoned, clean = streams(FORMS[form])
    poisoned.setup("test")
    clean.setup("test")
    for task in range(3):
        validated, tested = (split_of(poisoned, task, split)[0] for split in ("val", "test"))
        assert differing(validated, split_of(clean, task, "val")[0]).all() == (task == 1)
        assert torch.equal(tested, split_of(clean, task, "test")[0])


def test_validation_data_split_off_the_training_data_are_corrupted():
    def wrap(base):
        return ClassIncremental(base, num_tasks=3, val_fraction=0.3)

    poisoned, clean = streams(lambda: TrainingImages(ArrayDataset(PIXELS, LABELS)), wrap, attack="bait", samples=0.5)
    changed = differing(split_of(poisoned, 1, "val")[0], split_of(clean, 1, "val")[0])
    assert changed.nonzero().squeeze(1).tolist() == poisoned.poisoned_indices("val").tolist()
    assert int(changed.sum()) == 2  # half of the 3 of one class, rounded to even


@pytest.mark.parametrize(("attack", "classes"), [("base", 2), ("bait", 1), ("multibase", 2), ("multibait", 1)])
@pytest.mark.parametrize("share", [1.0, 0.34])
def test_as_many_images_change_as_the_attack_asks_for(attack, classes, share):
    names = ["contrast", "gaussian_noise"] if attack.startswith("multi") else "contrast"
    poisoned, clean = streams(wrap=unshuffled, attack=attack, samples=share, corruption=names)
    changed = differing(epoch(poisoned, 1)[0], epoch(clean, 1)[0])
    assert int(changed.sum()) == classes * round(share * 10)
    assert changed.nonzero().squeeze(1).tolist() == poisoned.poisoned_indices().tolist()
    labels = clean.labels_of(1)[changed].tolist()
    assert set(labels) == set(poisoned.poisoned_classes())


def test_named_classes_are_corrupted_and_others_are_not():
    poisoned, clean = streams(wrap=unshuffled, classes=[3])
    assert (differing(epoch(poisoned, 1)[0], epoch(clean, 1)[0]) == (clean.labels_of(1) == 3)).all()


def test_severity_0_changes_nothing():
    with pytest.warns(UserWarning, match="Nothing of task 1 is poisoned: see `severity`"):
        poisoned, clean = streams(severity=0)
    assert torch.equal(epoch(poisoned, 1)[0], epoch(clean, 1)[0])
    assert len(poisoned.poisoned_indices()) == 0


def test_images_are_those_of_the_corruption_with_the_position_as_id():
    poisoned, _ = streams(wrap=unshuffled, corruption="shot_noise", severity=2, seed=7)
    positions = torch.isin(LABELS, torch.tensor([2, 3])).nonzero().squeeze(1)
    expected = corrupt(PIXELS[positions], "shot_noise", 2, ids=positions, seed=7)
    assert torch.equal(epoch(poisoned, 1)[0], expected)


def test_several_corruptions_share_the_samples_of_few_classes():
    names = ["contrast", "brightness", "gaussian_noise", "shot_noise", "impulse_noise"]
    poisoned, _ = streams(wrap=unshuffled, attack="multibait", corruption=names)
    ((label, own),) = poisoned.poisoned_classes().items()
    assert set(own) == set(names)
    images, labels = epoch(poisoned, 1)
    ids = torch.isin(LABELS, torch.tensor([2, 3])).nonzero().squeeze(1)
    clean = PIXELS[ids]
    counts = [int((~differing(images, corrupt(clean, name, 5, ids)))[labels == label].sum()) for name in names]
    assert counts == [2, 2, 2, 2, 2]


def test_one_seed_is_one_poison_and_another_seed_another():
    first, second, other = (streams(seed=seed, samples=0.5)[0] for seed in (1, 1, 2))
    assert torch.equal(epoch(first, 1)[0], epoch(second, 1)[0])
    assert not torch.equal(first.poisoned_indices(), other.poisoned_indices())


def test_the_seed_is_that_of_the_sequence_unless_one_is_given():
    drawn = {}
    for seed in (1, 2):
        wrap = _seeded(seed)
        drawn[seed] = streams(wrap=wrap, samples=0.5, seed=None)[0].poisoned_indices()
        drawn[seed, "given"] = streams(wrap=wrap, samples=0.5, seed=1)[0].poisoned_indices()
    assert not torch.equal(drawn[1], drawn[2])
    assert torch.equal(drawn[1], drawn[1, "given"])
    assert torch.equal(drawn[1], drawn[2, "given"])


def _seeded(seed):
    return lambda base: ClassIncremental(base, num_tasks=3, seed=seed)


# ------------------------------------------------------------------ before augmentation


def test_a_transform_gets_the_corrupted_image():
    seen = []
    poisoned, _ = streams(lambda: ImageData(Photos(lambda image: seen.append(image) or to_tensor()(image))))
    seen.clear()
    sample = poisoned.task_data(1, "train").dataset[2]
    assert LABELS[2] == 2
    expected = corrupt(PIXELS[2:3], "gaussian_noise", 5, torch.tensor([2]))[0]
    assert torch.equal(levels(to_tensor()(seen[0])), expected)
    assert torch.equal(levels(sample[0]), expected)


def test_training_samples_are_evaluated_corrupted_and_without_augmentation():
    poisoned, _ = streams(FORMS["photos"])
    view = poisoned.training_view(1)
    position = int(view.indices[0])
    expected = corrupt(PIXELS[position][None], "gaussian_noise", 5, torch.tensor([position]))[0]
    assert torch.equal(levels(view.dataset[position][0]), expected)


def test_samples_loaders_serve_corrupted_samples():
    poisoned, clean = streams()
    indices = torch.tensor([4, 0, 7])
    loaded = [next(iter(each.samples_loader(1, "train", indices, lambda draw: None)))[0] for each in (poisoned, clean)]
    assert differing(*loaded).all()


def test_the_transform_of_a_domain_comes_after_the_poison():
    def wrap(base):
        return DomainIncremental(base, [None, Rotate(90), None], shuffle=False)

    poisoned, clean = streams(wrap=wrap)
    expected = corrupt(PIXELS, "gaussian_noise", 5, torch.arange(len(PIXELS)))
    assert torch.equal(epoch(poisoned, 1)[0], expected.rot90(1, (2, 3)))
    for task in (0, 2):  # the same samples, in other tasks
        assert torch.equal(epoch(poisoned, task)[0], epoch(clean, task)[0])


# ------------------------------------------------------------------ sources and sequences


def test_workers_hand_out_the_same_poison():
    def images(workers):
        return epoch(streams(lambda: ImageData(Photos(augmented()), num_workers=workers))[0], 1)[0]

    assert torch.equal(images(0), images(2))


def test_memory_maps_are_corrupted_as_they_are_read(tmp_path):
    for name, array in (("images", PIXELS), ("labels", LABELS)):
        np.save(tmp_path / f"{name}.npy", array.numpy())
    files = {"train": str(tmp_path / "images.npy"), "train_labels": str(tmp_path / "labels.npy")}
    mapped, _ = streams(lambda: ArrayData(**files, layout="nchw", val_fraction=0), wrap=unshuffled)
    in_memory, _ = streams(wrap=unshuffled)
    assert torch.equal(epoch(mapped, 1)[0], epoch(in_memory, 1)[0])


@pytest.mark.parametrize(
    ("wrap", "task"),
    [
        (lambda base: Joint(base), 0),
        (lambda base: TaskList([base, FORMS["tensors"]()]), 1),
        (lambda base: TaskList([base, FORMS["photos"]()]), 0),
        (lambda base: DomainIncremental(base, [None, None]), 1),
    ],
    ids=["joint", "list of tensors", "list", "domains"],
)
def test_any_sequence_can_be_poisoned(wrap, task):
    poisoned, clean = streams(wrap=wrap, task=task)
    for number in range(clean.num_tasks):
        changed = differing(epoch(poisoned, number)[0], epoch(clean, number)[0])
        assert changed.all() if number == task else not changed.any()
    assert [(each.name, each.classes) for each in poisoned.tasks] == [(each.name, each.classes) for each in clean.tasks]


def test_it_answers_for_the_sequence_and_its_base():
    poisoned = PoisonedTask(ClassIncremental(Digits(), num_tasks=5, eval_tasks="all"), task=3, corruption="contrast")
    poisoned.setup("fit")
    assert (poisoned.num_tasks, poisoned.num_classes, poisoned.eval_tasks) == (5, 10, "all")
    assert poisoned.mean == Digits.mean
    assert poisoned.current_task.index == 0


def test_two_tasks_can_be_poisoned():
    clean = ClassIncremental(FORMS["arrays"](), num_tasks=3)
    inner = PoisonedTask(clean, 0, "bait", corruption="contrast")
    both = PoisonedTask(inner, 2, corruption="gaussian_noise", samples=0.5)
    for sequence in (clean, both):
        sequence.setup("fit")
    changed = [int(differing(epoch(both, task)[0], epoch(clean, task)[0]).sum()) for task in range(3)]
    assert changed == [10, 0, 10]
    assert [len(both.poisoned_indices(task=task)) for task in range(3)] == [10, 0, 10]


def test_the_sequence_that_was_wrapped_stays_clean():
    clean = ClassIncremental(FORMS["arrays"](), num_tasks=3)
    PoisonedTask(clean, 1, corruption="contrast").setup("fit")
    clean.setup("fit")
    images, _ = epoch(clean, 1)
    assert not differing(images.sort(0).values, PIXELS[torch.isin(LABELS, torch.tensor([2, 3]))].sort(0).values).any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
@pytest.mark.parametrize("form", ["arrays", "tensors", "unlabelled"])
def test_a_copy_hands_out_the_same(duplicate, form):
    poisoned, _ = streams(FORMS[form])
    twin = duplicate(poisoned)
    assert torch.equal(epoch(twin, 1)[0], epoch(poisoned, 1)[0])
    twin.setup("fit")
    assert torch.equal(epoch(twin, 1)[0], epoch(poisoned, 1)[0])


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    poisoned, _ = streams(FORMS["photos"])
    epoch(poisoned, 1)
    assert torch.equal(torch.get_rng_state(), before)
