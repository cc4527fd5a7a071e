"""Measure what early exits save and what they cost.

    python benchmarks/early_exits.py

ResNet-32 on FashionMNIST with exits after its first two stages, trained jointly; one thread, everything in one process,
the sides in turn, medians of the rounds.
"""

import argparse
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.replay import TaskTimes
from benchmarks.stream_overhead import DATA, Net
from lightning_cl.callbacks import EarlyExits
from lightning_cl.datamodules import Joint, TorchvisionData
from lightning_cl.exits import ExitNetwork
from lightning_cl.metrics.early_exit import ExitCurve
from lightning_cl.models import build_backbone

LAYERS = ["model.stages.0", "model.stages.1"]
BATCH = 64


class ResNet(Net):
    """ResNet-32 for grey images."""

    def __init__(self) -> None:
        super().__init__(build_backbone("resnet32", 10, (1, 28, 28)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(root: str, steps: int, exits: EarlyExits | None, seed: int = 0) -> tuple[ResNet, float]:
    """Train on all classes at once, and return the module and its seconds a step."""
    seed_everything(seed, verbose=False)
    times = TaskTimes()
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=[times, *([] if exits is None else [exits])],
    )
    data = TorchvisionData("FashionMNIST", root=root, batch_size=BATCH, val_fraction=0.1)
    module = ResNet()
    trainer.fit(module, datamodule=Joint(data))
    return module, sum(times.seconds) / sum(times.steps)


def test_images(root: str, count: int) -> tuple[Tensor, Tensor]:
    """Return test images as the network gets them, and their labels."""
    data = TorchvisionData("FashionMNIST", root=root, batch_size=count)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    return data.on_after_batch_transfer((images, labels), 0)  # type: ignore[no-any-return]


def throughput(network: nn.Module, images: Tensor, batch: int) -> tuple[float, Tensor]:
    """Return images a second and what the network said of them."""
    outputs = []
    started = time.perf_counter()
    with torch.inference_mode():
        for part in images.split(batch):
            outputs.append(network(part))
    return len(images) / (time.perf_counter() - started), torch.cat(outputs)


def measure_speed(module: ResNet, exits: EarlyExits, root: str, rounds: int) -> None:
    """Compare the throughput with exits and without."""
    network, curve = exits.network, ExitCurve(**exits.figures["curve"])
    assert network is not None
    costs = ", ".join(f"{cost:.2f}" for cost in network.spec["costs"])
    print(f"chosen threshold {exits.threshold_in_use:.2f}; a sample costs {costs} of the plain network at the exits\n")
    print("| batch | side | images a second | beside plain | accuracy | what FLOPs promise |")
    print("|---|---|---|---|---|---|")
    module.eval()
    sides = {"plain": None, "chosen threshold": exits.threshold_in_use, "nobody leaves": 1.0, "all heads, no rule": 2.0}
    for batch, count in ((BATCH, 2048), (1, 300)):
        images, labels = test_images(root, count)
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        accuracies = {}
        for _ in range(rounds):
            for name, threshold in sides.items():
                with _exits_on(network, module, threshold):
                    speed, logits = throughput(module, images, batch)
                speeds[name].append(speed)
                accuracies[name] = float((logits.argmax(1) == labels).float().mean())
        for name, threshold in sides.items():
            ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds["plain"], strict=True))
            cost = 1.0 if threshold is None else float(curve.costs[round(min(threshold, 1.0) * 100)])
            speed = statistics.median(speeds[name])
            print(
                f"| {batch} | {name} | {speed:.0f} | {ratio:.2f} | {accuracies[name]:.3f} | {1 / cost:.2f} |",
                flush=True,
            )
    print()


@contextmanager
def _exits_on(network: ExitNetwork, module: nn.Module, threshold: float | None) -> Iterator[None]:
    """Put exits on a module: none at all, a rule with a threshold, or above 1 all heads without a rule."""
    if threshold is None:
        yield
        return
    hooks = network.attach(module)
    hooks.threshold = threshold
    with hooks.collecting() if threshold > 1 else nullcontext():
        yield
    network.detach()


def measure_training(root: str, rounds: int, steps: int = 15) -> None:
    """Compare a training step with three exits and without."""
    sides: dict[str, Callable[[], EarlyExits | None]] = {
        "plain": lambda: None,
        "three exits": lambda: EarlyExits([*LAYERS, "model.stages.2.2"], "joint", print_table=False),
    }
    ratios = []
    for seed in range(rounds):
        seconds = {name: train(root, steps, make(), seed)[1] for name, make in sides.items()}
        ratios.append(seconds["three exits"] / seconds["plain"])
    print(f"a training step with three exits: {statistics.median(ratios):.2f} of the plain one (asked: at most 1.25)\n")


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="training steps before the throughput is measured")
    parser.add_argument("--data", default=str(DATA), help="folder that holds FashionMNIST")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    print(f"{versions}; one thread ({platform.machine()})\n", flush=True)
    exits = EarlyExits(LAYERS, "joint", threshold="auto:0.5pp", print_table=False)
    module, seconds = train(arguments.data, arguments.steps, exits)
    print(f"trained {arguments.steps} steps of {1000 * seconds:.0f} ms\n", flush=True)
    measure_speed(module, exits, arguments.data, arguments.rounds)
    measure_training(arguments.data, arguments.rounds)


if __name__ == "__main__":
    main()
