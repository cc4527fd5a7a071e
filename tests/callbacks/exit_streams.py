"""A network with exits."""

import torch
from nearest_means import PredictingNet
from torch import nn


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
