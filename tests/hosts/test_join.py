"""Processes that join, talk, and end together: each a process of its own, as on several hosts."""

import json
import re
import signal
import socket
import threading
import time

import pytest
from processes import MEMBER, environment, flags, free_port, members, start, wait

HOST = socket.gethostname()
SOON = 30.0  # seconds in which all are gone, on a busy machine


def lines(process):
    """The lines that a process has printed on its stderr so far, without JAX's own."""
    return [
        line for line in process.err.splitlines() if line and not re.match(r"[WIE]\d{4} ", line)
    ]


def spoken(processes, word):
    """Waits until each process has printed a word; returns readers that keep their pipes empty."""
    heard = [threading.Event() for _ in processes]
    texts = [[] for _ in processes]

    def read(process, event, text):
        for line in process.stderr:
            text.append(line)
            if word in line:
                event.set()
        event.set()

    readers = []
    for process, event, text in zip(processes, heard, texts, strict=True):
        reader = threading.Thread(target=read, args=(process, event, text), daemon=True)
        reader.start()
        readers.append(reader)
    for event in heard:
        assert event.wait(90), texts
    return readers, texts


def end(processes, readers, texts):
    """Waits until all are gone; returns their codes, what they said, and the seconds it took."""
    began = time.monotonic()
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(90))
        finally:
            process.kill()
    seconds = time.monotonic() - began
    for reader in readers:
        reader.join(10)
    return codes, ["".join(text) for text in texts], seconds


def test_processes_talk_and_only_the_first_prints():
    ended = wait(members(3, "talk"))
    assert [process.code for process in ended] == [0, 0, 0], ended
    assert [process.out for process in ended] == ["only the first prints\n", "", ""]
    for number, process in enumerate(ended):
        heard = json.loads(lines(process)[-1])
        assert heard == {
            "count": 3,
            "index": number,
            "devices": 3,
            "of_first": {"by": 0},
            "made": [] if number else [0],
            "gather": [0, 1, 4],
            "unlike": [1],
            "to_first": None if number else [0, 1, 8],
            "long": 5_000_000,
        }


@pytest.mark.parametrize("killed", [0, 2])
@pytest.mark.parametrize("action", ["wait_for_others", "compute_with_others"])
def test_a_death_ends_all_and_is_named(action, killed):
    processes = members(3, action)
    readers, texts = spoken(processes, "waits" if action == "wait_for_others" else "computes")
    processes[killed].kill()
    codes, said, seconds = end(processes, readers, texts)
    assert codes.pop(killed) == -signal.SIGKILL
    assert codes == [3, 3], said
    assert seconds < SOON
    del said[killed]
    name = (
        rf"error: process {killed} of 3 on {HOST} \(pid {processes[killed].pid}\) has died; start"
    )
    for text in said:
        assert re.search(name, text), text
        assert "Traceback" not in text


def test_a_process_that_ends_without_a_word_has_died_even_with_code_0():
    ended = wait(members(2, "wait_for_others", "end_early"))
    assert [process.code for process in ended] == [3, 0]
    assert re.match(rf"error: process 1 of 2 on {HOST} .* has died;", lines(ended[0])[-1])


def test_an_error_of_one_process_ends_all_with_its_line():
    ended = wait(members(3, "compute_with_others", "fail", "wait_for_others"))
    assert [process.code for process in ended] == [2, 2, 2], ended
    assert max(process.seconds for process in ended) < SOON + 30
    for number, process in enumerate(ended):
        pid = "" if number == 1 else r" \(pid \d+\)"
        line = (
            rf"error: process 1 of 3 on {HOST}{pid}: config.key: expected 1, found 2; set it to 1"
        )
        assert re.fullmatch(line, lines(process)[-1]), process
        assert "Traceback" not in process.err


def test_a_fault_of_the_program_shows_its_traceback_where_it_was():
    ended = wait(members(2, "wait_for_others", "crash"))
    assert [process.code for process in ended] == [1, 1]
    assert "Traceback" not in ended[0].err
    assert "in crash" in ended[1].err
    for process in ended:
        assert "ZeroDivisionError: a fault of the program" in lines(process)[-1]


def test_what_was_begun_is_undone_when_another_ends_the_process(tmp_path):
    (tmp_path / "begun").touch()
    port = free_port()
    first = [MEMBER, *flags(0, 2, port), "--action=wait_for_others", f"--undo={tmp_path}/begun"]
    second = [MEMBER, *flags(1, 2, port), "--action=fail"]
    ended = wait([start(command, env=environment()) for command in (first, second)])
    assert [process.code for process in ended] == [2, 2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_point(told):
    processes = members(2, "stop_when_told")
    readers, texts = spoken(processes, "runs")
    processes[told].terminate()
    codes, said, seconds = end(processes, readers, texts)
    assert codes == [75, 75], said
    assert all("stopped by SIGTERM; the same command goes on" in text for text in said)
    assert seconds < SOON


# What is wrong before all have come. The first process knows the count; all are told.

MISTAKES = {
    "counts that differ": (
        [(0, 2, []), (1, 3, [])],
        r"process 1 on {host}: expected 2 processes as process 0 was told, found 3; give all",
    ),
    "two of one number": (
        [(0, 3, []), (1, 3, []), (1, 3, [])],
        r"process 1: expected one, found two, on {host} \(pid \d+\) and {host} \(pid \d+\); give",
    ),
    "one that does not come": (
        [(0, 3, ["--join_seconds=6"]), (2, 3, ["--join_seconds=6"])],
        r"expected 3 processes within 6 s, found 2: process 1 did not come; start",
    ),
    "configs that differ": (
        [(0, 2, []), (1, 2, ["--value=other"])],
        r"process 1 of 2 on {host} \(pid \d+\): config.key: expected same as on {host} "
        r"\(process 0\), found other; give all the same config and flags",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_processes_that_do_not_fit_each_other_are_told_why(mistake):
    starts, message = MISTAKES[mistake]
    port = free_port()
    ended = wait(
        [
            start([MEMBER, *flags(number, count, port), *more], env=environment())
            for number, count, more in starts
        ]
    )
    # Perhaps it is only late: a launcher may start all again.
    code = 3 if mistake == "one that does not come" else 2
    assert [process.code for process in ended] == [code] * len(starts), ended
    for process in ended:
        assert re.match("error: " + message.format(host=HOST), lines(process)[-1]), process.err
        assert process.out == ""
    assert max(process.seconds for process in ended) < 60


def test_versions_that_differ_are_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "m.version = lambda name: '0.1' if name == 'optax' else real(name)\n"
    )
    port, others = free_port(), environment()
    others["PYTHONPATH"] = f"{tmp_path}:{others['PYTHONPATH']}"
    first = start([MEMBER, *flags(0, 2, port)], env=environment())
    ended = wait([first, start([MEMBER, *flags(1, 2, port)], env=others)])
    assert [process.code for process in ended] == [2, 2]
    for process in ended:
        assert re.search(r"optax: expected \S+ as on .* found 0\.1; install", lines(process)[-1])


def test_a_coordinator_that_is_nobody_and_one_that_is_a_stranger():
    nobody = free_port()
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        more = ["--join_seconds=4"]
        ended = wait(
            [
                start([MEMBER, *flags(1, 2, nobody), *more], env=environment()),
                start([MEMBER, *flags(0, 2, taken), *more], env=environment()),
            ]
        )
    assert [process.code for process in ended] == [3, 2]
    assert re.match(
        rf"error: process 1 on {HOST}: expected process 0 at 127.0.0.1:{nobody}, found nobody in "
        r"4 s \(.*refused.*\); start it",
        lines(ended[0])[-1],
    )
    assert re.match(
        rf"error: 127.0.0.1:{taken}: expected ports {taken} and {taken + 1} to be free on this "
        rf"host \({HOST}\), found: .*in use.*; give another",
        lines(ended[1])[-1],
    )


def framed(text):
    return len(text).to_bytes(4, "big") + text


STRANGE = (
    b"GET / HTTP/1.1\r\n\r\n",
    b"",
    framed(b"{}"),
    b"\x7f\xff\xff\xff",
    framed(b"[" * 200_000),
    framed(b'{"process": Infinity, "host": "h", "pid": 1, "count": 2, "facts": {}}'),
    framed(b'{"process": 1, "host": "h", "pid": 1, "count": 2, "facts": [1]}'),
)


def test_strangers_at_the_door_do_not_disturb():
    port = free_port()
    first = start([MEMBER, *flags(0, 2, port)], env=environment())
    for text in STRANGE:
        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(text)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    # Two that stay: one that says nothing, and one that stops in the middle.
    with (
        socket.create_connection(("127.0.0.1", port)),
        socket.create_connection(("127.0.0.1", port)) as half,
    ):
        half.sendall(b"\x00\x00\x01")
        ended = wait([first, start([MEMBER, *flags(1, 2, port)], env=environment())])
    assert [process.code for process in ended] == [0, 0], ended


def test_a_run_waits_until_the_one_before_it_is_gone():
    """A script starts the next run while the keeper of the last one still holds the port."""
    port = free_port()
    before = members(2, "stop_when_told", port=port)
    readers, texts = spoken(before, "runs")
    now = members(2, "talk", port=port)
    time.sleep(4)
    before[1].kill()
    codes, said, _ = end(before, readers, texts)
    assert codes == [3, -signal.SIGKILL], said
    ended = wait(now)
    assert [process.code for process in ended] == [0, 0], ended


def test_a_process_alone_needs_no_keeper():
    ended = wait([start([MEMBER], env=environment())])
    assert ended[0].code == 0
    assert json.loads(lines(ended[0])[-1])["gather"] == [0]


@pytest.mark.parametrize("fails", [False, True])
def test_checkpoints_are_saved_together_in_the_background(tmp_path, fails):
    """The best parameters and a state at once; an error there ends all, too."""
    port = free_port()
    more = {"FOLDER": str(tmp_path / "checkpoints")} | ({"FAILS": "1"} if fails else {})
    ended = wait(
        [
            start([MEMBER, *flags(n, 2, port), "--action=save"], env=environment(2, **more))
            for n in range(2)
        ]
    )
    if not fails:
        assert [process.code for process in ended] == [0, 0], ended
        assert all("restored 6" in process.err for process in ended)
        return
    assert [process.code for process in ended] == [1, 1], ended
    assert max(process.seconds for process in ended) < SOON + 30
    assert all("division by zero" in lines(process)[-1] for process in ended)
