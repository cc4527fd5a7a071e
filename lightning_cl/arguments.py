"""Checks of arguments that several constructors share."""

from collections.abc import Sequence


def check_choice(argument: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of a few words.

    Raises:
        ValueError: Naming the argument, what was got and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
