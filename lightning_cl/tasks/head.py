"""What the callbacks share whose head answers in place of the classification layer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.heads import pool_positions
from lightning_cl.taps import LayerTap, OutputReplacement, layer_named, own_outputs
from lightning_cl.tasks import compat
from lightning_cl.tasks.batches import describe
from lightning_cl.tasks.evaluation import evaluating, find_call
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.stream_callback import StreamCallback
from lightning_cl.tasks.stream_means import Source


def heads_of(trainer: Trainer) -> "list[HeadCallback]":
    """Return the callbacks whose head stands in for the classification layer; more than one is refused in `setup`."""
    return [callback for callback in compat.callbacks_of(trainer) if isinstance(callback, HeadCallback)]


def compared_head(trainer: Trainer) -> "HeadCallback":
    """Return the callback whose head is compared with the classification layer.

    Raises:
        MisconfigurationException: If there is none.
    """
    heads = heads_of(trainer)
    if not heads:
        raise MisconfigurationException(
            "`compare_heads=True` compares a head such as that of `NearestMeanClassifier()` with the classification"
            " layer, and there is none among the callbacks."
        )
    return heads[0]


class HeadCallback(StreamCallback):
    """Base class of callbacks that replace what the classification layer predicts.

    Training sees the layer's own output. In eval mode a head answers from the layer's input, so the module's own
    validation, test and predict steps use it. It stands in from the start of a Trainer call to its end.

    Args:
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Attributes:
        classifier: The head; ``None`` as long as it knows no class, and the layer answers for itself.
    """

    commits_late = True  # a head reads the memory

    def __init__(self, head: str | None = None) -> None:
        self.head = head
        self.classifier: nn.Module | None = None
        self._layer: str | None = None
        self._call: ModuleCall | None = None
        self._shape = (0, 0)
        self._replacement: OutputReplacement | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        others = heads_of(trainer)
        if len(others) > 1:
            names = " and ".join(type(callback).__name__ for callback in others)
            raise MisconfigurationException(
                f"One head can stand in for the classification layer, got {names}. Take one out."
            )
        if stage != "fit":
            return
        joint = "Joint(your_datamodule)"
        tasks = self.need_stream(trainer, "reads the training data of each task", sequence=joint).tasks
        if any(isinstance(callback, WeightAveraging) for callback in compat.callbacks_of(trainer)):
            raise MisconfigurationException(
                f"{self.name} learns its head from the features of the weights in training, and"
                " WeightAveraging evaluates other weights, which the head does not fit. Take one out."
            )
        self.check_indexed(tasks)
        self._layer = self.classifier = self._call = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_labels()
        self._layer = self.find_layer(pl_module, self.head)
        self._stand_in(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._call, batch = find_call(trainer, pl_module, self.stream, head=self.layer)
        with evaluating(trainer, pl_module), LayerTap({self.layer: layer_named(pl_module, self.layer)}) as tap:
            features, outputs = self.features_of(pl_module, batch), pool_positions(tap.outputs[self.layer])
        if features.ndim != 2:
            raise MisconfigurationException(
                f"`head={self.layer!r}` gets {describe(features)}; {self.name} needs one row of features for"
                " each sample."
            )
        self._shape = outputs.shape[1], features.shape[1]

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stand_in(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_without_head()
        self._stand_in(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_without_head()
        self._stand_in(pl_module)

    @override
    def forget(self) -> None:
        super().forget()
        if self._replacement is not None:
            self._replacement.remove()
        self._replacement = self._call = None

    @property
    def layer(self) -> str:
        """Name of the classification layer."""
        if self._layer is None:
            raise RuntimeError(f"{self.name} was asked for its layer before a fit.")
        return self._layer

    @property
    def shape(self) -> tuple[int, int]:
        """Number of classes and width of the features."""
        return self._shape

    def features_of(self, pl_module: LightningModule, batch: Any) -> Tensor:
        """Return what the classification layer gets of a batch, ``(batch, width)``; for use in `evaluating`."""
        if self._call is None:
            raise RuntimeError(f"{self.name} was asked for features before training began.")
        with own_outputs(), LayerTap({self.layer: layer_named(pl_module, self.layer)}) as tap:
            self._call(batch)
        return pool_positions(tap.inputs[self.layer])

    @override
    def around_training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        step: Callable[[Any], Any],
    ) -> Any:
        self._stand_in(pl_module)  # its `on_task_start` may have put a new layer in
        with own_outputs():  # a module may be trained in eval mode
            return step(batch)

    @classmethod
    def build(cls, state: dict[str, Any]) -> nn.Module | None:
        """Return the head of a saved state, ``None`` if there was none yet."""
        raise NotImplementedError

    def sources(self) -> dict[int, Source]:
        """Return the training samples that the head is learnt from now, by task."""
        raise NotImplementedError

    def learn_from(self, trainer: Trainer, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> nn.Module | None:
        """Return a head of the same kind for other samples; to be called on all ranks, each with its share.

        Args:
            trainer: The Trainer.
            rows: Features, labels, and how many samples each row stands for, batch by batch.
        """
        raise NotImplementedError

    @contextmanager
    def answering_with(self, head: nn.Module | None) -> Iterator[None]:
        """Let another head answer while the ``with`` block lasts."""
        own = self.classifier
        self.learn(head)
        try:
            yield
        finally:
            self.learn(own)

    def attach(self, module: nn.Module) -> OutputReplacement:
        """Let the head answer in a module, without a Trainer; ``remove()`` of what is returned takes it off.

        Raises:
            RuntimeError: If the head knows no class yet.
        """
        if self.classifier is None or self._layer is None:
            raise RuntimeError(f"{self.name} has learnt no head yet: fit it, or load its state.")
        return OutputReplacement(module, layer_named(module, self._layer), self.classifier)

    def learn(self, classifier: nn.Module | None) -> None:
        """Let a head answer from now on; ``None`` gives the word back to the layer."""
        self.classifier = classifier
        if self._replacement is not None:
            self._replacement.head = classifier

    @override
    def state_dict(self) -> dict[str, Any]:
        known = {} if self.classifier is None else self.classifier.state_dict()
        return {"layer": self._layer, "classifier": {name: tensor.cpu().clone() for name, tensor in known.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._layer = state_dict["layer"]
        self.learn(self.build(state_dict))

    def _stand_in(self, pl_module: LightningModule) -> None:
        if self._layer is None:
            return
        layer = layer_named(pl_module, self._layer)
        if self._replacement is not None:
            if self._replacement.layer is layer:
                return
            self._replacement.remove()
        self._replacement = OutputReplacement(pl_module, layer, self.classifier)

    def _warn_without_head(self) -> None:
        if self.classifier is None:
            rank_zero_warn(
                f"{self.name} has no head yet, so the classification layer answers. Heads are learnt in `fit`"
                " and kept in its checkpoints: say `ckpt_path=...`, also after a fit in spawned processes."
            )
