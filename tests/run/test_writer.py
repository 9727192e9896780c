"""Nothing that was paid for is lost or asked for twice, whatever the endpoint and the user do."""

import dataclasses
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from morer1_jax.data.images import ImageConfig
from morer1_jax.run.budget import Prices
from morer1_jax.run.config import ConfigError
from morer1_jax.run.endpoint import EndpointConfig, EndpointError
from morer1_jax.run.writer import Writer, WriterConfig
from morer1_jax.task import more
from morer1_jax.task.fact import DataError

TOOL = Path(__file__).parents[2] / "tools" / "write_reasoning.py"
# A third of the requests meets with something that is not a good answer.
FATES = {
    **{"good": 60, "fenced": 3, "slow": 3, "echo": 1},
    **{"wrong": 2, "other": 3, "leak": 4, "format": 3, "special": 1},
    **{"length": 2, "filter": 1, "empty": 1, "refusal": 2},
    **{"busy": 6, "broken": 4, "cut": 3, "late": 1},
}
LASTING = {"": 90, "other": 4, "leak": 2, "blocked": 3, "broken": 1}
TIMEOUT = 300.0


@pytest.fixture
def settings(teacher, monkeypatch):
    """A config for a folder; fields of the config and of the endpoint's may be given."""
    monkeypatch.setenv("OPENAI_API_KEY", teacher.key)

    def make(folder, **fields):
        names = {field.name for field in dataclasses.fields(EndpointConfig)}
        endpoint = {"model": "teacher", "base_url": teacher.url, "retries": 2}
        endpoint |= {name: fields.pop(name) for name in names & fields.keys()}
        return WriterConfig(
            data=folder,
            endpoint=EndpointConfig(**endpoint),
            images=ImageConfig(),
            **({"prices": Prices(2.5, 10.0)} | fields),
        )

    return make


def journal(folder):
    """The whole lines of the journal but the first."""
    path = folder / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def answers(folder):
    return [line for line in journal(folder) if "answered" in line]


def lost(folder):
    """Requests of which the journal does not know what they cost."""
    known = {line["answered"] for line in answers(folder) if line["prompt_tokens"] is not None}
    return [line for line in journal(folder) if line.get("sent", 0) not in {0, *known}]


def outputs(folder):
    """Fact id to reasoning, read as SFT reads it, and fact id to why it was set aside."""
    ontology = more.read_ontology(folder)
    facts = more.read_split(folder, "train", ontology)
    path = folder / "reasoning.jsonl"
    kept = more.read_reasoning(path, facts, ontology) if path.exists() else {}
    lines = (folder / "set_aside.jsonl").read_text().splitlines()
    aside = {line["fact"]: line for line in map(json.loads, lines)}
    assert len(aside) == len(lines)
    return kept, aside


def paid(log):
    """The requests that the server billed."""
    return [entry for entry in log if "tokens" in entry]


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


def kill_after(process, folder, count):
    """Kills a run once its journal has so many answers."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while len(answers(folder)) < count:
            assert process.poll() is None, folder.with_name("log.txt").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, f"ended before it was killed at {count} answers"


def check_killed(teacher, teachable, count, in_flight):
    """Three kills, a budget that ends a run, and a run without one."""
    folder, facts = teachable(count)
    teacher.set(facts, fates=FATES, lasting=LASTING)
    rng = random.Random(0)
    flags = (f"--count={count}", f"--in-flight={in_flight}", "--max-tokens=200")
    # A good answer of 1,090 tokens in and 115 out is as much a fact; a third is asked again.
    dollars = 0.0039 * count
    limited = (*flags, f"--budget-dollars={dollars}")
    # Nothing is known of a prompt's price before the first answer, so the first run is let off.
    for share, run in ((0.12, flags), (0.25, limited), (0.38, limited)):
        moment = int(share * count) + rng.randint(0, 3)
        kill_after(command(folder, teacher, *run), folder, moment)
    after_kills = len(lost(folder))
    assert 3 <= after_kills <= 3 * in_flight + 2
    assert command(folder, teacher, *limited).wait(TIMEOUT) == 0
    said = folder.with_name("log.txt").read_text()
    left = int(re.search(r"the budget cannot bear; ([\d,]+) facts are left", said)[1])
    assert 0 < left < count
    prices = Prices(2.5, 10)
    log = teacher.log()
    billed = [sum(entry["tokens"][k] for entry in paid(log)) for k in (0, 1)]
    spent = (billed[0] * prices.prompt + billed[1] * prices.answer) / 1e6
    assert 0.4 * dollars < spent <= dollars
    assert command(folder, teacher, *flags).wait(TIMEOUT) == 0

    kept, aside = outputs(folder)
    ids = {fact.id for fact in facts}
    assert kept.keys() | aside.keys() == ids
    assert not kept.keys() & aside.keys()
    entries, log = answers(folder), teacher.log()
    ends = Counter(line["fact"] for line in entries if line["outcome"] in ("kept", "refused"))
    assert max(ends.values()) == 1
    # Each answer that was billed is in the journal once, but those on their way at a kill.
    known = Counter((line["fact"], line["text"]) for line in entries if line["text"] is not None)
    known += Counter((line["fact"], None) for line in entries if line["reason"] == "refusal")
    billed = Counter(
        (entry["fact"], entry["text"].replace(teacher.key, "[key]"))
        if entry["fate"] != "refusal"
        else (entry["fact"], None)
        for entry in paid(log)
    )
    assert not known - billed
    open_, unknown = Counter(line["fact"] for line in lost(folder)), Counter()
    for (fact, _), number in (billed - known).items():
        unknown[fact] += number
    assert not unknown - open_
    assert unknown.total() <= 3 * in_flight
    # Nothing was asked for after it was kept, nor more often than three times.
    for line in entries:
        assert line["reason"] != "says that it was told" or "given label" in line["text"]
    rejected = Counter(line["fact"] for line in entries if line["outcome"] == "rejected")
    assert max(rejected.values()) == 3
    for fact, line in aside.items():
        assert line["attempts"] == rejected[fact] == len(line["reasons"]) or re.match(
            "HTTP 400, content_filter|HTTP 500|no connection|time-out", line["reasons"][-1]
        )
    reasons = {line["reason"] for line in entries}
    return folder, {
        "facts": count,
        "kept": len(kept),
        "set aside": len(aside),
        "requests billed": len(paid(log)),
        "answers in the journal": len(entries),
        "requests on their way at three kills": after_kills,
        "answers billed and lost": unknown.total(),
        "budget": round(dollars, 4),
        "spent when it ended the run": round(spent, 4),
        "reasons": sorted(filter(None, reasons)),
    }


def check_no_key(teacher, folder):
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert teacher.key.encode() not in path.read_bytes(), path


def test_a_run_killed_three_times_asks_for_nothing_twice(teacher, teachable):
    folder, _ = check_killed(teacher, teachable, count=64, in_flight=6)
    check_no_key(teacher, folder)
    said = folder.with_name("log.txt").read_text()
    assert "reasoning: " in said  # The bar, with the cost so far.
    assert re.search(r"\d+ kept, \$\d", said)
    assert "requests of unknown cost" in said
    assert re.search(r"^total +\d+ +\d+ +0$", said, re.MULTILINE)


@pytest.mark.soak
def test_two_thousand_facts_killed_three_times(teacher, teachable):
    folder, figures = check_killed(teacher, teachable, count=2000, in_flight=32)
    check_no_key(teacher, folder)
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))


def test_every_answer_is_kept_or_rejected_with_its_reason(teacher, teachable, settings, capsys):
    folder, facts = teachable(12)
    fates = ("good", "fenced", "slow", "echo", "wrong", "other", "leak", "format", "special")
    reasons = {
        **dict.fromkeys(fates[:4]),
        **{"wrong": "format", "other": "another label", "leak": "says that it was told"},
        **{"format": "format", "special": "special token"},
        **{"length": "cut off", "filter": "content filter", "empty": "empty"},
        "refusal": "refusal",
    }
    for number, (fate, reason) in enumerate(reasons.items()):
        out = folder.parent / str(number)
        teacher.set(facts, fates={fate: 1})
        ids = folder.parent / "ids"
        ids.write_text("\n train:3\n\ntrain:1\n")
        assert Writer(settings(folder, out=out, facts=ids, attempts=2)).run() == 0
        lines = (out / "set_aside.jsonl").read_text().splitlines()
        if reason is None:
            assert not lines
            ontology = more.read_ontology(folder)
            kept = more.read_reasoning(out / "reasoning.jsonl", facts, ontology)
            assert list(kept) == ["train:1", "train:3"]
            assert all(text.startswith("<think>\nStep 1: ") for text in kept.values())
            assert all(text.endswith("</answer>") for text in kept.values())
        else:
            assert not (out / "reasoning.jsonl").exists()
            assert [json.loads(line) for line in lines] == [
                {"fact": fact, "reasons": [reason] * 2, "attempts": 2}
                for fact in ("train:1", "train:3")
            ]
        assert len(paid(teacher.log())) == (2 if reason is None else 4)
        shown = capsys.readouterr().out
        assert f"rejected: {reason}: 4" in shown or reason is None


def test_a_finished_run_asks_for_nothing_and_more_facts_come_on_top(teacher, teachable, settings):
    folder, facts = teachable(20)
    teacher.set(facts)
    assert Writer(settings(folder, count=6)).run() == 0
    first, _ = outputs(folder)
    assert len(first) == 6
    assert Counter(facts[int(name.split(":")[1]) - 1].label for name in first)["none"] <= 2
    assert Writer(settings(folder, count=6)).run() == 0
    assert len(teacher.log()) == 6
    # What may change: how many, how hard, how much.
    changed = settings(folder, count=15, attempts=1, in_flight=2, retries=0, budget_dollars=9.0)
    assert Writer(changed).run() == 0
    assert len(teacher.log()) == 15
    assert outputs(folder)[0].items() > first.items()


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"model": "other"}, "model"),
        ({"temperature": 0.5}, "temperature"),
        ({"images": ImageConfig(crop_margin=0.5)}, "images.crop_margin"),
    ],
)
def test_other_settings_over_one_journal_are_an_error(teacher, teachable, settings, changed, key):
    folder, facts = teachable(4)
    teacher.set(facts)
    Writer(settings(folder, count=2)).run()
    other = settings(folder, count=2, **{k: v for k, v in changed.items() if k != "images"})
    if "images" in changed:
        other = dataclasses.replace(other, images=changed["images"])
    for start in (Writer(other).run, Writer(other).dry_run):
        with pytest.raises(ConfigError, match=rf"other settings: {re.escape(key)}: ") as error:
            start()
        assert "; set these back, or use another --out" in str(error.value)
    assert len(teacher.log()) == 2


def test_another_dataset_over_one_journal_is_an_error(teacher, teachable, settings):
    folder, facts = teachable(4)
    teacher.set(facts)
    Writer(settings(folder, count=2)).run()
    more.write_split(folder, "train", facts[:3])
    with pytest.raises(ConfigError, match=r'data\.txt/train\.txt: "\w+" there, "\w+" here'):
        Writer(settings(folder, count=2)).run()


@pytest.mark.parametrize("unit", ["dollars", "tokens"])
def test_the_budget_stops_a_run_cleanly(teacher, teachable, settings, capsys, unit):
    folder, facts = teachable(100)
    teacher.set(facts, fates={"good": 9, "format": 1})
    budget = {"dollars": 0.3, "tokens": 106_000}[unit]
    config = settings(folder, count=100, in_flight=8, **{f"budget_{unit}": budget})
    assert Writer(config).run() == 0
    shown = capsys.readouterr().out
    left = int(re.search(r"the budget cannot bear; (\d+) facts are left", shown)[1])
    tokens = [entry["tokens"] for entry in paid(teacher.log())]
    total = sum(map(sum, tokens))
    cost = (2.5 * sum(t[0] for t in tokens) + 10 * sum(t[1] for t in tokens)) / 1e6
    share = {"dollars": cost, "tokens": total}[unit] / budget
    assert 0.9 < share <= 1  # It is used, too: what is left would not do for one more.
    kept, aside = outputs(folder)
    assert len(kept) + len(aside) == 100 - left
    # Started again it asks for nothing; with more to spend, for the rest.
    asked = len(teacher.log())
    assert Writer(config).run() == 0
    assert len(teacher.log()) == asked
    assert Writer(dataclasses.replace(config, **{f"budget_{unit}": None})).run() == 0
    assert sum(map(len, outputs(folder))) == 100


def test_a_budget_that_bears_no_request_sends_none(teacher, teachable, settings, capsys):
    folder, facts = teachable(4)
    teacher.set(facts)
    assert Writer(settings(folder, count=4, budget_tokens=50_000)).run() == 0
    assert "the next request may cost $0.26" in capsys.readouterr().out
    assert teacher.log() == []


def test_an_answer_without_usage_is_counted_at_its_most(teacher, teachable, settings, capsys):
    folder, facts = teachable(4)
    teacher.set(facts, usage=False)
    config = settings(folder, count=4, in_flight=1, budget_tokens=300_000)
    assert Writer(config).run() == 0
    assert len(paid(teacher.log())) == 2  # Of 102,600 tokens at most each.
    assert len(outputs(folder)[0]) == 2
    assert "requests of unknown cost: 2, at most $0.5" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_cleanly(teacher, teachable, settings, capsys, number):
    folder, facts = teachable(40)
    teacher.set(facts, fates={"good": 1, "slow": 1})

    def interrupt():
        while len(answers(folder)) < 8:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert Writer(settings(folder, count=40, in_flight=4)).run() == 128 + number
    thread.join()
    kept, _ = outputs(folder)
    assert 8 <= len(kept) == len(answers(folder)) < 40
    assert len(lost(folder)) <= 4
    shown = capsys.readouterr().out
    assert f"stopped by {number.name}; start again to go on" in shown
    assert re.search(rf"^total +{len(kept)} +0 +{40 - len(kept)}$", shown, re.MULTILINE)
    assert Writer(settings(folder, count=40)).run() == 0
    assert outputs(folder)[0].items() > kept.items()
    assert len(paid(teacher.log())) <= 40 + 4


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "correct OPENAI_API_KEY"), (404, "correct --model or --base-url"), (400, "it names")],
)
def test_what_holds_for_all_requests_ends_the_run(teacher, teachable, settings, status, message):
    folder, facts = teachable(30)
    teacher.set(facts, reply={"status": status, "body": {"error": {"message": teacher.key}}})
    config = settings(folder, count=30, in_flight=4, budget_dollars=1.2)
    with pytest.raises(EndpointError, match=message) as error:
        Writer(config).run()
    assert teacher.key not in str(error.value)
    assert len(teacher.log()) <= 4
    assert lost(folder) == []  # An error is not billed, also of those sent at the same time.
    assert outputs(folder) == ({}, {})
    teacher.set(facts)
    assert Writer(config).run() == 0
    assert len(outputs(folder)[0]) == 30


def test_an_endpoint_that_is_down_ends_the_run_and_costs_no_fact(teacher, teachable, settings):
    folder, facts = teachable(30)
    teacher.set(facts, reply={"status": 503, "body": {}})
    config = settings(folder, count=30, in_flight=4, retries=0)
    with pytest.raises(EndpointError, match=r"10 requests in a row .* \(last: HTTP 503\)"):
        Writer(config).run()
    assert 10 <= len(teacher.log()) <= 14
    teacher.set(facts)
    assert Writer(config).run() == 0
    assert len(outputs(folder)[0]) == 30


def test_a_fact_that_is_never_answered_is_set_aside_until_the_next_run(
    teacher, teachable, settings, capsys
):
    folder, facts = teachable(12)
    teacher.set(facts, lasting={"": 3, "broken": 1})
    assert Writer(settings(folder, count=12, retries=1)).run() == 0
    kept, aside = outputs(folder)
    assert len(kept) + len(aside) == 12
    assert {tuple(line["reasons"]) for line in aside.values()} == {("HTTP 500",)}
    assert f"{len(aside)} facts were not answered; start again" in capsys.readouterr().out
    teacher.set(facts)
    assert Writer(settings(folder, count=12)).run() == 0
    assert {entry["fact"] for entry in teacher.log()} == aside.keys()
    assert len(outputs(folder)[0]) == 12


def test_a_torn_line_is_cut_by_name(teacher, teachable, settings, capsys):
    folder, facts = teachable(4)
    teacher.set(facts)
    Writer(settings(folder, count=3)).run()
    path = folder / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    Writer(settings(folder, count=3)).run()
    assert f"{path}:7: torn when a run was killed; cut off" in capsys.readouterr().out
    assert len(teacher.log()) == 4
    assert len(outputs(folder)[0]) == 3


def test_reasoning_from_elsewhere_is_not_overwritten(teacher, teachable, settings):
    folder, facts = teachable(4)
    teacher.set(facts)
    (folder / "reasoning.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"reasoning\.jsonl: there already, and not from a journal"):
        Writer(settings(folder, count=2))
    assert (folder / "reasoning.jsonl").read_text() == "mine\n"


def test_a_dry_run_asks_and_writes_nothing(teacher, teachable, settings, monkeypatch, capsys):
    folder, facts = teachable(9)
    teacher.set(facts)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)
    before = sorted(path.name for path in folder.iterdir())
    assert Writer(settings(folder, count=9)).dry_run() == 0
    shown = capsys.readouterr().out
    assert "How is the object related to the entity" in shown
    assert "For your eyes only" in shown
    assert re.search(r"^photo: \d+ × 80 pixels, [\d.]+ kB as JPEG$", shown, re.MULTILINE)
    assert re.search(r"^crop: \d+ × \d+ pixels, ", shown, re.MULTILINE)
    assert re.search(
        r"^9 facts to ask for of 9; a request about 8[89]\d tokens in and 350", shown, 8
    )
    assert re.search(r"^about \$0\.05\d+ if each is asked once; \$0\.33", shown, re.MULTILINE)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert teacher.log() == []


def test_a_dry_run_goes_by_what_was_asked(teacher, teachable, settings, capsys):
    folder, facts = teachable(9)
    teacher.set(facts)
    Writer(settings(folder, count=4)).run()
    assert Writer(settings(folder, count=9)).dry_run() == 0
    shown = capsys.readouterr().out
    assert re.search(r"5 facts to ask for of 9; .* \(as in 4 answers so far\)", shown)
    assert Writer(settings(folder, count=4)).dry_run() == 0
    assert "nothing is left to ask of 4 facts" in capsys.readouterr().out
    assert len(teacher.log()) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:1\ntrain:99\n", r"ids:2: 'train:99' is unknown, a training fact's id like"),
        ("train:1\n\ntrain:1\n", r"ids:3: 'train:1' is there twice"),
        ("\n \n", r"ids: empty"),
        (None, r"--facts: .*No such file"),
    ],
)
def test_bad_ids_are_named(teachable, settings, text, message):
    folder, _ = teachable(4)
    path = folder.parent / "ids"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        Writer(settings(folder, facts=path))


def test_bad_data_is_found_before_anything_is_asked(teacher, teachable, settings):
    folder, facts = teachable(4)
    teacher.set(facts)
    with pytest.raises(ConfigError, match="--count: 5 found, at most 4 training facts there"):
        Writer(settings(folder, count=5))
    photo = folder / "img_org" / "train" / "3.jpg"
    photo.write_bytes(photo.read_bytes()[:500])
    with pytest.raises(DataError, match=r"3\.jpg \(fact train:3\)"):
        Writer(settings(folder, count=4)).run()
    marked = dataclasses.replace(facts[3], tokens=(*facts[3].tokens, "<|im_end|>"))
    more.write_split(folder, "train", [*facts[:3], marked])
    out = folder.parent / "out"
    with pytest.raises(DataError, match=r"train:4: the title holds '<\|im_end\|>'"):
        Writer(settings(folder, count=4, out=out)).run()
    assert teacher.log() == []


def parse(*flags):
    spec = importlib.util.spec_from_file_location("write_reasoning", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse(["--data=more", "--model=gpt-4o", *flags])


def test_flags_become_the_config():
    config, dry = parse(
        "--count=7", "--dry-run", "--out=o", "--budget-tokens=5", "--max-pixels=9999"
    )
    assert dry
    assert config.folder == Path("o")
    assert (config.count, config.budget_tokens, config.images.max_pixels) == (7, 5, 9999)
    config, dry = parse("--facts=ids", "--base-url=http://h/v1", "--price-in=1", "--price-out=2")
    assert not dry
    assert config.folder == Path("more")
    assert config == WriterConfig(
        data=Path("more"),
        endpoint=EndpointConfig(model="gpt-4o", base_url="http://h/v1"),
        images=ImageConfig(),
        prices=Prices(1, 2),
        facts=Path("ids"),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --count or --facts, one of the two"),
        (["--count=2", "--facts=ids"], "give --count or --facts, one of the two"),
        (["--count=2", "--modle=x"], "unrecognized arguments: --modle=x; --help"),
        (["--count=two"], "argument --count: invalid int value: 'two'; --help"),
        (["--count=0"], "--count: 0 found, at least 1 expected"),
        (["--count=2", "--attempts=0"], "--attempts: 0 found, at least 1"),
        (["--count=2", "--in-flight=0"], "--in-flight: 0 found, at least 1"),
        (["--count=2", "--timeout=0"], "--timeout: 0.0 found, seconds above 0"),
        (["--count=2", "--temperature=nan"], "--temperature: nan found, at least 0"),
        (["--count=2", "--max-pixels=1"], "--max-pixels: 1 found, at least 3136"),
        (["--count=2", "--budget-dollars=1"], "--budget-dollars: needs the endpoint's --price-in"),
        (["--count=2", "--budget-tokens=-1"], "--budget-tokens: -1 found, at least 0"),
    ],
)
def test_bad_flags_are_named_in_one_line(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse(*flags)
    assert "\n" not in str(error.value)
