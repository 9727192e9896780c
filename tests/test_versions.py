"""What pyproject.toml permits works: the lowest versions, the newest, those of GPU machines."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
VERSIONS = ROOT / ".ci" / "versions"


@pytest.fixture(scope="module")
def permitted():
    """By package, what all requirements of it permit together."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for wanted in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, wanted):
            name = requirement.name.lower()
            found[name] = found.get(name, requirement.specifier) & requirement.specifier
    return found


@pytest.mark.parametrize(
    ("package", "version", "permits"),
    [
        # `unique` along an axis returns its inverse in another shape.
        ("numpy", "2.0.0", False),
        ("numpy", "2.0.1", True),
        ("transformers", "5.4.0", False),
        ("transformers", "5.5.0", True),
        # What is wrong with a file ends in errors that do not say so.
        ("datasets", "4.8.0", False),
        # It does not tell what it has saved.
        ("orbax-checkpoint", "0.11.20", False),
        # With today's protobuf it cannot read what it has built.
        ("tensorflow-datasets", "4.9.9", False),
        # It has no --no-loadscope-reorder.
        ("pytest-xdist", "3.7.0", False),
        # As GPU machines have it, on Python 3.12.
        ("jax", "0.11.2", True),
    ],
)
def test_bounds(permitted, package, version, permits):
    assert permitted[package].contains(version) == permits


def test_the_lowest_versions_are_those_of_pyproject(permitted):
    """So that what `.ci/versions lowest` installs is all there is, at its bound."""
    told = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lowest.py"], capture_output=True, text=True, check=True
    )
    lowest = dict(line.lower().split("==") for line in told.stdout.splitlines())
    assert lowest.keys() == permitted.keys() - {"morer1-jax"}
    for name, version in lowest.items():
        if name != "torch":  # The tests' is pinned.
            assert permitted[name].contains(version)
            assert re.search(rf">={re.escape(version)}(,|$)", str(permitted[name]))


@pytest.mark.soak
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_the_newest_versions_on_newer_pythons(version):
    # Where Pythons are pyenv's, it has to be told which to start.
    environment = os.environ | {"PYENV_VERSION": version}
    python = f"python{version}"
    try:
        subprocess.run([python, "-V"], env=environment, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip(f"no {python} on this machine")
    check(python, environment)


@pytest.mark.soak
def test_the_lowest_versions():
    check("lowest", os.environ)


def check(which, environment):
    # Not the settings of this run of the tests.
    environment = {k: v for k, v in environment.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run([VERSIONS, which], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
