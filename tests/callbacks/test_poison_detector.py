"""A task is judged by how far it moved the network's layers, and undone where that is too far."""

import math
import warnings

import numpy as np
import pytest
import torch
from nearest_means import NoisyNet, RestlessNet
from numbered_streams import same, same_weights
from poison_streams import Moves, Networks, Widens, fit_watched, images_of, moving, shifts_by_hand, watching

from lightning_cl.callbacks import NearestMeanClassifier, PoisonDetector
from lightning_cl.tasks import ContinualCallback, TaskClock
from lightning_cl.tasks.probes import choose
from tests.modules import Plain

# ------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("samples", [None, 10, 1000])
def test_shifts_are_those_of_the_mean_outputs_in_eval_mode(samples):
    detector, networks = watching(samples=samples), Networks()
    trainer, _ = fit_watched(detector, others=[networks])
    for task, entry in enumerate(detector.record):
        chosen = choose(min(samples or 48, 48), 48, trainer.datamodule.seed, task)
        expected = shifts_by_hand(networks.before[task], networks.after[task], images_of(task)[chosen])
        assert entry["shifts"] == pytest.approx(expected, rel=1e-4)


def test_the_angle_is_that_of_the_mean_shift_of_all_layers_but_the_first():
    detector = watching()
    fit_watched(detector)
    for entry in detector.record:
        _, *rest = entry["shifts"].values()
        assert entry["angle"] == pytest.approx(math.degrees(math.atan(sum(rest) / len(rest))))


def test_a_network_that_stays_as_it_is_has_no_angle():
    detector = watching(samples=10)
    fit_watched(detector, Plain(lr=0.0))
    assert [entry["angle"] for entry in detector.record] == [0.0] * 3


@pytest.mark.parametrize("space", ["activation", "parameter"])
def test_a_known_change_of_weights_has_a_known_shift(space):
    detector = watching(space=space)
    fit_watched(detector, Moves)
    for step, entry in zip(Moves.steps, detector.record, strict=True):
        assert entry["shifts"] == pytest.approx({"net.0": 0.0, "net.4": step * 6**0.5}, abs=1e-5)


def test_in_the_space_of_weights_shifts_are_distances_of_weights():
    detector, networks = watching(space="parameter"), Networks()
    fit_watched(detector, others=[networks])
    for task, entry in enumerate(detector.record):
        for name, shift in entry["shifts"].items():
            before, after = (
                torch.cat([p.detach().flatten() for p in net[int(name[4:])].parameters()])
                for net in (networks.before[task], networks.after[task])
            )
            assert shift == pytest.approx(float((after - before).norm()), rel=1e-5)


def test_layers_come_in_the_order_of_the_module():
    detector = watching(layers=["net.4", "net.[01]"])
    fit_watched(detector)
    assert [list(entry["shifts"]) for entry in detector.record] == [["net.0", "net.1", "net.4"]] * 3


def test_of_a_head_that_grows_what_was_there_is_compared():
    detector = watching(action="rollback", threshold=89.9)
    _, module = fit_watched(detector, Widens)
    assert [entry["verdict"] for entry in detector.record] == ["clean"] * 3
    assert module.net[4].out_features == 6


def test_a_head_that_grew_shrinks_again_with_the_task():
    detector = PoisonDetector(threshold=0.0, detect_from=1)
    _, module = fit_watched(detector, Widens)
    assert [entry["verdict"] for entry in detector.record] == ["poisoned"] * 2
    assert module.net[4].out_features == 2


def test_a_layer_that_a_head_answers_for_is_measured_itself():
    records = []
    for others in ([], [NearestMeanClassifier(prototypes="all")]):
        detector = watching()
        fit_watched(detector, others=others)
        records.append([entry["shifts"] for entry in detector.record])
    assert records[0] == records[1]


@pytest.mark.parametrize("module", [NoisyNet, RestlessNet])
@pytest.mark.parametrize("space", ["activation", "parameter"])
def test_looking_at_the_layers_changes_nothing(module, space):
    ends = []
    for detector in (watching(space=space), ContinualCallback()):
        trainer, fitted = fit_watched(detector, module)
        ends.append([dict(fitted.state_dict()), trainer.optimizers[0].state_dict(), torch.get_rng_state()])
    assert same(*ends)


class KeepsMeans(ContinualCallback):
    def __init__(self, detector):
        self.detector, self.means = detector, []

    def on_train_batch_end(self, *args):
        self.means.append(self.detector.state_dict()["before"])


def test_under_autocast_means_are_taken_in_full_precision():
    detector = watching()
    keeper = KeepsMeans(detector)
    fit_watched(detector, others=[keeper], precision="bf16-mixed")
    assert {mean.dtype for means in keeper.means for mean in means.values()} == {torch.float32}
    mean = keeper.means[0]["net.0"]
    assert not torch.equal(mean, mean.bfloat16().float())
    assert all(0 < entry["angle"] < 90 for entry in detector.record)


# ------------------------------------------------------------------ the rule


def _value(statistic="angle", **arguments):
    detector = watching(detect_from=2, statistic=statistic, **arguments)
    fit_watched(detector)
    return detector.record[-1][statistic]


@pytest.mark.parametrize("statistic", ["angle", "slope"])
def test_what_equals_the_threshold_is_clean(statistic):
    value = _value(statistic)
    verdicts = []
    for threshold in (value, math.nextafter(value, 0)):
        detector = PoisonDetector(threshold=threshold, detect_from=2, statistic=statistic, samples=None)
        fit_watched(detector)
        verdicts.append(detector.record[-1]["verdict"])
    assert verdicts == ["clean", "poisoned"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("relative", [False, True])
def test_outputs_that_are_no_numbers_are_poison(value, relative):
    detector = PoisonDetector(threshold=90, relative=relative)
    _, module = fit_watched(detector, type("Breaks", (Broken,), {"step": value}))
    assert [entry["verdict"] for entry in detector.record] == ["clean", "poisoned"]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class Broken(Plain):
    def on_train_epoch_end(self):
        if self.trainer.datamodule.current_task.index == 2:
            with torch.no_grad():
                self.net[4].bias += self.step


def test_relative_shifts_do_not_depend_on_how_far_all_layers_moved():
    shifts = watching(), watching(relative=True)
    for detector in shifts:
        fit_watched(detector)
    for absolute, relative in zip(shifts[0].record, shifts[1].record, strict=True):
        first, *rest = absolute["shifts"].values()
        assert relative["shifts"] == absolute["shifts"]
        assert math.tan(math.radians(relative["angle"])) == pytest.approx(sum(rest) / len(rest) / first)


def test_relative_to_a_layer_that_stays_is_an_error():
    with pytest.raises(Exception, match=r"`relative=True`.*'net.0'.*has not moved"):
        fit_watched(watching(relative=True), Moves)


# ------------------------------------------------------------------ the threshold


class Strides(Moves):
    """Moves differently in each attempt."""

    def step_of(self, step, attempt):
        return step * (1 + attempt)


STRIDES = type("Strides123", (Strides,), {"steps": (0.0, 0.1, 0.1)})
SLOPES = [0.1 * 6**0.5 * k for k in (1, 2, 3, 4, 5)]  # the mean of the one layer that counts


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("max", np.max(SLOPES)),
        ("p90", np.percentile(SLOPES, 90)),
        ("p75", np.percentile(SLOPES, 75)),
        ("max+iqr", np.max(SLOPES) + np.subtract(*np.percentile(SLOPES, [75, 25]))),
        ("max-iqr", np.max(SLOPES) - np.subtract(*np.percentile(SLOPES, [75, 25]))),
    ],
)
def test_runs_of_one_task_become_a_threshold(aggregate, expected):
    detector = PoisonDetector(statistic="slope", aggregate=aggregate)
    fit_watched(detector, STRIDES)
    assert detector.record[0]["runs"] == pytest.approx(SLOPES, abs=1e-5)
    assert detector.current_threshold == pytest.approx(expected, abs=1e-5)


def test_angles_are_interpolated_as_angles():
    detector = PoisonDetector()
    fit_watched(detector, STRIDES)
    assert detector.current_threshold == pytest.approx(np.percentile(np.degrees(np.arctan(SLOPES)), 90), abs=1e-4)


def test_a_margin_multiplies_the_slope_of_a_threshold():
    detector = PoisonDetector(aggregate="max", margin=2)
    fit_watched(detector, STRIDES)
    assert math.tan(math.radians(detector.current_threshold)) == pytest.approx(2 * SLOPES[-1], abs=1e-5)


def test_history_judges_each_task_by_the_clean_ones_before_it():
    detector = PoisonDetector(
        calibration="history", calibrate_task=0, aggregate="max", statistic="slope", margin=2, action="warn"
    )
    with pytest.warns(UserWarning, match="looks poisoned"):
        fit_watched(detector, moving(0.1, 0.15, 0.4))
    assert [entry["verdict"] for entry in detector.record] == ["calibration", "clean", "poisoned"]
    assert detector.record[2]["threshold"] == pytest.approx(2 * 0.15 * 6**0.5, abs=1e-5)


def test_a_poisoned_task_is_no_part_of_the_history():
    detector = PoisonDetector(calibration="history", calibrate_task=0, aggregate="max", statistic="slope")
    fit_watched(detector, moving(0.1, 0.5, 0.4))
    assert [entry["verdict"] for entry in detector.record] == ["calibration", "poisoned", "poisoned"]


def test_history_needs_no_training():
    detector = PoisonDetector(calibration="history", calibrate_task=0, margin=10)
    trainer, _ = fit_watched(detector)
    assert trainer.current_epoch == 3


def test_tasks_before_the_first_judged_one_are_only_measured():
    detector = PoisonDetector(calibrate_task=0, calibration_runs=1, detect_from=2, action="warn")
    fit_watched(detector, moving(0.1, 9, 0.05))
    assert [entry["verdict"] for entry in detector.record] == ["calibration", "not judged", "clean"]


# ------------------------------------------------------------------ what is done


def test_a_poisoned_task_is_undone_and_the_next_one_trained():
    detector = PoisonDetector(threshold=30, detect_from=0)
    trainer, module = fit_watched(detector, moving(0.1, 2, 0.2))
    _, without = fit_watched(watching(), moving(0.1, 0, 0.2))
    assert [entry["verdict"] for entry in detector.record] == ["clean", "poisoned", "clean"]
    assert same_weights(module, without)
    assert trainer.current_epoch == 3


def test_a_warning_leaves_the_task_as_it_is():
    detector = PoisonDetector(threshold=30, action="warn")
    with pytest.warns(UserWarning, match=r"task 1 .*looks poisoned: .*Kept"):
        _, module = fit_watched(detector, moving(0.1, 2, 0.2))
    assert same_weights(module, fit_watched(watching(), moving(0.1, 2, 0.2))[1])
    assert detector.record[0]["kept"]


def test_a_detector_that_only_warns_needs_no_copy_of_the_run():
    assert not PoisonDetector(threshold=30, action="warn").wants_rollback
    assert not PoisonDetector(calibration_runs=1, action="warn").wants_rollback
    assert PoisonDetector(action="warn").wants_rollback


def test_a_fit_that_is_stopped_ends_with_the_network_of_before():
    detector = PoisonDetector(threshold=30, action="stop")
    trainer, module = fit_watched(detector, moving(0.1, 2, 0.2))
    assert trainer.current_epoch == 2
    assert same_weights(module, fit_watched(watching(), moving(0.1, 0, 0))[1])


# ------------------------------------------------------------------ calibration


class KeepsAttempts(ContinualCallback):
    """Keeps the attempts of all tasks, and what the first batch of each drew."""

    observer = True

    def __init__(self):
        self.attempts, self.draws, self.images = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            progress = TaskClock.of(trainer).progress
            self.attempts.append((progress.task, progress.attempt))
            self.images.append(batch[0].clone())
            self.draws.append(torch.default_generator.clone_state().get_state())


def test_a_calibration_trains_the_task_in_other_orders_and_with_other_draws():
    keeper = KeepsAttempts()
    detector = PoisonDetector(calibration_runs=3, action="warn")
    fit_watched(detector, others=[keeper])
    assert keeper.attempts == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 0), (2, 0)]
    first, second, third, kept = (keeper.images[place] for place in (1, 2, 3, 4))
    assert torch.equal(first, kept)
    assert len({tuple(images.flatten().tolist()) for images in (first, second, third)}) == 3
    draws = [tuple(keeper.draws[place].tolist()) for place in (1, 2, 3, 4)]
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3


def test_runs_of_a_calibration_differ():
    detector = PoisonDetector(calibration_runs=4)
    fit_watched(detector)
    assert len(set(detector.record[0]["runs"])) == 4
    assert detector.record[0]["angle"] == detector.record[0]["runs"][0]


@pytest.mark.parametrize("threshold", [0.001, 89.9])
def test_after_a_calibration_the_run_goes_on_as_if_there_had_been_none(threshold):
    calibrated = PoisonDetector(calibration_runs=3, margin=1e-9 if threshold < 1 else 1e9)
    _, module = fit_watched(calibrated)
    given = PoisonDetector(threshold=threshold, detect_from=2)
    _, expected = fit_watched(given)
    assert same_weights(module, expected)
    assert calibrated.record[-1]["verdict"] == given.record[-1]["verdict"]


def test_one_run_of_calibration_trains_once():
    detector = PoisonDetector(calibration_runs=1, action="warn")
    trainer, _ = fit_watched(detector)
    assert trainer.current_epoch == 3
    assert detector.record[0]["runs"] == [detector.record[0]["angle"]]


class Diverges(Moves):
    """Ends with outputs that are no numbers in some attempts of its second task."""

    broken = (1,)

    def step_of(self, step, attempt):
        task = self.trainer.datamodule.current_task.index
        return math.nan if task == 1 and attempt in self.broken else step * (1 + attempt)


def test_runs_that_diverged_are_left_out_with_a_warning():
    detector = PoisonDetector(calibration_runs=3, aggregate="max", statistic="slope")
    with pytest.warns(UserWarning, match="1 of 3 calibration runs of PoisonDetector ended with outputs"):
        fit_watched(detector, type("D", (Diverges,), {"steps": (0, 0.1, 0.2)}))
    assert detector.record[0]["verdict"] == "calibration"
    assert detector.current_threshold == pytest.approx(0.3 * 6**0.5, abs=1e-5)


def test_runs_that_all_diverged_are_an_error():
    with pytest.raises(Exception, match=r"cannot calibrate on task 1 .*Lower the learning rate"):
        fit_watched(PoisonDetector(calibration_runs=2), type("D", (Diverges,), {"broken": (0, 1)}))


class Refuses(ContinualCallback):
    def __init__(self, task):
        self.task = task

    @property
    def wants_rollback(self):
        return True

    def accept_task(self, trainer, pl_module, task):
        return task.index != self.task


def test_without_a_calibration_that_another_callback_undid_nothing_is_judged():
    detector = PoisonDetector(calibration_runs=2)
    with pytest.warns(UserWarning, match=r"no threshold for task 2 .*since task 1.*undone"):
        fit_watched(detector, others=[Refuses(1)])
    assert [entry["verdict"] for entry in detector.record] == ["not judged"]


def test_a_clean_task_that_another_callback_refused_is_forgotten():
    detector = watching(action="rollback")
    fit_watched(detector, others=[Refuses(1)])
    assert [entry["task"] for entry in detector.record] == [0, 2]


def test_a_second_fit_begins_a_new_record():
    detector = watching()
    for _ in range(2):
        fit_watched(detector)
    assert [entry["task"] for entry in detector.record] == [0, 1, 2]


def test_a_detector_that_finds_nothing_says_nothing_but_that(capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*PoisonDetector")
        fit_watched(watching())
    said = [line for line in capsys.readouterr().out.splitlines() if "PoisonDetector" in line]
    assert said == ["PoisonDetector: none of 3 tasks looks poisoned; the threshold is 90.0°."]
