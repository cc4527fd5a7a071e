"""An ordinary classifier: nothing in it knows about tasks."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_cl.models.backbones import build_backbone


class ImageClassifier(LightningModule):
    """Train a network with cross-entropy on batches ``(inputs, labels)``.

    It logs `train_loss`, `val_loss`, `val_acc`, `test_loss` and `test_acc`. Nothing in the suite needs this class.

    Args:
        backbone: "mlp", "convnet", "resnet32" (CIFAR's), "resnet18_cifar", a classification model of
            `torchvision.models`, or a module of your own from inputs to logits ``(batch, num_classes)``.
        num_classes: Number of classes.
        input_shape: Shape of one input: ``(channels, height, width)``, or ``(features,)`` for "mlp". A module of your
            own does not need it.
        weights: Name of torchvision's pretrained weights, such as "DEFAULT".
        optimizer: What makes the optimizer from the parameters.
        lr_scheduler: What makes the learning-rate schedule, stepped each epoch, from the optimizer.
        bottleneck: Width of a linear layer before the classification layer, for methods that keep figures of features,
            such as covariances; none if ``None``.

    Raises:
        ValueError: If `backbone` or `weights` is unknown, or does not go with the other arguments.

    Example::

        >>> model = ImageClassifier("mlp", num_classes=10, input_shape=(1, 8, 8))
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        backbone: str | nn.Module = "mlp",
        num_classes: int = 10,
        input_shape: tuple[int, ...] = (3, 32, 32),
        weights: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.05),
        lr_scheduler: LRSchedulerCallable | None = None,
        bottleneck: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
            self.model = build_backbone(backbone, num_classes, input_shape, weights, bottleneck)
        else:
            if weights is not None:
                raise ValueError(f"`weights` goes with the name of a torchvision model, got {weights!r} and a module.")
            if bottleneck is not None:
                raise ValueError(f"`bottleneck` goes with a backbone by name, got {bottleneck} and a module.")
            self.save_hyperparameters(ignore=["backbone", "optimizer", "lr_scheduler"])
            self.model = backbone
        self.num_classes = num_classes
        self.input_shape = tuple(input_shape)
        self._is_mlp = backbone == "mlp"
        self._is_own_module = isinstance(backbone, nn.Module)
        # The CLI can read and override only a lambda in the signature; processes that are spawned need what pickles.
        self._optimizer = _default_sgd if getattr(optimizer, "__module__", None) == __name__ else optimizer
        self._lr_scheduler = lr_scheduler

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        self._check_shape(inputs)
        loss = F.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits of a batch, with or without labels, ``(batch, num_classes)``."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters())
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", "val_loss")
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        inputs, labels = batch
        self._check_shape(inputs)
        logits = self(inputs)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        metrics = {f"{stage}_loss": F.cross_entropy(logits, labels), f"{stage}_acc": accuracy}
        self.log_dict(metrics, batch_size=len(labels), prog_bar=True, sync_dist=True)

    def _check_shape(self, inputs: Tensor) -> None:
        """Say what is wrong in the user's words: PyTorch would speak of matrices that cannot be multiplied."""
        got, wanted = tuple(inputs.shape[1:]), self.input_shape
        fits = math.prod(got) == math.prod(wanted) if self._is_mlp else got[:1] == wanted[:1]
        if not (fits or self._is_own_module):
            raise ValueError(f"`input_shape` of ImageClassifier is {wanted}, but the data have inputs of shape {got}.")


def _default_sgd(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)
