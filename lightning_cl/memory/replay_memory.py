"""A bounded memory of past samples, by reference."""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_cl.arguments import check_choice, check_count
from lightning_cl.hashing import mix, mix_each
from lightning_cl.memory.selection import (
    Selection,
    find_entry_bars,
    keep_smallest,
    number_groups,
    rank_each_group,
    share_slots,
)

_SLOT_TENSORS = ("tasks", "indices", "keys", "labels")
_KEY_MASK = (1 << 64) - 1  # numpy takes no negative seeds
_LARGEST_ID = torch.iinfo(torch.int32).max


class ReplayMemory:
    """A bounded memory of past samples, by reference: a slot is (task, index, key), 24 bytes with its label.

    Samples are offered with `add`; the selection decides who stays. The key of a sample is a hash of (seed, task,
    index), and the smallest keys stay. So the choice is random, but the same on every process and for every order and
    chunking of the offers, and it is known ahead of time. ``herding`` has the rank in the class as its key instead.

    * ``"reservoir"``: the ``size`` smallest keys of the whole stream, a uniform sample of it (Vitter, 1985).
    * ``"random"``: an equal share for each task.
    * ``"class_balanced"``: an equal share for each class.
    * ``"herding"``: an equal share for each class, those samples first whose mean feature is nearest to the class's
      (iCaRL, arXiv 1611.07725). A class that is offered again shares its slots, rank by rank, with its old samples.

    A group with fewer samples than its share leaves the rest to the others, and what cannot be divided goes to the
    first groups: the memory is never larger than ``size``, and never smaller while there are samples for it. Slots
    are in the order in which their samples were offered.

    Args:
        size: Slots of the memory; ``None`` lets it grow by ``per_class`` with each class.
        selection: Who stays.
        per_class: At most so many samples of each class (``class_balanced`` and ``herding``).
        seed: Another seed, another choice.

    Attributes:
        tasks: Task of each slot, int32.
        indices: Index of each slot's sample in its task's data, int64.
        keys: Key of each slot, int64.
        labels: Class of each slot, int32; -1 where it is not known.
        extras: Anything else per slot, by name, such as DER's logits; see `put`. New slots hold NaN (integers: 0).

    Raises:
        ValueError: If the memory would be without a bound, or an argument is not among what is allowed.

    Example::

        >>> import torch
        >>> from lightning_cl.memory import ReplayMemory
        >>> memory = ReplayMemory(size=5)
        >>> for task, labels in enumerate([torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 2, 3, 3, 3])]):
        ...     memory.add(task, torch.arange(5), labels)
        >>> memory.class_counts
        {0: 2, 1: 1, 2: 1, 3: 1}
        >>> slots = memory.sample(2)
        >>> past = zip(memory.tasks[slots].tolist(), memory.indices[slots].tolist())  # to look up in your data
    """

    def __init__(
        self,
        size: int | None = None,
        selection: Selection = "class_balanced",
        per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("selection", selection, get_args(Selection))
        check_count("size", size)
        check_count("per_class", per_class)
        if per_class is not None and selection not in ("class_balanced", "herding"):
            raise ValueError(
                f"`per_class` is for `selection` 'class_balanced' or 'herding', got {per_class} with {selection!r}."
            )
        if size is None and per_class is None:
            raise ValueError("`size` must be a number of slots where `per_class` does not bound the memory, got None.")
        self.size = size
        self.selection: Selection = selection
        self.per_class = per_class
        self.seed = seed
        self.tasks = torch.empty(0, dtype=torch.int32)
        self.indices = torch.empty(0, dtype=torch.int64)
        self.keys = torch.empty(0, dtype=torch.int64)
        self.labels = torch.empty(0, dtype=torch.int32)
        self.extras: dict[str, Tensor] = {}
        self._draws = 0
        self._bars: NDArray[np.int64] | None = None  # of the slots as they are; `None` until asked for

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def class_counts(self) -> dict[int, int]:
        """Slots of each class, by ascending class, without those whose class is not known."""
        return _count(self.labels[self.labels >= 0])

    @property
    def task_counts(self) -> dict[int, int]:
        """Slots of each task, by ascending task."""
        return _count(self.tasks)

    def add(
        self,
        task: int,
        indices: Tensor | Sequence[int],
        labels: Tensor | Sequence[int] | None = None,
        features: Tensor | None = None,
    ) -> None:
        """Offer samples of a task; the selection decides who stays. A sample that is in the memory is not added twice.

        Args:
            task: Task that the samples belong to.
            indices: Index of each sample in the task's data, ``(samples,)``.
            labels: Class of each, ``(samples,)``; needed where classes have shares.
            features: Feature vector of each, ``(samples, dim)``; needed for ``herding``.

        Raises:
            ValueError: If an argument is missing or malformed, or if ``size`` is less than one slot for each class
                (``random``: each task) seen. The memory is then as it was.
        """
        offer = self._decide(task, indices, labels, features)
        if len(offer.positions) == 0:
            return
        stay = offer.stay
        self._bars = None
        self.tasks = _renew(self.tasks, stay, np.full(len(offer.positions), task, dtype=np.int32))
        self.indices = _renew(self.indices, stay, offer.indices)
        self.keys = _renew(self.keys, stay, offer.keys)
        self.labels = _renew(self.labels, stay, offer.labels)
        for name, extra in self.extras.items():
            self.extras[name] = torch.cat([extra[torch.from_numpy(stay)], _blank(extra, len(offer.positions))])

    def select(
        self,
        task: int,
        indices: Tensor | Sequence[int],
        labels: Tensor | Sequence[int] | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Return the positions in ``indices``, ascending, of those whom `add` would take in now; changes nothing."""
        return torch.from_numpy(self._decide(task, indices, labels, features).positions)

    def sample(self, count: int, key: int | None = None) -> Tensor:
        """Draw slots at random, none twice.

        Args:
            count: Slots to draw; all of them, shuffled, where the memory has fewer.
            key: The draw depends on it and on the length of the memory only. ``None`` draws anew at each call, by a
                counter that is part of the state.

        Returns:
            Positions of slots, ``(min(count, len(memory)),)``.
        """
        if count < 0:
            raise ValueError(f"`count` must be at least 0, got {count}.")
        if key is None:
            key = mix(self.seed, self._draws)
            self._draws += 1
        generator = np.random.Generator(np.random.PCG64(key & _KEY_MASK))
        return torch.from_numpy(generator.choice(len(self), min(count, len(self)), replace=False))

    def find(self, task: int, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the slot of each sample, ``(samples,)``, -1 where it is not in the memory."""
        wanted, inverse = np.unique(_as_ids("indices", indices), return_inverse=True)
        found = np.full(len(wanted), -1, dtype=np.int64)
        slots, places = self._match(task, wanted)
        found[places] = slots
        return torch.from_numpy(found[inverse.reshape(-1)])

    def put(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Set ``extras[name]`` of some slots; the others hold NaN (integers: 0) until they are set.

        Args:
            name: Name of the extra; it is made at the first call, with the dtype of ``values``.
            slots: Positions of slots, ``(samples,)``.
            values: What to keep for each, ``(samples, ...)``.

        Raises:
            ValueError: If a slot is not in the memory, or the shape of the values does not fit.
        """
        slots = torch.as_tensor(slots, dtype=torch.long, device="cpu")
        if slots.numel() > 0 and not 0 <= int(slots.min()) <= int(slots.max()) < len(self):
            raise ValueError(
                f"`slots` must be from 0 to {len(self) - 1}, got {int(slots.min())} to {int(slots.max())}. "
                "`find` gives -1 for a sample that is not in the memory: leave these out."
            )
        values = values.detach().cpu()
        extra = self.extras[name] if name in self.extras else _blank(values, len(self))
        expected = (len(slots), *extra.shape[1:])
        if values.shape != expected:
            raise ValueError(f"`values` of {name!r} must have the shape {expected}, got {tuple(values.shape)}.")
        extra[slots] = values.to(extra.dtype)
        self.extras[name] = extra

    def fork(self) -> "ReplayMemory":
        """Return an independent copy of the slots, without extras, for looking ahead."""
        twin = ReplayMemory(self.size, self.selection, self.per_class, self.seed)
        twin._draws = self._draws
        for name in _SLOT_TENSORS:
            setattr(twin, name, getattr(self, name).clone())
        return twin

    def state_dict(self) -> dict[str, Any]:
        """Return the contents as tensors and plain Python, fit for ``weights_only`` loading."""
        return {
            "size": self.size,
            "selection": self.selection,
            "per_class": self.per_class,
            "seed": self.seed,
            "draws": self._draws,
            **{name: getattr(self, name).clone() for name in _SLOT_TENSORS},
            "extras": {name: extra.clone() for name, extra in self.extras.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, with its seed.

        Raises:
            ValueError: If the state is of a memory with another size, selection or number per class.
        """
        for name in ("size", "selection", "per_class"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"`{name}` is {state[name]!r} in the saved memory and {getattr(self, name)!r} in this one: "
                    f"give `{name}={state[name]!r}` to go on with it."
                )
        self.seed = state["seed"]
        self._draws = state["draws"]
        self._bars = None
        for name in _SLOT_TENSORS:
            setattr(self, name, state[name].cpu().clone())
        self.extras = {name: extra.cpu().clone() for name, extra in state["extras"].items()}

    def _decide(
        self,
        task: int,
        indices: Tensor | Sequence[int],
        labels: Tensor | Sequence[int] | None,
        features: Tensor | None,
    ) -> "_Decision":
        """Decide on an offer without changing anything."""
        if not 0 <= task <= _LARGEST_ID:
            raise ValueError(f"`task` must be from 0 to {_LARGEST_ID}, got {task}.")
        ids = _as_ids("indices", indices)
        classes = self._as_classes(labels, len(ids))
        if self.selection == "herding":
            features = _check_features(features, len(ids))
        keys = mix_each((self.seed, task), torch.from_numpy(ids)).numpy()
        positions = self._pick_hopeful(task, classes, keys)
        positions = positions[self._fresh(task, ids[positions])]
        if len(positions) == 0:
            return _Decision(positions, ids[:0], keys[:0], classes[:0], np.ones(len(self), dtype=bool))

        groups = np.concatenate((self._groups(), self._groups_of(task, classes[positions])))
        codes, counts = number_groups(groups)
        shares = self._share(counts)
        if self.selection == "herding" and features is not None:
            keys[positions] = rank_each_group(features[torch.from_numpy(positions)], codes[len(self) :], shares)
            ranking = np.concatenate((self.keys.numpy(), keys[positions]))
            # ranks are alike where a class was offered more than once: who came first goes first
            ranking = ranking * len(ranking) + np.arange(len(ranking))
        else:
            ranking = np.concatenate((self.keys.numpy(), keys[positions]))
        keep = keep_smallest(ranking, codes, counts, shares)
        positions = positions[keep[len(self) :]]
        return _Decision(positions, ids[positions], keys[positions], classes[positions], keep[: len(self)])

    def _match(self, task: int, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the slots of a task whose index is among ``ids`` (ascending), and the first place of each there."""
        slots = (self.tasks.numpy() == task).nonzero()[0]
        if len(slots) == 0 or len(ids) == 0:
            return slots[:0], slots[:0]
        held = self.indices.numpy()[slots]
        places = np.minimum(ids.searchsorted(held), len(ids) - 1)
        hits = ids[places] == held
        return slots[hits], places[hits]

    def _fresh(self, task: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of samples that are not in the memory, of equal ones the first."""
        order = ids.argsort(kind="stable")
        ascending = ids[order]
        fresh = np.ones(len(ids), dtype=bool)
        fresh[1:] = ascending[1:] != ascending[:-1]
        _, places = self._match(task, ascending)
        fresh[places] = False
        return np.sort(order[fresh])

    def _pick_hopeful(self, task: int, classes: NDArray[np.int32], keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of samples that may get in: of a long stream, only few."""
        if len(self) != self.size or self.selection == "herding":
            return np.arange(len(keys))
        if self._bars is None:
            self._bars = find_entry_bars(self._groups(), self.keys.numpy())
        groups = np.minimum(self._groups_of(task, classes), len(self._bars) - 1)
        return (keys < self._bars[groups]).nonzero()[0]

    def _groups(self) -> NDArray[np.int32]:
        """Return, for each slot, what the slots share the memory by."""
        if self.selection == "reservoir":
            return np.zeros(len(self), dtype=np.int32)
        return (self.tasks if self.selection == "random" else self.labels).numpy()

    def _groups_of(self, task: int, classes: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the same for newcomers."""
        if self.selection in ("class_balanced", "herding"):
            return classes
        return np.full(len(classes), task if self.selection == "random" else 0, dtype=np.int32)

    def _share(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots of each group."""
        if self.per_class is not None:
            counts = np.minimum(counts, self.per_class)
        if self.size is None:
            return counts
        number = int(np.count_nonzero(counts))
        if number > self.size:
            kind = "tasks" if self.selection == "random" else "classes"
            raise ValueError(f"`size` must be at least one slot for each of the {number} {kind} seen, got {self.size}.")
        return share_slots(counts, self.size)

    def _as_classes(self, labels: Tensor | Sequence[int] | None, count: int) -> NDArray[np.int32]:
        """Check the labels of an offer and return them, -1 where there are none."""
        by_class = self.selection in ("class_balanced", "herding")
        if labels is None:
            if by_class:
                raise ValueError(
                    f"`labels` must be given for `selection` {self.selection!r}, got None. "
                    "Samples without classes can use 'reservoir' or 'random'."
                )
            return np.full(count, -1, dtype=np.int32)
        if not by_class:  # targets may be other numbers than classes
            targets = torch.as_tensor(labels)
            labels = torch.where((targets >= 0) & (targets <= _LARGEST_ID), targets, -1)
        classes = _as_ids("labels", labels, lowest=0 if by_class else -1, highest=_LARGEST_ID)
        if len(classes) != count:
            raise ValueError(f"`labels` must be one for each of the {count} `indices`, got {len(classes)}.")
        return classes.astype(np.int32)


class _Decision(NamedTuple):
    """Who of an offer gets in."""

    positions: NDArray[np.int64]
    indices: NDArray[np.int64]
    keys: NDArray[np.int64]
    labels: NDArray[np.int32]
    stay: NDArray[np.bool_]  # which of the old slots


def _as_ids(
    argument: str, values: Tensor | Sequence[int], lowest: int = 0, highest: int = torch.iinfo(torch.int64).max
) -> NDArray[np.int64]:
    """Check a list of integers and return it as int64."""
    ids = torch.as_tensor(values).cpu().numpy()
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size > 0):
        raise ValueError(f"`{argument}` must be integers in one dimension, got {ids.dtype} of shape {ids.shape}.")
    if ids.size > 0 and not lowest <= ids.min() <= ids.max() <= highest:
        raise ValueError(f"`{argument}` must be from {lowest} to {highest}, got {ids.min()} to {ids.max()}.")
    return ids.astype(np.int64, copy=False)


def _check_features(features: Tensor | None, count: int) -> Tensor:
    if features is None:
        raise ValueError("`features` must be given for `selection` 'herding', got None.")
    if features.ndim != 2 or len(features) != count:
        raise ValueError(
            f"`features` must have the shape ({count}, dim), one row for each of the `indices`, "
            f"got {tuple(features.shape)}."
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("`features` must be finite, got NaN or infinity.")
    return features.detach().cpu()


def _renew(slots: Tensor, stay: NDArray[np.bool_], newcomers: NDArray[Any]) -> Tensor:
    """Return the slots that stay, then the newcomers."""
    return torch.from_numpy(np.concatenate((slots.numpy()[stay], newcomers)))


def _blank(like: Tensor, count: int) -> Tensor:
    """Return ``count`` rows that hold nothing yet, with the shape and dtype of the rows of ``like``."""
    return like.new_full((count, *like.shape[1:]), torch.nan if like.is_floating_point() else 0)


def _count(groups: Tensor) -> dict[int, int]:
    values, counts = torch.unique(groups, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
