"""Which samples of a task are poisoned, and with what."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cl.arguments import check_choice, check_list
from lightning_cl.corruptions import check_corruption
from lightning_cl.hashing import mix_each

Attack = Literal["base", "bait", "multibase", "multibait"]

ATTACKS = ("base", "bait", "multibase", "multibait")
ONE_CORRUPTION = ("gaussian_blur",)
SEVERAL_CORRUPTIONS = ("gaussian_blur", "gaussian_noise", "contrast", "pixelate", "jpeg_compression")

# what is drawn, so that no draw repeats another one's hashes
_CLASSES, _SAMPLES = 1, 2


class Poison:
    """How one task is poisoned: `PoisonedTask`'s arguments, and the choices that follow from them and a seed.

    Args:
        task: See `PoisonedTask`.
        attack: See `PoisonedTask`.
        corruption: See `PoisonedTask`.
        severity: See `PoisonedTask`.
        classes: See `PoisonedTask`.
        samples: See `PoisonedTask`.
        seed: Seed of all choices; ``None`` for that of the sequence.
    """

    def __init__(
        self,
        task: int,
        attack: Attack,
        corruption: str | list[str] | None,
        severity: int,
        classes: list[int] | None,
        samples: float,
        seed: int | None,
    ) -> None:
        if not isinstance(task, int) or isinstance(task, bool):
            raise TypeError(f"`task` must be the number of a task, counted from 0, got {task!r}.")
        if task < 0:
            raise ValueError(f"`task` must be the number of a task, counted from 0, got {task}.")
        check_choice("attack", attack, ATTACKS)
        usual = SEVERAL_CORRUPTIONS if attack.startswith("multi") else ONE_CORRUPTION
        names = usual if corruption is None else (corruption,) if isinstance(corruption, str) else corruption
        check_list("corruption", names, str, "the name of a corruption or a list of names")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`corruption` must name at least one corruption, and none twice, got {list(names)}.")
        for name in names:
            check_corruption(name, severity)
        if classes is not None:
            check_list("classes", classes, int, "a list of labels")
            if not classes or len(set(classes)) < len(classes):
                raise ValueError(f"`classes` must have at least one label, and none twice, got {list(classes)}.")
        if isinstance(samples, bool) or not isinstance(samples, (int, float)) or not 0 < samples <= 1:
            raise ValueError(f"`samples` must be a share above 0 and up to 1, got {samples!r}.")
        self.task = task
        self.attack = attack
        self.corruptions = tuple(names)
        self.severity = severity
        self.classes = None if classes is None else tuple(classes)
        self.samples = float(samples)
        self.seed = seed

    def describe(self, seed: int) -> dict[str, Any]:
        """Return all that decides what is poisoned in plain Python, for a checkpoint."""
        return {
            "task": self.task,
            "attack": self.attack,
            "corruptions": list(self.corruptions),
            "severity": self.severity,
            "classes": None if self.classes is None else list(self.classes),
            "samples": self.samples,
            "seed": seed if self.seed is None else self.seed,
        }

    def assign(self, present: Sequence[int], seed: int) -> dict[int, tuple[str, ...]]:
        """Say which classes are poisoned, and each with which corruptions.

        The classes come in a seeded order; "bait" and "multibait" take the first half of them, rounded up. They are
        dealt to the corruptions in turn. Where there are fewer classes than corruptions, it is the corruptions that
        are dealt to the classes, and a class has its samples divided evenly among its own.

        Args:
            present: The classes of the task.
            seed: Decides the order.

        Raises:
            ValueError: If `classes` has a label that is none of the task's.
        """
        if self.classes is not None:
            unknown = sorted(set(self.classes) - set(present))
            if unknown:
                raise ValueError(
                    f"`classes` has {unknown}, which task {self.task} has not: its classes are {sorted(present)}."
                )
            chosen = list(self.classes)
        else:
            labels = torch.tensor(sorted(present), dtype=torch.long)
            chosen = labels[mix_each((seed, _CLASSES, self.task), labels).argsort(stable=True)].tolist()
            if self.attack.endswith("bait"):
                chosen = chosen[: (len(chosen) + 1) // 2]
        names, count = self.corruptions, len(chosen)
        return {label: names[place % len(names) :: count] for place, label in enumerate(chosen)}

    def choose(self, labels: Tensor, ids: Tensor, assignment: dict[int, tuple[str, ...]], seed: int) -> Tensor:
        """Choose the samples, by keys that are hashed from seed, task and id.

        Args:
            labels: Class of each sample of the task, ``(samples,)``.
            ids: Position of each in its data set, ``(samples,)``.
            assignment: What `assign` returned.
            seed: Decides the keys.

        Returns:
            Position in `corruptions` of each sample's corruption, -1 for those that stay clean, ``(samples,)`` int64.
        """
        kinds = torch.full((len(ids),), -1)
        if self.severity == 0:
            return kinds
        for label, names in assignment.items():
            members = (labels == label).nonzero().squeeze(1)
            order = mix_each((seed, _SAMPLES, self.task), ids[members]).argsort(stable=True)
            chosen = members[order[: round(self.samples * len(members))]]
            for place, name in enumerate(names):
                kinds[chosen[place :: len(names)]] = self.corruptions.index(name)
        return kinds
