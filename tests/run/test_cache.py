"""Programs are kept where the user says, or in a place of our own."""

import os
import subprocess
import sys
import time

import jax
import pytest

from morer1_jax import stores
from morer1_jax.errors import AbsentError, ConfigError
from morer1_jax.run import cache
from morer1_jax.run.cache import VARIABLE, use_program_cache

PROGRAM = """
import jax, jax.numpy as jnp
from morer1_jax.run.cache import use_program_cache
use_program_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: jnp.sin(x @ x))(jnp.ones((8, 8))).sum())
"""


@pytest.fixture(autouse=True)
def restored():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_place_of_our_own(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    use_program_cache()
    assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/.cache/morer1_jax/programs"


@pytest.mark.parametrize("given", ["/somewhere", ""])
def test_what_the_environment_says_is_not_touched(monkeypatch, given):
    monkeypatch.setenv(VARIABLE, given)
    before = jax.config.jax_compilation_cache_dir
    use_program_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_second_command_finds_what_the_first_compiled(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"HOME": str(tmp_path)}

    def run():
        command = [sys.executable, "-c", PROGRAM]
        said = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
        kept = (tmp_path / ".cache" / "morer1_jax" / "programs").glob("*-cache")
        return said, {path.name for path in kept}

    said, kept = run()
    assert kept
    assert run() == (said, kept)


def test_a_bucket_that_does_not_answer_is_found_before_jax_waits_for_it(monkeypatch):
    monkeypatch.setattr(cache, "_ANSWERS", 0.2)
    monkeypatch.setenv(VARIABLE, "gs://slow/programs")
    monkeypatch.setattr(stores, "check_bucket", lambda path: time.sleep(5))
    with pytest.raises(AbsentError, match=r"^JAX_COMPILATION_CACHE_DIR=gs://slow.* no answer in 0"):
        use_program_cache()

    def missing(path):
        raise FileNotFoundError(2, "no such bucket", path)

    monkeypatch.setattr(cache, "_ANSWERS", 20.0)
    monkeypatch.setattr(stores, "check_bucket", missing)
    with pytest.raises(ConfigError, match="found no such bucket; name another") as refused:
        use_program_cache()
    assert refused.type is ConfigError
    monkeypatch.setattr(stores, "check_bucket", lambda path: None)
    use_program_cache()
