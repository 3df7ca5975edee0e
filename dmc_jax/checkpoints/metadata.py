"""What a checkpoint says of itself beside its arrays: typed, from JSON and to JSON.

What running the model takes stands at the top: sizes, what its cache keeps, tokenizer. The run that
trained it is there where it was trained here.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dmc_jax.checkpoints import digests
from dmc_jax.checkpoints.run_directory import CheckpointRef, free_space, read_json
from dmc_jax.config import ModelConfig, RunConfig
from dmc_jax.data.tokenizer_files import SpecialTokens
from dmc_jax.errors import UserError
from dmc_jax.fields import from_dict
from dmc_jax.files import write_text
from dmc_jax.policies import choice as policies
from dmc_jax.policies.choice import Trained

FORMAT = "dmc_jax"
VERSION = 2  # 1 had all sizes in its run, and made up a run where there was none

_LONGEST_EVALUATED = 4096


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint of another format that a model was converted from."""

    format: str
    path: str


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A checkpoint but for its arrays."""

    stage: str
    step: int
    model: ModelConfig
    policy: Trained  # that it was trained for; the end of the retrofit calibrates its threshold
    compute_dtype: str  # of the forward pass: float32 | bfloat16
    data: str = ""  # prepared folder that it was trained on; empty: not trained here
    tokenizer: str = ""  # its file, from the step's folder if not absolute; empty: none is known
    tokenizer_sha256: str | None = None
    special_tokens: SpecialTokens | None = None  # None: as the tokenizer's files say
    run: RunConfig | None = None  # that trained it
    converted_from: Origin | None = None
    base_sha256: str | None = None  # of the frozen model that it holds gates for, by `model_hash`
    validation: dict | None = None  # an `Evaluation`, once the end of the stage was measured

    @property
    def evaluation_length(self) -> int:
        """Tokens per window that it is evaluated on where nothing else is asked for."""
        if self.run is not None:
            return self.run.data.length
        return max(2, min(self.model.max_length, _LONGEST_EVALUATED))


def to_json(metadata: Metadata) -> dict[str, Any]:
    """What is written: plain JSON-able values, the inverse of `from_json`."""
    values = dataclasses.asdict(metadata) | {"policy": policies.to_json(metadata.policy)}
    return {"format": FORMAT, "version": VERSION, **values}


def from_json(values: Any, where: str) -> Metadata:
    """Read what `to_json` gave, or what was written before it was there.

    Args:
        values: of the file.
        where: they come from, for messages.

    Raises:
        UserError: not a checkpoint's metadata, of a version to come, or damaged.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise UserError(f"{where} is no metadata of a {FORMAT} checkpoint")
    version = values.get("version", 1)
    if version not in (1, VERSION):
        raise UserError(
            f"{where} is of version {version}; versions 1 to {VERSION} can be read: use a newer "
            "dmc_jax"
        )
    try:
        fields = _of_version_1(values) if version == 1 else dict(values)
        fields["policy"] = policies.from_json(fields["policy"])
        fields = {k: v for k, v in fields.items() if k not in ("format", "version")}
        return from_dict(Metadata, fields)
    except (KeyError, TypeError, ValueError, UserError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{where} is damaged: {what}") from None


def load_metadata(ref: CheckpointRef) -> Metadata:
    """Read the metadata of a checkpoint.

    Args:
        ref: the checkpoint.

    Raises:
        UserError: the file is missing, damaged or of a version to come.
    """
    file = ref.path / "metadata" / "metadata"
    digests.check(ref.path, "metadata/")
    return from_json(read_json(file), str(file))


def write_metadata(ref: CheckpointRef, metadata: Metadata) -> None:
    """Replace the metadata of a finished checkpoint, whole or not at all.

    Args:
        ref: the checkpoint.
        metadata: for example `dataclasses.replace(load_metadata(ref), step=3)`.

    Raises:
        OSError: the file cannot be written; the former metadata stays.
    """
    file = ref.path / "metadata" / "metadata"
    try:
        with digests.rewritten(ref.path, "metadata/metadata"):
            write_text(file, json.dumps(to_json(metadata)))
    except OSError as error:
        raise OSError(
            f"could not write {file}: {error.strerror or error} ({free_space(ref.path)}). The "
            "former metadata is intact."
        ) from error


def _of_version_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields as today's, from a file without a version."""
    fields, run = dict(values), values["run"]
    mode, threshold = fields.pop("mode"), fields.pop("threshold")
    fields["policy"] = {"name": mode}
    if mode == "dmc":
        fields["policy"] |= run["dmc"] | {"threshold": threshold}
    fields |= {"model": run["model"], "compute_dtype": run["compute_dtype"]}
    if "converted_from" in values:
        fields["run"] = None  # it was made up
    return fields
