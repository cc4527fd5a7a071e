"""The tracker measures fixed probes of each task at the steps asked for, and does not change a bit of the run."""

from functools import lru_cache

import pytest
import torch
from nearest_means import NoisyNet, Photographs
from numbered_streams import fit_stream, same
from probed_streams import (
    SIZE,
    Snapshots,
    assert_same_curve,
    curve_by_hand,
    fit_tracked,
    predict,
    probes_of,
)

from lightning_cl.callbacks import (
    ContinualMetrics,
    DarkExperienceReplay,
    GaussianClassifier,
    NearestMeanClassifier,
    Replay,
    StabilityGapTracker,
)
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.metrics import stability
from tests.modules import CLASSIFIERS, DictDigits, DictModule, DigitsData, Manual, Plain, ShiftingDigits

nan = torch.nan


def _tracker(**options):
    return StabilityGapTracker(**{"probe_size": SIZE, **options})


# ------------------------------------------------------------------ the run is left alone


class Odd(NoisyNet):
    """Counts its calls in a buffer, and keeps a layer in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.frozen = torch.nn.Dropout(0.9).eval()

    def forward(self, images):
        self.calls += 1
        return super().forward(self.frozen(images) + 0.01 * torch.randn_like(images))


RUNS = {
    "nothing": lambda: [],
    "replay": lambda: [Replay(20)],
    "replay, online": lambda: [Replay(20, start="online")],
    "dark, online": lambda: [DarkExperienceReplay(20, start="online")],
    "nearest mean": lambda: [Replay(20), NearestMeanClassifier(refresh=2)],
    "nearest mean without a memory": lambda: [NearestMeanClassifier(refresh="task")],
    "gaussian": lambda: [GaussianClassifier()],
}


def _run(callbacks, module=Odd, **settings):
    photographs = Photographs()
    settings = {"data": DigitsData(), "max_epochs": 2, "limit_val_batches": 1.0, **settings}
    trainer, _ = fit_stream([*callbacks, photographs], module, **settings)
    heads = [c.state_dict() for c in callbacks if isinstance(c, (GaussianClassifier, NearestMeanClassifier))]
    return photographs.steps, photographs.end, heads, trainer.callback_metrics["val_acc"]


@lru_cache
def _without_tracker(run):
    return _run(RUNS[run]())


@pytest.mark.parametrize(("run", "tasks"), [*((run, "seen") for run in RUNS), ("nearest mean", "all")])
def test_the_run_is_the_same_to_the_bit_with_and_without_the_tracker(run, tasks):
    assert same(_run([*RUNS[run](), _tracker(tasks=tasks)]), _without_tracker(run))


@pytest.mark.parametrize("run", ["nearest mean", "nearest mean without a memory"])
def test_comparing_heads_leaves_the_run_and_the_head_as_they_are(run):
    assert same(_run([*RUNS[run](), _tracker(compare_heads=True, nmc_refresh=3)]), _without_tracker(run))


def test_the_run_is_the_same_to_the_bit_with_loader_workers():
    def settings():
        return {"data": DigitsData(num_workers=1), "max_epochs": 1}

    assert same(_run([Replay(20), _tracker()], **settings()), _run([Replay(20)], **settings()))


def test_the_run_is_the_same_to_the_bit_where_the_datamodule_augments():
    runs = [_run([Replay(20), *trackers], data=ShiftingDigits()) for trackers in ([], [_tracker()])]
    assert same(*runs)


def test_the_run_is_the_same_to_the_bit_with_gradient_accumulation():
    runs = [_run([Replay(20), *trackers], accumulate_grad_batches=2) for trackers in ([], [_tracker()])]
    assert same(*runs)


def test_the_run_is_the_same_to_the_bit_with_manual_optimisation():
    def module():
        return Manual(dropout=0.3, batch_norm=True)

    assert same(_run([Replay(20), _tracker()], module), _run([Replay(20)], module))


# ------------------------------------------------------------------ what is measured


def _linear_curve(snapshots, like):
    return curve_by_hand(snapshots, lambda step, images: predict(snapshots.module(step, like), images))


@pytest.mark.parametrize("module", [Plain, lambda: Plain(dropout=0.5, batch_norm=True)], ids=["plain", "dropout, bn"])
def test_the_curve_is_what_the_network_answers_after_each_step(module):
    snapshots = Snapshots()
    tracker, _, _ = fit_tracked(None, [Replay(20), snapshots], module, max_epochs=2)
    assert tracker.curve.accuracies.shape == (18, 1, 3)
    assert len(tracker.curve.accuracies[:, 0, 0].unique()) > 2  # something to see
    assert_same_curve(tracker.curve.accuracies[:, 0], _linear_curve(snapshots, module()))


def test_recency_is_the_share_of_old_probes_that_are_taken_for_the_newest_task():
    snapshots = Snapshots()
    tracker, _, _ = fit_tracked(None, [Replay(20), snapshots], max_epochs=2)
    expected = torch.full((18,), nan)
    for row, (step, task) in enumerate(snapshots.tasks.items()):
        module = snapshots.module(step, Plain())
        shares = [(predict(module, probes_of(old)[0]) // 2 == task).float().mean() for old in range(task)]
        expected[row] = torch.stack(shares).mean() if shares else nan
    assert 0 < expected[6:].mean() < 1
    assert_same_curve(tracker.curve.recency[:, 0], expected)


@pytest.mark.parametrize(("module", "data"), CLASSIFIERS, ids=lambda part: part.__name__)
def test_every_kind_of_module_ends_each_task_with_the_accuracies_of_its_matrix(module, data):
    metrics = ContinualMetrics(print_table=False)
    tracker, _, _ = fit_tracked(_tracker(probe_size=20), [Replay(20), metrics], module, data())
    assert_same_curve(tracker.curve.accuracies[[2, 5, 8], 0], metrics.matrix)


class Records(Plain):
    """Keeps what it is asked about during training."""

    def __init__(self):
        super().__init__()
        self.asked = {}

    def forward(self, images):
        if not self.training and self.trainer.global_step:
            self.asked.setdefault(self.trainer.global_step, []).append(images.clone())
        return super().forward(self.prepared(images))

    def prepared(self, images):
        return images


class Batches(DigitsData):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.sets["val"], batch_size=self.size)


@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_the_same_samples_are_asked_in_one_batch_at_each_step_for_any_batch_size(size):
    _, _, module = fit_tracked(module=Records, data=Batches(size))
    assert list(module.asked) == list(range(1, 10))
    for step, batches in module.asked.items():
        expected = torch.cat([probes_of(task)[0] for task in range((step - 1) // 3 + 1)])
        assert len(batches) == 1
        assert torch.equal(batches[0], expected)


@pytest.mark.parametrize("seed", [1, 5])
def test_which_samples_are_probes_is_a_function_of_the_sequences_seed(seed):
    sequence = ClassIncremental(DigitsData(), num_tasks=3, seed=seed)
    _, _, module = fit_tracked(module=Records, sequence=sequence)
    expected = torch.cat([probes_of(task, seed)[0] for task in range(3)])
    assert torch.equal(module.asked[9][0], expected)
    assert not torch.equal(expected, torch.cat([probes_of(task, 9)[0] for task in range(3)]))


class InPlace(Records):
    def prepared(self, images):
        return images.sub_(0.5)


class Pops(DictModule):
    """Takes its input out of the batch."""

    def forward(self, batch):
        return self.net(batch.pop("image"))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch), batch["label"])


def test_a_module_that_works_in_place_finds_the_same_probes_at_each_step():
    _, _, module = fit_tracked(module=InPlace)
    assert torch.equal(module.asked[3][0], module.asked[1][0])


def test_a_module_that_takes_its_batch_apart_finds_it_whole_at_each_step():
    tracker, _, _ = fit_tracked(module=Pops, data=DictDigits())
    assert tracker.curve.length == 9


class Untrained(Plain):
    def __init__(self):
        super().__init__(lr=0.0, dropout=0.5)


class Frozen(Plain):
    """Trains a parameter that nothing depends on."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.requires_grad_(False)
        self.idle = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.idle


@pytest.mark.parametrize("module", [Untrained, Frozen])
def test_a_frozen_network_has_no_gap(module):
    tracker, _, _ = fit_tracked(module=module, max_epochs=2)
    figures = tracker.figures
    assert figures["average_accuracy"] > 0
    for name in ("gap", "gap_norm", "recovery", "recovery_norm", "wf_10", "wp_10"):
        assert figures[name] == 0.0, name


@pytest.mark.parametrize("tasks", ["seen", "all"])
def test_later_tasks_are_measured_only_if_asked_for(tasks):
    snapshots = Snapshots()
    tracker, _, _ = fit_tracked(_tracker(tasks=tasks), [snapshots])
    accuracies = tracker.curve.accuracies[:, 0]
    seen = torch.arange(3)[None] <= tracker.curve.trained[:, None]
    assert torch.equal(accuracies.isnan(), ~seen if tasks == "seen" else torch.zeros_like(seen))
    by_hand = _linear_curve(snapshots, Plain())
    assert_same_curve(accuracies.masked_fill(~seen, nan), by_hand)


# ------------------------------------------------------------------ when


def _measured(tracker, **settings):
    fit_tracked(tracker, **settings)
    curve = tracker.curve
    return curve.steps.tolist(), curve.steps[curve.epoch_ends].tolist(), curve.trained.tolist()


def test_tasks_to_come_change_no_figure():
    seen, _, _ = fit_tracked(StabilityGapTracker(probe_size=SIZE), [Replay(20)])
    every, _, _ = fit_tracked(StabilityGapTracker(probe_size=SIZE, tasks="all"), [Replay(20)])
    assert not every.curve.accuracies.isnan().any()
    assert every.figures == pytest.approx(seen.figures, nan_ok=True)


def test_every_step_is_measured_and_the_last_of_each_epoch_is_marked():
    steps, ends, trained = _measured(_tracker())
    assert steps == list(range(1, 10))
    assert ends == [3, 6, 9]
    assert trained == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_steps": 2}, [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18]),
        ({"every_n_steps": 100}, [3, 6, 9, 12, 15, 18]),
        ({"every_n_steps": 100, "dense_steps": 2}, [1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18]),
        ({"every_n_steps": 5, "dense_steps": 1}, [1, 3, 5, 6, 7, 9, 10, 12, 13, 15, 18]),
    ],
    ids=str,
)
def test_steps_are_left_out_but_for_epoch_ends_and_the_first_of_a_task(options, steps):
    measured, ends, _ = _measured(_tracker(**options), max_epochs=2)
    assert measured == steps
    assert ends == [3, 6, 9, 12, 15, 18]


def test_steps_that_are_left_out_do_not_change_those_that_are_not():
    dense, _, _ = fit_tracked(_tracker(), [Replay(20)], max_epochs=2)
    sparse, _, _ = fit_tracked(_tracker(every_n_steps=4), [Replay(20)], max_epochs=2)
    rows = [step - 1 for step in sparse.curve.steps.tolist()]
    assert_same_curve(sparse.curve.accuracies, dense.curve.accuracies[rows])


def test_gradient_accumulation_measures_a_step_once():
    # batches 2 and 3 of each epoch end a step
    steps, ends, trained = _measured(_tracker(dense_steps=5), accumulate_grad_batches=2)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert ends == [2, 4, 6]
    assert trained == [0, 0, 1, 1, 2, 2]


class CutsEpochsShort(Plain):
    """Skips the rest of an epoch before its third batch."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


@pytest.mark.parametrize("every", [1, 2, 100])
def test_an_epoch_that_is_cut_short_ends_with_its_last_step(every):
    steps, ends, trained = _measured(_tracker(every_n_steps=every), module=CutsEpochsShort)
    assert steps == ([1, 2, 3, 4, 5, 6] if every == 1 else [2, 4, 6])
    assert ends == [2, 4, 6]
    assert trained[-1] == 2


@pytest.mark.parametrize("every", [1, 100])
def test_a_task_that_ends_inside_an_epoch_ends_with_its_last_step(every):
    steps, ends, _ = _measured(_tracker(every_n_steps=every), max_epochs=-1, max_steps=2)
    assert steps == ([1, 2, 3, 4, 5, 6] if every == 1 else [2, 4, 6])
    assert ends == [2, 4, 6]


# ------------------------------------------------------------------ figures


def _expected_figures(accuracies, trained, ends, recency, window):
    return {
        "average_accuracy": accuracies[-1].nanmean(),
        "min_acc": stability.min_accuracy(accuracies, trained),
        "wc_acc": stability.worst_case_accuracy(accuracies, trained),
        f"wf_{window}": stability.windowed_forgetting(accuracies, window),
        f"wp_{window}": stability.windowed_plasticity(accuracies, window),
        "gap": stability.stability_gap(accuracies, trained),
        "gap_norm": stability.normalized_stability_gap(accuracies, trained),
        "recovery": stability.recovery(accuracies, trained),
        "recovery_norm": stability.normalized_recovery(accuracies, trained),
        "task_recency_bias": torch.stack(recency).mean(),
        "final_task_recency_bias": recency[-1],
        "task_min_acc": stability.task_minimum_accuracy(accuracies[ends], trained[ends]),
    }


@pytest.mark.parametrize("window", [2, 10])
def test_figures_are_those_of_the_curve_and_are_logged(window):
    snapshots = Snapshots()
    tracker, trainer, _ = fit_tracked(_tracker(window=window), [Replay(20), snapshots], max_epochs=2)
    trained = torch.tensor(list(snapshots.tasks.values()))
    ends = torch.arange(1, 19) % 3 == 0
    recency = []
    for step, task in snapshots.tasks.items():
        module = snapshots.module(step, Plain())
        newest = [(predict(module, probes_of(old)[0]) // 2 == task).float().mean() for old in range(task)]
        recency += [torch.stack(newest).mean()] if task > 0 else []
    expected = _expected_figures(_linear_curve(snapshots, Plain()), trained, ends, recency, window)
    assert tracker.figures == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("stability/")}
    assert logged == pytest.approx({f"stability/{name}": value for name, value in tracker.figures.items()}, abs=1e-6)
