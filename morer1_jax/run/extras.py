"""Packages that only some commands need, looked for before a command works."""

from __future__ import annotations
