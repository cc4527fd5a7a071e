"""Methods put on one instance for the length of a fit, and taken off again."""

import copy
from collections.abc import Callable
from functools import update_wrapper
from typing import Any


class InstanceOverrides:
    """Override methods of single objects, reversibly.

    A copy of the object (by ``deepcopy`` or pickle), such as a teacher that is kept, has its own methods again.

    Example::

        >>> class Bell:
        ...     def ring(self):
        ...         return "ding"
        >>> bell, overrides = Bell(), InstanceOverrides()
        >>> overrides.wrap(bell, "ring", lambda original: original() + " dong")
        >>> bell.ring(), copy.deepcopy(bell).ring()
        ('ding dong', 'ding')
        >>> overrides.undo()
        >>> bell.ring(), "ring" in vars(bell)
        ('ding', False)
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Put ``wrapper`` in the place of a method; it is called with the original first, then the arguments."""
        missing = object()
        before = vars(owner).get(name, missing)

        def undo() -> None:
            if before is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, _Override(getattr(owner, name), wrapper))
        self._undo.append(undo)

    def undo(self) -> None:
        """Take all overrides off, the last one first."""
        while self._undo:
            self._undo.pop()()


class _Override:
    def __init__(self, original: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
        self._original = original
        self._wrapper = wrapper
        # lets Lightning see through to the user's signature, and to whether the hook is overridden
        update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(self._original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a bound method's copy is bound to the copy of its object
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        return _as_it_is, (self._original,)


def _as_it_is(method: Callable[..., Any]) -> Callable[..., Any]:
    return method
