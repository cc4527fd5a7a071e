"""What callbacks do around the module's own `training_step`."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything

from lightning_cl.datamodules import ClassIncremental
from lightning_cl.tasks import ContinualCallback, added_loss
from tests.modules import DigitsData, Manual, Plain, quiet_trainer


class Around(ContinualCallback):
    """Notes that it was there, before and after; hands on what ``change`` makes of batch and outputs."""

    def __init__(self, heard, change_batch=lambda batch: batch, change_outputs=lambda outputs: outputs):
        self.heard, self.change_batch, self.change_outputs = heard, change_batch, change_outputs

    def around_training_step(self, trainer, pl_module, batch, batch_idx, step):
        self.heard.append((type(self).__name__, "in", batch_idx))
        outputs = step(self.change_batch(batch))
        self.heard.append((type(self).__name__, "out", batch_idx))
        return self.change_outputs(outputs)


class Beyond(Around):
    pass


class Module(Plain):
    """Notes the batches that it gets."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch, batch_idx))
        return super().training_step(batch, batch_idx)


def _fit(callbacks, module=None, **settings):
    seed_everything(2, verbose=False)
    module = (module or Module)()
    trainer = quiet_trainer(callbacks=callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **settings})
    trainer.fit(module, datamodule=ClassIncremental(DigitsData(), num_tasks=2))
    return module


def _weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_a_callback_that_hands_on_what_it_gets_changes_nothing():
    assert torch.equal(_weights(_fit([Around([])])), _weights(_fit([])))


def test_it_is_called_once_a_step_with_the_step_inside():
    heard = []
    module = _fit([Around(heard)])
    assert heard == [("Around", place, step) for _ in range(2) for step in range(5) for place in ("in", "out")]
    assert [index for _, index in module.seen] == list(range(5)) * 2


def test_several_are_nested_in_an_order_that_does_not_depend_on_the_users_list():
    runs = []
    for turn in (1, -1):
        heard = []
        _fit([Around(heard), Beyond(heard)][::turn], limit_train_batches=1)
        runs.append(heard)
    assert runs[0] == runs[1]
    assert [place for _, place, _ in runs[0][:4]] == ["in", "in", "out", "out"]
    assert runs[0][0][0] == runs[0][3][0] != runs[0][1][0] == runs[0][2][0]


def test_the_module_gets_the_changed_batch():
    def first_half(batch):
        return [part[:4] for part in batch]

    module = _fit([Around([], first_half)])
    assert {len(batch[1]) for batch, _ in module.seen} == {4}


def test_what_the_callback_returns_is_what_is_trained_on():
    assert torch.equal(
        _weights(_fit([Around([], change_outputs=lambda loss: loss * 0)], lambda: Plain(lr=0.5))),
        _weights(_fit([], lambda: Plain(lr=0.0))),
    )


def test_a_step_may_be_left_out():
    assert torch.equal(
        _weights(_fit([Around([], change_outputs=lambda loss: None)])), _weights(_fit([], lambda: Module(lr=0.0)))
    )


def test_the_step_may_be_called_twice():
    class Twice(ContinualCallback):
        def around_training_step(self, trainer, pl_module, batch, batch_idx, step):
            return step(batch) + step([batch[0] + 0.1, batch[1]])

    module = _fit([Twice()], limit_train_batches=1)
    assert len(module.seen) == 4


class Term(ContinualCallback):
    """A loss term that notes what it was given."""

    def __init__(self):
        self.given = []

    def training_loss(self, trainer, pl_module, batch, batch_idx, outputs):
        self.given.append((batch, outputs))
        return pl_module.net[0].weight.square().sum() * 0.01


def test_loss_terms_get_the_batch_that_the_module_got_and_what_comes_out():
    term = Term()
    module = _fit([Around([], lambda batch: [part[:4] for part in batch], lambda loss: loss * 2), term])
    for (seen, _), (batch, outputs) in zip(module.seen, term.given, strict=True):
        assert all(torch.equal(mine, its) for mine, its in zip(seen, batch, strict=True))
        assert outputs.ndim == 0


def test_a_term_comes_to_the_changed_loss():
    class ByHand(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 2 + self.net[0].weight.square().sum() * 0.01

    changed = _fit([Around([], change_outputs=lambda loss: loss * 2), Term()], Plain)
    assert torch.equal(_weights(changed), _weights(_fit([], ByHand)))


def test_losses_per_sample_can_be_reduced_before_a_term_is_added():
    class Each(Plain):
        def training_step(self, batch, batch_idx):
            return {"loss": F.cross_entropy(self(batch[0]), batch[1], reduction="none"), "extra": 1}

    def mean(outputs):
        return {**outputs, "loss": outputs["loss"].mean()}

    reduced = _fit([Around([], change_outputs=mean), Term()], Each)
    torch.testing.assert_close(_weights(reduced), _weights(_fit([Term()], Plain)))


def test_manual_optimisation_is_gone_around_too():
    term, heard = Term(), []
    manual = _fit([Around(heard), term], lambda: Manual(added_loss))
    automatic = _fit([Around([]), Term()], Plain)
    assert torch.equal(_weights(manual), _weights(automatic))
    assert len(heard) == 20


@pytest.mark.parametrize("names", ["batch", "batch, batch_idx", "batch, batch_idx, *others", "batch, **others"])
def test_any_signature_of_training_step_is_called_as_without_callbacks(names):
    source = f"def training_step(self, {names}):\n    return F.cross_entropy(self(batch[0]), batch[1])\n"
    scope = {"F": F}
    exec(source, scope)
    module = type("Signed", (Plain,), {"training_step": scope["training_step"]})
    assert torch.equal(_weights(_fit([Around([]), Term()], module)), _weights(_fit([Around([]), Term()], Plain)))


def test_after_the_fit_the_modules_own_step_is_back():
    module = _fit([Around([])])
    assert "training_step" not in vars(module)


def test_an_ordinary_fit_is_gone_around_too():
    heard = []
    trainer = quiet_trainer(callbacks=[Around(heard)], max_epochs=1, limit_train_batches=2)
    module = Plain()
    trainer.fit(module, datamodule=DigitsData())
    assert len(heard) == 4
    assert "training_step" not in vars(module)


def test_an_exception_in_it_leaves_the_modules_own_step():
    def refuse(batch):
        raise RuntimeError("broken")

    module, trainer = Plain(), quiet_trainer(callbacks=[Around([], refuse)], max_epochs=1)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, datamodule=ClassIncremental(DigitsData(), num_tasks=2))
    assert "training_step" not in vars(module)
