"""Which stages of a run are whole.

A stage writes all its output first and its marker last, so a marker that is there says that the
output is too, and a stage that was killed is run again.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morer1_jax.config.binding import OPERATIONAL, differences, matches
from morer1_jax.errors import ConfigError
from morer1_jax.files import read_json, write_json

MARKER = "DONE.json"


class Stage:
    """One stage's folder in the workdir.

    Attributes:
      folder: where the stage's output belongs; not made here.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        name: str,
        depends: Mapping[str, Any] | None = None,
        grows: str | None = None,
    ):
        """Names the stage; touches no file.

        Args:
          depends: the part of the config its output depends on, as `identity` gives it.
          grows: the one of these keys that may be raised once the stage is done: it then goes on.
        """
        self.name = name
        self.folder = Path(workdir) / name
        self._depends = dict(depends or {})
        self._grows = grows

    def done(self) -> bool:
        """Whether the stage's output is whole, and as much as is asked for.

        Raises:
          ConfigError: it is whole, but was made under another config, or the marker cannot be read.
        """
        marker = self._marker()
        if marker is None or self._grows is None:
            return marker is not None
        return marker["config"].get(self._grows) == self._depends[self._grows]

    def results(self) -> dict[str, Any]:
        """What `finish` was given; an error if the stage is not done."""
        marker = self._marker()
        if marker is None:
            raise ConfigError(f"{self.folder}: stage {self.name} is not done; run it first")
        return marker["results"]

    def finish(self, results: Mapping[str, Any] | None = None) -> None:
        """Marks the output as whole: the last thing a stage does.

        Args:
          results: JSON values for later stages, such as the step of the best checkpoint.
        """
        marker = {"stage": self.name, "config": self._depends, "results": dict(results or {})}
        write_json(self.folder / MARKER, marker)

    def _marker(self) -> dict[str, Any] | None:
        marker = read_marker(self.folder)
        if marker is None:
            return None
        made = marker["config"]
        if isinstance(made, str):  # An earlier version's, of keys that are not known any more.
            changed = "of an earlier version"
        else:
            # What binds no more may have been another.
            made = {key: value for key, value in made.items() if not matches(key, OPERATIONAL)}
            free = {} if self._grows is None else {self._grows: made.get(self._grows)}
            changed = "; ".join(differences(made, self._depends | free))
        if changed:
            raise ConfigError(
                f"{self.folder}: stage {self.name} was made under another config ({changed}); "
                "use a new --workdir, or delete this folder to run the stage again"
            )
        return marker


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a stage's folder as it is; None if there is none.

    Raises:
      ConfigError: the file is something else.
    """
    path = folder / MARKER
    if not path.exists():
        return None
    remedy = f"delete it to run stage {folder.name} again"
    marker = read_json(path, remedy, expected="a stage's marker", error=ConfigError)
    kinds = {key: type(marker.get(key)) for key in ("config", "results")}
    if kinds["config"] not in (str, dict) or kinds["results"] is not dict:
        raise ConfigError(f"{path}: expected a stage's marker, found other keys; {remedy}")
    return marker
