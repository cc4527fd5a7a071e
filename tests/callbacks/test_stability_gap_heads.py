"""With a head that stands in for the classification layer, the tracker measures what the head would say at each step.

Its prototypes are those of a fixed sample; the head itself is left alone.
"""

import pytest
import torch
from nearest_means import VAL_IMAGES, VAL_LABELS, AtTaskEnds, MeansByHand, NoisyNet, numbers_of_task
from numbered_streams import LABELS, Judge, fit_stream, same
from probed_streams import (
    SIZE,
    Snapshots,
    assert_same_curve,
    curve_by_hand,
    fit_tracked,
    nearest,
    nearest_curve_by_hand,
    predict,
    probes_of,
)

from lightning_cl.callbacks import NearestMeanClassifier, Replay, StabilityGapTracker
from lightning_cl.datamodules import DomainIncremental
from lightning_cl.tasks.probes import choose
from tests.modules import CLASSIFIERS, DigitsData, Plain, quiet_trainer


def _tracker(**options):
    return StabilityGapTracker(**{"probe_size": SIZE, **options})


def _fit(options=None, memory=20, module=Plain, others=(), **settings):
    snapshots, head = Snapshots(), NearestMeanClassifier(refresh="task")
    memories = [] if memory is None else [Replay(memory)]
    settings = {"max_epochs": 2, **settings}
    tracker, trainer, _ = fit_tracked(
        _tracker(**options or {}), [*memories, head, snapshots, *others], module, **settings
    )
    return tracker, snapshots, head, trainer


# ------------------------------------------------------------------ by hand


@pytest.mark.parametrize("memory", [20, 60])
def test_the_curve_is_that_of_prototypes_of_the_fixed_sample_after_each_step(memory):
    tracker, snapshots, _, _ = _fit(memory=memory)
    expected = nearest_curve_by_hand(snapshots, Plain())
    assert len(expected[:, 0].unique()) > 1
    assert_same_curve(tracker.curve.accuracies[:, 0], expected)
    assert not torch.equal(expected, curve_by_hand(snapshots, lambda n, x: predict(snapshots.module(n, Plain()), x)))


def test_dropout_and_batch_norm_are_those_of_an_evaluation():
    def module():
        return Plain(dropout=0.5, batch_norm=True)

    tracker, snapshots, _, _ = _fit(module=module)
    assert_same_curve(tracker.curve.accuracies[:, 0], nearest_curve_by_hand(snapshots, module()))


def test_prototypes_are_used_until_the_refresh_is_due():
    tracker, snapshots, _, _ = _fit({"nmc_refresh": 5})
    # six steps a task, and prototypes of other samples from each task's first step on
    expected = nearest_curve_by_hand(snapshots, Plain(), lambda step: step - (step - 1) % 6 % 5)
    assert_same_curve(tracker.curve.accuracies[:, 0], expected)
    assert not torch.equal(expected.nan_to_num(9), nearest_curve_by_hand(snapshots, Plain()).nan_to_num(9))


def test_the_refresh_is_due_at_the_first_measurement_after_so_many_steps():
    tracker, snapshots, _, _ = _fit({"nmc_refresh": 2, "every_n_steps": 3})
    expected = nearest_curve_by_hand(snapshots, Plain())
    assert tracker.curve.steps.tolist() == [3, 6, 9, 12, 15, 18]
    assert_same_curve(tracker.curve.accuracies[:, 0], expected[2::3])


def test_without_a_memory_past_classes_keep_the_means_of_their_tasks_end():
    tracker, snapshots, _, _ = _fit(memory=None, module=lambda: Plain(lr=0.05))  # some features are not zero

    def past(step):
        means = MeansByHand()
        for task in range(snapshots.tasks[step]):
            means.add(snapshots.module(6 * task + 6, Plain()), numbers_of_task(task))
        return means

    assert_same_curve(tracker.curve.accuracies[:, 0], nearest_curve_by_hand(snapshots, Plain(), past=past))


def test_recency_is_that_of_the_head():
    tracker, snapshots, _, _ = _fit({"compare_heads": True})
    shares = torch.full((18, 2), torch.nan)
    for row, (step, current) in enumerate(snapshots.tasks.items()):
        if current:
            module = snapshots.module(step, Plain())
            sample = snapshots.current(step) | snapshots.remembered(step)
            prototypes = MeansByHand().add(module, list(sample), weights=list(sample.values())).prototypes
            answers = [(nearest(module, prototypes, x), predict(module, x)) for x, _ in map(probes_of, range(current))]
            taken = [[(answer // 2 == current).float().mean() for answer in pair] for pair in answers]
            shares[row] = torch.tensor(taken).mean(0)
    assert not torch.equal(shares[6:, 0], shares[6:, 1])
    assert_same_curve(tracker.curve.recency, shares)


@pytest.mark.parametrize("start", ["next_task", "online"])
def test_prototypes_of_the_memory_alone_are_of_what_it_held_at_the_first_step(start):
    """In the first task an empty memory knows no class, and the classification layer answers."""
    snapshots = Snapshots()
    head = NearestMeanClassifier(prototypes="memory")
    tracker, _, _ = fit_tracked(_tracker(), [Replay(30, start=start), head, snapshots])
    rows = []
    for step, current in snapshots.tasks.items():
        sample = snapshots.remembered(3 * current + 1, current=True)
        module = snapshots.module(step, Plain())
        prototypes = MeansByHand().add(module, list(sample), weights=list(sample.values())).prototypes
        images, labels = probes_of(0)
        answer = nearest(module, prototypes, images) if prototypes else predict(module, images)
        rows.append((answer == labels).float().mean())
    assert_same_curve(tracker.curve.accuracies[:, 0, 0], torch.stack(rows))


# ------------------------------------------------------------------ the head is left alone


@pytest.mark.parametrize(("memory", "refresh"), [(20, "epoch"), (20, 4), (None, "task")])
def test_the_heads_own_prototypes_are_those_of_a_run_without_the_tracker(memory, refresh):
    states = []
    for trackers in ([], [_tracker(compare_heads=True, nmc_refresh=2)]):
        head = NearestMeanClassifier(refresh=refresh)
        memories = [] if memory is None else [Replay(memory)]
        callbacks = [*memories, head, *trackers]
        trainer, _ = fit_stream(callbacks, NoisyNet, DigitsData(), max_epochs=2, limit_val_batches=1.0)
        states.append([head.state_dict(), trainer.callback_metrics["val_acc"]])
    assert same(*states)


def test_the_head_answers_with_its_own_prototypes_between_measurements():
    """Validation within an epoch sees the head's prototypes of the last task, not those of the tracker."""
    accuracies = []
    for trackers in ([], [_tracker()]):
        seen = []

        class Keeps(Plain):
            def on_validation_epoch_end(self, seen=seen):
                seen.append(float(self.trainer.callback_metrics["val_acc"]))

        settings = {"limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 0}
        callbacks = [Replay(20), NearestMeanClassifier(refresh="task"), *trackers]
        fit_stream(callbacks, Keeps, DigitsData(), **settings)
        accuracies.append(seen)
    assert len(accuracies[0]) == 9
    assert accuracies[0] == accuracies[1]


# ------------------------------------------------------------------ both heads


def test_comparing_gives_the_curves_of_a_run_with_and_one_without_the_head():
    both, _, _, _ = _fit({"compare_heads": True})
    with_head, _, _, _ = _fit()
    linear, _, _ = fit_tracked(_tracker(), [Replay(20)], max_epochs=2)
    assert same(both.curve.accuracies[:, :1], with_head.curve.accuracies)
    assert same(both.curve.accuracies[:, 1:], linear.curve.accuracies)
    assert same(both.curve.recency, torch.cat([with_head.curve.recency, linear.curve.recency], dim=1))
    assert not same(both.curve.accuracies[:, 0], both.curve.accuracies[:, 1])


def test_figures_of_both_heads_are_named_apart_and_logged():
    both, _, _, trainer = _fit({"compare_heads": True})
    with_head, _, _, _ = _fit()
    linear, _, _ = fit_tracked(_tracker(), [Replay(20)], max_epochs=2)
    expected = {**with_head.figures, **{f"linear_{name}": value for name, value in linear.figures.items()}}
    assert both.figures == pytest.approx(expected, nan_ok=True)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("stability/")}
    assert logged == pytest.approx({f"stability/{name}": value for name, value in expected.items()})


@pytest.mark.parametrize(("module", "data"), CLASSIFIERS, ids=lambda part: part.__name__)
def test_the_layers_own_curve_is_that_of_a_run_without_the_head_for_every_kind_of_module(module, data):
    head = NearestMeanClassifier()
    both, _, _ = fit_tracked(_tracker(compare_heads=True), [Replay(20), head], module, data())
    linear, _, _ = fit_tracked(_tracker(), [Replay(20)], module, data())
    assert same(both.curve.accuracies[:, 1:], linear.curve.accuracies)
    assert not same(both.curve.accuracies[:, :1], linear.curve.accuracies)


def test_a_rejected_task_leaves_no_trace_in_what_comes_after():
    """Prototypes of later tasks are of the memory as it was put back."""
    tracker, snapshots, _, _ = _fit(others=[Judge(1)], max_epochs=1)
    by_hand = nearest_curve_by_hand(snapshots, Plain())
    assert tracker.curve.trained.tolist() == [0] * 3 + [2] * 3
    kept = by_hand[[0, 1, 2, 6, 7, 8]]
    assert_same_curve(tracker.curve.accuracies[:, 0, [0, 2]], kept[:, [0, 2]])


def test_a_repeated_task_is_measured_as_if_it_were_the_first_attempt():
    tracker, snapshots, _, _ = _fit(others=[Judge(1, [1])], max_epochs=1)
    by_hand = nearest_curve_by_hand(snapshots, Plain())
    assert_same_curve(tracker.curve.accuracies[:, 0], by_hand[[0, 1, 2, 6, 7, 8, 9, 10, 11]])


@pytest.mark.parametrize("refresh", [1, 2, 4])
def test_a_repeated_task_takes_prototypes_anew(refresh):
    tracker, snapshots, _, _ = _fit({"nmc_refresh": refresh}, others=[Judge(1, [1])], max_epochs=1)
    by_hand = nearest_curve_by_hand(snapshots, Plain(), lambda step: step - (step - 1) % 3 % refresh)
    assert_same_curve(tracker.curve.accuracies[:, 0], by_hand[[0, 1, 2, 6, 7, 8, 9, 10, 11]])


# ------------------------------------------------------------------ classes that come again


def test_a_sample_of_each_source_stands_for_as_many_as_there_are():
    """All classes come in both tasks: 20 samples of the past, and 144 of the present of which 96 are chosen."""
    snapshots, head = Snapshots(), NearestMeanClassifier(refresh="task")
    sequence = DomainIncremental(DigitsData(), [lambda x: x, lambda x: x * 2 - 1], seed=1)
    tracker = _tracker()
    trainer = quiet_trainer(callbacks=[Replay(20), head, tracker, snapshots], max_epochs=1, limit_val_batches=0)
    trainer.fit(Plain(), datamodule=sequence)
    everything, labels = torch.arange(144), LABELS
    chosen = [everything[labels == label][choose(16, 24, 1, 1)] for label in range(6)]
    for step, current in snapshots.tasks.items():
        if current == 0:
            continue
        module = snapshots.module(step, Plain())
        tasks, indices = snapshots.memories[step]
        means = MeansByHand().add(module, indices[tasks == 0].tolist())
        means.add(module, torch.cat(chosen).tolist(), shifted=True, weights=[1.5] * 96)
        images = VAL_IMAGES[choose(SIZE, 60, 1, 0)]
        answer = nearest(module, means.prototypes, images)
        expected = (answer == VAL_LABELS[choose(SIZE, 60, 1, 0)]).float().mean()
        assert tracker.curve.accuracies[step - 1, 0, 0] == pytest.approx(float(expected))


@pytest.mark.parametrize("memory", [20, 100])
def test_every_class_has_its_share_of_the_sample(memory):
    """However few the samples are, a class has 16 of them, or all that there are."""
    tracker, snapshots = _tracker(), Snapshots()
    record = AtTaskEnds(lambda *args: tracker.state_dict()["provisional"])
    fit_tracked(tracker, [Replay(memory), NearestMeanClassifier(), record, snapshots])
    for task, state in enumerate(record.seen):
        tasks, indices = snapshots.memories[3 * task + 1]
        held = {t: indices[tasks == t] for t in range(task)} | {task: torch.arange(48)}
        assert sorted(state["indices"]) == sorted(held)
        for source, members in held.items():
            there = LABELS[48 * source + members].bincount(minlength=6)
            chosen = LABELS[48 * source + state["indices"][source]].bincount(minlength=6)
            assert torch.equal(chosen, there.clamp(max=16))
            known = chosen > 0
            torch.testing.assert_close(state["weights"][source][known], (there / chosen)[known])
