"""The first reading of a text: its size, its splits, a sample of it, and what is wrong with it.

It is read a second time to be tokenised, so that a mistake in its last line costs no hours.
"""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from dmc_jax.data.chat import Render
from dmc_jax.data.corpus import SPLITS, Corpus, Document, documents, unit_hash
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError

_SAMPLE_PIECE = 8192  # characters drawn together


@dataclass(frozen=True)
class Texts:
    """What is to be read.

    Attributes:
        corpus: the text.
        validation: the validation set, if it is the user's own.
        limit_bytes: of `corpus` to use at most; None: all of it.
        skip_bad_rows: pass over rows without usable text instead of refusing them.
        render: gives the text of a conversation.
    """

    corpus: Corpus
    validation: Corpus | None = None
    limit_bytes: float | None = None
    skip_bad_rows: bool = False
    render: Render | None = None


@dataclass
class Survey:
    """What was found.

    Attributes:
        size: bytes of text in the documents.
        documents: by split.
        bad_rows: rows passed over.
        first_fault: what is wrong with the first of them.
        in_validation: documents of the text passed over because the user's own validation set has
            them too.
        sample: pieces of the training split, in order.
    """

    size: int = 0
    documents: collections.Counter = field(default_factory=collections.Counter)
    bad_rows: int = 0
    first_fault: str = ""
    in_validation: int = 0
    sample: list[str] = field(default_factory=list)

    def count_bad_row(self, fault: str) -> None:
        """Count a row passed over."""
        self.bad_rows += 1
        self.first_fault = self.first_fault or fault


def split_documents(texts: Texts, found: Survey) -> Iterator[Document]:
    """Read all documents, each in its split.

    With a validation set of the user's own, which comes first, what would have been the validation
    split of the text is trained on.

    Args:
        texts: what to read.
        found: counts what is passed over.

    Raises:
        UserError: as `documents`.
    """
    options = {
        "bad_row": found.count_bad_row if texts.skip_bad_rows else None,
        "render": texts.render,
    }
    keys = set()
    if texts.validation:
        for document in documents(texts.validation, **options):
            keys.add(document.key)
            yield dataclasses.replace(document, split="validation")
    for document in documents(texts.corpus, texts.limit_bytes, **options):
        if document.key in keys:
            found.in_validation += 1
        elif keys and document.split == "validation":
            yield dataclasses.replace(document, split="train")
        else:
            yield document


def survey(texts: Texts, sample_size: int) -> Survey:
    """Read everything once.

    Args:
        texts: what to read.
        sample_size: characters of the training split to keep, drawn evenly from all of it.

    Raises:
        UserError: as `documents`, or there are too few documents for a split.
    """
    found = Survey()
    drawn: list[tuple[float, int, int, str]] = []  # a heap: first the piece to be given up first
    room = sample_size
    for number, document in enumerate(split_documents(texts, found)):
        found.size += len(document.text.encode())
        found.documents[document.split] += 1
        if document.split != "train":
            continue
        for at in range(0, len(document.text), _SAMPLE_PIECE):
            piece = document.text[at : at + _SAMPLE_PIECE]
            draw = unit_hash("sample", f"{document.key}:{at}")
            if room > 0 or draw < -drawn[0][0]:
                heapq.heappush(drawn, (-draw, number, at, piece))
                room -= len(piece)
            while drawn and room + len(drawn[0][-1]) <= 0:
                room += len(heapq.heappop(drawn)[-1])
    found.sample = [piece for *_, piece in sorted(drawn, key=lambda entry: entry[1:3])]
    _check_splits(texts, found)
    return found


def change_of_text(tokenizer: Tokenizer, sample: list[str]) -> str:
    """Say how text changes that is encoded and decoded again; "" where it comes back as it was.

    Args:
        tokenizer: any.
        sample: texts to try.
    """
    changed = [
        (text, back)
        for text in sample
        if (back := tokenizer.decode(tokenizer.encode(text))) != text
    ]
    if not changed:
        return ""
    text, back = changed[0]
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, back, strict=False))
    start = max(0, sum(1 for _ in alike) - 10)
    before, after = text[start : start + 40], back[start : start + 40]
    return (
        "the tokenizer does not give the text back: it changes "
        f"{len(changed)} of {len(sample)} samples, such as {before!r} to {after!r}"
    )


def _check_splits(texts: Texts, found: Survey) -> None:
    source = texts.corpus.source
    if not found.size:
        skipped = f"; {found.bad_rows} bad rows, such as {found.first_fault}" * bool(found.bad_rows)
        raise UserError(
            f"corpus {source} is empty: no text in {len(texts.corpus.files)} files{skipped}"
        )
    if found.documents["train"] and found.documents["validation"]:
        return
    counts = ", ".join(f"{split} {found.documents[split]}" for split in SPLITS)
    raise UserError(
        f"corpus {source} is too small to split: {counts} documents, drawn 90/5/5 by a hash of "
        "their text; give more documents (a .jsonl file has one a row, a .txt file is one), or a "
        "validation set of your own with --validation"
    )
