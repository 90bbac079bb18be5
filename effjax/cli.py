"""What the command line programs share: flags for a config and for several processes, and errors of one message
instead of a traceback.

A mistake of the user (an unknown field, a wrong type, a missing file) ends a program with `error:
...` on standard error and exit code 2; `--debug` shows the traceback as well.
"""

import ast
import contextlib
import functools
import gc
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
import ml_collections
from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from effjax.unknown import unknown

# What a wrong config, path or file raises, and FloatingPointError for a loss that is not finite.
USER_ERRORS = (ValueError, OSError, FloatingPointError)
EXIT_CODE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Objects made before Python looks for garbage among them, by itself 700 (2000 since 3.14). Importing and tracing make a
# million that stay, and looking through them over and over takes a fifth of the time until the first step.
_GARBAGE_THRESHOLD = 100_000

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


class _Literal(flags.ArgumentParser):
    """A Python literal; anything else is a string."""

    def parse(self, argument: Any) -> Any:
        try:
            return ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            return {"true": True, "false": False, "none": None}.get(argument, argument)

    def flag_type(self) -> str:
        return "literal"


class _OrNone(flags.ArgumentParser):
    """What another parser takes, or the word `none`."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument in ("none", "None") else self.parser.parse(argument)

    def flag_type(self) -> str:
        return f"{self.parser.flag_type()} or none"


_FIELD_PARSERS = {
    bool: _OrNone(flags.BooleanParser()),
    int: _OrNone(flags.IntegerParser()),
    float: _OrNone(flags.FloatParser()),
    str: flags.ArgumentParser(),  # where None is valid it has that for its type (`overrides`)
    type(None): _Literal(),
}


class _Recipe(config_flags.config_flags.ConfigFileFlagParser):
    """A config file, made ready for the flags that set its fields (`effjax.training.overrides`)."""

    def __init__(self, argv: list[str] | None):
        super().__init__("config", lock_config=False)
        self._argv = argv

    def parse(self, path: str) -> Any:
        config = super().parse(path)
        if isinstance(config, ml_collections.ConfigDict):
            from effjax.training import overrides  # as recipes do

            overrides.prepare(config, list(_overrides(self._argv or sys.argv)))
            config.lock()
        return config


def define_config(
    help_string: str, flag_values: flags.FlagValues = flags.FLAGS, argv: list[str] | None = None
) -> flags.FlagHolder:
    """Defines `--config=path/to/file.py[:argument]`, with `--config.field=value` for its fields.

    Beyond what `config_flags` does by itself, a field that is None takes any literal
    (`--config.model.window=64`), `none` sets a number, a bool, or a string that may be None to None, and a part that is
    named (`--config.model.depth.name=recursive`) has the fields of that part, for flags to set.

    Args:
      help_string: what the config is for.
      flag_values: the flags that it joins.
      argv: the command line in which fields are looked for; None takes `sys.argv`.
    """
    for kind, parser in _FIELD_PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, parser)
    holder = config_flags.DEFINE_config_file(
        "config", None, help_string, flag_values=flag_values, sys_argv=argv
    )
    flag_values["config"].parser = _Recipe(argv)
    return holder


def define_distributed(what: str) -> Callable[[], AbstractContextManager]:
    """Defines `--distributed` and `--distributed.coordinator_address`, `.num_processes` and `.process_id`.

    Args:
      what: what the processes do together, for the help.

    Returns:
      To be called when the flags are parsed: the context of the program, among its processes where there are several
      (`effjax.training.distributed.joined`). It raises ValueError for details without `--distributed`.
    """
    whole = flags.DEFINE_bool(
        "distributed",
        False,
        f"One of several processes that {what}; the cluster (TPU pod, SLURM, Kubernetes, Open MPI) says which, or "
        "these flags:",
    )
    address = flags.DEFINE_string(
        "distributed.coordinator_address", None, "host:port of process 0."
    )
    count = flags.DEFINE_integer("distributed.num_processes", None, "How many processes there are.")
    index = flags.DEFINE_integer("distributed.process_id", None, "Which one this is, from 0.")

    def joined() -> AbstractContextManager:
        check_not_alone((address, count, index), whole)
        if not whole.value:
            return contextlib.nullcontext()
        from effjax.training import distributed  # after the flags: a wrong one is told at once

        report = functools.partial(one_message, _DEBUG.value)
        return distributed.joined(address.value, count.value, index.value, report)

    return joined


def check_not_alone(details: Sequence[flags.FlagHolder], whole: flags.FlagHolder) -> None:
    """Raises ValueError if one of `details` is given without the flag that they are details of."""
    for flag in details:
        if flag.present and not whole.value:
            raise ValueError(f"--{flag.name} without --{whole.name}; valid: both, or neither")


def default_workdir() -> str:
    """`runs/<name of the config file>`, followed by `-<argument>` if it was given one, a path in it in dashes.

    Raises:
      ValueError: if there is no `--config`.
    """
    if flags.FLAGS["config"].value is None:
        raise ValueError("neither --workdir nor --config is given; valid: one of them or both")
    path, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    argument = re.sub(r"[:/\\]+", "-", argument)
    return str(Path("runs") / "-".join(filter(None, (Path(path).stem, argument))))


def run(main: Callable[[], Any], argv: list[str] | None = None) -> NoReturn:
    """Parses the flags, runs `main` and exits.

    The exit code is 0, or 2 after a user's error, or 130 if interrupted.

    Args:
      main: the program; it reads its flags from the holders that it defined.
      argv: command line, the program's name first; None takes `sys.argv`.
    """

    def guarded(_: list[str]) -> None:
        _announce()
        with one_message(_DEBUG.value):
            main()

    gc.set_threshold(_GARBAGE_THRESHOLD)
    app.run(guarded, argv, flags_parser=parse_flags)


def _announce() -> None:
    """Lets our own loggers say what they do, also where those of libraries only warn."""
    for ours in ("effjax", "pallas_kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)


@contextlib.contextmanager
def one_message(debug: bool = False) -> Iterator[None]:
    """Turns a user's error into one message on standard error and SystemExit.

    With `debug`, the traceback comes before it.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        fail(describe(error))


def fail(message: str) -> NoReturn:
    """Prints `error: message` and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_CODE)


def describe(error: BaseException) -> str:
    """The message of an error, after its type where the message alone would not say enough."""
    message = str(error)
    is_plain = isinstance(error, ValueError | FloatingPointError | flags.Error)
    return message if is_plain and message else f"{type(error).__name__}: {message}"


def parse_flags(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """The flags parser of `run`: as absl's, but a wrong flag or config ends in one message."""
    try:
        rest = flag_values(argv)
    except Exception as error:  # config_flags raises many kinds, and a config file any
        if "--debug" in argv:
            traceback.print_exc()
        fail(_what_is_wrong(error, argv))
    problem = _what_is_wrong_with_file(_config_argument(argv))
    if problem:
        fail(problem)
    if "verbosity" in flag_values and flag_values["verbosity"].using_default_value:
        # Libraries log every file they write. absl's hint of `__setattr__` is that of a type variable.
        flag_values.verbosity = absl.logging.WARNING  # type: ignore[assignment]
    if rest[1:]:
        fail(f"unexpected argument {rest[1]!r}; valid: flags, as --name=value")
    return rest


def _what_is_wrong(error: Exception, argv: list[str]) -> str:
    """Says which flag `absl` or `config_flags` tripped over, and what would be valid there."""
    config_argument = _config_argument(argv)
    problem = _what_is_wrong_with_file(config_argument)
    if problem:
        return problem
    if config_argument is None:
        if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config."):
            return f"--{error.flagname} without a config; valid: --config=<file.py> before it"
        return describe(error)
    try:
        config = _Recipe(argv).parse(config_argument)
    except Exception as config_error:
        # config_flags wraps the file's own error in one that holds a traceback as its message.
        return f"--config={config_argument}: {describe(config_error.__context__ or config_error)}"
    for field, value in _overrides(argv):
        problem = _what_is_wrong_with_override(config, field, value)
        if problem:
            return problem
    return describe(error)


def _what_is_wrong_with_file(config_argument: str | None) -> str | None:
    if config_argument is None:
        return None
    path = Path(config_argument.split(":", 1)[0])
    if path.is_file():
        return None
    siblings = (str(path.with_name(other.name)) for other in path.parent.glob("[!_]*.py"))
    return unknown("config file", str(path), siblings)


def _what_is_wrong_with_override(config: Any, field: str, value: str | None) -> str | None:
    """What is wrong with `--config.field=value`, or None."""
    holder, where = config, "config"
    for key in config_path.split(field):
        if isinstance(holder, ml_collections.ConfigDict) and key not in holder:
            return unknown(f"field of {where}:", key, holder.keys())
        if not isinstance(holder, ml_collections.ConfigDict | list | tuple):
            return f"--config.{field}: {where} is {holder!r}, which has no fields"
        holder = holder[key]
        where += f".{key}" if isinstance(key, str) else f"[{key}]"
    if value is None:
        return None
    if isinstance(holder, ml_collections.ConfigDict):
        if isinstance(_Literal().parse(value), dict):
            return None
        return f"--config.{field} is {value!r}; valid: a dict, or set one of {', '.join(holder)}"
    parser = _FIELD_PARSERS.get(config_path.get_type(field, config))
    if parser is None:
        return None
    try:
        parser.parse(value)
    except (TypeError, ValueError):
        example = "" if holder is None else f", such as {holder!r}"
        return f"--config.{field} is {value!r}; valid: {parser.flag_type()}{example}"
    return None


def _config_argument(argv: list[str]) -> str | None:
    """The value of `--config` in either spelling, `--config=x` or `--config x`."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return value if equals else next(iter(argv[i + 1 :]), None)
    return None


def _overrides(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """(field, value) of every `--config.field=value` or `--config.field value`."""
    for i, argument in enumerate(argv):
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            following = next(iter(argv[i + 1 :]), "-")
            yield (
                match[1],
                match[2] if match[2] is not None or following.startswith("-") else following,
            )
