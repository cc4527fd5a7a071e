"""Checks of arguments that several constructors share."""

import math
from collections.abc import Sequence


def check_count(argument: str, value: object, optional: bool = True) -> None:
    """Refuse what is no whole number from 1, nor ``None`` where that is allowed.

    Args:
        argument: Its name.
        value: What was got.
        optional: Whether ``None`` is allowed.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is less than 1.
    """
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{argument}` must be at least 1, got {value}.")


def check_number(argument: str, value: object, least: float, most: float = math.inf, above: bool = False) -> None:
    """Refuse what is no finite number in a range.

    Args:
        argument: Its name.
        value: What was got.
        least: The smallest number that is allowed.
        most: The greatest.
        above: Whether the smallest itself is not allowed.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is outside the range, or not finite.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{argument}` must be a number, got {value!r}.")
    if not (math.isfinite(value) and least <= value <= most and not (above and value == least)):
        low = f"above {least:g}" if above else f"{least:g} or more"
        allowed = f"{low} and finite" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"`{argument}` must be {allowed}, got {value!r}.")


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
