"""The command line: flags, errors in one line, packages that only some commands need."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from morer1_jax.errors import AbsentError, ConfigError, DataError, Stopped, one_line
from morer1_jax.files import full_disk
from morer1_jax.hosts import join
from morer1_jax.hosts.keeper import LOST
from morer1_jax.output import check_text, unfailing_output

# Exit code of a run that was told to stop and has saved: start the same command again. It is the
# code of a temporary failure in sysexits.h.
STOPPED = 75


def run_main(
    main: Callable[[list[str]], Any],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
) -> None:
    """Parses the absl flags and runs `main`; prints the user's errors in one line.

    `ConfigError`, `DataError`, the system's errors about a file, a full disk as any library reports
    it, and errors in the flags (an unknown `--config.` key, a value of the wrong type, a missing
    config file) become one line on stderr and exit code 2. So do Ctrl-C, with exit code 130, a run
    that was told to stop, with `STOPPED`, and one whose other processes did not come, with `LOST`.
    All others keep their traceback, including faults inside a config file. Libraries' logs are
    shown from warnings on, unless `--verbosity` is given. Of a run's several processes each names
    itself, and one that fails ends the others.

    Args:
        main: takes the command line without its flags: the program's name alone.
        argv: the command line; by default `sys.argv`.
        interrupted: the message after Ctrl-C.
    """

    def quiet_main(rest: list[str]) -> Any:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax reports every file it touches
        return main(rest)

    # Each kind of error has its own line and exit code.
    with unfailing_output():
        try:
            argv = list(sys.argv if argv is None else argv)
            check_text([*argv, *sys.argv])
            app.run(quiet_main, argv, flags_parser=_parse_flags)
        except AbsentError as error:
            _exit(LOST, one_line(error))
        except (ConfigError, DataError) as error:
            _exit(2, one_line(error))
        except Stopped as error:
            print(f"{one_line(error)}; the same command goes on", file=sys.stderr)
            sys.exit(STOPPED)
        except KeyboardInterrupt:
            join.leave(130, interrupted)
            print(interrupted, file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if full := full_disk(error):
                file, problem = full
                _exit(
                    2,
                    f"{file or 'a file'}: {problem}; make room, then give the same command",
                )
            if not isinstance(error, OSError) or error.filename is None:
                join.leave(1, f"{type(error).__name__}: {one_line(error)}", error)
                raise
            _exit(2, f"{error.filename}: {error.strerror}")


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse` parser that raises ConfigError, for `run_main`; flags cannot be abbreviated."""

    def __init__(self, description: str) -> None:
        """Makes a parser without flags; `description` is the command's help."""
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}; --help shows the flags")


def _exit(code: int, line: str) -> NoReturn:
    join.leave(code, line)
    print("error:", " ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
    # Check config files first: absl would report a missing one with a traceback.
    sources = _config_sources(argv)
    for name, source in sources.items():
        # Expand `~`, which a shell does not expand after a `=`.
        flag = re.compile(rf"^(--?{name}=)(~.*)", re.DOTALL)
        argv = [flag.sub(lambda m: m[1] + os.path.expanduser(m[2]), arg) for arg in argv]
        path = os.path.expanduser(source.split(":", 1)[0])
        if not os.path.isfile(path):
            if os.path.isfile(source):
                raise ConfigError(
                    f"--{name}={source}: what follows a colon is given to the config; name a path "
                    "without one"
                )
            raise ConfigError(f"--{name}={path}: no such file; give the path of a config file")
        if not path.endswith(".py"):
            raise ConfigError(f"--{name}={path}: expected a Python file such as configs/demo.py")
    # Parse the flags; errors of config_flags are traced back to the key that is unknown.
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        # A config file that raises a ValueError arrives as a flag's error around the traceback.
        if "Traceback (most recent call last)" in str(error):
            if own := _own_error(error):
                raise ConfigError(str(own)) from None
            raise RuntimeError(str(error)) from error
        raise ConfigError(one_line(error)) from None
    except (AttributeError, KeyError):
        # config_flags raises these for an override of a key that does not exist.
        for name, source in sources.items():
            _check_overrides(name, source, argv)
        raise
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; a flag is written --name=value")
    return rest


def _own_error(error: BaseException | None) -> ConfigError | None:
    """Returns the error that a config file has raised for the user, if it is one."""
    while error is not None:
        if isinstance(error, ConfigError) and "Traceback" not in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _config_sources(argv: Sequence[str]) -> dict[str, str]:
    """Returns the value of each config flag: `path` or `path:argument`."""
    sources = {}
    for name in flags.FLAGS:
        if config_flags.is_config_flag(flags.FLAGS[name]):
            values = [flags.FLAGS[name].default] + [
                match[1] or following
                for arg, following in zip(argv, [*argv[1:], ""], strict=True)
                if (match := re.fullmatch(rf"--?{name}(?:=(.*))?", arg))
            ]
            if values[-1]:  # The last one on the command line counts.
                sources[name] = values[-1]
    return sources


def _check_overrides(name: str, source: str, argv: Sequence[str]) -> None:
    keys = list(_keys(config_flags.ConfigFileFlagParser(name).parse(source)))
    known = {key.rsplit(".", depth)[0] for key in keys for depth in range(key.count(".") + 1)}
    for arg in argv:
        match = re.match(rf"--?(?:no)?{name}\.([^=[]+)", arg)
        if match and match[1] not in known:
            raise ConfigError(f"--{name}.{match[1]}: unknown key{suggest(match[1], keys)}")


@contextlib.contextmanager
def needs_extra(extra: str, otherwise: str = "") -> Iterator[None]:
    """Turns a failed import in the block into an error that says what to install.

    Args:
        extra: the extra of `pyproject.toml` that has the packages.
        otherwise: an alternative for the user, if there is one.

    Raises:
        ConfigError: a package is missing, or cannot be imported.
    """
    try:
        yield
    # Packages with lazy imports raise RuntimeError for a missing package.
    except (ImportError, RuntimeError) as error:
        ways = f"pip install 'morer1-jax[{extra}]'" + (f", or {otherwise}" if otherwise else "")
        raise ConfigError(f"{error}; {ways}") from None


def _keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of a config's values."""
    for key, value in node.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def suggest(key: str, known: Iterable[str]) -> str:
    """Returns a hint at the known key with the most similar spelling, for an error; or ""."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
