"""Train or retrofit a model: `python -m dmc_jax.train --config=configs/tiny_4x.py`.

Fields of the config are overridden by flags, `--config.data.batch=16`. Exit code 2: a mistake in
the config, the data or the checkpoint; 1: a failure such as a full disk; 130: interrupted, after a
checkpoint. Run the same command again to go on.
"""

from absl import flags, logging
from ml_collections import config_flags

from dmc_jax import commands
from dmc_jax.config import RunConfig, from_dict
from dmc_jax.errors import UserError
from dmc_jax.evaluation.report import write_report
from dmc_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/. Fields are documented in dmc_jax/config.py.",
    lock_config=True,
)
flags.mark_flag_as_required("config")


def main() -> None:
    """Train, then write the report."""
    logging.set_verbosity(logging.INFO)
    try:
        config = _CONFIG.value.to_dict()
    except OSError as error:  # a file that does not exist shows itself only now
        raise UserError(f"--config: {error}") from error
    run = from_dict(RunConfig, config)
    directory = train(run)
    print(f"report: {write_report(directory)}")


if __name__ == "__main__":
    commands.run(main)
