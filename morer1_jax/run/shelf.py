"""Finds and deletes checkpoints of a folder, without reading their arrays.

<folder>/step_00000100/…       states, see `run.checkpoint`
<folder>/best/step_00000080/…  the best parameters by a metric, in the same form
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from morer1_jax import stores
from morer1_jax.run.manifest import MANIFEST, read_manifest

# In a state's `extra`: its step's validation is still to come, since the run was told to stop.
UNVALIDATED = "unvalidated"


class Shelf:
    """The checkpoints of one training, in a folder or a bucket, as this process sees them.

    File systems that processes share may show them different things for seconds: where all must
    agree, the first process looks.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Takes the folder, which need not exist."""
        self.folder = stores.absolute(folder)

    def state(self, step: int) -> Path:
        """Returns the folder of a step's state."""
        return _step_path(self.folder, step)

    def best_parameters(self, step: int) -> Path:
        """Returns the folder of the best parameters, if a step's are the best."""
        return _step_path(self.folder / "best", step)

    def latest(self) -> int | None:
        """Returns the newest step with a whole checkpoint; warns of newer ones that are not."""
        return next(self._whole(), None)

    def whole(self) -> list[int]:
        """Returns the steps of whole checkpoints, newest first; warns of those that are not."""
        return list(self._whole())

    def _whole(self) -> Iterator[int]:
        for step in _steps(self.folder):
            if read_manifest(self.state(step)):
                yield step
            else:
                logging.warning("%s is not a whole checkpoint; passed over", self.state(step))

    def set_aside(self, step: int) -> None:
        """Makes a damaged state count as not whole, so that its step can be saved anew."""
        path = self.state(step) / MANIFEST
        stores.write_bytes(path.with_name(f"damaged-{MANIFEST}"), stores.read_bytes(path))
        stores.delete(path)

    def is_unvalidated(self) -> bool:
        """Returns whether training goes on from the newest state with its step's validation."""
        latest = self.latest()
        manifest = None if latest is None else read_manifest(self.state(latest))
        return manifest is not None and bool(manifest["extra"].get(UNVALIDATED))

    def best(self) -> tuple[int, float] | None:
        """Returns step and metric of the best parameters, or None."""
        while True:
            steps = _steps(self.folder / "best")
            # A run killed before it removed the best but one leaves both.
            manifests = {step: read_manifest(self.best_parameters(step)) for step in steps}
            metrics = {step: m["extra"]["metric"] for step, m in manifests.items() if m}
            if metrics:
                return max(metrics.items(), key=lambda item: item[1])
            if steps == _steps(self.folder / "best"):  # Else another process has replaced it.
                return None

    def surplus(self, keep: int) -> list[Path]:
        """Returns folders of all states but the newest `keep`, and those that killed saves left.

        The best parameters are never among them.
        """
        paths = {step: self.state(step) for step in _steps(self.folder)}
        whole = [step for step, path in paths.items() if read_manifest(path)]
        # A folder newer than all whole ones stays: perhaps only its manifest is damaged.
        states = [
            path
            for step, path in paths.items()
            if step not in whole[:keep] and (not keep or step < max(whole, default=0))
        ]
        return [*unfinished(self.folder), *states]

    def drop(self, keep: int) -> None:
        """Deletes what `surplus` returns."""
        for path in self.surplus(keep):
            delete(path)

    def drop_best_but(self, step: int) -> None:
        """Deletes the best parameters but those of a step."""
        for saved_step in _steps(self.folder / "best"):
            if saved_step != step:
                delete(self.best_parameters(saved_step))


def unfinished(folder: Path) -> list[Path]:
    """Returns the hidden folders that killed saves left; a bucket has none."""
    names = stores.names(folder)
    return [folder / name for name in names if re.fullmatch(r"\.step_\d+\.tmp", name)]


def delete(path: Path) -> None:
    """Deletes a checkpoint's folder, if there is one.

    In a bucket the manifest, by which it counts, goes first.
    """
    if stores.in_bucket(path):
        stores.delete(path / MANIFEST)
    if path.suffix:
        shutil.rmtree(path)
    else:
        stores.delete(path)


def _step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Returns the steps that have a folder, whole or not, newest first."""
    names = stores.names(folder)
    return sorted((int(m[1]) for n in names if (m := re.fullmatch(r"step_(\d+)", n))), reverse=True)
