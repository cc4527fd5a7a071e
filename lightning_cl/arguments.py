"""Checks of arguments that several constructors share."""

import math
from collections.abc import Sequence


def check_count(argument: str, value: object) -> None:
    """Refuse what is neither ``None`` nor a whole number from 1.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is less than 1.
    """
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, got {value}.")


def check_weight(argument: str, value: object) -> None:
    """Refuse what is no finite number from 0.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is below 0, infinite or not a number.
    """
    _check_number(argument, value)
    if not 0 <= value < math.inf:  # type: ignore[operator]
        raise ValueError(f"`{argument}` must be 0 or more and finite, got {value!r}.")


def check_positive(argument: str, value: object) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is 0 or below, infinite or not a number.
    """
    _check_number(argument, value)
    if not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"`{argument}` must be above 0 and finite, got {value!r}.")


def check_share(argument: str, value: object) -> None:
    """Refuse what is no number from 0 to 1.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is outside.
    """
    _check_number(argument, value)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"`{argument}` must be from 0 to 1, got {value!r}.")


def _check_number(argument: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be a number, got {value!r}.")


def check_choice(argument: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of a few words.

    Raises:
        ValueError: Naming the argument, what was got and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_list(argument: str, value: object, of: type | tuple[type, ...], allowed: str) -> None:
    """Refuse what is no list or tuple, and one with members of another kind.

    Args:
        argument: Its name.
        value: What was got.
        of: The kinds of member that are allowed.
        allowed: All that the argument may be, in words.

    Raises:
        TypeError: Naming the argument, what is allowed and what was got.
    """
    if not isinstance(value, (list, tuple)) or any(isinstance(m, bool) or not isinstance(m, of) for m in value):
        raise TypeError(f"`{argument}` must be {allowed}, got {value!r}.")
