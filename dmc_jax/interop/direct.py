"""Checkpoints of other formats as models of ours, read where they are, without a conversion."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from dmc_jax.checkpoints.models import StoredModel
from dmc_jax.data.tokenizer import fingerprint
from dmc_jax.errors import UserError
from dmc_jax.interop.dmc_jax import metadata_of
from dmc_jax.interop.formats import open_source, recognise, with_tokenizer
from dmc_jax.interop.parameters import read_params


def find_foreign(path: Path) -> StoredModel | None:
    """Open a checkpoint of another format; None where a folder looks like none.

    Args:
        path: the folder.

    Raises:
        UserError: it is damaged, or of another architecture.
    """
    form = recognise(path)
    if form is None:
        return None
    source = open_source(path, form)
    # A tokenizer that cannot be read is said so by whoever needs it; there may be another.
    with contextlib.suppress(UserError):
        source = with_tokenizer(source)

    def read(abstract: Any) -> dict:
        return read_params(source, abstract)

    notes = [f"{source.path} is a {source.format} checkpoint, read directly", *source.notes]
    if any(tensor.dtype == np.float16 for tensor in source.tensors.values()):
        # Said, for on a GPU it takes twice the memory of what one might expect.
        notes.append("its weights are float16, which float32 holds exactly: it computes in that")
    return StoredModel(
        path=source.path,
        format=source.format,
        metadata=metadata_of(source),
        tokenizer=source.tokenizer[0] if source.tokenizer else None,
        tokenizer_sha256=frozenset(map(fingerprint, source.tokenizer)),
        read_params=read,
        notes=tuple(notes),
        gates=source.gates,
    )
