"""A linear head that learns from features drawn of Gaussians, in place of samples that are gone."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_cl.heads.class_gaussians import ClassGaussians
from lightning_cl.heads.nearest_mean import pool_positions

_EPOCHS, _MILESTONE = 30, 15
_LR, _MOMENTUM = 0.1, 0.9
_BATCH = 128


class LinearHead(nn.Linear):
    """A linear layer of zeros that also stands in for a 1x1 convolution, with the same scores at every position.

    Args:
        width: Width of the features.
        num_classes: Number of logits.

    Example::

        >>> LinearHead(8, 3)(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes)

    @override
    def reset_parameters(self) -> None:
        """Begin at zero, which leaves the global generator alone."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Return logits, of shape ``(batch, classes)`` or ``(batch, classes, height, columns)``."""
        logits = functional.linear(pool_positions(features), self.weight.to(features), self.bias.to(features))
        if features.dim() == 4:
            logits = logits[:, :, None, None].expand(-1, -1, features.size(2), features.size(3))
        return logits


def fit_linear(gaussians: ClassGaussians, samples_per_class: int, generator: torch.Generator) -> LinearHead:
    """Train a linear head on features that are drawn from the Gaussians of the classes.

    That is one of the classifiers which AdaGauss (arXiv 2409.18265) compares: 30 epochs of SGD with a learning rate of
    0.1, a tenth of it from the 15th. It runs on the CPU and begins at zero, so that the generator alone decides.

    Args:
        gaussians: Of the classes; one without samples gets a logit of minus infinity.
        samples_per_class: Features drawn of each class.
        generator: One on the CPU.

    Example::

        >>> gaussians = ClassGaussians(num_classes=3, width=2, covariance="diagonal")
        >>> features = torch.tensor([[1.0, 1.0], [3.0, -1.0], [0.0, 5.0], [2.0, 3.0]])
        >>> gaussians.update(features, torch.tensor([0, 0, 2, 2]))
        >>> head = fit_linear(gaussians, 100, torch.Generator().manual_seed(0))
        >>> head(torch.tensor([[2.0, 0.0], [1.0, 4.0]])).argmax(1)
        tensor([0, 2])
    """
    classes = gaussians.known.nonzero().flatten().tolist()
    drawn = [gaussians.draw(label, samples_per_class, generator).cpu().float() for label in classes]
    head = LinearHead(gaussians.means.shape[1], len(gaussians.counts)).requires_grad_(False)
    head.bias.fill_(-float("inf"))
    if drawn:
        labels = torch.arange(len(classes)).repeat_interleave(samples_per_class)
        head.weight[classes], head.bias[classes] = _trained(torch.cat(drawn), labels, len(classes), generator)
    return head


def _trained(features: Tensor, labels: Tensor, num_classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=_LR, momentum=_MOMENTUM)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [_MILESTONE])
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(_EPOCHS):
            for rows in torch.split(torch.randperm(len(labels), generator=generator), _BATCH):
                optimizer.zero_grad()
                loss = functional.cross_entropy(functional.linear(features[rows], weight, bias), labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
    return weight.detach(), bias.detach()
