"""The shards of prepare, written by an Apache Beam pipeline on any runner.

Each shard is one element. The workers must see the files of SOURCE and DEST under the same paths, as on a shared disk.
"""

import shlex
from multiprocessing.reduction import ForkingPickler

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions

from simmim_jax.errors import DataError, UserError
from simmim_jax.tools.prepare.shards import Report, Settings, Task, read_statistics, write_shard


def write_shards(
    source, tasks: list[Task], settings: Settings, labels: list[int], *, options: str, report: Report
) -> None:
    """Write shards, with the bytes of `shards.write_shards`. options: of the pipeline, like --runner=DirectRunner."""
    work = bytes(ForkingPickler.dumps((source, settings, labels)))  # Beam's own pickler refuses some sources
    try:
        with apache_beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
            _ = pipeline | apache_beam.Create(tasks) | apache_beam.Reshuffle() | apache_beam.Map(_write, work)
    except UserError:
        raise
    except Exception as error:  # runners raise many types, with the traceback of a worker in the text
        lines = str(error).strip().splitlines() or [type(error).__name__]
        named = [line for line in lines if "ERROR[" in line]
        fix = "see the log of the runner; the same command continues, and finished shards stay"
        raise DataError(f"the pipeline failed: {(named or lines)[-1][:300]}", f"--beam={options}", fix) from error
    for task in tasks:
        made = read_statistics(task)
        report(task.stop - task.start, made.refused if made else [])


def _write(task: Task, work: bytes) -> None:
    source, settings, labels = ForkingPickler.loads(work)
    write_shard(source, task, settings, labels, lambda *_: None)
