"""The writer, in this process, before a server that does as each test says."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import sys
from collections import Counter

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from morer1_jax.errors import ConfigError, DataError
from morer1_jax.model.config import ImageConfig
from morer1_jax.run.lock import hold
from morer1_jax.task import more
from morer1_jax.teacher.endpoint import EndpointError
from morer1_jax.teacher.writer import Writer


def test_another_writer_is_named_before_anything_is_sent(teacher, teachable, settings):
    folder, facts = teachable(2)
    teacher.set(facts)
    with hold(folder / "journal.jsonl"):
        with pytest.raises(
            ConfigError, match=rf"journal\.jsonl: expected no .* found process {os.getpid()} on "
        ):
            Writer(settings(folder, count=2)).run()
        assert not (folder / "journal.jsonl").exists()
    assert teacher.log() == []
    assert Writer(settings(folder, count=2)).run() == 0
    assert not list(folder.glob(".*"))


def test_every_answer_is_kept_or_rejected_with_its_reason(
    teacher, teachable, settings, capsys, written
):
    folder, facts = teachable(12)
    behaviours = ("good", "fenced", "slow", "echo", "wrong", "other", "leak", "format", "special")
    reasons = {
        **dict.fromkeys(behaviours[:4]),
        **{"wrong": "format", "other": "another label", "leak": "reveals that the label was known"},
        **{"format": "format", "special": "special token"},
        **{"length": "cut off", "filter": "content filter", "empty": "empty"},
        "refusal": "refusal",
    }
    for number, (behaviour, reason) in enumerate(reasons.items()):
        out = folder.parent / str(number)
        teacher.set(facts, behaviours={behaviour: 1})
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
        assert len(written.paid(teacher.log())) == (2 if reason is None else 4)
        shown = capsys.readouterr().out
        assert f"rejected: {reason}: 4" in shown or reason is None


def test_a_finished_run_asks_for_nothing_and_can_be_extended(teacher, teachable, settings, written):
    folder, facts = teachable(20)
    teacher.set(facts)
    assert Writer(settings(folder, count=6)).run() == 0
    first, _ = written.outputs(folder)
    assert len(first) == 6
    assert Counter(facts[int(name.split(":")[1]) - 1].label for name in first)["none"] <= 2
    assert Writer(settings(folder, count=6)).run() == 0
    assert len(teacher.log()) == 6
    # What may change: how many, how hard, how much.
    changed = settings(folder, count=15, attempts=1, in_flight=2, retries=0, budget_dollars=9.0)
    assert Writer(changed).run() == 0
    assert len(teacher.log()) == 15
    assert written.outputs(folder)[0].items() > first.items()


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
    with pytest.raises(ConfigError, match=r'data\.txt/train\.txt: expected "\w+", found "\w+"'):
        Writer(settings(folder, count=2)).run()


def test_answers_about_a_photo_are_refused_after_it_was_replaced(
    teacher, teachable, settings, written
):
    folder, facts = teachable(8)
    teacher.set(facts)
    assert Writer(settings(folder, count=6)).run() == 0
    sent = [line for line in written.journal(folder) if "sent" in line]
    assert len(sent) == 6
    path = folder / "img_org" / "train" / "1.jpg"
    before, whole = path.read_bytes(), (folder / "journal.jsonl").read_bytes()
    about = [line["fact"] for line in sent if facts[int(line["fact"][6:]) - 1].image == "1.jpg"]
    digest = hashlib.sha256(before).hexdigest()
    assert {line["photo"] for line in sent if line["fact"] in about} == {digest}
    with Image.open(path) as photo:
        photo.rotate(180).save(path)
    for start in (Writer(settings(folder, count=8)).run, Writer(settings(folder, count=8)).dry_run):
        with pytest.raises(
            DataError, match=rf"{about[0]}: expected the photo .*, found .*1\.jpg; put"
        ):
            start()
    assert len(teacher.log()) == 6
    assert (folder / "journal.jsonl").read_bytes() == whole
    # One of before, which does not say of which photos, is not refused.
    lines = [json.loads(line) for line in whole.splitlines()]
    older = [{key: line[key] for key in line if key != "photo"} for line in lines]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    assert Writer(settings(folder, count=6)).run() == 0
    # Nor is a photo that nothing was asked about.
    (folder / "journal.jsonl").write_bytes(whole)
    path.write_bytes(before)
    assert Writer(settings(folder, count=8)).run() == 0
    assert len(teacher.log()) == 8


@pytest.mark.parametrize("unit", ["dollars", "tokens"])
def test_the_budget_stops_a_run_cleanly(teacher, teachable, settings, capsys, unit, written):
    folder, facts = teachable(100)
    teacher.set(facts, behaviours={"good": 9, "format": 1})
    budget = {"dollars": 0.3, "tokens": 106_000}[unit]
    config = settings(folder, count=100, in_flight=8, **{f"budget_{unit}": budget})
    assert Writer(config).run() == 0
    shown = capsys.readouterr().out
    left = int(re.search(r"exceeds the budget; (\d+) facts are left", shown)[1])
    total, cost = written.bill(teacher.log(), config.prices)
    share = {"dollars": cost, "tokens": total}[unit] / budget
    assert 0.9 < share <= 1  # It is used, too: what is left would not do for one more.
    kept, aside = written.outputs(folder)
    assert len(kept) + len(aside) == 100 - left
    # Started again it asks for nothing; with more to spend, for the rest.
    asked = len(teacher.log())
    assert Writer(config).run() == 0
    assert len(teacher.log()) == asked
    assert Writer(dataclasses.replace(config, **{f"budget_{unit}": None})).run() == 0
    assert sum(map(len, written.outputs(folder))) == 100


def test_the_budget_covers_the_bill_for_answers_that_never_arrived(
    teacher, teachable, settings, capsys, written
):
    folder, facts = teachable(80)
    teacher.set(facts, behaviours={"good": 12, "cut": 3, "late": 1, "busy": 2})
    config = settings(
        folder,
        count=80,
        in_flight=12,
        retries=4,
        timeout=0.2,
        max_tokens=200,
        budget_dollars=0.25,
    )
    # A first answer tells what requests cost, without which few can be in flight.
    assert Writer(dataclasses.replace(config, count=1, budget_dollars=None)).run() == 0
    assert Writer(config).run() == 0
    assert "which exceeds the budget" in capsys.readouterr().out
    log = teacher.log()
    _, bill = written.bill(log, config.prices)
    assert 0.5 * 0.25 < bill <= 0.25
    # Each try has its line, and each that was billed and did not arrive is of unknown cost.
    assert len(log) == sum("sent" in line for line in written.journal(folder))
    silent = Counter(entry["fact"] for entry in log if entry["behaviour"] in ("cut", "late"))
    assert silent.total() > 5
    assert silent == Counter(line["fact"] for line in written.lost(folder))


def test_a_budget_below_one_request_sends_none(teacher, teachable, settings, capsys):
    folder, facts = teachable(4)
    teacher.set(facts)
    assert Writer(settings(folder, count=4, budget_tokens=50_000)).run() == 0
    assert "the next request may cost $0.26" in capsys.readouterr().out
    assert teacher.log() == []


def test_an_answer_without_usage_is_charged_at_its_maximum(
    teacher, teachable, settings, capsys, written
):
    folder, facts = teachable(4)
    teacher.set(facts, usage=False)
    config = settings(folder, count=4, in_flight=1, budget_tokens=300_000)
    assert Writer(config).run() == 0
    assert len(written.paid(teacher.log())) == 2  # Of 102,600 tokens at most each.
    assert len(written.outputs(folder)[0]) == 2
    assert "requests of unknown cost: 2, at most $0.5" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_hides_no_other_error(
    teacher, teachable, settings, monkeypatch, capsys, written
):
    folder, facts = teachable(6)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    teacher.set(facts)
    with monkeypatch.context() as patch:
        patch.setattr(more, "write_reasoning", full)
        with pytest.raises(DataError, match=r"data: .*No space left on device; make room"):
            Writer(settings(folder, count=4)).run()
        teacher.set(facts, reply={"status": 404, "body": {}})
        with pytest.raises(EndpointError, match="no model 'teacher' there"):
            Writer(settings(folder, count=6)).run()
        assert "error: " in capsys.readouterr().err
    teacher.set(facts)
    assert Writer(settings(folder, count=6)).run() == 0
    assert len(teacher.log()) == 2
    assert len(written.outputs(folder)[0]) == 6


def test_data_in_a_bucket_needs_a_local_out(teacher, teachable, settings, monkeypatch, written):
    folder, facts = teachable(4)
    teacher.set(facts)
    bucket = MemoryFileSystem()
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(fsspec, "filesystem", lambda *args, **options: bucket)
    monkeypatch.setattr(
        bucket, "_strip_protocol", lambda path: "/" + path.removeprefix("az://").strip("/")
    )
    for path in folder.rglob("*.*"):
        bucket.pipe_file(f"az://team/more/{path.relative_to(folder)}", path.read_bytes())
    there, out = epath.Path("az://team/more"), folder.parent / "out"
    assert Writer(settings(there, count=4, out=out)).run() == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("journal.jsonl", "reasoning.jsonl", "set_aside.jsonl")
    ]
    assert len(out.joinpath("reasoning.jsonl").read_text().splitlines()) == 4
    for where in (None, epath.Path("gs://team/out")):
        with pytest.raises(ConfigError, match=r"--out: expected .* local disk, which the journal"):
            settings(there, count=4, out=where)


def test_a_torn_line_is_cut_off_and_named(teacher, teachable, settings, capsys, written):
    folder, facts = teachable(4)
    teacher.set(facts)
    Writer(settings(folder, count=3)).run()
    path = folder / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    Writer(settings(folder, count=3)).run()
    assert f"{path}:8: cut off" in capsys.readouterr().out
    assert len(teacher.log()) == 4
    assert len(written.outputs(folder)[0]) == 3


def test_reasoning_from_elsewhere_is_not_overwritten(teacher, teachable, settings):
    folder, facts = teachable(4)
    teacher.set(facts)
    (folder / "reasoning.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"reasoning\.jsonl: expected no file, .*, found one"):
        Writer(settings(folder, count=2))
    assert (folder / "reasoning.jsonl").read_text() == "mine\n"


def test_a_dry_run_sends_and_writes_nothing(teacher, teachable, settings, monkeypatch, capsys):
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


@pytest.mark.parametrize(
    ("count", "budget", "told"),
    [
        (1, 0.2, "the budget does not cover the first request, which may cost $0.26"),
        (60, 0.3, "the budget ends before each is asked once; raise it, or ask for fewer"),
        (1, 0.3, None),
    ],
)
def test_a_dry_run_says_what_exceeds_the_budget(teachable, settings, capsys, count, budget, told):
    folder, _ = teachable(60)
    assert Writer(settings(folder, count=count, budget_dollars=budget)).dry_run() == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the budget")]
    assert len(shown) == (told is not None)
    assert not shown or shown[0].startswith(told)


def test_a_dry_run_estimates_from_the_answers_so_far(teacher, teachable, settings, capsys):
    folder, facts = teachable(9)
    teacher.set(facts)
    Writer(settings(folder, count=4)).run()
    assert Writer(settings(folder, count=9)).dry_run() == 0
    shown = capsys.readouterr().out
    assert re.search(r"5 facts to ask for of 9; .* \(as in 4 answers so far\)", shown)
    assert Writer(settings(folder, count=4)).dry_run() == 0
    assert "nothing is left to ask for of 4 facts" in capsys.readouterr().out
    assert len(teacher.log()) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:1\ntrain:99\n",
            r"ids:2: expected the ids of training facts, .*, found 'train:99' which",
        ),
        ("train:1\n\ntrain:1\n", r"ids:3: .*, found 'train:1' a second time"),
        ("\n \n", r"ids: .*, found an empty file"),
        (None, r"ids: expected .*, found No such file or directory; .* --facts"),
        # The second line is wrong, and not the first with a byte-order mark before it.
        ("\ufefftrain:1\r\ntrain:99\r\n", r"ids:2: .*, found 'train:99' which is unknown"),
    ],
)
def test_bad_ids_are_named(teachable, settings, text, message):
    folder, _ = teachable(4)
    path = folder.parent / "ids"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Writer(settings(folder, facts=path))


def test_bad_data_is_found_before_anything_is_sent(teacher, teachable, settings):
    folder, facts = teachable(4)
    teacher.set(facts)
    with pytest.raises(ConfigError, match=r"--count: expected at most 4, .*, found 5"):
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
