"""python -m simmim_jax.main --config configs/X.py --workdir DIR [--config.a.b=value ...]

Run the config; the same command resumes an interrupted run. --print_config prints its fields instead.
"""

import sys

from absl import app, flags, logging

from simmim_jax import flags as run_flags
from simmim_jax.errors import exit_with_message


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX and Orbax log much at the level below
    if given.print_config:
        print(run_flags.describe_config(given.config, sys.argv, encoder_fields(given.config, given.workdir)))
        return
    from simmim_jax import experiment, train  # late: mistakes on the command line need no JAX
    from simmim_jax.runtime import compilation, processes

    compilation.enable_cache()
    processes.join(given.coordinator, given.processes, given.process, heartbeat=given.heartbeat)
    try:
        train.train(experiment.make_experiment(given.config, given.workdir, extend=given.extend), given.workdir)
    except Exception as error:
        if (user_error := processes.translate_error(error)) is error:
            raise
        raise user_error from error


def encoder_fields(config, workdir: str | None) -> dict | None:
    """All fields of the encoder; None if the config leaves it to the run, or to an `init_from` that is not given."""
    if config.encoder.size is None or (not config.encoder.name and not config.init_from):
        return None
    from simmim_jax import experiment, models  # the sizes of encoders are next to their Flax modules

    options = experiment.resolve_encoder(config, workdir or "")
    return experiment.encoder_record(models.make_encoder(**options), options)


def leave(by_signal: bool) -> None:
    if "simmim_jax.runtime.processes" in sys.modules:
        sys.modules["simmim_jax.runtime.processes"].leave(agreed=by_signal)


def run() -> None:
    """Run `main`. A user's mistake prints one line and exits with its code, as `errors` promises."""
    if any(argument.startswith("--jax") for argument in sys.argv):
        __import__("jax").config.config_with_absl()
    run_flags.define_run_flags()
    flags.adopt_module_key_flags(run_flags)
    with exit_with_message(leave):
        app.run(main, flags_parser=run_flags.parse_flags)


if __name__ == "__main__":
    run()
