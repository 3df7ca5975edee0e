"""Turn text into tokens: `python -m dmc_jax.prepare_data --output=DIR [--input=PATH]`.

Without --input the corpus is the source and documentation of the running Python's library (about
12 MB, no download). Exit codes: 0 done or already done, 2 bad input or flags, 1 a failure such as
a full disk.
"""

from absl import flags

from dmc_jax import commands
from dmc_jax.data.corpus import SPLITS
from dmc_jax.data.prepare import DEFAULT_VOCAB_SIZE, prepare

_OUTPUT = flags.DEFINE_string("output", None, "Folder to make.", required=True)
_INPUT = flags.DEFINE_string(
    "input",
    None,
    "A .txt, .jsonl or .parquet file, or a folder of them; default: Python's library.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Tokenizer file to use, of any known format; default: train one."
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, f"Ids of the tokenizer to train; default: {DEFAULT_VOCAB_SIZE}."
)
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that tokenise.")
_LIMIT_MB = flags.DEFINE_float("limit_mb", None, "Text to use at most, in MB; default: all of it.")


def main() -> None:
    """Prepare what the flags ask for and print a line for each split."""
    data = prepare(
        _OUTPUT.value,
        source=_INPUT.value,
        tokenizer=_TOKENIZER.value,
        vocab_size=_VOCAB_SIZE.value,
        workers=_WORKERS.value,
        limit_mb=_LIMIT_MB.value,
    )
    for split in SPLITS:
        facts = data.manifest["splits"][split]
        print(
            f"{split:>10}: {facts['tokens']:>12,} tokens, {facts['documents']:>9,} documents, "
            f"{facts['bytes_per_token']:.2f} bytes a token"
        )


if __name__ == "__main__":
    commands.run(main)
