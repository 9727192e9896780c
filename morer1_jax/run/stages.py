"""Which stages of a run are whole.

A stage writes all its output first and its marker last, so a marker that is there says that the
output is too, and a stage that was killed is run again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morer1_jax.files import atomic_write
from morer1_jax.run.config import ConfigError

MARKER = "DONE.json"


class Stage:
    """One stage's folder in the workdir.

    Attributes:
      folder: where the stage's output belongs; not made here.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], name: str, depends: Mapping[str, Any] | None = None
    ):
        """Names the stage; touches no file.

        Args:
          depends: the part of the config its output depends on, as `config.identity` gives it.
        """
        self.name = name
        self.folder = Path(workdir) / name
        canonical = json.dumps(dict(depends or {}), sort_keys=True, allow_nan=False)
        self._digest = hashlib.sha256(canonical.encode()).hexdigest()

    def done(self) -> bool:
        """Whether the stage's output is whole.

        Raises:
          ConfigError: it is, but was made under another config, or the marker cannot be read.
        """
        return self._marker() is not None

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
        marker = {"stage": self.name, "config": self._digest, "results": dict(results or {})}
        atomic_write(self.folder / MARKER, json.dumps(marker, indent=1, allow_nan=False) + "\n")

    def _marker(self) -> dict[str, Any] | None:
        path = self.folder / MARKER
        try:
            marker = json.loads(path.read_text())
            made_under = marker["config"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path}: not a stage's marker; delete it to run stage {self.name} again"
            ) from None
        if made_under != self._digest:
            raise ConfigError(
                f"{self.folder}: stage {self.name} was made under another config; "
                "use a new --workdir, or delete this folder to run the stage again"
            )
        return marker
