"""What the layers of a module put out for each sample of a task, one vector a layer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_cl.taps import ForwardHooks, find_head, layers_matching
from lightning_cl.tasks.batches import as_labels
from lightning_cl.tasks.evaluation import evaluate_samples, find_call
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.stream import ReplayStream

_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


class PooledOutputs(ForwardHooks):
    """Keep a vector for each sample of what some layers put out, while the ``with`` block lasts.

    A layer that is called several times counts with the mean over its calls.

    Args:
        layers: The layers by name.

    Example::

        >>> layer = nn.Conv2d(1, 3, kernel_size=1)
        >>> with PooledOutputs({"conv": layer}) as outputs:
        ...     _ = layer(torch.zeros(2, 1, 8, 8))
        >>> outputs.take(2)["conv"].shape
        torch.Size([2, 3])
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._calls: dict[str, list[Tensor]] = {}

    @override
    def register(self) -> Iterable[RemovableHandle]:
        return [layer.register_forward_hook(self._keep(name)) for name, layer in self._layers.items()]

    def take(self, rows: int) -> dict[str, Tensor]:
        """Return the vectors ``(rows, width)`` of the batch that was just passed, in the order of the layers.

        Layers that were not called, or do not put out a row for each sample, are left out.
        """
        calls, self._calls = self._calls, {}
        found = {name: calls[name] for name in self._layers if name in calls}
        whole = {name: parts for name, parts in found.items() if {part.shape for part in parts} == {parts[0].shape}}
        return {name: torch.stack(parts).mean(0) for name, parts in whole.items() if len(parts[0]) == rows}

    def _keep(self, name: str) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 1 and output.is_floating_point():
                self._calls.setdefault(name, []).append(pool_strength(layer, output.detach().float()))

        return keep


def pool_strength(layer: nn.Module, output: Tensor) -> Tensor:
    """Return one vector for each sample: how strong each channel is, the root of its mean square over all positions.

    The mean would not tell noise or blur from a clean image: neither changes the mean of what a convolution puts out.
    Outputs without positions are returned as they are.

    Args:
        layer: Where the output comes from, which tells where its channels are.
        output: ``(batch, width)``, ``(batch, channels, ...)`` of images and convolutions, else ``(batch, ...,
            channels)``.
    """
    if output.ndim == 2:
        return output
    last = output.ndim == 3 and not isinstance(layer, _CHANNELS_FIRST)
    rows = output.transpose(1, -1) if last else output
    return rows.flatten(2).square().mean(2).sqrt()


class SampleOutputs:
    """Take what layers of a module put out for samples of a task now, and again later.

    Args:
        patterns: Shell patterns of the layers; all layers with weights if ``None``.
    """

    def __init__(self, patterns: Sequence[str] | None) -> None:
        self._patterns = patterns
        self._call: ModuleCall | None = None

    def forget(self) -> None:
        """Let go of the module."""
        self._call = None

    def find(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the layers by name.

        Raises:
            MisconfigurationException: If a pattern matches none, or there are none.
        """
        try:
            layers = layers_matching(pl_module, self._patterns)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        if not layers:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no layer with weights; name layers with `layers=[...]`."
            )
        return layers

    def drop_head(
        self, pl_module: LightningModule, stream: ReplayStream, outputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return outputs without those of the classification layer, where layers are not named and it can be told.

        It learns new classes from all samples, poisoned or not, and drowns what the others say of them.
        """
        if self._patterns is not None or len(outputs) < 2:
            return outputs
        try:
            head = find_head(pl_module, stream.num_classes, None)
        except ValueError:
            return outputs
        return {name: rows for name, rows in outputs.items() if name != head}

    def check(self, trainer: Trainer, pl_module: LightningModule, stream: ReplayStream) -> None:
        """Refuse, before training, layers that put out nothing for a batch; to be called on all ranks."""
        self._call, _ = find_call(trainer, pl_module, stream)
        task = stream.current_task.index
        few = torch.arange(min(8, stream.samples_of(task) or 0))
        _, reached = self.take(trainer, pl_module, stream, task, few)
        silent = [name for name in self.find(pl_module) if name not in reached]
        if (silent and self._patterns is not None) or not reached:
            raise MisconfigurationException(
                "`layers` must match layers that put out a tensor with a row for each sample. These do not:"
                f" {', '.join(map(repr, silent))}."
            )

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stream: ReplayStream, task: int, indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the labels of training samples and what each layer puts out for them, as an evaluation sees them.

        To be called on all ranks, which share the work.

        Returns:
            The labels ``(samples,)``, and by layer ``(samples, width)`` float32, on the CPU and the same on every rank.
        """
        call = self._call
        if call is None:
            raise RuntimeError("Layers were asked for their outputs before training began.")
        widths: dict[str, int] = {}
        layers = self.find(pl_module)  # anew: a module may put other layers in the place of the old ones

        with PooledOutputs(layers) as outputs:

            def rows_of(batch: Any) -> Tensor:
                labels = as_labels(stream.structure.find_targets(batch))
                call(batch)
                found = outputs.take(len(labels))
                widths.update((name, rows.shape[1]) for name, rows in found.items())
                # labels are whole in float32 up to 16 million
                device = next(iter(found.values())).device if found else labels.device
                columns = [labels[:, None].to(device, torch.float32), *(rows.to(device) for rows in found.values())]
                return torch.cat(columns, dim=1)

            rows = evaluate_samples(trainer, pl_module, stream, task, indices, rows_of)
        parts, first = {}, 1
        for name, width in widths.items():
            parts[name] = rows[:, first : first + width].contiguous()
            first += width
        return rows[:, 0].long(), parts
