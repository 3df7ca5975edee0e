"""Fields of a foreign configuration: each is checked for its type, and defaults are remembered."""

import math
from collections.abc import Mapping
from typing import Any

from dmc_jax.errors import UserError

_LARGEST = 2**31  # of any size that a model has; Python would take a billion digits


class Fields:
    """Values by name, from a file that may hold anything.

    Attributes:
        values: the fields.
        where: they come from, for messages.
        defaulted: a phrase for every default that was used, in order.
    """

    def __init__(self, where: str, values: Mapping[str, Any]):
        self.where, self.values = where, values
        self.defaulted: list[str] = []

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A field that counts something; absent or null is the default.

        Raises:
            UserError: no integer, one out of range, or none at all where there is no default.
        """
        value = self._value(name, default)
        if type(value) is not int or not least <= value < _LARGEST:
            raise UserError(
                f"{self.where}: {name} is {shown(value)}; expected an integer of at least {least}"
            )
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        """A field that measures something; as `integer`, and `least` itself is too small."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= least:
            raise UserError(
                f"{self.where}: {name} is {shown(value)}; expected a number above {least:g}"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false; absent or null is the default, which goes without saying.

        Raises:
            UserError: neither true nor false.
        """
        value = self.values[name] if self.has(name) else default
        if type(value) is not bool:
            raise UserError(f"{self.where}: {name} is {shown(value)}; expected true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A field that is text; absent or null is the default, which goes without saying.

        Raises:
            UserError: no text, or none at all where there is no default.
        """
        value = self.values[name] if self.has(name) else default
        if not isinstance(value, str):
            what = "missing" if value is None else f"{shown(value)}; expected text"
            raise UserError(f"{self.where}: {name} is {what}")
        return value

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(name) is not None

    def require(self, name: str, *expected: Any) -> None:
        """Make sure that a field, where it is given, is what our model computes.

        Raises:
            UserError: it is something else.
        """
        value = self.values.get(name)
        if value is not None and not any(type(value) is type(e) and value == e for e in expected):
            raise UserError(
                f"{self.where}: {name} is {shown(value)}; only {expected[0]!r} can be read"
            )

    def notes(self) -> tuple[str, ...]:
        """What the user should know: every default that was used."""
        return tuple(f"{self.where} does not give {what}" for what in self.defaulted)

    def _value(self, name: str, default: Any) -> Any:
        if self.has(name):
            return self.values[name]
        if default is None:
            raise UserError(f"{self.where}: {name} is missing")
        self.defaulted.append(f"{name}: taken as {default}")
        return default


def shown(value: Any) -> str:
    """The value if it is a plain and short one, otherwise its type: it may be endless."""
    if isinstance(value, str):
        return repr(value[:60])
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int) and abs(value) < 2**63:
        return repr(value)
    return f"of type {type(value).__name__}" if not isinstance(value, int) else "too large"
