"""DER keeps and compares the logits of every exit where `EarlyExits(losses="all_exits")` says so."""

import copy

import pytest
import torch
import torch.nn.functional as F
from exit_streams import LAYERS, Deep
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numbered_streams import IMAGES, fit_stream, same

from lightning_cl.callbacks import DarkExperienceReplay, EarlyExits
from lightning_cl.tasks import ContinualCallback
from lightning_cl.tasks.batches import take_rows
from tests.modules import DigitsData

REGIMES = ["joint", "mixed", "disjoint"]
ALPHA, BETA = 0.3, 0.5


class Watched(Deep):
    """Without dropout and batch norm, so that a copy says the same."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.net[1] = torch.nn.Identity()


def _fit(regime="joint", others=(), der=None, exits=None, module=Watched, turn=1, **settings):
    der = der or DarkExperienceReplay(20, ALPHA, BETA)
    exits = exits or EarlyExits(LAYERS, regime, losses="all_exits", print_table=False)
    settings = {"max_epochs": 2, **settings}
    _, module = fit_stream([der, exits, *others][::turn], module, DigitsData(), **settings)
    return der, exits, module


def _copy_of(heads):
    hooks, heads.hooks = heads.hooks, None
    try:
        return copy.deepcopy(heads)
    finally:
        heads.hooks = hooks


def _heads_of(module):
    """Copies of network and heads that know nothing of each other."""
    with torch.random.fork_rng():
        network, heads = Watched().net, _copy_of(module.early_exits)
    network.load_state_dict(module.net.state_dict())

    def answers(images):
        first = network[:2](images)
        second = network[2:5](first.clone())
        said = heads.say(0, first, [])
        return [said, heads.say(1, second, [said]), network[5:](second)]

    return answers


def _numbers(memory, slots):
    return 48 * memory.tasks[slots] + memory.indices[slots]


class Terms(Callback):
    """Computes each step's term by hand, from the logits that the memory keeps, and notes what was logged."""

    def __init__(self, der, heads):
        self.der, self.heads = der, heads
        self.expected, self.logged = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        draw = trainer.datamodule.training_draw
        self.expected.append(0.0)
        if draw.replayed is None:
            return
        slots = draw.replayed.slots
        images, labels = take_rows(batch, slice(len(draw.ids), draw.rows), draw.rows)
        assert torch.equal(images, IMAGES[_numbers(self.der.memory, slots)])
        kept = self.der.memory.extras["logits"][slots].split(6, dim=1)
        answers = _heads_of(pl_module)
        terms = []
        for head in self.heads(trainer):
            logits = answers(images)[head]
            distance = ((logits - kept[head]) ** 2).sum() / logits.numel()
            terms.append(ALPHA * distance + BETA * F.cross_entropy(logits, labels))
        self.expected[-1] = float(sum(terms) / len(terms))

    def on_train_batch_end(self, trainer, *args):
        self.logged.append(float(trainer.logged_metrics.get("loss/dark_experience_replay", 0.0)))


def _epoch(trainer):
    return (trainer.global_step // 3) % 2  # of the task, two each


# the heads that are compared in an epoch of a task
COMPARED = {
    "joint": lambda trainer: [0, 1, 2],
    "mixed": lambda trainer: [[2], [0, 1, 2]][_epoch(trainer)],
    "disjoint": lambda trainer: [[2], [0, 1, 2]][_epoch(trainer)],
}


@pytest.mark.parametrize("start", ["next_task", "online"])
@pytest.mark.parametrize("regime", REGIMES)
def test_the_term_is_the_mean_over_the_heads_that_are_trained(regime, start):
    """While the network is trained alone it is that of its own head."""
    der = DarkExperienceReplay(20, ALPHA, BETA, start=start)
    terms = Terms(der, COMPARED[regime])
    _fit(regime, [terms], der)
    assert terms.logged == pytest.approx(terms.expected, rel=1e-4)
    assert sum(term > 0 for term in terms.logged) == (17 if start == "online" else 12)


class AtEnds(ContinualCallback):
    """Keeps what the heads say of the samples of the task that ends, and what the memory has of them."""

    observer = True

    def __init__(self, der):
        self.der, self.pairs = der, []

    def on_task_end(self, trainer, pl_module, task):
        slots = (self.der.memory.tasks == task.index).nonzero().squeeze(1)
        with torch.no_grad():
            answers = _heads_of(pl_module)(IMAGES[_numbers(self.der.memory, slots)])
        self.pairs.append((self.der.memory.extras["logits"][slots], torch.cat(answers, dim=1)))


@pytest.mark.parametrize("options", [{}, {"ensemble": "geometric", "threshold": 0.9}, {"correction": "tlc"}], ids=str)
def test_what_is_kept_is_what_the_heads_themselves_say(options):
    der = DarkExperienceReplay(20)
    ends = AtEnds(der)
    _fit(der=der, others=[ends], exits=EarlyExits(LAYERS, "joint", losses="all_exits", print_table=False, **options))
    assert len(ends.pairs) == 3
    for held, expected in ends.pairs:
        torch.testing.assert_close(held, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["next_task", "online"])
@pytest.mark.parametrize(("losses", "columns"), [("last_head", 6), ("all_exits", 18)])
def test_the_same_is_kept_and_learnt_wherever_samples_may_leave(losses, columns, start):
    runs = []
    for threshold in (None, 0.0):
        exits = EarlyExits(LAYERS, "joint", threshold=threshold, losses=losses, print_table=False)
        der, _, module = _fit(der=DarkExperienceReplay(20, start=start), exits=exits, module=Deep)
        runs.append([dict(module.state_dict()), der.state_dict()])
    assert runs[0][1]["memory"]["extras"]["logits"].shape == (20, columns)
    assert same(*runs)


@pytest.mark.parametrize("start", ["next_task", "online"])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_resumed_run_ends_the_same(regime, start, tmp_path):
    runs, path = [], tmp_path / "step=10.ckpt"
    for resumed in (None, path):
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        der = DarkExperienceReplay(20, start=start)
        der, exits, module = _fit(regime, [checkpoint], der, module=Deep, enable_checkpointing=True, ckpt_path=resumed)
        runs.append([dict(module.state_dict()), exits.state_dict(), der.state_dict()])
    assert runs[0][2]["memory"]["extras"]["logits"].shape == (20, 18)
    assert same(*runs)


@pytest.mark.parametrize("start", ["next_task", "online"])
@pytest.mark.parametrize("regime", REGIMES)
def test_callbacks_in_any_order_give_the_same_run(regime, start):
    runs = []
    for turn in (1, -1):
        der, exits, module = _fit(regime, der=DarkExperienceReplay(20, start=start), module=Deep, turn=turn)
        runs.append([dict(module.state_dict()), exits.state_dict(), der.state_dict()])
    assert same(*runs)


class Gradients(Callback):
    """Notes after each backward pass who has a gradient."""

    def __init__(self):
        self.network, self.heads = [], []

    def on_after_backward(self, trainer, pl_module):
        found = {name: p.grad is not None and bool(p.grad.any()) for name, p in pl_module.named_parameters()}
        self.network.append(any(value for name, value in found.items() if name.startswith("net.")))
        self.heads.append(all(value for name, value in found.items() if name.startswith("early_exits.heads.")))


def test_in_the_phase_of_the_heads_nothing_reaches_the_network():
    gradients = Gradients()
    _fit("disjoint", [gradients], module=Deep)
    assert gradients.network == [step % 6 < 3 for step in range(18)]
    assert gradients.heads == [step % 6 >= 3 for step in range(18)]


def test_the_heads_are_trained_by_it_too():
    ends = []
    for losses in ("all_exits", "last_head"):
        exits = EarlyExits(LAYERS, "disjoint", losses=losses, print_table=False)
        _, exits, module = _fit(exits=exits)
        ends.append((dict(module.state_dict()), exits.state_dict()["heads"]))
    assert same(ends[0][0], ends[1][0])
    assert not same(ends[0][1], ends[1][1])


def test_a_run_of_other_losses_cannot_be_resumed(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    _fit(others=[checkpoint], enable_checkpointing=True)
    other = EarlyExits(LAYERS, "joint", losses="last_head")
    with pytest.raises(MisconfigurationException, match=r"keeps 18 logits .*have 6\. .*`losses` of EarlyExits"):
        _fit(exits=other, ckpt_path=tmp_path / "step=10.ckpt")
