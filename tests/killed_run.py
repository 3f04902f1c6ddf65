"""python killed_run.py WHEN SIGNAL [main's flags]: a run that gets SIGNAL at WHEN, from inside, at exactly that place.

WHEN: "step:7" right after step 7 is sent to the device; "save:10" while step 10's checkpoint is being written in the
background; "evaluators:8" before the evaluators run at step 8; "evaluation:0" when they have run at step 0 and nothing
is written yet; "compile:0" before compilation.
"""

import os
import signal
import sys

from simmim_jax import main


def install(when: str, number: int) -> None:
    from simmim_jax import train
    from simmim_jax.runs import checkpoint, records

    place, at = when.split(":")

    def hit(what, step):
        if what == place and step == int(at):
            os.kill(os.getpid(), number)

    compile_step, save, read_figures = train.compile_train_step, checkpoint.save, records.read_figures
    make_evaluators = train.make_evaluators

    def compile_and_watch(*arguments):
        hit("compile", 0)
        compiled, done = compile_step(*arguments), None

        def step(state, batch, key):
            nonlocal done
            done = int(state.step) + 1 if done is None else done + 1
            out = compiled(state, batch, key)
            hit("step", done)
            return out

        step.memory_analysis = compiled.memory_analysis
        return step

    def save_and_hit(manager, state, *rest):
        save(manager, state, *rest)
        hit("save", int(state.step))

    def make_and_watch(*arguments):
        evaluators = make_evaluators(*arguments)
        first, run = next(iter(evaluators.items()))

        def hit_and_run(state):
            hit("evaluators", int(state.step))
            return run(state)

        return evaluators | {first: hit_and_run}

    def figures_and_hit(folder, step):
        hit("evaluation", step)
        return read_figures(folder, step)

    train.compile_train_step, checkpoint.save, records.read_figures = compile_and_watch, save_and_hit, figures_and_hit
    train.make_evaluators = make_and_watch


if __name__ == "__main__":
    install(sys.argv[1], getattr(signal, sys.argv[2]))
    sys.argv[1:3] = []
    main.run()
