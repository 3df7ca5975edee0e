"""Train or retrofit a model: `python -m dmc_jax.train --config=configs/tiny_4x.py`.

Fields of the config are set by flags, `--config.data.batch=16`. Exit code 2: a mistake in
the config, the data or the checkpoint; 1: a failure such as a full disk; 130 after Ctrl-C and 143
after SIGTERM, once a checkpoint is written. Run the same command again to go on.

Several processes are one run. Started by SLURM, Open MPI or Kubernetes they find each other; by
hand, each is told --coordinator=HOST:PORT --processes=N --process=I. A signal to one stops all
after the same step, with its exit code. Where one dies, the others end with exit code 1.
"""

import logging as standard_logging

from absl import flags, logging

from dmc_jax import commands, processes
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
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where several are started by hand: a free port."
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "How many are started; 1: this one is alone, whatever the cluster says."
)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds to wait until all processes are there."
)
_PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout", 100, "Seconds without a sign of life after which a process counts as dead."
)


def main() -> None:
    """Train, then write the report; one process of several, or the only one."""
    logging.set_verbosity(logging.INFO)
    standard_logging.getLogger("jax").setLevel("WARNING")  # it tells of backends that it lacks
    if _CONFIG.value is None:
        raise UserError("--config is missing: give the path or the name of one, --config=tiny_4x")
    run = from_dict(RunConfig, _CONFIG.value.to_dict())
    with processes.joined(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS.value,
        start_timeout=_START_TIMEOUT.value,
        peer_timeout=_PEER_TIMEOUT.value,
    ):
        if not processes.first():
            logging.set_verbosity(logging.ERROR)  # what is the same in all is said once
        directory = train(run)
        if run.dry_run:
            said = f"dry run: {run.name} can run; everything was checked, and nothing was written"
        else:
            said = f"report: {processes.of_first(lambda: write_report(directory))}"
        if processes.first():
            print(said)


if __name__ == "__main__":
    commands.run(main)
