"""Command line -> config. Every mistake in a flag is a ConfigError of one line, raised before JAX is imported.

An unknown field is answered with the nearest known one, a value of the wrong type with an example.
"""

import difflib
import os
import re

from absl import flags
from ml_collections import ConfigDict, config_flags

from simmim_jax.config import config_field, flat, load, to_dict
from simmim_jax.errors import ConfigError


def define_config_flag() -> None:
    """Define --config as `main` does, for the tools that take a config too."""
    config_flags.DEFINE_config_file("config", help_string="config file, configs/X.py", lock_config=True)


def parse_flags(argv: list[str], *, needs_workdir: bool = True) -> list[str]:
    """absl's flag parser, with every mistake as a ConfigError of one line. For `app.run(flags_parser=...)`."""
    path = _flag_value(argv, "config")
    if path and not os.path.isfile(path.split(":")[0]):
        near = difflib.get_close_matches(path, _config_files(path), n=1, cutoff=0.3)
        raise ConfigError("no such config file", path, f"did you mean {near[0]}?" if near else "give --config=FILE.py")
    if not {"--help", "--helpfull", "--helpshort", "-h", "-help"} & set(argv):
        if path is None:
            fix = "give --config=configs/digits_vit_tiny.py, or another of configs/"
            raise ConfigError("no config given", "--config", fix)
        if needs_workdir and _flag_value(argv, "workdir") is None:
            raise ConfigError("no workdir given", "--workdir", "give a folder for the run, like --workdir=runs/mine")
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # absl's and ml_collections' many, and whatever the config file raises
        raise _translate_flag_error(error, argv, path) from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}", "command line", "give fields as --config.field=value")
    name = _flag_value(argv, "config.encoder.name")
    if path and name is not None:
        _leave_to_the_encoder(flags.FLAGS["config"].value, load(path), argv)
    return rest


def _leave_to_the_encoder(config: ConfigDict, file: ConfigDict, argv: list[str]) -> None:
    """Where the command line names another encoder than the config file, unset what the file sets for its own.

    A file that names none sets fields for whichever it will be.
    """
    if not file.encoder.name or config.encoder.name == file.encoder.name:
        return
    given = {match.group(1) for argument in argv if (match := re.match(r"--?config\.encoder\.([^=]+)", argument))}
    kept = given | {"name", "dtype", "remat", "scan", "attention", "drop_path"}
    kept |= {"size"} if config.encoder.name else set()
    left = [field for field, value in file.encoder.items() if value is not None and field not in kept]
    for field in left:
        config.encoder[field] = None
    if left:
        name = config.encoder.name or "that of init_from"
        print(f"encoder {name}: left unset what the config sets for {file.encoder.name}: {', '.join(sorted(left))}")


def _translate_flag_error(error: Exception, argv: list[str], path: str) -> ConfigError:
    """What is wrong in `argv`, with the nearest field where it is a field that the config does not have."""
    message = " ".join(str(error).split())
    try:
        config = load(path)
        fields = [name for name, _ in flat(to_dict(config))]
    except Exception as broken:  # the config file itself fails: any error can come out of it
        return ConfigError(f"{type(broken).__name__}: {' '.join(str(broken).split())}", path, "mend the config file")
    for argument in argv[1:]:
        name = re.match(r"--?config\.([^=]+)", argument)
        if name and name.group(1) not in fields and not any(field.startswith(name.group(1) + ".") for field in fields):
            near = difflib.get_close_matches(name.group(1), fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"fields are listed in {path} and simmim_jax/config.py"
            return ConfigError(f"unknown field {name.group(1)}", path, hint)
        if name and name.group(0) in message:
            value = config_field(config, name.group(1))
            like = f"give a {type(value).__name__}, like {value!r}"
            if isinstance(value, ConfigDict):
                like = f"set its fields one by one: --{name.group(0).lstrip('-')}.{next(iter(value), 'field')}=value"
            return ConfigError(message.removeprefix("flag "), path, like)
    return ConfigError(message, path, "see --help")


def _flag_value(argv: list[str], name: str) -> str | None:
    """The value of --name=VALUE or --name VALUE; None if it is not there."""
    for n, argument in enumerate(argv):
        if match := re.fullmatch(rf"--?{name}=(.*)", argument, re.DOTALL):
            return match.group(1)
        if re.fullmatch(rf"--?{name}", argument) and n + 1 < len(argv):
            return argv[n + 1]
    return None


def _config_files(path: str) -> list[str]:
    folder = os.path.dirname(path) or "configs"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if name.endswith(".py")]
