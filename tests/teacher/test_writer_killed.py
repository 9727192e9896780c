"""The command, killed three times: no answer is lost or paid twice."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from morer1_jax.teacher.ledger import Ledger, Prices, Size, Usage

TOOL = Path(__file__).parents[2] / "tools" / "write_reasoning.py"
# A third of the requests meets with something that is not a good answer.
BEHAVIOURS = {
    **{"good": 60, "fenced": 3, "slow": 3, "echo": 1},
    **{"wrong": 2, "other": 3, "leak": 4, "format": 3, "special": 1},
    **{"length": 2, "filter": 1, "empty": 1, "refusal": 2},
    **{"busy": 6, "broken": 4, "cut": 3, "late": 1},
}
LASTING = {"": 90, "other": 4, "leak": 2, "blocked": 3, "broken": 1}
TIMEOUT = 300.0
PRICES = Prices(2.5, 10)


def command(folder, teacher, *flags):
    arguments = [
        *(f"--data={folder}", "--model=teacher", f"--base-url={teacher.url}"),
        *("--price-in=2.5", "--price-out=10", "--timeout=1"),
    ]
    environment = os.environ | {"OPENAI_API_KEY": teacher.key, "OPENAI_LOG": "debug"}
    with open(folder.with_name("log.txt"), "ab") as file:
        return subprocess.Popen(
            [sys.executable, str(TOOL), *arguments, *flags],
            env=environment,
            stdout=file,
            stderr=file,
        )


def kill_after(process, folder, count, written):
    """Kills a run once its journal has so many answers."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while len(written.answers(folder)) < count:
            assert process.poll() is None, folder.with_name("log.txt").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, f"ended before it was killed at {count} answers"


def unanswered(journal):
    """The requests of which nothing is known, for a run was killed meanwhile."""
    known = {line.get("answered") for line in journal}
    return [line for line in journal if "sent" in line and line["sent"] not in known]


def ledger(journal):
    """Dollars that a journal knows to be spent, and the most that the other requests cost."""
    kept = Ledger(PRICES)
    for line in journal:
        if "sent" in line:
            size = {field.name: line[field.name] for field in dataclasses.fields(Size)}
            kept.reserve(line["sent"], Size(**size))
        elif line.get("prompt_tokens") is not None:
            kept.settle(line["answered"], Usage(line["prompt_tokens"], line["answer_tokens"]))
    return PRICES.dollars(kept.spent), PRICES.dollars(kept.reserved())


def check_killed(teacher, teachable, written, count, in_flight):
    """Three kills, a budget that ends a run, and a run without one."""
    folder, facts = teachable(count)
    teacher.set(facts, behaviours=BEHAVIOURS, lasting=LASTING)
    rng = random.Random(0)
    flags = (f"--count={count}", f"--in-flight={in_flight}", "--max-tokens=200")
    # A good answer of 1,090 tokens in and 115 out is as much a fact; a third is asked again.
    dollars = 0.0039 * count
    limited = (*flags, f"--budget-dollars={dollars}")
    # Nothing is known of a prompt's price before the first answer, so the first run is let off.
    for share, run in ((0.12, flags), (0.25, limited), (0.38, limited)):
        moment = int(share * count) + rng.randint(0, 3)
        kill_after(command(folder, teacher, *run), folder, moment, written)
    after_kills = len(unanswered(written.journal(folder)))
    assert 3 <= after_kills <= 3 * in_flight + 2
    assert command(folder, teacher, *limited).wait(TIMEOUT) == 0
    said = folder.with_name("log.txt").read_text()
    left = int(re.search(r"which exceeds the budget; ([\d,]+) facts are left", said)[1])
    assert 0 < left < count
    _, bill = written.bill(teacher.log(), PRICES)
    spent, unknown = ledger(written.journal(folder))
    assert 0.4 * dollars < bill <= spent + unknown <= dollars
    assert command(folder, teacher, *flags).wait(TIMEOUT) == 0

    kept, aside = written.outputs(folder)
    ids = {fact.id for fact in facts}
    assert kept.keys() | aside.keys() == ids
    assert not kept.keys() & aside.keys()
    entries, log = written.answers(folder), teacher.log()
    ends = Counter(line["fact"] for line in entries if line["outcome"] in ("kept", "refused"))
    assert max(ends.values()) == 1
    _, whole = written.bill(log, PRICES)
    assert ledger(written.journal(folder))[0] <= whole <= sum(ledger(written.journal(folder)))
    # Each answer that was billed is in the journal once, but those in flight at a kill, and
    # those that were sent and did not arrive: each of these has a line that says so.
    known = Counter((line["fact"], line["text"]) for line in entries if line["text"] is not None)
    known += Counter((line["fact"], None) for line in entries if line["reason"] == "refusal")
    billed = Counter(
        (entry["fact"], entry["text"].replace(teacher.key, "[key]"))
        if entry["behaviour"] != "refusal"
        else (entry["fact"], None)
        for entry in written.paid(log)
    )
    assert not known - billed
    paid_for_nothing = billed - known
    silent = Counter(entry["fact"] for entry in log if entry.get("behaviour") in ("cut", "late"))
    lost = Counter()
    for (fact, _), number in paid_for_nothing.items():
        lost[fact] += number
    assert silent.total() > 0
    assert not lost - Counter(line["fact"] for line in written.lost(folder))
    at_kills = Counter(line["fact"] for line in unanswered(written.journal(folder)))
    twice = lost - silent - at_kills
    assert not twice
    # No fact was asked for after it was kept, nor more often than three times.
    done = set()
    for line in written.journal(folder):
        assert "sent" not in line or line["fact"] not in done
        done |= {line["fact"]} if line.get("outcome") in ("kept", "refused") else set()
    rejected = Counter(line["fact"] for line in entries if line["outcome"] == "rejected")
    assert max(rejected.values()) == 3
    final = "HTTP 400, content_filter|HTTP 500"
    for fact, line in aside.items():
        assert line["attempts"] == rejected[fact]
        assert re.match(final, line["reasons"][-1]) or len(line["reasons"]) == rejected[fact] == 3
    last = Counter(line["reasons"][-1].partition(":")[0] for line in aside.values())
    return folder, {
        "facts": count,
        "kept": len(kept),
        "set aside, by last reason": dict(last),
        "requests": sum("sent" in line for line in written.journal(folder)),
        "billed by the server": len(written.paid(log)),
        "billed and cut off or late": silent.total(),
        "in flight at three kills": after_kills,
        "paid for twice, but these": twice.total(),
        "budget": round(dollars, 4),
        "when it ended the run: spent, of unknown cost at most, server's bill": [
            round(x, 4) for x in (spent, unknown, bill)
        ],
        "at the end, the same": [round(x, 4) for x in (*ledger(written.journal(folder)), whole)],
    }


def check_no_key(teacher, folder):
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert teacher.key.encode() not in path.read_bytes(), path


def test_a_run_killed_three_times_asks_for_nothing_twice(teacher, teachable, written):
    folder, _ = check_killed(teacher, teachable, written, count=64, in_flight=6)
    check_no_key(teacher, folder)
    said = folder.with_name("log.txt").read_text()
    assert "reasoning: " in said  # The bar, with the cost so far.
    assert re.search(r"\d+ kept, \$\d", said)
    assert "requests of unknown cost" in said
    assert re.search(r"^total +\d+ +\d+ +0$", said, re.MULTILINE)


@pytest.mark.soak
def test_two_thousand_facts_killed_three_times(teacher, teachable, written):
    folder, figures = check_killed(teacher, teachable, written, count=2000, in_flight=32)
    check_no_key(teacher, folder)
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
