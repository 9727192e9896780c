"""A run's configuration: what may change on resume, what is allowed, and the command line."""

import argparse
import difflib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from morer1_jax.files import atomic_write, full_disk, read_text
from morer1_jax.model.config import ConfigError
from morer1_jax.run.output import check_text, lasting_output
from morer1_jax.task.fact import DataError, one_line

# Keys that may differ when a run is resumed: beyond rounding no step depends on them, so that a run
# out of memory can be corrected. How often and on how many facts is validated decides which of its
# steps is the best.
# Dotted prefixes (see `matches`).  Every other key is part of the run's identity, from when it has
# shaped something (see `binding`).
OPERATIONAL = (
    "mesh",
    "stages",
    "profile",
    "model.path",  # what is in it is compared, not where it is
    "runtime.attention",
    "runtime.remat",
    "runtime.scan_unroll",
    "runtime.decode_unroll",
    "score.chunk",
    "data.round_to",  # of padding
    "data.shapes",
    "data.prompt_length",  # what fits is checked; rows are as long as the data needs
    "data.windows",
    "data.keep_features",
    "rate.batch",
    "evaluate.batch",
    "*.micro_batches",
    "*.eval_facts",
    "*.workers",
    "*.worker_kind",
    "*.save_every",
    "*.log_every",
    "*.eval_every",
    "*.rollouts_every",
    "*.keep_checkpoints",
)
FILE = "config.json"
_ABSENT = object()


@dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
      kind: `int`, `float` (takes whole numbers too), `bool`, `str`, `tuple` (or list) or `dict`
        (the key's whole subtree, unchecked).
      low, high: bounds of a number, inclusive.
      choices: the values allowed, if not any.
      optional: whether None is allowed.
    """

    kind: type
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    optional: bool = False


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key to value, sorted, tuples as lists: exactly what a JSON file gives back.

    Raises:
      ConfigError: a value that JSON cannot hold.
    """

    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, Mapping) and (node or not prefix):
            for key, value in node.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), value)
            return
        try:
            yield prefix, json.loads(json.dumps(node, allow_nan=False))
        except (TypeError, ValueError):
            raise ConfigError(
                f"config.{prefix}: {node!r} found, a value that JSON can hold expected "
                "(a finite number, text, true or false, none, a list or a dict of these)"
            ) from None

    return dict(sorted(walk("", _tree(config))))


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted key is one of `patterns` or below one; `*` stands for one component."""
    parts = key.split(".")
    for pattern in patterns:
        wanted = pattern.split(".")
        if len(parts) >= len(wanted) and all(
            want in ("*", part) for want, part in zip(wanted, parts, strict=False)
        ):
            return True
    return False


def identity(
    config: ConfigDict | Mapping[str, Any],
    prefixes: Sequence[str] = ("*",),
    operational: Sequence[str] = OPERATIONAL,
) -> dict[str, Any]:
    """The flat keys at or below `prefixes` on which the run's numbers depend."""
    return {
        key: value
        for key, value in flatten(config).items()
        if matches(key, prefixes) and not matches(key, operational)
    }


def load(
    config: ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike[str],
    operational: Sequence[str] = OPERATIONAL,
    write: bool = True,
    bound: Callable[[str], str | None] | None = None,
) -> None:
    """Binds `workdir` to `config`: kept in `config.json` at first use, compared afterwards.

    Operational keys may differ and are updated in the file; so do keys that bind nothing yet. A
    difference in any other key is an error that leaves the workdir as it was.

    Args:
      write: whether this process keeps the file; in a run of several, only the first does.
      bound: says why a key may not change, or None if it may; by default all are bound.

    Raises:
      ConfigError: keys of the run's identity differ, or the workdir's file cannot be read.
    """
    path = Path(workdir) / FILE
    now = flatten(config)
    before = _read(path) if path.exists() else None
    if before is not None:
        there, here = (
            {key: value for key, value in flat.items() if not matches(key, operational)}
            for flat in (before, now)
        )
        if changed := differences(there, here, bound):
            raise ConfigError(
                f"{path} belongs to another run: {'; '.join(changed)}; "
                "use a new --workdir, or set these keys back"
            )
    if write and before != now:
        atomic_write(path, json.dumps(_tree(config), indent=1, ensure_ascii=False) + "\n")


def differences(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    bound: Callable[[str], str | None] | None = None,
) -> list[str]:
    """Each key whose values differ, with both of them, and why it is bound; see `load`."""
    changed = []
    for key in sorted(there.keys() | here.keys()):
        before, now = there.get(key, _ABSENT), here.get(key, _ABSENT)
        if _same(before, now):
            continue
        why = "" if bound is None else bound(key)
        if why is not None:
            why = f" ({why})" if why else ""
            changed.append(f"{key}: {_show(before)} there, {_show(now)} here{why}")
    return changed


def check_config(config: ConfigDict | Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Checks every key of a config, before anything is done.

    Args:
      rules: dotted key to what it may hold.  A key without a rule is an error, and so is a rule
        without its key: a config says everything and nothing more.

    Raises:
      ConfigError: names the dotted key, what was found and what is expected.
    """
    values = flatten(config)
    groups = [key for key, rule in rules.items() if rule.kind is dict]
    for key in values:
        if key not in rules and not matches(key, groups):
            raise ConfigError(f"config.{key}: unknown key{_suggest(key, rules)}")
    for key, rule in rules.items():
        if rule.kind is dict:
            if not any(matches(name, [key]) for name in values):
                raise ConfigError(f"config.{key}: the key is missing")
        elif key not in values:
            raise ConfigError(f"config.{key}: the key is missing")
        else:
            _check(key, values[key], rule)


def _check(key: str, value: Any, rule: Rule) -> None:
    if value is None and rule.optional:
        return
    kinds = {float: (int, float), tuple: (list,)}.get(rule.kind, (rule.kind,))
    fits = isinstance(value, kinds) and isinstance(value, bool) == (rule.kind is bool)
    if fits and rule.kind in (int, float):
        low = -math.inf if rule.low is None else rule.low
        high = math.inf if rule.high is None else rule.high
        fits = low <= value <= high
    if fits and rule.choices is not None:
        fits = value in rule.choices
    if fits:
        return
    if rule.choices is not None:
        expected = "one of " + ", ".join(map(str, rule.choices))
    else:
        expected = {int: "a whole number", float: "a number", str: "text", tuple: "a list"}.get(
            rule.kind, "true or false"
        )
        if rule.low is not None:
            expected += f", at least {rule.low:g}"
        if rule.high is not None:
            expected += f", at most {rule.high:g}"
    none = " or none" if rule.optional else ""
    raise ConfigError(f"config.{key}: {_show(value)} found, {expected}{none} expected")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({one_line(error)}); use a new --workdir") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a dict of config keys expected; use a new --workdir")
    return flatten(found)


def _tree(config: ConfigDict | Mapping[str, Any]) -> Mapping[str, Any]:
    return config.to_dict() if isinstance(config, ConfigDict) else config


def _same(left: Any, right: Any) -> bool:
    # In Python, True == 1; to whoever reads a config they are not the same.
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def _suggest(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def read_config(path: str | os.PathLike[str]) -> ConfigDict:
    """The config of another config file: what its `get_config()` returns."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def run_main(
    main: Callable[[list[str]], Any],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
) -> None:
    """Parses the absl flags, runs `main` and exits, telling the user's errors from the program's.

    `ConfigError`, `DataError`, an error of the system about a file, a full disk however a library
    puts it, and whatever is wrong with the flags (an unknown `--config.` key, a value of the wrong
    type, a missing config file) become one line on stderr and exit code 2. So does Ctrl-C, with
    exit code 130. Everything else keeps its traceback, errors inside a config file included.
    Libraries' logs are shown from warnings on, unless `--verbosity` says otherwise.

    Args:
      main: gets what is left of the command line after the flags: the program's name alone.
      argv: the command line; by default `sys.argv`.
      interrupted: what is said after Ctrl-C.
    """

    def quiet_main(rest: list[str]) -> Any:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax reports every file it touches
        return main(rest)

    with lasting_output():
        try:
            argv = list(sys.argv if argv is None else argv)
            check_text([*argv, *sys.argv])
            app.run(quiet_main, argv, flags_parser=_parse_flags)
        except (ConfigError, DataError) as error:
            _exit(2, f"error: {one_line(error)}")
        except KeyboardInterrupt:
            _exit(130, interrupted)
        except Exception as error:
            if full := full_disk(error):
                file, problem = full
                _exit(
                    2,
                    f"error: {file or 'a file'}: {problem}; make room, then give the same command",
                )
            if not isinstance(error, OSError) or error.filename is None:
                raise
            _exit(2, f"error: {error.filename}: {error.strerror}")


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse` parser whose errors `run_main` knows. It takes no abbreviation for a flag."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}; --help shows the flags")


def _exit(code: int, line: str) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
    sources = _config_sources(argv)
    for name, source in sources.items():
        # A shell leaves `~` as it is after a `=`.
        argv = [re.sub(rf"^(--?{name}=)(~.*)", _at_home, arg, flags=re.DOTALL) for arg in argv]
        path = os.path.expanduser(source.split(":", 1)[0])
        if not os.path.isfile(path):
            if os.path.isfile(source):
                raise ConfigError(
                    f"--{name}={source}: what follows a colon is given to the config; name a path "
                    "without one"
                )
            raise ConfigError(f"--{name}={path}: no such file; give the path of a config file")
        if not path.endswith(".py"):
            raise ConfigError(f"--{name}={path}: a Python file such as configs/demo.py expected")
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        # A config file that raises a ValueError arrives as a flag's error around the traceback.
        if "Traceback (most recent call last)" in str(error):
            raise RuntimeError(str(error)) from error
        raise ConfigError(one_line(error)) from None
    except (AttributeError, KeyError):
        # What config_flags raises for an override of a key that does not exist.
        for name, source in sources.items():
            _check_overrides(name, source, argv)
        raise
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; a flag is written --name=value")
    return rest


def _at_home(match: re.Match[str]) -> str:
    return match[1] + os.path.expanduser(match[2])


def _config_sources(argv: Sequence[str]) -> dict[str, str]:
    """Config flag to what it is given: `path` or `path:argument`."""
    sources = {}
    for name in flags.FLAGS:
        if config_flags.is_config_flag(flags.FLAGS[name]):
            given = [flags.FLAGS[name].default] + [
                match[1] or following
                for arg, following in zip(argv, [*argv[1:], ""], strict=True)
                if (match := re.fullmatch(rf"--?{name}(?:=(.*))?", arg))
            ]
            if given[-1]:
                sources[name] = given[-1]
    return sources


def _check_overrides(name: str, source: str, argv: Sequence[str]) -> None:
    keys = list(flatten(config_flags.ConfigFileFlagParser(name).parse(source)))
    known = {key.rsplit(".", depth)[0] for key in keys for depth in range(key.count(".") + 1)}
    for arg in argv:
        match = re.match(rf"--?(?:no)?{name}\.([^=[]+)", arg)
        if match and match[1] not in known:
            raise ConfigError(f"--{name}.{match[1]}: unknown key{_suggest(match[1], keys)}")
