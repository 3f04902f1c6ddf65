"""Command line -> config. Every mistake in a flag is a ConfigError of one line, raised before JAX is imported.

An unknown field is answered with the nearest known one, a value of the wrong type with an example.
"""

import difflib
import functools
import os
import re

from absl import flags
from ml_collections import ConfigDict, config_flags

from simmim_jax import automatic
from simmim_jax.config import defaults, flat, load, to_dict
from simmim_jax.errors import ConfigError

HELP = {"--help", "--helpfull", "--helpshort", "-h", "-help"}
KINDS = {  # type of a field: what to give, an example
    int: ("a whole number", "64"),
    float: ("a number", "0.1"),
    bool: ("true or false", "true"),
    tuple: ("numbers with commas between them", "64,64"),
    str: ("text", "s"),
}
TEXT_LISTS = ("data.bands", "init_parts")  # other lists hold numbers
# Encoder fields of a recipe that also fit another encoder, named on the command line.
KEPT_FOR_OTHER_ENCODERS = {"dtype", "remat", "scan", "attention", "drop_path"}


def define_config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Define --config."""
    config_flags.DEFINE_config_file(
        "config", help_string="recipe, like configs/X.py or configs/X.py:argument", flag_values=flag_values
    )


def define_run_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags of `simmim_jax.main`. SLURM, Open MPI and TPU slices need no flag for several processes."""
    define_config_flag(flag_values)
    add = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, figures", **add)
    flags.DEFINE_bool("print_config", False, "print every field with its value and origin, and exit", **add)
    flags.DEFINE_bool(
        "extend",
        False,
        "continue a finished or stopped run with another length or rate, as a new phase",
        **add,
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes", **add)
    flags.DEFINE_integer("processes", None, "number of processes", lower_bound=1, **add)
    flags.DEFINE_integer("process", None, "index of this process, from 0", lower_bound=0, **add)
    flags.DEFINE_integer(
        "heartbeat", 100, "seconds without a sign of life until a process is lost", lower_bound=1, **add
    )


def parse_flags(
    argv: list[str], *, needs_workdir: bool = True, flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
    """absl's flag parser, with every mistake as a ConfigError of one line. For `app.run(flags_parser=...)`."""
    path = flag_value(argv, "config")
    if path and not os.path.isfile(path.split(":")[0]):
        near = difflib.get_close_matches(path, _recipes(path), n=1, cutoff=0.3)
        raise ConfigError("no such config file", path, f"did you mean {near[0]}?" if near else "give --config=FILE.py")
    if not HELP & set(argv):
        if path is None:
            fix = "give --config=configs/digits_vit_tiny.py, or another of configs/"
            raise ConfigError("no config given", "--config", fix)
        needs_workdir &= not any(re.match("--?print_config", argument) for argument in argv)
        if needs_workdir and flag_value(argv, "workdir") is None:
            raise ConfigError("no workdir given", "--workdir", "give a folder for the run, like --workdir=runs/mine")
    try:
        rest = flag_values(argv)
    except Exception as error:  # the many types of absl and ml_collections, and all that a recipe can raise
        raise _translate_flag_error(error, argv, path) from error
    for name in re.findall(r"^--?config\.([^=\s]+)", "\n".join(argv), re.MULTILINE):
        value = functools.reduce(lambda group, field: group[field], name.split("."), flag_values["config"].value)
        if isinstance(value, tuple) and name not in TEXT_LISTS and any(isinstance(part, str) for part in value):
            kind, example = KINDS[tuple]
            raise ConfigError(f"--config.{name}={as_flag(value)} is not {kind}", path, f"give {kind}, like {example}")
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}", "command line", "give fields as --config.field=value")
    if path and flag_value(argv, "config.encoder.name") is not None:
        _unset_encoder_fields(flag_values["config"].value, load(path), argv)
    return rest


def describe_config(config: ConfigDict, argv: list[str], encoder: dict | None) -> str:
    """One line per field: its name, its value as the command line takes it, and its origin.

    The origin is "default"; "recipe" if the recipe or its family function sets another value; "flag" if the command
    line sets it or a field that it follows from; or what fills in a field of the encoder, like "vit b" or "init_from".

    encoder: all fields of the encoder, or None if the config leaves it open.
    """
    path = flag_value(argv, "config")
    recipe, default, now = (dict(flat(to_dict(c))) for c in (load(path), defaults(config), config))
    if encoder is not None:
        filled = {f"encoder.{name}": value for name, value in encoder.items()}
        now = {name: value for name, value in now.items() if not name.startswith("encoder.") or name in filled}
        now |= {name: value for name, value in filled.items() if now.get(name) in (None, "")}
    rows = []
    for name, value in now.items():
        if flag_value(argv, f"config.{name}") is not None:
            origin = "flag"
        elif encoder is not None and name.startswith("encoder.") and config.encoder.get(name[8:]) in (None, ""):
            origin = f"{encoder['name']} {encoder['size'] or ''}" if config.encoder.name else "init_from"
        elif name not in recipe or value != recipe[name]:
            origin = "flag"
        else:
            origin = "default" if name in default and value == default[name] else "recipe"
        if value is None and name in automatic.FIELDS:
            value, origin = "auto", "chosen from the data and the machine when the run starts"
        rows.append((name, as_flag(value), origin))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}" for name, value, origin in rows)


def flag_value(argv: list[str], name: str) -> str | None:
    """The value of --name=VALUE or --name VALUE; None if the flag is missing."""
    for n, argument in enumerate(argv):
        if match := re.fullmatch(rf"--?{re.escape(name)}=(.*)", argument, re.DOTALL):
            return match.group(1)
        if argument in (f"--{name}", f"-{name}") and n + 1 < len(argv):
            return argv[n + 1]
    return None


def as_flag(value) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(as_flag, value)) + ("," if len(value) == 1 else "") if value else "()"
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else str(value)


def _unset_encoder_fields(config: ConfigDict, recipe: ConfigDict, argv: list[str]) -> None:
    """If the command line names another encoder than the recipe, unset what the recipe sets for its own encoder.

    A recipe that names no encoder sets fields for any encoder.
    """
    if not recipe.encoder.name or config.encoder.name == recipe.encoder.name:
        return
    kept = {"name", *KEPT_FOR_OTHER_ENCODERS} | ({"size"} if config.encoder.name else set())
    unset = [
        field
        for field, value in recipe.encoder.items()
        if value is not None and field not in kept and flag_value(argv, f"config.encoder.{field}") is None
    ]
    for field in unset:
        config.encoder[field] = None
    if unset:
        name = config.encoder.name or "of init_from"
        print(f"encoder {name}: ignoring the recipe's fields for {recipe.encoder.name}: {', '.join(sorted(unset))}")


def _translate_flag_error(error: Exception, argv: list[str], path: str) -> ConfigError:
    """The mistake in `argv`; for an unknown field, with the nearest known one."""
    message = " ".join(str(error).split())
    try:
        config = load(path)
        fields = dict(flat(to_dict(config)))
    except Exception as broken:  # the recipe itself fails, with any type of error
        return ConfigError(f"{type(broken).__name__}: {' '.join(str(broken).split())}", path, "fix the config file")
    for argument in argv[1:]:
        flag, name = re.match(r"(?:--?config\.([^=]+))?", argument).group(0, 1)
        if name is None:
            continue
        children = [field for field in fields if field.startswith(f"{name}.")]
        if name not in fields and not children:
            near = nearest_field(name, fields)
            fix = f"did you mean {near}?" if near else "see the fields with --print_config"
            return ConfigError(f"unknown field {name}", path, fix)
        if flag in message:
            if children:
                fix = f"set its fields one by one: --config.{children[0]}=value"
            else:
                group, _, field = name.rpartition(".")
                kind, example = KINDS[(config[group] if group else config).get_type(field)]
                fix = f"give {kind}, like {example if fields[name] in (None, []) else as_flag(fields[name])}"
            return ConfigError(f"{argument} is not {kind}" if not children else message, path, fix)
    return ConfigError(message, path, "see --help")


def nearest_field(name: str, fields) -> str | None:
    """The known field nearest to an unknown one, first among those of its section. None if none is near."""
    section, _, word = name.rpartition(".")
    siblings = {field.rpartition(".")[2]: field for field in fields if field.rpartition(".")[0] == section}
    containing = [sibling for sibling in siblings if word in sibling.split("_")]
    near = difflib.get_close_matches(word, containing, n=1, cutoff=0.0) or difflib.get_close_matches(
        word, siblings, n=1
    )
    if near:
        return siblings[near[0]]
    near = difflib.get_close_matches(name, fields, n=1)
    return near[0] if near and not siblings else None


def _recipes(path: str) -> list[str]:
    """The recipes in the folder of `path`."""
    folder = os.path.dirname(path) or "configs"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if name.endswith(".py")]
