"""The first process ends last: in a container, its end is the keeper's, which the others need."""

import contextlib
import socket
import subprocess
import sys

import pytest

from morer1_jax.hosts.wire import connected, receive, send

FACTS = {"versions": {"jax": "1"}, "config": {"seed": "0"}}


@pytest.fixture
def run():
    """A keeper's process, and the connections of the three processes of a run that has begun."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "morer1_jax.hosts.keeper", str(port), "3", "30"]
    with (
        subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as keeper,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(keeper.kill)
        assert keeper.stdout.readline() == "ready\n"
        members = []
        for number in range(3):
            member = connected(socket.create_connection(("127.0.0.1", port), timeout=30))
            members.append(stack.enter_context(member))
            hello = {"process": number, "count": 3, "host": "h", "pid": number, "facts": FACTS}
            send(member, hello)
        assert [receive(member) for member in members] == [{"start": port + 1}] * 3
        yield keeper, members


def test_in_order(run):
    keeper, (first, second, third) = run
    send(first, {"bye": True})
    send(second, {"bye": True})
    assert receive(second) is None
    assert not first.poll(0.3)
    send(third, {"bye": True})
    assert receive(third) is None
    assert receive(first) is None
    assert keeper.wait(timeout=30) == 0


@pytest.mark.parametrize("fails", [0, 1])
def test_by_an_error(run, fails):
    _, members = run
    send(members[fails], {"failed": "no such folder", "code": 2})
    end = {"end": f"process {fails} of 3 on h (pid {fails}): no such folder", "code": 2}
    assert receive(members[0]) == end
    # What the others are told has come by then.
    assert all(member.poll(0) for member in members[1:])
    assert [receive(member) for member in members[1:]] == [end, end]


def test_a_death_after_the_first_has_ended_is_told_to_the_others(run):
    _, (first, second, third) = run
    send(first, {"bye": True})
    second.close()
    assert receive(third)["code"] == 3
    assert receive(first)["code"] == 3
