"""How far the layers of a module move while it learns a task: what they put out on average, or their weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_cl.heads import pool_positions
from lightning_cl.taps import ForwardHooks, layers_matching, own_outputs
from lightning_cl.tasks.batches import describe
from lightning_cl.tasks.evaluation import evaluating, sample_batches
from lightning_cl.tasks.module_call import Call, ways_to_call
from lightning_cl.tasks.probes import choose
from lightning_cl.tasks.stream import ReplayStream
from lightning_cl.tasks.task import Task

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


class OutputSums(ForwardHooks):
    """Sum up what some layers put out over samples, while the ``with`` block lasts.

    A layer that is called several times for a batch counts with the mean over its calls, and a convolution with the
    mean over positions: which classes a task has shows in where things are, and poison in what is there.

    Args:
        layers: The layers by name.

    Example::

        >>> layer = nn.Linear(2, 3)
        >>> with OutputSums({"fc": layer}) as sums:
        ...     _ = layer(torch.zeros(4, 2))
        >>> sums.totals["fc"].shape, sums.rows["fc"]
        (torch.Size([3]), 4)
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.totals: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self._layers = layers

    @override
    def register(self) -> Iterable[RemovableHandle]:
        return [layer.register_forward_hook(self._add_to(name)) for name, layer in self._layers.items()]

    def _add_to(self, name: str) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def add(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim < 1 or not output.is_floating_point():
                return
            rows = pool_positions(output.detach())
            rows = rows.cpu() if rows.device.type == "mps" else rows  # which knows no double precision
            total = rows.double().sum(0)
            known = self.totals.get(name)
            if known is not None and known.shape != total.shape:
                raise ValueError(
                    f"Layer {name!r} puts out samples of different shapes, {tuple(known.shape)} and"
                    f" {tuple(total.shape)}, whose mean means nothing. Name other layers with `layers=[...]`."
                )
            self.totals[name] = total if known is None else known + total
            self.rows[name] = self.rows.get(name, 0) + len(rows)

        return add


class LayerStates:
    """Take the state of a module's layers now and again, to be compared with `shifts_between`.

    Args:
        patterns: Shell patterns of the layers. ``None`` takes the norms where outputs are compared and there are two at
            least, since these bring what comes before them to one scale; else all layers with weights.
        space: Whether the state of a layer is its mean output ("activation") or its weights ("parameter").
        samples: Training samples of a task that outputs are averaged over, drawn once; all if ``None``.
    """

    def __init__(
        self, patterns: Sequence[str] | None, space: Literal["activation", "parameter"], samples: int | None
    ) -> None:
        self._patterns = patterns
        self._space = space
        self._samples = samples
        self._call: Call | None = None

    def forget(self) -> None:
        """Let go of the module."""
        self._call = None

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the layers by name.

        Raises:
            MisconfigurationException: If a pattern matches none, or there are less than two.
        """
        try:
            layers = layers_matching(pl_module, self._patterns)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        if self._patterns is None and self._space == "activation":
            norms: dict[str, nn.Module] = {name: layer for name, layer in layers.items() if isinstance(layer, _NORMS)}
            layers = norms if len(norms) > 1 else layers
        if len(layers) < 2:
            raise MisconfigurationException(
                f"`layers={self._patterns}` must match two layers at least, to compare them; it matches"
                f" {', '.join(map(repr, layers)) or 'none'}."
            )
        return layers

    def check(self, trainer: Trainer, pl_module: LightningModule, stream: ReplayStream) -> None:
        """Refuse, before training, layers that put out no tensor for a batch; to be called on all ranks."""
        layers = self.find(pl_module)
        if self._space == "parameter":
            wanted = "have weights"
            reached = {name for name, layer in layers.items() if any(True for _ in layer.parameters())}
        else:
            wanted = "put out a tensor for a batch"
            task = stream.current_task
            few = torch.arange(min(8, stream.samples_of(task.index) or 0))
            self._call = self._find_call(trainer, pl_module, stream, few, layers)
            reached = set(mean_outputs(trainer, pl_module, stream, task.index, few, self._call, layers))
        silent = [name for name in layers if name not in reached]
        if (silent and self._patterns is not None) or len(reached) < 2:
            raise MisconfigurationException(
                f"`layers` must match two layers at least that {wanted}. Of {', '.join(map(repr, layers))} these do"
                f" not: {', '.join(map(repr, silent)) or 'none'}."
            )

    def _find_call(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stream: ReplayStream,
        few: Tensor,
        layers: Mapping[str, nn.Module],
    ) -> Call:
        """Return the way of calling the module that reaches the most layers; what it returns does not matter."""
        found: Call | None = None
        most, tried = -1, []
        with evaluating(trainer, pl_module), own_outputs():
            samples = sample_batches(trainer, pl_module, stream, stream.current_task.index, few, every_rank=True)
            _, batch = next(samples)
            for name, call in ways_to_call(pl_module, batch, stream.structure):
                with OutputSums(layers) as sums:
                    try:
                        call(batch)
                    except Exception as error:
                        tried.append(f"{name}: {type(error).__name__}: {error}")
                        continue
                if len(sums.totals) > most:
                    found, most = call, len(sums.totals)
                if most == len(layers):
                    break
        if found is None:
            raise MisconfigurationException(
                f"Cannot find out how to call {type(pl_module).__name__} for a batch {describe(batch)}. Tried:"
                f" {'; '.join(tried)}. Name the inputs with `inputs=...` on the task sequence, or compare weights with"
                " `space='parameter'`."
            )
        return found

    def take(self, trainer: Trainer, pl_module: LightningModule, stream: ReplayStream, task: Task) -> dict[str, Tensor]:
        """Return the state of the layers, in the order of the module; the same on every rank."""
        layers = self.find(pl_module)  # anew: a module may put other layers in the place of the old ones
        if self._space == "parameter":
            return layer_weights(layers)
        if self._call is None:
            raise RuntimeError("Layers were asked for their outputs before training began.")
        count = stream.samples_of(task.index) or 0
        drawn = choose(min(self._samples or count, count), count, stream.seed, task.index)
        means = mean_outputs(trainer, pl_module, stream, task.index, drawn, self._call, layers)
        return {name: means[name] for name in layers if name in means}


def mean_outputs(
    trainer: Trainer,
    pl_module: LightningModule,
    stream: ReplayStream,
    task: int,
    indices: Tensor,
    call: Callable[[Any], Any],
    layers: Mapping[str, nn.Module],
) -> dict[str, Tensor]:
    """Return what layers put out on average over training samples of a task, as an evaluation sees them.

    The samples are shared out over the ranks. Layers that the module did not call are left out.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        stream: The tasks.
        task: The task that the samples belong to.
        indices: Which samples.
        call: Calls the module on a batch.
        layers: The layers by name.

    Returns:
        A tensor of the shape of one sample's output for each layer, float32, on the CPU and the same on every rank.
    """
    shared = trainer.world_size > 1 and len(indices) >= trainer.world_size  # a rank must not be without a sample
    with evaluating(trainer, pl_module), own_outputs(), OutputSums(layers) as sums:
        for _, batch in sample_batches(trainer, pl_module, stream, task, indices, every_rank=not shared):
            call(batch)
    means = {}
    for name, total in sums.totals.items():
        rows = torch.tensor(float(sums.rows[name]), device=total.device, dtype=total.dtype)
        if shared:
            total, rows = (trainer.strategy.reduce(part, reduce_op="sum") for part in (total, rows))
        means[name] = (total / rows).float().cpu()
    # a module may put out something else on each rank
    return means if shared else trainer.strategy.broadcast(means)


def layer_weights(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return copies of the layers' parameters on the CPU, ``<layer>:<parameter>`` for a name."""
    return {
        f"{name}:{part}": parameter.detach().cpu().clone()
        for name, layer in layers.items()
        for part, parameter in layer.named_parameters()
    }


def shifts_between(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the distance between two states of each layer, in the order of the first.

    Of a layer that has grown in between, such as a head with new classes, what it had before is compared.

    Args:
        before: Tensors by layer, or by layer and parameter as `layer_weights` names them.
        after: The same later.

    Raises:
        ValueError: If a layer has changed its shape in another way, or is gone.
    """
    squares: dict[str, float] = {}
    for name, old in before.items():
        layer = name.partition(":")[0]
        new = after.get(name)
        if new is None or new.ndim != old.ndim or any(n < o for n, o in zip(new.shape, old.shape, strict=True)):
            found = "is not called any more" if new is None else f"now gives {tuple(new.shape)}"
            raise ValueError(
                f"Layer {layer!r} gave {tuple(old.shape)} when the task began and {found}, so how far it moved cannot"
                " be told. Name the layers to compare with `layers=[...]`."
            )
        kept = new[tuple(slice(size) for size in old.shape)]
        squares[layer] = squares.get(layer, 0.0) + float((kept.double() - old.double()).square().sum())
    return {layer: square**0.5 for layer, square in squares.items()}
