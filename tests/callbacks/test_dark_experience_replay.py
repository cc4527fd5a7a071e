"""DER and DER++: past samples are replayed with the logits that the network gave them."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from numbered_streams import IMAGES, AnyBatch, DataOf, Judge, Numbered, Watch, fit_stream, same, same_weights
from torch.utils.data import TensorDataset

from lightning_cl.callbacks import ContinualMetrics, DarkExperienceReplay
from lightning_cl.datamodules.array_dataset import ArrayDataset, collate
from lightning_cl.tasks import ContinualCallback
from tests.modules import (
    DigitsData,
    Plain,
)


class Terms(Callback):
    """Notes the term that was logged, step by step; 0 where there was none."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *args):
        self.values.append(float(trainer.logged_metrics.get("loss/dark_experience_replay", 0.0)))


def _reference_der(module, steps, alpha, beta, online):
    """The paper's loss in plain PyTorch, on the batches that were noted; logits are kept for every sample."""
    kept, terms, task, optimizer = torch.full((144, 6), torch.nan), [], None, None

    def keep(numbers):
        module.eval()
        with torch.no_grad():
            logits = module(IMAGES[numbers])
        module.train()
        return logits

    for now, (images, labels, numbers), rows in steps:
        if now != task:
            if task is not None and not online:
                done = torch.arange(48 * task, 48 * task + 48)
                kept[done] = keep(done)
            task, optimizer = now, module.configure_optimizers()
        own, old = numbers[~rows], numbers[rows]
        seen = keep(own)
        loss = F.cross_entropy(module(images[~rows]), labels[~rows])
        terms.append(0.0)
        if len(old) > 0:
            logits = module(images[rows])
            assert not kept[old].isnan().any()
            term = alpha * ((logits - kept[old]) ** 2).sum() / logits.numel()
            if beta > 0:
                term = term - beta * logits.log_softmax(1)[torch.arange(len(old)), labels[rows]].mean()
            terms[-1] = float(term)
            loss = loss + term
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if online:
            kept[own] = seen
    return terms, kept


@pytest.mark.parametrize("online", [False, True], ids=["next task", "online"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.5), (0.3, 0.0), (0.0, 0.5)])
def test_loss_logits_and_weights_are_those_of_the_paper(alpha, beta, online):
    seed_everything(1, verbose=False)
    by_hand, watch, terms = AnyBatch(batch_norm=False), Watch(), Terms()
    start = "online" if online else "next_task"
    der = DarkExperienceReplay(60, alpha, beta, batch_size=10, start=start)
    stream = {"epochs_per_task": 2}
    _, trained = fit_stream([watch, der, terms], copy.deepcopy(by_hand), stream=stream)
    expected, kept = _reference_der(by_hand, watch.steps, alpha, beta, online)
    assert terms.values == pytest.approx(expected, rel=1e-4)
    assert sum(bool(rows.any()) for _, _, rows in watch.steps) == (17 if online else 12)
    for got, wanted in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    held = der.memory.tasks < 2 if not online else slice(None)
    numbers = 48 * der.memory.tasks[held] + der.memory.indices[held]
    torch.testing.assert_close(der.memory.extras["logits"][held], kept[numbers], rtol=1e-4, atol=1e-5)


def test_every_slot_has_logits_when_a_task_is_over():
    class Looks(ContinualCallback):
        observer = True

        def on_task_end(self, trainer, pl_module, task):
            logits = der.memory.extras["logits"]
            assert logits.shape == (20, 6)
            assert not logits.isnan().any()
            looks.append((der.memory.tasks.clone(), der.memory.indices.clone(), logits.clone()))

    der, looks = DarkExperienceReplay(20, selection="class_balanced"), []
    fit_stream([der, Looks()], lambda: AnyBatch(dropout=0.5))
    for (tasks, indices, logits), (later_tasks, later_indices, later) in pairwise(looks):
        before = {(t, i): row for t, i, row in zip(tasks.tolist(), indices.tolist(), logits, strict=True)}
        old = [(t, i) in before for t, i in zip(later_tasks.tolist(), later_indices.tolist(), strict=True)]
        assert 0 < sum(old) < 20
        for place, known in enumerate(old):  # logits of a slot stay those of its own task
            if known:
                assert torch.equal(later[place], before[int(later_tasks[place]), int(later_indices[place])])


def test_logits_are_taken_without_dropout_and_without_moving_batch_norm():
    class Looks(ContinualCallback):
        observer = True

        def on_task_end(self, trainer, pl_module, task):
            held = der.memory.tasks == task.index
            numbers = 48 * der.memory.tasks[held] + der.memory.indices[held]
            with torch.no_grad():
                expected = copy.deepcopy(pl_module).eval()(IMAGES[numbers])
            torch.testing.assert_close(der.memory.extras["logits"][held], expected)
            assert pl_module.training
            tracked.append(int(pl_module.net[1].num_batches_tracked))

    der, tracked = DarkExperienceReplay(20), []
    fit_stream([der, Looks()], lambda: AnyBatch(dropout=0.5, batch_norm=True))
    assert tracked == [3, 9, 15]  # own rows, and from the second task on replayed rows, by themselves


def test_online_logits_follow_the_network_while_the_sample_is_in_its_own_task():
    class Looks(Callback):
        def on_train_batch_end(self, trainer, *args):
            if "logits" in der.memory.extras:
                states.append(der.memory.extras["logits"].clone())
                assert not states[-1].isnan().any()

    der, states = DarkExperienceReplay(200, start="online"), []
    fit_stream([der, Looks()], stream={"epochs_per_task": 2})
    assert [len(logits) for logits in states] == [16, 32, 48, 48, 48, 48] + [64, 80, 96, 96, 96, 96, 112, 128] + [
        144
    ] * 4
    first = [logits[:48] for logits in states[2:]]
    moved = [not torch.equal(early, late) for early, late in pairwise(first)]
    assert moved == [True] * 3 + [False] * 12


def test_online_logits_are_kept_of_those_of_a_batch_that_stay():
    """A batch larger than the memory: of its samples some are not taken, and some lose their slot to later ones."""
    der = DarkExperienceReplay(8, start="online", selection="class_balanced")
    fit_stream([der], data=DataOf(batch_size=48))
    logits = der.memory.extras["logits"]
    assert len(der.memory) == 8
    assert logits.isfinite().all()
    assert (logits != 0).any(1).all()


def test_the_module_sees_only_its_own_rows():
    class Sees(AnyBatch):
        def training_step(self, batch, batch_idx):
            seen.append((batch, self.trainer.datamodule.current_task.index))
            return super().training_step(batch, batch_idx)

    seen, watch = [], Watch()
    fit_stream([watch, DarkExperienceReplay(20)], Sees)
    for (batch, task), (_, whole, rows) in zip(seen, watch.steps, strict=True):
        assert (batch[1] // 2 == task).all()
        assert len(rows) == len(whole[0]) == (16 if task == 0 else 32)
        assert type(batch) is type(whole)
        assert same(list(batch), [part[~rows] for part in whole])


def _nested(image, label, number):
    return {"image": image, "label": label, "more": {"pair": (image * 2, [number]), "name": f"digit {number}"}}


def test_rows_are_cut_out_of_nested_batches_with_strings_in_them():
    class Sees(AnyBatch):
        def training_step(self, batch, batch_idx):
            numbers = batch["more"]["pair"][1][0]
            assert len(numbers) == 16
            assert batch["more"]["name"] == [f"digit {number}" for number in numbers]
            assert torch.equal(batch["more"]["pair"][0], 2 * IMAGES[numbers])
            return super().training_step(batch, batch_idx)

    _, nested = fit_stream([DarkExperienceReplay(20)], Sees, DataOf(Numbered(_nested)))
    _, plain = fit_stream([DarkExperienceReplay(20)])
    assert same_weights(nested, plain)


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        (lambda: TensorDataset(IMAGES, Numbered().targets), {}),
        (lambda: ArrayDataset(IMAGES, Numbered().targets), {"collate_fn": collate}),
        (Numbered, {"num_workers": 1}),
    ],
    ids=["tensors", "arrays", "worker"],
)
@pytest.mark.parametrize("start", ["next_task", "online"])
def test_any_data_set_gives_the_same_run(dataset, settings, start):
    _, expected = fit_stream([DarkExperienceReplay(20, start=start)])
    _, module = fit_stream([DarkExperienceReplay(20, start=start)], data=DataOf(dataset(), **settings))
    assert same_weights(module, expected)


def test_der_without_labels_differs_from_derpp_and_both_from_none():
    runs = [fit_stream([DarkExperienceReplay(20, 0.3, beta)])[1] for beta in (0.0, 0.5)]
    runs.append(fit_stream([])[1])
    assert not same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_with_both_weights_at_zero_the_run_is_that_without_replay():
    _, weightless = fit_stream([DarkExperienceReplay(20, 0.0, 0.0)])
    _, without = fit_stream([])
    for got, wanted in zip(weightless.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------ transactions, state, order


@pytest.mark.parametrize("start", ["next_task", "online"])
def test_a_refused_task_leaves_no_trace_in_memory_and_logits(start):
    class Looks(ContinualCallback):
        def on_task_start(self, trainer, pl_module, task):
            states[task.index] = copy.deepcopy(der.state_dict())

        def on_task_rejected(self, trainer, pl_module, task):
            assert same(der.state_dict(), states[task.index])

    der, states = DarkExperienceReplay(20, start=start), {}
    fit_stream([der, Judge(1), Looks()], stream={"epochs_per_task": 2})
    assert same(states[1], states[2])
    assert set(der.memory.task_counts) == {0, 2}


@pytest.mark.parametrize("start", ["next_task", "online"])
def test_a_task_that_is_repeated_ends_as_if_it_had_been_trained_once(start):
    runs = []
    for attempts in ([], [1, 0]):
        der = DarkExperienceReplay(20, start=start)
        _, module = fit_stream([der, Judge(1, attempts)], lambda: AnyBatch(dropout=0.3))
        runs.append((dict(module.state_dict()), der.state_dict()))
    assert same(*runs)


@pytest.mark.parametrize("start", ["next_task", "online"])
@pytest.mark.parametrize("step", [2, 4, 5, 6, 8])
def test_a_resumed_run_ends_the_same(start, step, tmp_path):
    runs, path = [], tmp_path / f"step={step}.ckpt"
    for resumed in (None, path):
        der, checkpoint = (
            DarkExperienceReplay(20, start=start),
            ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1),
        )
        _, module = fit_stream(
            [der, checkpoint], lambda: AnyBatch(dropout=0.3), enable_checkpointing=True, ckpt_path=resumed
        )
        runs.append((dict(module.state_dict()), der.state_dict()))
    assert same(*runs)


def test_the_state_is_plain(tmp_path):
    der = DarkExperienceReplay(20)
    fit_stream([der, ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True)
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (state,) = [value for name, value in states.items() if "Replay" in name]
    assert same(state, der.state_dict())
    assert state["memory"]["extras"]["logits"].shape == (20, 6)


def test_callbacks_in_any_order_give_the_same_run():
    runs = []
    for turn in (1, -1):
        metrics, der = ContinualMetrics(print_table=False), DarkExperienceReplay(20, start="online")
        callbacks = [metrics, der, Decay()][::turn]
        _, module = fit_stream(callbacks, lambda: Plain(dropout=0.2), DigitsData(), limit_val_batches=1.0)
        runs.append((dict(module.state_dict()), der.state_dict(), metrics.matrix))
    assert same(*runs)


class Decay(ContinualCallback):
    """Another callback with a loss term."""

    def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
        assert len(batch[0]) == 16  # the batch as `training_step` got it
        return 0.01 * sum(weight.square().sum() for weight in pl_module.parameters())


def test_an_observer_finds_the_run_unchanged_by_der_looking_at_the_network():
    class States(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, *args):
            self.seen.append(torch.get_rng_state())

    runs = []
    for callbacks in ([], [DarkExperienceReplay(20, 0.0, 0.0, start="online")]):
        states = States()
        fit_stream([*callbacks, states], lambda: AnyBatch(), DataOf())
        runs.append(states.seen)
    assert same(*runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "`alpha` must be at least 0, got -0.1"),
        ({"beta": -1}, "`beta` must be at least 0, got -1"),
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        DarkExperienceReplay(**{"size": 20, **arguments})
