"""Whole runs on several processes, stopped and killed, with their workdir in a bucket."""

import signal

import pytest
from processes import HOST
from runs import FILES, SOON, Started, check_same, copy_of, logged

from morer1_jax.run.shelf import Shelf


@pytest.fixture(scope="module")
def reference(once):
    """A run on two processes that is left in peace: its workdir."""

    def make(folder):
        Started(folder, folder / "run", 2, 2).end([0, 0])

    return once("undisturbed", make) / "run"


def test_a_run_in_a_bucket_that_is_stopped_and_killed_is_the_one_left_in_peace(
    tmp_path, bucket, reference, monkeypatch
):
    workdir = f"{bucket}/killed"
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
    # Started again it ends, and nothing tells that it was ever disturbed.
    Started(reference.parent, workdir, 2, 2).end([0, 0])
    check_same(workdir, reference)


@pytest.mark.soak
def test_two_processes_compile_the_same_programs_ahead(tmp_path, reference):
    run = Started(reference.parent, tmp_path / "run", 2, 2, ["--config.compile.threads=2"])
    run.end([0, 0])
    assert "compiled sft step" in run.logs[0].read_text()
    assert "compiled" not in run.logs[1].read_text()
    files = [name for name in FILES if name != "config.json"]
    check_same(tmp_path / "run", reference, files=files)
