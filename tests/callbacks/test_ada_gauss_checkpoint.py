"""AdaGauss and its pieces in checkpoints: resumed to the bit, undone with a task, and taken off after a fit."""

import io
from contextlib import nullcontext

import pytest
import torch
from feature_streams import Images, Narrow, NarrowNoisy, ada_gauss, fit_images
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import Judge, SaveAfterSteps, same

from benchmarks.resume import differences
from lightning_cl.callbacks import AntiCollapse, ContinualMetrics, ProjectedDistillation
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback
from lightning_cl.tasks.adapter_training import AdapterTraining
from tests.modules import quiet_trainer

KINDS = {
    "AdaGauss": ada_gauss,
    "epochs": lambda: ada_gauss(refresh="epoch", warmup=0.5),
    "distillation": lambda: ProjectedDistillation(expansion=4),
    "anti-collapse": AntiCollapse,
}
EVERY_KIND = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
QUICK = ("AdaGauss", "anti-collapse")  # the others are variants of these
MOST_KINDS_SLOW = pytest.mark.parametrize(
    "make", [pytest.param(KINDS[kind], id=kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)

DRAWN = {"projector", "regulariser"}  # begin with the first task

# three tasks of two epochs, each of three steps
PLACES = {
    "2.ckpt": "first task",
    "6.ckpt": "last batch of the first task",
    "epoch=1.ckpt": "end of the first task",
    "8.ckpt": "in an epoch",
    "9.ckpt": "last batch of an epoch",
    "epoch=2.ckpt": "end of an epoch",
    "12.ckpt": "last batch of a task",
    "epoch=3.ckpt": "end of a task",
    "16.ckpt": "last task",
    "18.ckpt": "last batch",
}
FAST = {"8.ckpt", "9.ckpt", "12.ckpt"}
FAST_VARIANTS = {("epochs", "12.ckpt"), ("distillation", "8.ckpt"), ("anti-collapse", "8.ckpt")}


def _run(make, others=(), ckpt_path=None, stream=None):
    callback, metrics = make(), ContinualMetrics(print_table=False)
    trainer, module = fit_images(
        [callback, metrics, *others],
        NarrowNoisy,
        max_epochs=2,
        limit_val_batches=1.0,
        enable_checkpointing=True,
        ckpt_path=ckpt_path,
        stream=stream,
    )
    return [
        {name: value.clone() for name, value in module.state_dict().items()},
        trainer.optimizers[0].state_dict(),
        callback.state_dict(),
        metrics.state_dict(),
        trainer.global_step,
        torch.get_rng_state(),
    ]


def _saving(folder):
    epochs = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    return [SaveAfterSteps(folder, range(1, 20)), epochs]


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """Return the end of a run that went through, and the folder with its checkpoints; each run is made once."""
    ends = {}

    def of(make, reset=True):
        if (make, reset) not in ends:
            folder = tmp_path_factory.mktemp("through")
            ends[make, reset] = _run(make, _saving(folder), stream={"reset_optimizer": reset}), folder
        return ends[make, reset]

    return of


def _cases():
    """Every place for AdaGauss and, for its variants, those where a checkpoint of theirs could differ."""
    for place in PLACES:
        for kind in KINDS if place in ("8.ckpt", "9.ckpt", "12.ckpt") else ["AdaGauss"]:
            fast = (kind == "AdaGauss" and place in FAST) or (kind, place) in FAST_VARIANTS
            marks = [] if fast else pytest.mark.slow
            yield pytest.param(KINDS[kind], place, id=f"{kind}-{PLACES[place]}", marks=marks)


@pytest.mark.parametrize(("make", "place"), _cases())
def test_a_resumed_run_ends_the_same(make, place, through):
    end, folder = through(make)
    assert differences(end, _run(make, ckpt_path=folder / place)) == []


@pytest.mark.parametrize("place", ["9.ckpt", pytest.param("12.ckpt", marks=pytest.mark.slow)])
def test_a_run_with_one_optimizer_for_all_tasks_is_resumed_to_the_same_end(place, through):
    end, folder = through(ada_gauss, False)
    assert differences(end, _run(ada_gauss, ckpt_path=folder / place, stream={"reset_optimizer": False})) == []


def test_a_run_that_died_while_an_adapter_was_trained_is_resumed_to_the_same_end(through, tmp_path, monkeypatch):
    end, _ = through(ada_gauss)
    usual, epochs = AdapterTraining._loss, []

    def loss(self, *args):
        epochs.append(1)
        if len(epochs) == 5:  # in the second of three epochs, at the end of the third task
            raise RuntimeError("died")
        return usual(self, *args)

    monkeypatch.setattr(AdapterTraining, "_loss", loss)
    with pytest.raises(RuntimeError, match="died"):
        _run(ada_gauss, _saving(tmp_path))
    monkeypatch.undo()
    assert differences(end, _run(ada_gauss, ckpt_path=tmp_path / "18.ckpt")) == []


@MOST_KINDS_SLOW
def test_the_state_is_plain(make, through, tmp_path):
    end, folder = through(make)
    (saved,) = [
        state
        for state in torch.load(folder / "epoch=5.ckpt", weights_only=True)["callbacks"].values()
        if state.keys() == end[2].keys()
    ]
    assert same(saved, end[2])
    assert _odd_parts(saved) == []


def _odd_parts(value):
    """What in a state is neither a tensor with a storage of its own nor plain Python."""
    if isinstance(value, torch.Tensor):
        return [] if value.untyped_storage().nbytes() == value.numel() * value.element_size() else [value]
    if isinstance(value, (dict, list)):
        return [odd for part in (value.values() if isinstance(value, dict) else value) for odd in _odd_parts(part)]
    return [] if value is None or type(value) in (int, float, str, bool) else [value]


@MOST_KINDS_SLOW
def test_a_saved_state_is_not_moved_by_the_run_that_goes_on(make):
    class Keeps(Callback):
        def on_train_batch_end(self, *args):
            state, file = callback.state_dict(), io.BytesIO()
            torch.save(state, file)
            states.append((state, file))

    callback, states = make(), []
    fit_images([callback, Keeps()])
    for state, file in states:
        file.seek(0)
        assert same(state, torch.load(file, weights_only=True))


@pytest.mark.parametrize("make", [ada_gauss, KINDS["distillation"]], ids=["AdaGauss", "distillation"])
def test_a_run_that_goes_on_from_a_checkpoint_without_it_is_told_so(make, tmp_path):
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit_images([saved], enable_checkpointing=True)
    callback = make()
    with pytest.warns(UserWarning, match=f"{type(callback).__name__} begins at task 1 .* without a past"):
        fit_images([callback], ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_is_resumed_with_distillation_switched_off(tmp_path):
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit_images([ada_gauss(), saved], enable_checkpointing=True)
    callback = ada_gauss(distillation=0.0)
    fit_images([callback], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callback.gaussians.known.all()


@pytest.mark.parametrize("make", [ada_gauss, ProjectedDistillation])
def test_a_projector_of_another_size_is_refused(make, tmp_path):
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit_images([make(expansion=4), saved], enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"projector has `expansion=4`, this \w+ has `expansion=3`"):
        fit_images([make(expansion=3)], ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_run_without_adaptation_is_not_resumed_with_it(tmp_path):
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit_images([ada_gauss(adapt="none", distillation=0), saved], enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="`adapt='full'`, and the checkpoint has no teacher"):
        fit_images([ada_gauss(distillation=0)], ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_of_another_kind_of_classifier_is_refused(tmp_path):
    saved = ModelCheckpoint(tmp_path, save_last=True)
    fit_images([ada_gauss(), saved], enable_checkpointing=True)
    trainer = quiet_trainer(callbacks=[ada_gauss(classifier="nearest_mean")])
    sequence = ClassIncremental(Images(), num_tasks=3)
    with pytest.raises(MisconfigurationException, match=r"classifier='bayes'.*classifier='nearest_mean'"):
        trainer.test(Narrow(), datamodule=sequence, ckpt_path=tmp_path / "last.ckpt", verbose=False)


# ------------------------------------------------------------------ undone with a task


@MOST_KINDS_SLOW
def test_a_task_that_is_repeated_ends_as_if_it_had_been_trained_once(make):
    runs = []
    for attempts in ([], [1, 0]):
        callback = make()
        _, module = fit_images([callback, Judge(1, attempts)], NarrowNoisy)
        runs.append((dict(module.state_dict()), callback.state_dict()))
    assert same(*runs)


@MOST_KINDS_SLOW
@pytest.mark.parametrize("reset", [True, False])
def test_a_refused_task_leaves_what_was_there_at_its_start(make, reset):
    class Looks(ContinualCallback):
        observer = True  # sees what others have committed

        def on_task_end(self, trainer, pl_module, task):
            if task.index == 0:
                seen.append(callback.state_dict())

        def on_task_rejected(self, trainer, pl_module, task):
            seen.append(callback.state_dict())

    callback, seen = make(), []
    fit_images([callback, Judge(1), Looks()], NarrowNoisy, stream={"reset_optimizer": reset})
    assert same(seen[0], seen[1])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["8.ckpt", "12.ckpt", "epoch=3.ckpt"])
def test_a_run_with_a_refused_task_is_resumed_to_the_same_end(place, tmp_path):
    end = _run(ada_gauss, [Judge(1), *_saving(tmp_path)])
    assert differences(end, _run(ada_gauss, [Judge(1)], ckpt_path=tmp_path / place)) == []


# ------------------------------------------------------------------ taken off


class Breaks(ContinualCallback):
    def __init__(self, hook):
        setattr(self, hook, self._break)

    def _break(self, trainer, *args):
        if trainer.datamodule.current_task.index == 1:
            raise RuntimeError("broken")
        return True


@MOST_KINDS_SLOW
@pytest.mark.parametrize("hook", [None, "on_train_batch_end", "on_task_end"])
def test_nothing_is_left_on_module_and_trainer(make, hook):
    def traces():
        layers = {
            name: (sorted(vars(layer)), len(layer._forward_hooks), len(layer._forward_pre_hooks), layer.training)
            for name, layer in module.named_modules()
        }
        return layers, [id(p) for p in module.parameters()], list(map(id, trainer.callbacks)), sorted(vars(trainer))

    module, sequence = Narrow(), ClassIncremental(Images(), num_tasks=3)
    others = [] if hook is None else [Breaks(hook)]
    callback = make()
    trainer = quiet_trainer(callbacks=[callback, *others], max_epochs=1, limit_val_batches=0)
    trainer.validate(module, datamodule=sequence, verbose=False)
    module.train()
    before = traces()
    with pytest.raises(RuntimeError, match="broken") if others else nullcontext():
        trainer.fit(module, datamodule=sequence)
    assert traces() == before
    assert "training_step" not in vars(module)
    part = getattr(callback, "regulariser", callback)
    assert part.projector is part.wanted is part._tap is part._stream is None


@MOST_KINDS_SLOW
def test_a_second_fit_begins_anew(make):
    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(callback.state_dict())

    callback, seen = make(), []
    trainer, module = fit_images([callback, Looks()])
    trainer.fit(module, datamodule=trainer.datamodule)
    first, second = ({name: part for name, part in state.items() if name not in DRAWN} for state in seen)
    assert same(first, second)
