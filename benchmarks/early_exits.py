"""Measure what early exits save and what they cost.

    python benchmarks/early_exits.py

ResNet-32 on FashionMNIST with exits in its first stage and after its second, trained jointly for 500 steps, and
smaller networks trained in the same way; one thread, everything in one process, the sides in turn, medians of the
rounds.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn

from benchmarks.quiet import quiet_trainer, silence
from benchmarks.stream_overhead import DATA, Net
from lightning_cl.callbacks import EarlyExits
from lightning_cl.datamodules import Joint, TorchvisionData
from lightning_cl.exits import ExitNetwork, SubNetwork, flops_until
from lightning_cl.heads.exit_rules import confidence_of
from lightning_cl.metrics.early_exit import ExitCurve, ExitScores, accuracy_at_budget, exit_curve, exit_summary
from lightning_cl.models import CifarResNet

LAYERS = ["model.stages.0.2", "model.stages.1"]
BATCH = 64
TIMED = {BATCH: 1024, 1: 256}  # images by batch
FIXED = (0.5, 0.9)

Call = Callable[[Tensor], Tensor]
Side = Callable[[], AbstractContextManager[Call]]


class ResNet(Net):
    """A residual network for grey images and its recipe; five blocks a stage are ResNet-32."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__(CifarResNet(1, 10, blocks))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepTimes(Callback):
    """The moment at which each training step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Median seconds of a step, the first left out."""
        return statistics.median(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))


def train(
    root: str, steps: int, exits: EarlyExits | None = None, blocks: int = 5, seed: int = 0, val_fraction: float = 0.1
) -> tuple[ResNet, float]:
    """Train on all classes at once, and return the module and its seconds a step."""
    seed_everything(seed, verbose=False)
    times = StepTimes()
    trainer = quiet_trainer(
        max_epochs=1,
        limit_train_batches=steps,
        callbacks=[times, *([] if exits is None else [exits])],
    )
    data = TorchvisionData("FashionMNIST", root=root, batch_size=BATCH, val_fraction=val_fraction)
    module = ResNet(blocks)
    trainer.fit(module, datamodule=Joint(data))
    return module.eval(), times.step


def load_test_images(root: str) -> tuple[Tensor, Tensor]:
    """Return all test images as the network gets them, and their labels."""
    data = TorchvisionData("FashionMNIST", root=root, eval_batch_size=10_000)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    return data.on_after_batch_transfer(batch, 0)  # type: ignore[no-any-return]


@contextmanager
def leaving(network: ExitNetwork, module: nn.Module, threshold: float) -> Iterator[Call]:
    """Let samples leave a module above a threshold."""
    network.attach(module).threshold = threshold
    yield module
    network.detach()


@contextmanager
def cut_off(network: ExitNetwork, module: nn.Module, position: int) -> Iterator[Call]:
    """End a module at one of its exits."""
    network.attach(module)
    yield SubNetwork(module, position)
    network.detach()


@contextmanager
def heard(network: ExitNetwork, module: nn.Module) -> Iterator[Call]:
    """Evaluate all heads by the plainest of hooks, and let nobody leave."""

    def hear(head: nn.Module, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        head(output)

    pairs = zip(network.spec["layers"], network.heads.eval().heads, strict=True)
    handles = [module.get_submodule(layer).register_forward_hook(partial(hear, head)) for layer, head in pairs]
    yield module
    for handle in handles:
        handle.remove()


@torch.inference_mode()
def time_sides(sides: Mapping[str, Side], images: Tensor, batch: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds that an image takes, by side and round; in a round the sides take turns every few batches."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        spent = dict.fromkeys(sides, 0.0)
        for some in images.split(2 * batch if batch > 1 else 32):
            for name, side in sides.items():
                with side() as call:
                    started = time.perf_counter()
                    for part in some.split(batch):
                        call(part)
                    spent[name] += time.perf_counter() - started
        if number > 0:  # the first round warms up
            for name in sides:
                seconds[name].append(spent[name] / len(images))
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the ratios of two sides, round by round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


@torch.inference_mode()
def score(network: ExitNetwork, module: nn.Module, images: Tensor, labels: Tensor) -> ExitScores:
    """Return how sure and how right each exit is of images, with nobody leaving."""
    said = []
    hooks = network.attach(module)
    with hooks.collecting():
        for part in images.split(250):
            module(part)
            said.append(torch.stack(hooks.logits, dim=1))
    network.detach()
    logits = torch.cat(said)
    return ExitScores(confidence_of(logits), logits.argmax(-1) == labels[:, None])


@torch.inference_mode()
def accuracy_of(call: Call, images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Return the share of images whose answer is right."""
    answers = torch.cat([call(part).argmax(1) for part in images.split(batch)])
    return float((answers == labels).float().mean())


def measure_speed(
    network: ExitNetwork, module: nn.Module, chosen: float, batch: int, images: Tensor, labels: Tensor, rounds: int
) -> float:
    """Compare the throughput with exits, without, and of networks cut off at the exits; return what the rule costs."""
    thresholds = {f"chosen threshold, {chosen:.2f}": chosen, **{f"threshold {t}": t for t in FIXED}}
    sides: dict[str, Side] = {"plain": partial(nullcontext, module)}
    sides |= {name: partial(leaving, network, module, threshold) for name, threshold in thresholds.items()}
    sides["nobody leaves"] = partial(leaving, network, module, 1.0)
    sides["plain with its heads"] = partial(heard, network, module)
    cuts = {f"cut off at exit {i}": partial(cut_off, network, module, i) for i in range(len(network.heads.heads))}
    seconds = time_sides({**sides, **cuts}, images, batch, rounds)
    scores = score(network, module, images, labels)
    for name in (*sides, *cuts):
        speed, gain = statistics.median(1 / s for s in seconds[name]), ratio(seconds["plain"], seconds[name])
        with {**sides, **cuts}[name]() as call:
            cells = [f"{speed:.0f}", f"{gain:.2f}", f"{accuracy_of(call, images, labels, batch):.3f}", *["-"] * 5]
        if name in thresholds:
            shares, _ = exit_summary(scores, thresholds[name]).at(thresholds[name])
            cells[3] = " / ".join(f"{share:.0%}" for share in shares)
            cost = float(shares @ network.costs)
            ways = zip(*(seconds[way] for way in (*cuts, "plain with its heads")), strict=True)
            static = [sum(s * share for s, share in zip(way, shares.tolist(), strict=True)) for way in ways]
            bound = ratio(seconds["plain"], static)
            cells[4:] = [f"{1 / cost:.2f}", f"{gain * cost:.0%}", f"{bound:.2f}", f"{gain / bound:.0%}"]
        print(f"| {batch} | {name} | {' | '.join(cells)} |", flush=True)
    return ratio(seconds["nobody leaves"], seconds["plain with its heads"])


def measure_speeds(
    network: ExitNetwork, module: nn.Module, chosen: float, images: Tensor, labels: Tensor, rounds: int
) -> None:
    """Print the speed at each batch size."""
    costs = ", ".join(f"{cost:.2f}" for cost in network.spec["costs"])
    print(f"a sample costs {costs} of the plain network's operations at the exits and the end\n")
    columns = (
        "batch", "side", "images a second", "beside plain", "accuracy on these images", "left at the exits and the end",
        "FLOPs promise", "kept of it", "networks cut off there promise", "kept of it",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    overheads = {
        batch: measure_speed(network, module, chosen, batch, images[:count], labels[:count], rounds)
        for batch, count in TIMED.items()
    }
    print()
    for batch, overhead in overheads.items():
        print(f"batch {batch}: nobody leaves takes {overhead:.2f} of plain with its heads (asked: at most 1.08)")
    print(flush=True)


def measure_static(
    network: ExitNetwork,
    module: nn.Module,
    smaller: Mapping[int, nn.Module],
    images: Tensor,
    labels: Tensor,
    rounds: int,
) -> None:
    """Compare the exits with smaller networks of the same cost."""
    one = images[:1]
    total = flops_until(module, [], lambda: module(one))[1]
    costs = {blocks: flops_until(net, [], partial(net, one))[1] / total for blocks, net in smaller.items()}
    curve = exit_curve(*score(network, module, images, labels), network.costs)
    sides: dict[str, Side] = {"plain": partial(nullcontext, module)}
    for blocks, net in smaller.items():
        sides[f"static {blocks}"] = partial(nullcontext, net)
        if costs[blocks] >= curve.costs[0]:
            sides[f"exits {blocks}"] = partial(leaving, network, module, threshold_at(curve, costs[blocks]))
    seconds = time_sides(sides, images[: TIMED[BATCH]], BATCH, rounds)
    speeds = {
        name: [f"{statistics.median(1 / s for s in of_side):.0f}", f"{ratio(seconds['plain'], of_side):.2f}"]
        for name, of_side in seconds.items()
    }
    columns = ("blocks a stage", "cost", "accuracy", "images a second", "beside plain")
    columns += ("exits at that cost", "threshold", "images a second", "beside plain")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for blocks, net in smaller.items():
        cells = [f"{costs[blocks]:.2f}", f"{accuracy_of(net, images, labels):.3f}", *speeds[f"static {blocks}"]]
        if f"exits {blocks}" in sides:
            at_cost = f"{accuracy_at_budget(curve, costs[blocks]):.3f}", f"{threshold_at(curve, costs[blocks]):.2f}"
            cells += [*at_cost, *speeds[f"exits {blocks}"]]
        else:  # even the first exit costs more
            cells += ["-"] * 4
        print(f"| {blocks} | {' | '.join(cells)} |")
    print(f"| 5, with exits | 1 | {curve.accuracies[-1]:.3f} | {' | '.join(speeds['plain'])} | | | | |\n", flush=True)
    print("| threshold | cost | accuracy |\n|---|---|---|")
    for at in (0, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100):
        print(f"| {curve.thresholds[at]:.2f} | {curve.costs[at]:.2f} | {curve.accuracies[at]:.3f} |")
    print(flush=True)


def threshold_at(curve: ExitCurve, budget: float) -> float:
    """Return the threshold that `accuracy_at_budget` takes."""
    return float(curve.thresholds[curve.costs <= budget + 1e-6][-1])


def measure_training(root: str, rounds: int, steps: int = 15) -> None:
    """Compare a training step with three exits and without."""
    layers = [*LAYERS, "model.stages.2.2"]
    ratios = []
    for seed in range(rounds):
        plain = train(root, steps, seed=seed, val_fraction=0.0)[1]
        exits = EarlyExits(layers, "joint", print_table=False)
        ratios.append(train(root, steps, exits, seed=seed, val_fraction=0.0)[1] / plain)
    print(f"a training step with three exits: {statistics.median(ratios):.2f} of the plain one (asked: at most 1.25)\n")


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="training steps of each network")
    parser.add_argument("--layers", nargs="*", default=LAYERS, help="where the exits stand")
    parser.add_argument("--static", type=int, nargs="*", default=[1, 2, 3], help="blocks a stage of smaller networks")
    parser.add_argument("--data", default=str(DATA), help="folder that holds FashionMNIST")
    arguments = parser.parse_args()
    silence()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"
    print(f"{versions}; one thread ({platform.machine()}); batch and images: {TIMED}\n", flush=True)
    started = time.perf_counter()
    print(f"exits after {', '.join(arguments.layers)}")
    exits = EarlyExits(arguments.layers, "joint", threshold="auto:0.5pp", print_table=False)
    module, seconds = train(arguments.data, arguments.steps, exits)
    network, chosen = exits.network, exits.threshold_in_use
    if network is None or chosen is None:
        raise RuntimeError("The fit left no threshold.")
    print(f"trained {arguments.steps} steps of {1000 * seconds:.0f} ms\n", flush=True)
    images, labels = load_test_images(arguments.data)
    measure_speeds(network, module, chosen, images, labels, arguments.rounds)
    smaller = {blocks: train(arguments.data, arguments.steps, blocks=blocks)[0] for blocks in arguments.static}
    measure_static(network, module, smaller, images, labels, arguments.rounds)
    measure_training(arguments.data, arguments.rounds)
    print(f"all in {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
