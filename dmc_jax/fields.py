"""Dataclasses from plain values, checked by their annotations; and what their fields mean."""

import dataclasses
import inspect
import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from dmc_jax.errors import UserError


def describe_fields(cls: type, prefix: str = "--config") -> Iterator[str]:
    """Yield a line for each field of a config: its flag, default and comment in its file."""
    comments = re.findall(
        r"^    (\w+): [^#\n]*(?:#\s*(.*))?$", inspect.getsource(cls), re.MULTILINE
    )
    hints, about = typing.get_type_hints(cls), dict(comments)
    for field in dataclasses.fields(cls):
        options = (hints[field.name], *typing.get_args(hints[field.name]))
        inner = next((option for option in options if dataclasses.is_dataclass(option)), None)
        if inner is not None:
            yield from describe_fields(inner, f"{prefix}.{field.name}")
            continue
        default = "" if field.default is dataclasses.MISSING else f"={field.default}"
        yield f"{prefix}.{field.name}{default}  {about[field.name]}".rstrip()


def from_dict(cls: type, values: Mapping) -> Any:
    """Build a config dataclass from (possibly nested) mappings, checked.

    Args:
        cls: the dataclass, for instance `RunConfig`.
        values: its fields; absent ones take their defaults.

    Raises:
        UserError: an unknown or missing field, or a value of another type or out of range.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(hints)}")
    arguments = {name: _coerce(hints[name], values[name], name) for name in hints if name in values}
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{cls.__name__}: {error}") from error


def _coerce(annotation: Any, value: Any, name: str) -> Any:
    options = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_dict(option, value)
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            kind = typing.get_args(option)[0]
            if kind is str:  # --config.names=a,b comes as one text, --config.names= as an empty one
                parts = [v.split(",") if type(v) is str else [v] for v in value]
                value = [part for part in itertools.chain(*parts) if part != ""]
            return tuple(_coerce(kind, v, name) for v in value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"field {name!r}: expected a finite number, got {value}")
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
    raise UserError(f"field {name!r}: expected {annotation}, got {value!r}")
