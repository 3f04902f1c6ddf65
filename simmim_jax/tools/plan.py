"""python -m simmim_jax.tools.plan --config configs/X.py --devices=64 --kind=h100 [--config.a.b=value ...]

Plan a run for a machine that you do not have: memory, time, data rate and communication.

The training step is compiled for simulated CPU devices, as a run compiles it, and never executed. The number of
operations is exact. Memory is an estimate: an accelerator's attention may keep less, and its compiler may order the
work differently. Time follows from an assumed MFU.
"""

import json
import math
import os
import sys
from functools import partial

from absl import app, flags, logging

from simmim_jax.errors import ConfigError, UserError, check_minimum, choose, exit_with_message
from simmim_jax.flags import define_config_flag, parse_flags

JPEG_BYTES = 110_000  # assumed size of an image file
GPU_MEMORY_FRACTION = 0.75  # of a GPU's memory that JAX allocates by default (XLA_PYTHON_CLIENT_MEM_FRACTION)
# A quarter faster to compile, with the same memory and communication. The program is never executed.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def define_flags() -> None:
    """Define the flags of `simmim_jax.main` and those of the machine."""
    define_config_flag()
    flags.declare_key_flag("config")
    flags.DEFINE_integer("devices", 8, "number of devices, all hosts together")
    flags.DEFINE_string("kind", "h100", "device kind, like h100, a100-40 or tpu-v5e")
    flags.DEFINE_integer("devices-per-host", 8, "devices per host")
    flags.DEFINE_float("mfu", 0.45, "assumed share of the published peak that a step's matmuls reach")
    flags.DEFINE_integer("images", 0, "size of the training set; 0: count the images of the config's data")
    flags.DEFINE_bool("json", False, "print the numbers as JSON")
    flags.DEFINE_string("workdir", "", "ignored, so that a command of simmim_jax.main can be reused")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    check_minimum("devices", given.devices, 1)
    simulate(given.devices)
    numbers = plan(
        given.config,
        devices=given.devices,
        kind=given.kind,
        devices_per_host=given["devices-per-host"].value,
        mfu=given.mfu,
        images=given.images,
    )
    if given.json:
        print(json.dumps(numbers, indent=1))
        return
    lines = table(numbers)
    width = max(len(name) for name, _ in lines)
    for name, line in lines:
        print(f"{name:{width}}  {line}")


def simulate(devices: int) -> None:
    """Make JAX, which must not be imported yet, use simulated CPU devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')} {count}"
    os.environ["JAX_PLATFORMS"] = "cpu"


def plan(
    config, *, devices: int, kind: str, devices_per_host: int = 8, mfu: int | float = 0.45, images: int = 0
) -> dict:
    """The numbers of a run of `config`: bytes, seconds, and rates per second.

    images: size of the training set; 0: count the config's data. Raises the errors that a run would raise, and
    ConfigError for a machine that cannot exist.
    """
    import jax  # late: --help and mistakes on the command line need no JAX

    from simmim_jax.compiled import step_flops
    from simmim_jax.experiment import with_settings
    from simmim_jax.memory import compile_to_measure, try_settings
    from simmim_jax.runtime.costs.collectives import collectives
    from simmim_jax.runtime.costs.devices import KINDS, memory, state_bytes

    check_minimum("devices-per-host", devices_per_host, 1)
    check_minimum("images", images, 0)
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu is {mfu}", "--mfu", "give a number above 0, at most 1")
    device_kind = choose("kind", kind, KINDS)
    per_host = min(devices_per_host, devices)
    if devices % per_host:
        raise ConfigError(
            f"{devices} devices do not fill hosts of {per_host}",
            "--devices",
            f"give a multiple of {per_host}, or another --devices-per-host",
        )
    if jax.device_count() != devices:
        raise ConfigError(f"{jax.device_count()} devices are simulated, not {devices}", "--devices", "start again")
    if config.encoder.attention == "cudnn":  # not available on CPUs; XLA's attention has the same operations
        config = with_settings(config, {"encoder.attention": "xla"})
    experiment = make_planned(config, images)
    encoder, mesh, batch_size = experiment.encoder, experiment.mesh, experiment.batches.batch_size
    flops = step_flops(experiment)
    compiled = compile_to_measure(experiment)
    needed, found = memory(compiled), collectives(compiled, per_host)
    del compiled
    gpu_fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION))
    usable = round(device_kind.memory * (1.0 if kind.startswith("tpu") else gpu_fraction))
    communication_seconds = sum(each.seconds(device_kind) for each in found)
    peak = device_kind.bfloat16 if encoder.dtype == "bfloat16" else device_kind.float32
    compute_seconds = flops / (devices * peak * mfu)
    step_seconds = max(compute_seconds, communication_seconds)
    rate, hosts = batch_size / step_seconds, devices // per_host
    numbers = {
        "encoder": f"{config.encoder.name or 'that of init_from'} {experiment.record['encoder']['size'] or ''}".strip(),
        "dtype": encoder.dtype,
        "image": [*experiment.batches.image_size, experiment.batches.channels],
        "kind": kind,
        "devices": devices,
        "devices_per_host": per_host,
        "mesh": dict(mesh.shape),
        "batch_size": batch_size,
        "microbatches": experiment.microbatches,
        "images_per_device": batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experiment.state.params)),
        "state_bytes": state_bytes(experiment.state),
        "memory_bytes": needed,
        "device_bytes": device_kind.memory,
        "usable_bytes": usable,
        "fits": needed <= usable,
        "flops_per_image": flops / batch_size,
        "flops_per_step": flops,
        "peak_flops": peak,
        "mfu": mfu,
        "step_seconds": step_seconds,
        "compute_seconds": compute_seconds,
        "communication_seconds": communication_seconds,
        "collectives": [each._asdict() | {"seconds": each.seconds(device_kind)} for each in found],
        "images_per_second": rate,
        "steps": experiment.steps,
        "steps_per_epoch": experiment.steps_per_epoch or None,
        "hours": experiment.steps * step_seconds / 3600,
        "images_per_second_per_host": rate / hosts,
        "read_bytes_per_second_per_host": rate / hosts * JPEG_BYTES,
    }
    if not numbers["fits"]:
        numbers["tried"] = list(try_settings(experiment, usable))
    return numbers


def make_planned(config, images: int):
    """The Experiment of a config for `images` training images; 0: count the config's data.

    Data that cannot be read is an error only if the length of the run depends on it.
    """
    from simmim_jax.experiment import make_experiment

    make = partial(make_experiment, config, on_cpu=False)
    if images:
        return make(images=images)
    try:
        return make()
    except UserError as error:
        if config.steps:
            return make(images=0)
        make(images=10**9)  # raises if the mistake is not in the data
        raise ConfigError(
            f"the number of images is unknown ({error.what})",
            "--images",
            "give --images=N (ImageNet-1K has 1281167), or --config.steps",
        ) from error


def table(numbers: dict) -> list[tuple[str, str]]:
    """The numbers as rows (name, text), and the assumptions behind them."""
    n, gib = numbers, 2**30
    mesh = " ".join(f"{axis}={size}" for axis, size in n["mesh"].items())
    image, parameters = "x".join(map(str, n["image"])), f"{n['parameters'] / 1e6:.1f} M parameters"
    usable = f"{n['usable_bytes'] / gib:.1f} GiB that JAX uses of {n['device_bytes'] / gib:.0f}"
    verdict = {True: "fits", False: "does not fit"}
    rows = [
        ("machine", f"{n['devices']} x {n['kind']}, {n['devices_per_host']} per host; mesh {mesh}"),
        ("model", f"{n['encoder']}, {image}, {n['dtype']}, {parameters}"),
        ("batch", f"{n['batch_size']}: {n['images_per_device']} per device, in {n['microbatches']} microbatch(es)"),
        ("state", f"{n['state_bytes'] / gib:.2f} GiB per device: parameters and optimizer state"),
        ("memory", f"{n['memory_bytes'] / gib:.1f} GiB per device, of {usable}: {verdict[n['fits']]}"),
    ]
    for tried in n.get("tried", []):
        settings = " ".join(f"--config.{name}={value}" for name, value in tried["settings"].items())
        rows.append(("", f"{settings}: {tried['memory_bytes'] / gib:.1f} GiB, {verdict[tried['fits']]}"))
    peak = f"{n['peak_flops'] / 1e12:.1f} TFLOP/s per device"
    bound = "" if n["step_seconds"] == n["compute_seconds"] else "; bound by communication"
    reading = f"{n['read_bytes_per_second_per_host'] / 1e6:.0f} MB/s of JPEG"
    rows += [
        (
            "operations",
            f"{n['flops_per_image'] / 1e9:.2f} GFLOP per image, {n['flops_per_step'] / 1e12:.2f} TFLOP per step",
        ),
        ("step", f"{n['compute_seconds'] * 1e3:.1f} ms at an MFU of {n['mfu']:.0%} of {peak}{bound}"),
        ("images/s", f"{n['images_per_second']:.0f}, {n['images_per_second'] / n['devices']:.0f} per device"),
        ("run", f"{n['steps']} steps, {n['hours']:.1f} hours, without evaluations and saving"),
        ("data", f"{n['images_per_second_per_host']:.0f} images/s per host, {reading}"),
        ("communication", f"{n['communication_seconds'] * 1e3:.2f} ms per step, if nothing overlaps with compute"),
    ]
    for each in n["collectives"]:
        if each["sent"] >= 2**20:
            group = f"{each['count']} x {each['kind']} among {each['group']} ({each['local']} on a host)"
            size = f"{each['size'] / 2**20:.1f} MiB, {each['sent'] / 2**20:.1f} sent per device"
            rows.append(("", f"{group}: {size}, {each['seconds'] * 1e3:.2f} ms"))
    links = "rings over links and networks at their published rates"
    return [
        *rows,
        ("assumed", f"an MFU of {n['mfu']:.0%} (--mfu); {JPEG_BYTES / 1e3:.0f} KB per JPEG; {links}"),
        ("estimated", "memory: the program was compiled for CPUs, where attention keeps its logits"),
    ]


def run() -> None:
    """Run `main`. A mistake of the user ends in one line and an exit code."""
    define_flags()
    with exit_with_message():
        app.run(main, flags_parser=partial(parse_flags, needs_workdir=False))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    run()
