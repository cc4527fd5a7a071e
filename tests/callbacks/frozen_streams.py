"""A network that anything moves, and streams that train it with layers frozen."""

from itertools import pairwise

import torch
from lightning.pytorch import Callback
from numbered_streams import fit_stream

from tests.modules import DigitsData, Plain

HEAD = {"net.4.weight", "net.4.bias"}


class Decays(Plain):
    """Has batch norm and dropout, and an optimizer that moves whatever has a gradient, be it zero."""

    def __init__(self):
        super().__init__(lr=0.05, dropout=0.3, batch_norm=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.1)


class States(Callback):
    """Keeps what the module holds at the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    @property
    def moved(self):
        """What moved in each epoch but the first."""
        pairs = pairwise(self.epochs)
        return [{name for name in before if not torch.equal(before[name], after[name])} for before, after in pairs]


def fit_frozen(*callbacks, module=Decays, **settings):
    """Train three tasks, an epoch each, and return what moved in the second and the third, and the module."""
    states = States()
    _, fitted = fit_stream([*callbacks, states], module, settings.pop("data", None) or DigitsData(), **settings)
    return states.moved, fitted
