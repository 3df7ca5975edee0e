"""Train or retrofit a model: `python -m dmc_jax.train --config=configs/tiny_4x.py`.

Fields of the config are set by flags, `--config.data.batch=16`. Exit code 2: a mistake in
the config, the data or the checkpoint; 1: a failure such as a full disk; 130 after Ctrl-C and 143
after SIGTERM, once a checkpoint is written. Run the same command again to go on.
"""

import logging as standard_logging

from absl import logging

from dmc_jax import commands
from dmc_jax.config import RunConfig, load_config, named_configs
from dmc_jax.errors import UserError
from dmc_jax.evaluation.report import write_report
from dmc_jax.fields import describe_fields, from_dict
from dmc_jax.training.loop import train

_CONFIG = commands.define_config(
    load_config,
    f"Python file with a function get_config(), or a name: {', '.join(named_configs())}. Some take "
    "arguments: paper:7b,ratio=8.",
    describe_fields(RunConfig),
)


def main() -> None:
    """Train, then write the report."""
    logging.set_verbosity(logging.INFO)
    standard_logging.getLogger("jax").setLevel("WARNING")  # it tells of backends that it lacks
    if _CONFIG.value is None:
        raise UserError("--config is missing: give the path or the name of one, --config=tiny_4x")
    run = from_dict(RunConfig, _CONFIG.value.to_dict())
    directory = train(run)
    if run.dry_run:
        print(f"dry run: {run.name} can run; everything was checked, and nothing was written")
        return
    print(f"report: {write_report(directory)}")


if __name__ == "__main__":
    commands.run(main)
