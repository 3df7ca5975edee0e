"""The flags of commands that run an engine: a model, what its cache keeps, and how much."""

from pathlib import Path
from typing import Any

from absl import flags

from dmc_jax import commands
from dmc_jax.checkpoints.models import StoredModel, find_model
from dmc_jax.errors import UserError
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.pages import KV_DTYPES
from dmc_jax.inference.prompts import parse_bytes
from dmc_jax.policies.choice import BUDGETED, POLICIES

flags.disclaim_key_flags()  # they are their command's, whose help lists them

_DEMO_RUN = Path("runs/tiny_4x")  # what `make demo-train` makes
_AS_IS = ("policy", "page_size", "max_length", "window", "budget", "threshold", "gates", "ratio")
_AS_IS += (
    "tokenizer",
    "add_bos",
    "dtype",
    "kv_dtype",
    "prompt_lookup",
    "chunk",
)  # arguments of the engine


class EngineFlags:
    """Flags, defined; their values are read once the command line is."""

    def __init__(self):
        """Define them, for the module that calls this."""
        self._checkpoint = flags.DEFINE(
            commands.PATH,
            "checkpoint",
            None,
            "A run's directory, a stage of it, a step, the folder of a Hugging Face, Meta or "
            "Megatron checkpoint, or a GGUF file; default: the run of `make demo-train`.",
        )
        self._kv_bytes = flags.DEFINE_string(
            "kv_bytes", "2GiB", "Keys and values in the cache, at most."
        )
        named = (*_policy_flags(), *_model_flags())
        self._named = {holder.name: holder for holder in named}

    def find(self) -> StoredModel:
        """Find the model, and show what a user should know of it.

        Raises:
            UserError: there is none.
        """
        if self._checkpoint.value is None and not _DEMO_RUN.is_dir():
            raise UserError(
                f"no --checkpoint, and no run of the demo in {_DEMO_RUN}: `make demo-train` makes "
                "one"
            )
        model = find_model(self._checkpoint.value or _DEMO_RUN)
        commands.show_notes(model.notes)
        return model

    @property
    def checkpoint(self) -> Path:
        """What was named, or would be found."""
        return Path(self._checkpoint.value or _DEMO_RUN)

    def engine(self, model: StoredModel, max_sequences: int, **options: Any) -> Engine:
        """Make the engine.

        Args:
            model: from `find`.
            max_sequences: that run at a time.
            options: of the engine, for which there are no flags here.

        Raises:
            UserError: as in `Engine.from_checkpoint`.
        """
        return Engine.from_checkpoint(
            model,
            kv_bytes=parse_bytes(self._kv_bytes.value),
            max_sequences=max_sequences,
            **{name: self._named[name].value for name in _AS_IS},
            **options,
        )

    def tokenizer(self, model: StoredModel) -> Path:
        """Say where the tokenizer's file is, beside which a chat template may lie."""
        return Path(self._named["tokenizer"].value or model.tokenizer)


def _policy_flags():
    yield flags.DEFINE_integer("page_size", 16, "Slots per page: 8, 16, 32, ...")
    yield flags.DEFINE_integer(
        "window", None, "Merge window in tokens, 0: unlimited; default: that of training."
    )
    yield flags.DEFINE_enum(
        "policy",
        None,
        list(POLICIES),
        "What the cache keeps; default: what the model was trained for.",
    )
    yield flags.DEFINE_integer(
        "budget",
        None,
        f"Slots of a row, with --policy={'|'.join(BUDGETED)}; with --ratio, the least.",
    )
    yield flags.DEFINE_float(
        "threshold", None, "Logit above which DMC merges or gates drop; default: that of training."
    )
    yield flags.DEFINE(
        commands.PATH,
        "gates",
        None,
        "File of gates, or the name of some that come along: they make a pretrained model compress "
        "as it is.",
    )
    yield flags.DEFINE_float(
        "ratio", None, "Tokens per slot of gates, of a budget that grows, or of --policy=stride."
    )


def _model_flags():
    yield flags.DEFINE_integer(
        "max_length",
        None,
        "Tokens of a prompt and its continuation at most; default: the model's.",
    )
    yield flags.DEFINE(
        commands.PATH,
        "tokenizer",
        None,
        "Its file, where it did not come along or is no longer where it was.",
    )
    yield flags.DEFINE_bool(
        "add_bos", None, "Whether prompts begin with BOS; default: as the model's files say."
    )
    yield flags.DEFINE_integer(
        "chunk",
        None,
        "Tokens of prompts that are read at most between two tokens of the others, a power of two; "
        "default: 512, on a GPU 1,024.",
    )
    yield flags.DEFINE_integer(
        "prompt_lookup",
        0,
        "Tokens of a draft at most, of what a sequence said before, that one pass tries: the text "
        "stays the same.",
        0,
    )
    yield flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "Of the computation; default: that of the checkpoint, but float32 on a CPU.",
    )
    yield flags.DEFINE_enum(
        "kv_dtype",
        None,
        KV_DTYPES,
        "Of keys and values in the cache, int8 with a scale for each; default: that of the "
        "computation.",
    )
