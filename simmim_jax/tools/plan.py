"""python -m simmim_jax.tools.plan --config configs/X.py --devices=64 --kind=h100 [--config.a.b=value ...]

What a run of this config needs of a machine that one does not have: memory, time, data and communication.

The training step is compiled for so many simulated CPU devices, as a run of the config compiles it, and never run. Its
operations are exact. Its memory is an estimate of an accelerator's: there attention may keep less, and compilers order
the work otherwise. Time follows from an MFU that is assumed.
"""

import json
import math
import os
import sys
from functools import partial

from absl import app, flags, logging

from simmim_jax.errors import ConfigError, UserError, check_minimum, choose, exit_with_message
from simmim_jax.flags import define_config_flag, parse_flags

JPEG = 110_000  # bytes of an image that are assumed for the rate of reading
TAKEN = 0.75  # of a GPU's memory, that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
# A quarter faster, the same memory and communication: nothing is going to run.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def define_flags() -> None:
    """The flags: those of `simmim_jax.main`, and the machine."""
    define_config_flag()
    flags.declare_key_flag("config")
    flags.DEFINE_integer("devices", 8, "of the machine, all hosts together")
    flags.DEFINE_string("kind", "h100", "of these devices, like h100, a100-40 or tpu-v5e")
    flags.DEFINE_integer("devices-per-host", 8, "neighbors by number")
    flags.DEFINE_float("mfu", 0.45, "part of the published peak that the matmuls of a step are assumed to reach")
    flags.DEFINE_integer("images", 0, "of the training set; 0: those that the config's data have")
    flags.DEFINE_bool("json", False, "print the numbers as JSON instead")
    flags.DEFINE_string("workdir", "", "not used: a command of simmim_jax.main will do as it stands")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    devices = given.devices
    check_minimum("devices", devices, 1)
    simulate(devices)
    numbers = plan(
        given.config, devices=devices, kind=given.kind, devices_per_host=given["devices-per-host"].value,
        mfu=given.mfu, images=given.images,
    )  # fmt: skip
    if given.json:
        print(json.dumps(numbers, indent=1))
        return
    width = max(len(name) for name, _ in lines_of(numbers))
    for name, line in lines_of(numbers):
        print(f"{name:{width}}  {line}")


def simulate(devices: int) -> None:
    """Let JAX, which must not be here yet, find so many CPU devices and nothing else."""
    count = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')} {count}"
    os.environ["JAX_PLATFORMS"] = "cpu"


def plan(
    config, *, devices: int, kind: str, devices_per_host: int = 8, mfu: int | float = 0.45, images: int = 0
) -> dict:
    """The numbers of a run of `config` on so many devices of a kind; bytes, seconds, and rates a second.

    Raises UserError as a run would, and ConfigError for a machine that cannot be.
    """
    from simmim_jax import costs, train  # JAX comes in here: help and mistakes are told without it

    check_minimum("devices-per-host", devices_per_host, 1)
    check_minimum("images", images, 0)
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu is {mfu}", "--mfu", "give a number above 0, at most 1")
    of_kind = choose("kind", kind, costs.KINDS)
    per_host = min(devices_per_host, devices)
    if devices % per_host:
        raise ConfigError(
            f"{devices} devices are no whole hosts of {per_host}", "--devices",
            f"give a multiple of {per_host}, or another --devices-per-host",
        )  # fmt: skip
    train.check_numbers(config)
    steps, steps_per_epoch = run_length(config, images)
    if config.encoder.attention == "cudnn":  # which is not here; the other form has the same operations
        config = train.with_settings(config, {"encoder.attention": "xla"})
    built = train.build(config, steps, steps_per_epoch, devices)
    encoder, abstract, mesh = built["encoder"], built["abstract"], built["mesh"]
    flops = train.step_flops(config, built["objective"], abstract, built["key"], encoder)
    compiled = train.compile_to_measure(config, built, steps, steps_per_epoch)
    memory = costs.memory(compiled)
    fraction = 1.0 if kind.startswith("tpu") else float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", TAKEN))
    there = round(of_kind.memory * fraction)
    found = costs.collectives(compiled, per_host)
    del compiled
    moving = sum(each.seconds(of_kind) for each in found)
    peak = of_kind.bfloat16 if encoder.dtype == "bfloat16" else of_kind.float32
    computing = flops / (devices * peak * mfu)
    seconds = max(computing, moving)
    rate, hosts = config.batch_size / seconds, devices // per_host
    numbers = {
        "encoder": f"{config.encoder.name or 'that of init_from'} {config.encoder.size or ''}".strip(),
        "dtype": encoder.dtype,
        "image": [*config.image_size, len(config.mean)],
        "kind": kind,
        "devices": devices,
        "devices_per_host": per_host,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "microbatches": config.microbatches,
        "images_per_device": config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"]),
        "parameters": size_of(abstract.params),
        "state_bytes": costs.held_bytes(abstract),
        "memory_bytes": memory,
        "device_bytes": of_kind.memory,
        "usable_bytes": there,
        "fits": memory <= there,
        "flops_per_image": flops / config.batch_size,
        "flops_per_step": flops,
        "peak_flops": peak,
        "mfu": mfu,
        "step_seconds": seconds,
        "compute_seconds": computing,
        "communication_seconds": moving,
        "collectives": [each._asdict() | {"seconds": each.seconds(of_kind)} for each in found],
        "images_per_second": rate,
        "steps": steps,
        "steps_per_epoch": steps_per_epoch,
        "hours": steps * seconds / 3600,
        "images_per_second_per_host": rate / hosts,
        "read_bytes_per_second_per_host": rate / hosts * JPEG,
    }
    if not numbers["fits"]:
        numbers["tried"] = list(train.try_settings(config, encoder, steps, steps_per_epoch, there))
    return numbers


def run_length(config, images: int) -> tuple[int, int | None]:
    """(steps, steps of an epoch): None where the number of images is not given, cannot be found, and is not needed.

    Raises ConfigError where it is needed.
    """
    from simmim_jax import train

    if not images:
        try:
            images = len(train.make_sources(config)[0])
        except UserError as error:
            if config.steps:
                return config.steps, None
            raise ConfigError(
                f"how many images there are is not known ({error.what})", "--images",
                "give --images=N, ImageNet-1K has 1281167, or --config.steps",
            ) from error  # fmt: skip
    return train.run_length(config, images)


def size_of(tree) -> int:
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def lines_of(numbers: dict) -> list[tuple[str, str]]:
    """The numbers as (name, line) to read, and what they rest upon."""
    n, gib = numbers, 2**30
    mesh = " ".join(f"{axis}={size}" for axis, size in n["mesh"].items())
    image, parameters = "x".join(map(str, n["image"])), f"{n['parameters'] / 1e6:.1f} M parameters"
    taken = f"{n['usable_bytes'] / gib:.1f} that JAX takes of {n['device_bytes'] / gib:.0f} GiB"
    verdict = {True: "fits", False: "does not fit"}
    lines = [
        ("machine", f"{n['devices']} x {n['kind']}, {n['devices_per_host']} to a host; mesh {mesh}"),
        ("model", f"{n['encoder']}, {image}, {n['dtype']}, {parameters}"),
        ("batch", f"{n['batch_size']}: {n['images_per_device']} images a device, in {n['microbatches']} part(s)"),
        ("state", f"{n['state_bytes'] / gib:.2f} GiB a device: parameters and what the optimizer keeps"),
        ("memory", f"{n['memory_bytes'] / gib:.1f} GiB a device, of {taken}: {verdict[n['fits']]}"),
    ]
    for tried in n.get("tried", []):
        settings = " ".join(f"--config.{name}={value}" for name, value in tried["settings"].items())
        lines.append(("", f"{settings}: {tried['memory_bytes'] / gib:.1f} GiB, {verdict[tried['fits']]}"))
    peak = f"{n['peak_flops'] / 1e12:.1f} TFLOP/s a device"
    bound = "" if n["step_seconds"] == n["compute_seconds"] else "; communication takes longer, and counts"
    reading = f"{n['read_bytes_per_second_per_host'] / 1e6:.0f} MB/s of JPEG"
    lines += [
        (
            "operations",
            f"{n['flops_per_image'] / 1e9:.2f} GFLOP an image, {n['flops_per_step'] / 1e12:.2f} a step (TFLOP)",
        ),
        ("step", f"{n['compute_seconds'] * 1e3:.1f} ms at an MFU of {n['mfu']:.0%} of {peak}{bound}"),
        ("images/s", f"{n['images_per_second']:.0f}, {n['images_per_second'] / n['devices']:.0f} a device"),
        ("run", f"{n['steps']} steps, {n['hours']:.1f} hours, without evaluations and saving"),
        ("data", f"{n['images_per_second_per_host']:.0f} images/s a host, {reading}"),
        ("communication", f"{n['communication_seconds'] * 1e3:.2f} ms a step, if nothing is hidden behind the work"),
    ]
    for each in n["collectives"]:
        if each["sent"] >= 2**20:
            who = f"{each['count']} x {each['kind']} among {each['group']} ({each['local']} on a host)"
            moved = f"{each['size'] / 2**20:.1f} MiB, a device sends {each['sent'] / 2**20:.1f}"
            lines.append(("", f"{who}: {moved}, {each['seconds'] * 1e3:.2f} ms"))
    links = "rings over links and networks as published, with nothing else on them"
    return [
        *lines,
        ("assumed", f"an MFU of {n['mfu']:.0%} (--mfu); {JPEG / 1e3:.0f} KB a JPEG; {links}"),
        ("estimated", "the memory: the program was compiled for CPUs, where attention keeps its logits"),
    ]


def run() -> None:
    """Run `main`; end as `errors` promises: one line and an exit code for what the user can mend."""
    define_flags()
    with exit_with_message():
        app.run(main, flags_parser=partial(parse_flags, needs_workdir=False))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    run()
