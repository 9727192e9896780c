"""Packages that only some commands need, looked for before a command works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from morer1_jax.run.config import ConfigError


@contextlib.contextmanager
def needs_extra(extra: str, otherwise: str = "") -> Iterator[None]:
    """Turns an import that fails in the block into a line that says what to install.

    Args:
      extra: of `pyproject.toml`, which has the packages.
      otherwise: what else can be done, if anything.

    Raises:
      ConfigError: a package is missing, or cannot be imported.
    """
    try:
        yield
    # Packages that import their parts late raise RuntimeError for a part's missing package.
    except (ImportError, RuntimeError) as error:
        ways = f"pip install 'morer1-jax[{extra}]'" + (f", or {otherwise}" if otherwise else "")
        raise ConfigError(f"{error}; {ways}") from None
