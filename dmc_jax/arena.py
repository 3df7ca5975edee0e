"""Methods beside each other on one model: `python -m dmc_jax.arena --config=arena_smollm2`.

Measures what the config names and writes `results/NAME/`: arena.json, row by row, so that the same
command goes on where it was stopped; table.md; quality.png of text, needle.png, passkey.png. Fields
are set by flags, `--config.contests=text,passkey`. Exit codes: 0 done, 2 bad input or flags, 1 a
failure, 130 Ctrl-C.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from dmc_jax import commands
from dmc_jax.checkpoints.gates import check_base, gates_for, model_hash
from dmc_jax.checkpoints.models import load_tokenizer_of, open_model
from dmc_jax.config import load_config
from dmc_jax.data.chat import load_chat_template
from dmc_jax.data.prepared import open_data
from dmc_jax.errors import UserError
from dmc_jax.evaluation.arena import Arena, about_gates, run, with_margins
from dmc_jax.evaluation.arena_config import ArenaConfig, ServingConfig
from dmc_jax.evaluation.arena_tables import maps, points, report
from dmc_jax.evaluation.machine import machine
from dmc_jax.evaluation.needle import NEEDLES
from dmc_jax.evaluation.plots import found_by_depth, quality_by_bytes
from dmc_jax.evaluation.record import open_record
from dmc_jax.evaluation.side_by_side import slot_bytes
from dmc_jax.fields import describe_fields, from_dict
from dmc_jax.files import write_text
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.throughput import NoText, serve, warm_up
from dmc_jax.model.llama import unstack_layers
from dmc_jax.policies.policy import Policy

_DTYPE = "float32"
_PAGE = 16

_CONFIG = commands.define_config(
    load_config,
    "Python file with a function get_config(), or a name: arena_smollm2.",
    describe_fields(ArenaConfig),
)


def main() -> None:
    """Measure what is missing, then write tables and picture."""
    logging.set_verbosity(logging.WARNING)  # restoring a checkpoint is talkative
    if _CONFIG.value is None:
        raise UserError(
            "--config is missing: give the path or the name of one, --config=arena_smollm2"
        )
    config = from_dict(ArenaConfig, _CONFIG.value.to_dict())
    folder = Path(config.output) / config.name
    arena = enter(config, folder / "arena.json")
    run(arena)
    text = report(arena.record)
    write_text(folder / "table.md", text)
    rows = points(arena.record)
    if rows:
        quality_by_bytes(rows).savefig(folder / "quality.png")
    for contest in NEEDLES:
        rows = maps(arena.record, contest)
        if rows:
            found_by_depth(rows).savefig(folder / f"{contest}.png")
    print(f"\n{text}\nwrote {folder}")


def enter(config: ArenaConfig, file: Path) -> Arena:
    """Open all that contests need.

    Raises:
        UserError: a model, gates or text that cannot be had, or a record of others.
    """
    if not config.checkpoint:
        raise UserError("checkpoint is missing: --config.checkpoint=DIR")
    model = open_model(config.checkpoint)
    commands.show_notes(model.notes)
    files = tuple(gates_for(each, model.config) for each in config.gates)
    for gates in files:
        check_base(gates, model.params, model.config)
    files = with_margins(files, config.margins)
    texts = tuple(open_data(path) for path in config.text.data.split(",") if path)
    tokenizer = load_tokenizer_of(model)
    chat = (
        Path(model.tokenizer) if config.chat and load_chat_template(Path(model.tokenizer)) else None
    )
    about = {
        "measures": "methods beside the dense model at equal slots of cache",
        "machine": machine(" ".join(["python -m dmc_jax.arena", *sys.argv[1:]])),
        "model": model_hash(model.params, model.config),
        "text": [Path(data.manifest["source"]).name for data in texts],
        "split": config.text.split,
        "chat": chat is not None,
        "gates": about_gates(files),
    }
    record = open_record(file, about, same=("model", "text", "split", "chat"), joins=("gates",))
    unstacked = unstack_layers(model.params, model.config, _DTYPE)
    engine = functools.partial(Engine, unstacked, model.config, dtype=_DTYPE, page_size=_PAGE)

    def pages(kv_dtype: str) -> dict:
        return {"kv_dtype": None if kv_dtype == _DTYPE else kv_dtype}

    def write(policy: Policy, kv_dtype: str, prompts: list, new_tokens: int, stop: Sequence[str]):
        seats = {"max_sequences": config.sequences, "kv_bytes": config.kv_bytes}
        params = SamplingParams(new_tokens, temperature=0.0, stop=tuple(stop))
        seated = engine(tokenizer, policy=policy, **seats, **pages(kv_dtype))
        return seated.generate(prompts, params)

    def serve_all(
        policy: Policy, kv_dtype: str, prompts: list, sizes: ServingConfig, ratio: float
    ) -> dict:
        length = sizes.prompt + sizes.new_tokens
        held = ratio * sizes.kv_bytes / (length * slot_bytes(model.config, kv_dtype))
        one = engine(
            NoText(model.config.vocab_size),
            policy=policy,
            max_sequences=min(len(prompts), max(1, round(1.1 * held))),
            kv_bytes=sizes.kv_bytes,
            max_length=length,
            **pages(kv_dtype),
        )
        warm_up(one, prompts[0], sizes.new_tokens)
        served = serve(one, prompts, sizes.new_tokens)._asdict()
        return {"ratio_at_end": served.pop("ratio")} | served

    return Arena(config, model, tokenizer, chat, files, texts, record, write, serve_all)


if __name__ == "__main__":
    commands.run(main)
