"""Turn text into tokens: `python -m dmc_jax.prepare_data --output=DIR [--input=PATH]`.

Without --input the corpus is the source and documentation of the running Python's library (about
12 MB, no download). The input is text (.txt, a document each), rows of JSON (.jsonl, .ndjson) or
.parquet, the former also compressed (.gz, .bz2, .xz, .zst), or a folder of such files. A row holds
text, or a conversation, which the chat template beside the tokenizer renders.

A hash of its text decides whether a document is for training (90 %), validation or test (5 % each):
its file's name and what else there is change nothing. --validation gives a validation set of one's
own; what the input has of it is left out.

Exit codes: 0 done or already done, 2 bad input or flags, 1 a failure such as a full disk.
"""

from absl import flags

from dmc_jax import commands
from dmc_jax.data.corpus import SPLITS
from dmc_jax.data.listing import KINDS
from dmc_jax.data.prepare import DEFAULT_VOCAB_SIZE, ON_BAD_ROW, prepare

_OUTPUT = flags.DEFINE(commands.PATH, "output", None, "Folder to make.", required=True)
_INPUT = flags.DEFINE(
    commands.PATH,
    "input",
    None,
    f"A file, or a folder of files: {KINDS}; default: Python's library.",
)
_TEXT_FIELD = flags.DEFINE_string(
    "text_field",
    None,
    "Field of .jsonl and .parquet files that holds the text or the conversation; default: text or "
    "else messages.",
)
_VALIDATION = flags.DEFINE(
    commands.PATH,
    "validation",
    None,
    "File or folder of the validation split; default: drawn from the input.",
)
_ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row", "error", ON_BAD_ROW, "What to do about a row without usable text."
)
_TOKENIZER = flags.DEFINE(
    commands.PATH,
    "tokenizer",
    None,
    "Tokenizer file to use, of any known format; default: train one.",
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, f"Ids of the tokenizer to train; default: {DEFAULT_VOCAB_SIZE}."
)
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that tokenise.")
_LIMIT_MB = flags.DEFINE_float("limit_mb", None, "Text to use at most, in MB; default: all of it.")
_SPECIAL_TOKENS = flags.DEFINE_boolean(
    "special_tokens", False, "Names of special tokens in a text mean these tokens."
)


def main() -> None:
    """Prepare what the flags ask for and print a line for each split."""
    data = prepare(
        _OUTPUT.value,
        source=_INPUT.value,
        tokenizer=_TOKENIZER.value,
        vocab_size=_VOCAB_SIZE.value,
        workers=_WORKERS.value,
        limit_mb=_LIMIT_MB.value,
        text_field=_TEXT_FIELD.value,
        validation=_VALIDATION.value,
        on_bad_row=_ON_BAD_ROW.value,
        special_tokens=_SPECIAL_TOKENS.value,
    )
    for split in SPLITS:
        facts = data.manifest["splits"][split]
        print(
            f"{split:>10}: {facts['tokens']:>12,} tokens, {facts['documents']:>9,} documents, "
            f"{facts['bytes_per_token']:.2f} bytes a token"
        )


if __name__ == "__main__":
    commands.run(main)
