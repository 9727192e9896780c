"""Where a run's files last: in a folder, or in a bucket of which the run has a local copy.

In a bucket nothing can be appended or renamed. So the run works in a folder of its own on the first
process's disk, whose files are copied to the bucket at points where they fit each other: before a
checkpoint counts, at the end of a stage, and now and then while facts are rated. Only checkpoints
are written straight into the bucket, by all processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from morer1_jax import stores
from morer1_jax.errors import ConfigError
from morer1_jax.hosts import group
from morer1_jax.run.lock import LOCK, hold
from morer1_jax.run.owner import owned

# The folder of a training's checkpoints, in the training's own.
CHECKPOINTS = "checkpoints"
# The object in a bucket's workdir that lists the files which count there.
INDEX = ".index.json"
# The variable that names the folder of local copies; by default it is in the user's cache.
COPIES = "MORER1_WORKDIR_CACHE"


class Store:
    """Where a run's files last.

    Attributes:
        root: the workdir as the user named it; checkpoints are below it.
        folder: the local folder of everything else; `root` itself, unless that is in a bucket.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Takes a local folder or one in a bucket; makes neither."""
        if stores.in_bucket(root) and not os.fspath(root).startswith("gs://"):
            raise ConfigError(f"--workdir={root}: expected a path or gs://…, found another URL")
        self.root = stores.absolute(root)
        self.folder = Path(root)
        self._published: dict[str, tuple[int, int]] = {}
        self._last, self._publishing = time.monotonic(), threading.Lock()
        if self.is_bucket:
            name = hashlib.sha256(os.fspath(self.root).encode()).hexdigest()[:16]
            default = Path.home() / ".cache" / "morer1_jax" / "workdirs"
            self.folder = Path(os.environ.get(COPIES, default)) / f"{name}-{group.index()}"

    @property
    def is_bucket(self) -> bool:
        """Whether the run works in a copy."""
        return stores.in_bucket(self.root)

    def checkpoints(self, training: str) -> Path:
        """Returns the folder of a training's checkpoints, local or in the bucket."""
        return self.root / training / CHECKPOINTS

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs from writing there in the block; makes the local copy, if it is one.

        Raises:
            ConfigError: another run is writing there.
            OSError: nothing can be written there.
        """
        with contextlib.ExitStack() as stack:
            if group.is_first():
                stack.enter_context(hold(self.folder, folder=True, name=self.root))
                if self.is_bucket:
                    stack.enter_context(owned(self.root))
                    self._copy_all()
            yield

    def publish(self, every: float = 0.0) -> None:
        """Copies to the bucket what has changed since the last time; called by the first process.

        Args:
            every: do nothing if the last time is not so many seconds ago.
        """
        if not self.is_bucket or time.monotonic() - self._last < every:
            return
        with self._publishing:
            now = self._files()
            changed = [name for name, state in now.items() if self._published.get(name) != state]
            stores.copy({self.root / name: self.folder / name for name in changed})
            # A folder that is new counts only once all of it is there.
            if now.keys() != self._published.keys():
                stores.write_bytes(self.root / INDEX, json.dumps(sorted(now)).encode())
            stores.delete_all(self.root / name for name in self._published.keys() - now.keys())
            self._published, self._last = now, time.monotonic()

    def share(self, *names: str) -> None:
        """Gives all processes these files or folders, as the first has them in its copy."""
        if not self.is_bucket or group.count() == 1:
            return
        group.by_first(f"{names} in the bucket", self.publish)
        if not group.is_first():
            self._fetch([name for name in listed(self.root) if name.split("/")[0] in names])
        group.meet(f"{names} are here")

    def _copy_all(self) -> None:
        """Makes the local copy what the bucket has."""
        for name in os.listdir(self.folder):
            if name != LOCK:
                stores.delete(self.folder / name)
        self._fetch(listed(self.root))
        self._published = self._files()

    def _files(self) -> dict[str, tuple[int, int]]:
        """Returns size and time of the copy's files, but of those that are being written."""
        found = {}
        for name in stores.files(self.folder):
            if not any(part.startswith(".") for part in Path(name).parts):
                with contextlib.suppress(FileNotFoundError):  # Deleted meanwhile.
                    status = (self.folder / name).stat()
                    found[name] = status.st_size, status.st_mtime_ns
        return found

    def _fetch(self, names: list[str]) -> None:
        for name in {name.split("/")[0] for name in names}:
            stores.delete(self.folder / name)
        stores.copy({self.folder / name: self.root / name for name in names})


def listed(root: Path) -> list[str]:
    """Returns the files that count in a bucket's workdir, but checkpoints, by their paths in it.

    There are none if nothing was published there, or the folder is no workdir.
    """
    try:
        return json.loads(stores.read_bytes(root / INDEX))
    except FileNotFoundError:
        return []
