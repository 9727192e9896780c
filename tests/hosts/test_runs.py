"""Whole runs on several processes, stopped and killed, with their workdir in a bucket."""

import signal

import pytest
from processes import HOST
from runs import FILES, SOON, Started, check_same, copy_of, logged

from morer1_jax import stores
from morer1_jax.run.owner import OWNER
from morer1_jax.run.shelf import Shelf


@pytest.fixture(scope="module")
def reference(once):
    """A run on two processes that is left in peace: its workdir."""

    def make(folder):
        Started(folder, folder / "run", 2, 2).end([0, 0])

    return once("undisturbed", make) / "run"


@pytest.mark.parametrize(
    "waits", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["at once", "waits"]
)
def test_a_run_in_a_bucket_that_is_stopped_and_killed_is_the_one_left_in_peace(
    tmp_path, bucket, reference, monkeypatch, waits
):
    workdir = f"{bucket}/killed-{waits}"
    cache = tmp_path / "cache"
    monkeypatch.setenv("MORER1_WORKDIR_CACHE", str(cache))
    # Told to stop in SFT: it saves, and says that it is to be started again.
    run = Started(reference.parent, workdir, 2, 2)
    local = copy_of(workdir, cache)
    run.until(lambda: logged(local, "sft", 2))
    run.processes[1].terminate()
    assert run.end([75, 75]) < SOON
    assert "the same command goes on" in run.said()
    assert Shelf(f"{workdir}/sft/checkpoints").latest() >= 2
    # One is killed while facts are rated: the other ends, and names it.
    run = Started(reference.parent, workdir, 2, 2)
    run.until(lambda: (local / "rate" / "ratings.jsonl.unfinished").exists())
    run.processes[1].kill()
    assert run.end([3, -signal.SIGKILL]) < SOON
    assert f"process 1 of 2 on {HOST}" in run.logs[0].read_text()
    if not waits:
        stores.delete(f"{workdir}/{OWNER}")
    # Started again it ends, and nothing tells that it was ever disturbed.
    run = Started(reference.parent, workdir, 2, 2)
    run.end([0, 0])
    assert ("waiting 45 s to see" in run.logs[0].read_text()) == waits
    check_same(workdir, reference)


@pytest.mark.soak
def test_a_run_in_a_bucket_that_often_fails_is_the_one_in_a_folder(
    tmp_path, served, reference, monkeypatch
):
    """A tenth of the requests is late, lost before or after it is served, or refused."""
    monkeypatch.setenv("MORER1_WORKDIR_CACHE", str(tmp_path / "cache"))
    with served(faults=0.1) as root:
        Started(reference.parent, f"{root}/faults", 2, 2).end([0, 0])
        check_same(f"{root}/faults", reference)


@pytest.mark.soak
def test_two_processes_compile_the_same_programs_ahead(tmp_path, reference):
    run = Started(reference.parent, tmp_path / "run", 2, 2, ["--config.compile.threads=2"])
    run.end([0, 0])
    assert "compiled sft step" in run.logs[0].read_text()
    assert "compiled" not in run.logs[1].read_text()
    files = [name for name in FILES if name != "config.json"]
    check_same(tmp_path / "run", reference, files=files)
