"""DER under modules as people write them."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import IMAGES, AnyBatch, DataOf, Numbered, Watch, fit_stream, same_weights
from torch.utils.data import TensorDataset

from lightning_cl.callbacks import ContinualMetrics, DarkExperienceReplay
from lightning_cl.datamodules import ClassIncremental, DomainIncremental, TaskList
from lightning_cl.tasks import ContinualCallback, added_loss
from tests.modules import (
    CLASSIFIERS,
    BrightnessData,
    DigitsData,
    Manual,
    Plain,
    PredictsLabels,
    Regression,
    TorchvisionModule,
    TrainingDigits,
    TwoHeads,
    WithoutValidation,
    quiet_trainer,
)


class Terms(Callback):
    """Notes the term that was logged, step by step; 0 where there was none."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *args):
        self.values.append(float(trainer.logged_metrics.get("loss/dark_experience_replay", 0.0)))


@pytest.mark.parametrize(
    ("module", "base"),
    [*CLASSIFIERS, (WithoutValidation, TrainingDigits), (lambda: Manual(added_loss), DigitsData)],
)
def test_der_remembers_whatever_the_module(module, base):
    seed_everything(0, verbose=False)
    metrics, der = ContinualMetrics(print_table=False), DarkExperienceReplay(60, 0.3, 1.0)
    validated = {} if base is not TrainingDigits else {"val_fraction": 0.2}
    sequence = ClassIncremental(base(), num_tasks=3, **validated)
    quiet_trainer(callbacks=[metrics, der], max_epochs=5).fit(module(), datamodule=sequence)
    assert der.memory.extras["logits"].shape == (60, 6)
    assert metrics.matrix[2, 0] > 0.6  # without replay it is below 0.2
    assert metrics.matrix[2, 2] > 0.6


def test_der_runs_under_a_torchvision_classifier():
    sequence = ClassIncremental(DigitsData(), num_tasks=2)
    der = DarkExperienceReplay(12, start="online")
    quiet_trainer(callbacks=[der], max_epochs=1, limit_train_batches=2).fit(TorchvisionModule(), datamodule=sequence)
    assert not der.memory.extras["logits"].isnan().any()


def test_a_head_that_cannot_be_told_is_an_error_that_lists_the_layers():
    with pytest.raises(MisconfigurationException, match=r"Name the classification layer with `head=\.\.\.`") as error:
        fit_stream([DarkExperienceReplay(20)], TwoHeads, DigitsData())
    assert all(layer in str(error.value) for layer in ("'main'", "'auxiliary'", "'net.0'"))


def test_head_says_whose_logits_are_kept():
    class Looks(ContinualCallback):
        observer = True

        def on_task_end(self, trainer, pl_module, task):
            held = der.memory.tasks == task.index
            with torch.no_grad():
                expected = pl_module(IMAGES[48 * task.index + der.memory.indices[held]])["auxiliary"]
            torch.testing.assert_close(der.memory.extras["logits"][held], expected)

    der = DarkExperienceReplay(20, head="auxiliary")
    fit_stream([der, Looks()], TwoHeads, DigitsData())
    assert der.memory.extras["logits"].shape == (20, 6)


def test_a_head_that_is_not_there_is_an_error_that_lists_the_layers():
    with pytest.raises((MisconfigurationException, ValueError), match=r"`head='fc'` names no layer of Plain.*'net.4'"):
        fit_stream([DarkExperienceReplay(20, head="fc")], Plain, DigitsData())


def test_a_module_that_cannot_be_called_for_logits_is_refused_before_training():
    with pytest.raises(
        MisconfigurationException, match=r"PredictsLabels.*forward\(inputs\): RuntimeError: call predict"
    ):
        fit_stream([DarkExperienceReplay(20)], PredictsLabels, DigitsData())


def test_regression_is_refused_before_training_by_the_callbacks_own_name():
    sequence = DomainIncremental(BrightnessData(), [None, torch.Tensor.neg])

    class NeverTrained(Regression):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training had begun")

    with pytest.raises((ValueError, MisconfigurationException), match="no class labels") as error:
        fit_stream([DarkExperienceReplay(20)], NeverTrained, sequence=sequence)
    assert "ContinualMetrics" not in str(error.value)


def test_manual_optimisation_takes_the_term_with_added_loss():
    _, automatic = fit_stream([DarkExperienceReplay(20)], Plain, DigitsData())
    _, manual = fit_stream([DarkExperienceReplay(20)], lambda: Manual(added_loss), DigitsData())
    assert same_weights(automatic, manual)


def test_manual_optimisation_that_leaves_the_term_out_is_told_what_to_call():
    with pytest.raises(MisconfigurationException, match=r"DarkExperienceReplay adds a loss.*added_loss\(self"):
        fit_stream([DarkExperienceReplay(20)], Manual, DigitsData())


def test_gradient_accumulation_takes_the_term_of_each_batch():
    terms = Terms()
    trainer, _ = fit_stream([DarkExperienceReplay(20), terms], accumulate_grad_batches=2)
    assert trainer.global_step == 6
    assert [term > 0 for term in terms.values] == [False] * 3 + [True] * 6


def test_the_returned_entries_of_training_step_are_kept():
    class InDict(AnyBatch):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "extra": 7}

    _, in_dict = fit_stream([DarkExperienceReplay(20)], InDict)
    assert same_weights(in_dict, fit_stream([DarkExperienceReplay(20)])[1])


def test_past_domains_are_replayed_under_their_own_transform():
    watch, der = Watch(), DarkExperienceReplay(40, selection="random")
    fit_stream([watch, der], sequence=DomainIncremental(DataOf(), [None, torch.Tensor.neg]))
    for (images, _, _), rows in watch.of_task(1):
        assert (images[~rows] <= 0).all()
        assert (images[rows] >= 0).all()


def test_tasks_of_different_data_sets():
    der = DarkExperienceReplay(40, selection="random")
    numbered = TensorDataset(IMAGES, Numbered().targets)
    fit_stream([der], sequence=TaskList([DataOf(numbered), DataOf(numbered, batch_size=20)]))
    assert der.memory.task_counts == {0: 20, 1: 20}
