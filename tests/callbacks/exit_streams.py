"""A network with exits, and streams that train it."""

import torch
from lightning.pytorch import Callback
from nearest_means import DigitsToPredict, PredictingNet
from numbered_streams import fit_stream
from torch import nn

from lightning_cl.callbacks import EarlyExits


class Deep(PredictingNet):
    """Three layers before the last, with batch norm and dropout, and an optimizer that moves all it is given."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 24),
            nn.BatchNorm1d(24),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(24, 16),
            nn.ReLU(),
            nn.Linear(16, 6),
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


LAYERS = ["net.1", "net.4"]


def fit_exits(regime="joint", module=Deep, others=(), exits=None, **settings):
    """Train on digits with exits, and return callback, Trainer and module."""
    exits = exits or EarlyExits(LAYERS, regime=regime, threshold="auto:5pp", correction="tlc", print_table=False)
    settings = {"max_epochs": 2, **settings}
    data = settings.pop("data", None) or DigitsToPredict()
    trainer, fitted = fit_stream([*others, exits], module, data, **settings)
    return exits, trainer, fitted


class Weights(Callback):
    """Keeps what the network and the heads hold at the end of each epoch."""

    def __init__(self):
        self.network, self.heads = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        self.heads.append({name: tensor for name, tensor in state.items() if name.startswith("early_exits")})
        self.network.append({name: tensor for name, tensor in state.items() if not name.startswith("early_exits")})
