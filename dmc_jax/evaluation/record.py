"""Measurements as rows of a JSON file, each of which is made once: a second run goes on."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dmc_jax.errors import UserError
from dmc_jax.files import write_text

Row = dict[str, Any]


@dataclasses.dataclass
class Record:
    """Rows, and what they are measurements of."""

    path: Path | None  # of the file, written row by row; None: it is kept in memory
    about: dict[str, Any]
    rows: list[Row] = dataclasses.field(default_factory=list)
    report: Callable[[str], None] = print  # takes a line for every new row

    def row(self, keys: Mapping[str, Any], measure: Callable[[], Row]) -> Row:
        """Give the row of these keys: the one that is there, or a new one.

        Args:
            keys: what is measured; no two rows have the same.
            measure: gives the other fields.
        """
        for row in self.rows:
            if row.items() >= keys.items():
                return row
        row = {**keys, **measure()}
        self.rows.append(row)
        self.report(json.dumps({k: v for k, v in row.items() if not isinstance(v, list | dict)}))
        self.write()
        return row

    def write(self) -> None:
        """Write the file."""
        if self.path is not None:
            write_text(self.path, json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")


def open_record(
    path: Path, about: dict[str, Any], same: tuple[str, ...], joins: tuple[str, ...] = ()
) -> Record:
    """Begin a file of rows, or go on with it.

    Args:
        path: of the file.
        about: what stands before the rows.
        same: names in `about` whose values must be those of the file.
        joins: names of dictionaries in `about` which those of the file become part of, but for
            entries of one name that differ.

    Raises:
        UserError: a file of other measurements, or of another form.
    """
    if not path.exists():
        return Record(path, about)
    try:
        there = json.loads(path.read_text())
        rows, old = there["rows"], {name: there[name] for name in (*same, *joins)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of measurements ({error!r}): name another") from error
    differ = [name for name in same if old[name] != json.loads(json.dumps(about[name]))]
    for name in joins:
        differ += [key for key, value in about[name].items() if old[name].get(key, value) != value]
    if differ:
        raise UserError(f"{path} was measured with another {differ[0]}: name another file")
    about = about | {name: old[name] | about[name] for name in joins}
    return Record(path, about, rows)
