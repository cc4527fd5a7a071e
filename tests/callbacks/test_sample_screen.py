"""The samples of a task are ranked by how they moved, and nothing of the run changes."""

import csv

import numpy as np
import pytest
import torch
from command_line import OPTIONS, options_for
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import IMAGES, LABELS, Judge, SaveAfterSteps, fit_stream, same, same_weights
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl.callbacks import PoisonDetector, Replay, SampleScreen
from lightning_cl.cli import main
from lightning_cl.datamodules import ClassIncremental, Digits, PoisonedTask, TaskList
from lightning_cl.models import ImageClassifier
from lightning_cl.tasks import ContinualCallback
from tests.modules import DigitsData, Plain, quiet_trainer

POISONED = torch.tensor([3, 7, 20, 21, 40])


class Known(ClassIncremental):
    """Says which samples of its second task are poisoned."""

    def poisoned_indices(self, split="train", task=None):
        return POISONED if task == 1 else POISONED[:0]


class Nets(ContinualCallback):
    """Keeps the module as it was at the start and at the end of each task."""

    def __init__(self):
        self.states = {}

    def on_task_start(self, trainer, pl_module, task):
        self._keep(pl_module, task)

    def accept_task(self, trainer, pl_module, task):
        self._keep(pl_module, task)
        return True

    def _keep(self, pl_module, task):
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.states.setdefault(task.index, []).append(state)

    def outputs(self, task, which, layers):
        module = Plain()
        module.load_state_dict(self.states[task][which])
        x, found = IMAGES[48 * task : 48 * task + 48], []
        with torch.no_grad():
            for number, layer in enumerate(module.eval().net):
                x = layer(x)
                if number in layers:
                    found.append(x.double().numpy())
        return found


def _screened(screen=None, others=(), module=Plain, data=None, **settings):
    screen = screen or SampleScreen()
    trainer, module = fit_stream([*others, screen], module, data or DigitsData(), **settings)
    return screen, trainer, module


def _scores_by_hand(nets, task, layers):
    labels, total = LABELS[48 * task : 48 * task + 48].numpy(), 0
    for old, new in zip(nets.outputs(task, 0, layers), nets.outputs(task, 1, layers), strict=True):
        moved, length = np.linalg.norm(new - old, axis=1), np.linalg.norm(old, axis=1)
        shift = np.log(moved / length)
        for label in np.unique(labels):
            own = shift[labels == label]
            spread = 1.4826 * np.median(np.abs(own - np.median(own))) + 1e-3
            shift[labels == label] = (own - np.median(own)) / spread
        total = total + shift
    return total


def _by_sample(ranking):
    return ranking.scores[ranking.indices.argsort()]


@pytest.mark.parametrize(("layers", "numbers"), [(None, [0]), (["net.[24]"], [2, 4])], ids=["default", "named"])
def test_samples_are_ranked_by_how_far_they_moved_in_the_layers(layers, numbers):
    nets = Nets()
    screen, _, _ = _screened(SampleScreen(layers), [nets])
    for task in (1, 2):
        ranking = screen.ranking(task)
        assert sorted(ranking.indices.tolist()) == list(range(48))
        assert (ranking.scores.diff() <= 0).all()
    expected = torch.from_numpy(_scores_by_hand(nets, 1, numbers)).float()
    # outputs are kept in half precision
    torch.testing.assert_close(_by_sample(screen.ranking(1)), expected, atol=0.25, rtol=0.05)


def test_all_tasks_but_the_first_are_screened():
    screen, _, _ = _screened()
    assert list(screen.rankings) == [1, 2]
    assert same(screen.ranking(), screen.ranking(2))
    with pytest.raises(ValueError, match="`task=0` was not screened; these were: 1, 2"):
        screen.ranking(0)


def test_the_tasks_that_are_named_are_screened():
    screen, _, _ = _screened(SampleScreen(tasks=[0, 2]))
    assert list(screen.rankings) == [0, 2]


def test_as_many_samples_as_asked_for_are_screened():
    screen, _, _ = _screened(SampleScreen(samples=10))
    assert len(screen.ranking(1).indices) == 10
    assert len(screen.ranking(1).indices.unique()) == 10
    everything, _, _ = _screened(SampleScreen(samples=10_000))
    assert len(everything.ranking(1).indices) == 48


def test_the_outputs_of_before_are_kept_no_longer_than_the_task():
    sizes = {}

    class Looks(ContinualCallback):
        def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
            sizes[trainer.datamodule.current_task.index] = {
                n: r.shape for n, r in screen.state_dict()["before"].items()
            }

        def on_task_end(self, trainer, pl_module, task):
            assert screen.state_dict()["before"] == {}

    screen = SampleScreen(samples=10)
    _screened(screen, [Looks()])
    assert sizes[0] == {}
    assert sizes[1] == sizes[2]
    assert all(shape[0] == 10 for shape in sizes[2].values())


# ------------------------------------------------------------------ the known poison


def test_the_share_of_poisoned_samples_among_the_first_is_logged():
    screen, trainer, _ = _screened(sequence=Known(DigitsData(), num_tasks=3))
    first = screen.ranking(1).indices[: len(POISONED)]
    share = torch.isin(first, POISONED).float().mean()
    assert trainer.callback_metrics["screen/precision_at_k"] == share


def test_nothing_is_logged_where_the_poison_is_unknown():
    _, trainer, _ = _screened()
    assert not any(name.startswith("screen") for name in trainer.callback_metrics)


def test_faded_images_come_first():
    """Of a net with convolutions, which most images move alike."""
    data = PoisonedTask(
        ClassIncremental(Digits(), num_tasks=5), task=2, corruption="contrast", samples=0.15, classes=[4]
    )
    screen = SampleScreen()
    module = ImageClassifier("convnet", input_shape=(1, 8, 8))
    _, trainer, _ = _screened(screen, module=module, sequence=data, max_epochs=2, limit_val_batches=0)
    poisoned = data.poisoned_indices("train", task=2)
    chance = len(poisoned) / len(screen.ranking(2).indices)
    assert trainer.callback_metrics["screen/precision_at_k"] > 4 * chance


# ------------------------------------------------------------------ files


def _table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def _logged(folder):
    return {"logger": CSVLogger(folder, "", version="")}


def test_the_table_holds_the_ranking(tmp_path):
    screen, _, _ = _screened(sequence=Known(DigitsData(), num_tasks=3), **_logged(tmp_path))
    rows, ranking = _table(tmp_path / "suspicious_task_1.csv"), screen.ranking(1)
    assert [int(row["rank"]) for row in rows] == list(range(1, 49))
    assert [int(row["index"]) for row in rows] == ranking.indices.tolist()
    assert [int(row["label"]) for row in rows] == LABELS[48:96][ranking.indices].tolist()
    assert [float(row["score"]) for row in rows] == pytest.approx(ranking.scores.tolist(), rel=1e-5)
    assert {int(row["index"]) for row in rows if row["poisoned"] == "1"} == set(POISONED.tolist())


def test_vectors_have_a_table_and_no_picture(tmp_path):
    _screened(**_logged(tmp_path))
    assert {path.name for path in tmp_path.glob("suspicious*")} == {"suspicious_task_1.csv", "suspicious_task_2.csv"}
    assert {row["poisoned"] for row in _table(tmp_path / "suspicious_task_1.csv")} == {""}


@pytest.mark.parametrize("top", [3, 1000])
def test_images_have_a_picture(top, tmp_path):
    sequence, module = ClassIncremental(Digits(), num_tasks=5), ImageClassifier(input_shape=(1, 8, 8))
    _screened(SampleScreen(tasks=[1], samples=40, top=top), module=module, sequence=sequence, **_logged(tmp_path))
    assert (tmp_path / "suspicious_task_1.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_writes_nothing(tmp_path):
    _screened(fast_dev_run=True, default_root_dir=tmp_path)
    assert list(tmp_path.rglob("suspicious*")) == []


# ------------------------------------------------------------------ an observer


class Noisy(Plain):
    def __init__(self):
        super().__init__(dropout=0.3, batch_norm=True)

    def forward(self, images):
        return super().forward(images + 0.01 * torch.randn_like(images))


def test_screening_changes_no_bit_of_the_run(tmp_path):
    _, module = fit_stream([Replay(20)], Noisy, DigitsData())
    state = torch.get_rng_state()
    _, _, screened = _screened(others=[Replay(20)], module=Noisy, **_logged(tmp_path))
    assert same_weights(module, screened)
    assert torch.equal(state, torch.get_rng_state())


def test_a_task_that_is_undone_was_screened(tmp_path):
    detector = PoisonDetector(threshold=0.0)  # to which nothing stays
    screen, _, _ = _screened(others=[detector], **_logged(tmp_path))
    assert list(screen.rankings) == [1, 2]
    assert len(_table(tmp_path / "suspicious_task_2.csv")) == 48


def test_a_task_that_is_trained_again_is_screened_as_it_was_trained_last():
    repeated, _, _ = _screened(others=[Judge(1, [1, 0])])
    once, _, _ = _screened()
    assert same(repeated.rankings, once.rankings)


# ------------------------------------------------------------------ resuming

STEPS = [7, 8, 12]  # of 18, six a task: in the middle of the second task, and its last


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A screen, its module and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    others = [Replay(20), SaveAfterSteps(folder, STEPS)]
    screen, _, module = _screened(others=others, module=Noisy, max_epochs=2, enable_checkpointing=True)
    return screen, module, folder


@pytest.mark.parametrize("step", STEPS)
def test_a_resumed_run_has_the_rankings_of_an_uninterrupted_one(step, saved):
    screen, module, folder = saved
    resumed, _, again = _screened(others=[Replay(20)], module=Noisy, max_epochs=2, ckpt_path=folder / f"{step}.ckpt")
    assert list(resumed.rankings) == [1, 2]
    assert same(resumed.state_dict(), screen.state_dict())
    assert same_weights(again, module)


def test_what_is_saved_loads_without_running_code_and_is_no_slice(saved):
    _, _, folder = saved
    state = torch.load(folder / "8.ckpt", weights_only=True)["callbacks"]["SampleScreen"]
    assert {name: rows.dtype for name, rows in state["before"].items()} == {
        "net.0": torch.float16,
        "net.1": torch.float16,
    }
    for rows in state["before"].values():
        assert rows.dtype == torch.float16
        assert rows.untyped_storage().nbytes() == rows.numel() * rows.element_size()


def test_resuming_with_other_samples_is_refused(saved):
    _, _, folder = saved
    with pytest.raises(MisconfigurationException, match=r"`samples=None`.*`samples=10`.*Resume with the same"):
        _screened(SampleScreen(samples=10), [Replay(20)], Noisy, max_epochs=2, ckpt_path=folder / "8.ckpt")


def test_a_task_that_was_begun_without_the_screen_is_not_ranked(tmp_path):
    fit_stream([SaveAfterSteps(tmp_path, [4])], Plain, DigitsData())
    screen = SampleScreen()
    with pytest.warns(UserWarning, match=r"did not see the start of task 1 \(classes 2, 3\), so it is not screened"):
        _screened(screen, ckpt_path=tmp_path / "4.ckpt", **_logged(tmp_path))
    assert list(screen.rankings) == [2]
    assert not (tmp_path / "suspicious_task_1.csv").exists()


def test_a_test_with_a_checkpoint_leaves_the_rankings_of_the_fit(saved):
    _, _, folder = saved
    screen, trainer, module = _screened(others=[Replay(20)], module=Noisy)
    before = screen.state_dict()
    trainer.test(module, datamodule=trainer.datamodule, ckpt_path=folder / "8.ckpt", verbose=False)
    assert same(screen.state_dict(), before)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": "net.0"}, TypeError, "`layers` must be a list of layer names or patterns, got 'net.0'"),
        ({"tasks": 1}, TypeError, "`tasks` must be a list of task indices, got 1"),
        ({"tasks": []}, ValueError, r"`tasks` must name at least one task, counted from 0, got \[\]"),
        ({"tasks": [1, -1]}, ValueError, "`tasks` must name at least one task, counted from 0"),
        ({"samples": 0}, ValueError, "`samples` must be at least 1, got 0"),
        ({"samples": 0.5}, TypeError, "`samples` must be a whole number, got 0.5"),
        ({"top": 0}, ValueError, "`top` must be at least 1, got 0"),
        ({"top": None}, TypeError, "`top` must be a whole number, got None"),
    ],
    ids=str,
)
def test_an_argument_that_is_not_allowed(arguments, error, message):
    with pytest.raises(error, match=message):
        SampleScreen(**arguments)


class NeverTrained(Plain):
    """Fails the test if a single batch is trained on: errors come before."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training had begun")


class Iterable(DigitsData):
    def train_dataloader(self):
        return DataLoader(Endless(), batch_size=2)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(64), torch.tensor(0))] * 4)


@pytest.mark.parametrize(
    ("screen", "settings", "message"),
    [
        ({"layers": ["body.*"]}, {}, r"`layers` has 'body.\*', which matches no layer of NeverTrained.*'net.0'"),
        ({"tasks": [1, 3]}, {}, r"`tasks=\[1, 3\]` of SampleScreen.*tasks are 0 to 2"),
        ({}, {"sequence": TaskList([DigitsData(), Iterable()])}, "data of task 1 .*can only be iterated"),
        ({}, {"sequence": TaskList([DigitsData()])}, "no stream of several"),
    ],
    ids=["layers", "tasks", "iterable", "one task"],
)
def test_a_run_that_cannot_be_screened_is_refused_before_training(screen, settings, message):
    with pytest.raises(MisconfigurationException, match=message):
        _screened(SampleScreen(**screen), module=NeverTrained, **settings)


class Idle(Plain):
    """Has a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.idle = torch.nn.Linear(2, 2)


def test_a_layer_that_is_named_and_not_called_is_refused():
    with pytest.raises(MisconfigurationException, match=r"`layers` must match layers that put out.*'idle'"):
        _screened(SampleScreen(["net.0", "idle"]), module=Idle)


def test_a_layer_that_is_neither_named_nor_called_is_left_out():
    screen, _, _ = _screened(module=Idle)
    expected, _, _ = _screened()
    assert len(screen.ranking(1).indices) == len(expected.ranking(1).indices)


def test_a_fit_without_tasks_is_refused():
    with pytest.raises(MisconfigurationException, match=r"no stream of several.*`ClassIncremental\("):
        quiet_trainer(callbacks=[SampleScreen()]).fit(NeverTrained(), datamodule=DigitsData())


def test_the_command_line_knows_it_by_its_short_name(tmp_path):
    main(
        [
            "fit",
            *OPTIONS,
            *options_for("SampleScreen", samples=30, tasks="[1]"),
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    (path,) = tmp_path.rglob("suspicious_task_1.csv")
    assert len(_table(path)) == 30
