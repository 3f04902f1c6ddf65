"""python -m simmim_jax.main --config configs/X.py --workdir DIR [--config.a.b=value ...]

Pretrains, or evaluates, as the config says. Run the same command again to go on after any interruption.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from simmim_jax.errors import exit_with_message
from simmim_jax.flags import parse_flags

CONFIG = config_flags.DEFINE_config_file("config", help_string="config file, configs/X.py", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, figures", required=True)
# SLURM, Open MPI and TPU slices say these by themselves.
COORDINATOR = flags.DEFINE_string("coordinator", None, "of several processes: HOST:PORT of the first")
PROCESSES = flags.DEFINE_integer("processes", None, "how many they are", lower_bound=1)
PROCESS = flags.DEFINE_integer("process", None, "which of them this is, from 0 on", lower_bound=0)
HEARTBEAT = flags.DEFINE_integer("heartbeat", 100, "seconds of silence after which one counts as lost", lower_bound=1)


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX and Orbax tell much at the level below
    from simmim_jax import train  # late, so that mistakes on the command line are reported without importing JAX
    from simmim_jax.runtime import compilation, processes

    compilation.keep_compiled()
    processes.join(COORDINATOR.value, PROCESSES.value, PROCESS.value, heartbeat=HEARTBEAT.value)
    try:
        train.train(CONFIG.value, WORKDIR.value)
    except Exception as error:
        if (told := processes.translate_error(error)) is error:
            raise
        raise told from error


def leave(by_signal: bool) -> None:
    if "simmim_jax.runtime.processes" in sys.modules:
        sys.modules["simmim_jax.runtime.processes"].leave(agreed=by_signal)


def run() -> None:
    """Run `main`; end as `errors` promises: one line and an exit code for what the user can mend."""
    if any(argument.startswith("--jax") for argument in sys.argv):
        import jax

        jax.config.config_with_absl()
    with exit_with_message(leave):
        app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
