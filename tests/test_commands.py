"""The commands as typed, given what cannot work: one line, exit code 2, and nothing is touched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from morer1_jax.run.lock import hold

ROOT = Path(__file__).parents[1]
PREDICT, EVALUATE = "morer1_jax.predict", "morer1_jax.evaluate"
TRAIN = "morer1_jax.train"
RATE, CONVERT, TFDS, STUDY, BENCH_DATA, BENCH_SAVES, FINGERPRINT = (
    str(ROOT / "tools" / f"{name}.py")
    for name in (
        "rate_difficulty",
        "convert",
        "build_tfds",
        "study",
        "bench_data",
        "bench_saves",
        "fingerprint",
    )
)
TINY = ROOT / "tests" / "configs" / "tiny.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where commands are typed: a photo, a file, a folder with scores, what is no checkpoint."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), (9, 9, 9)).save("photo.jpg")
    for name in ("file", "scores/eval/sft.json", "runs/demo/config.json", "runs/old/notes"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    return tmp_path


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


ASK = (PREDICT, "--checkpoint=none", "--image=photo.jpg", "--box=.5,.5,.2,.2", "--title=Heat win")
ASK = (*ASK, "--entity=Heat")
SCORE = (EVALUATE, "--checkpoint=runs/a/sft", "--data=none")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (*ASK, "--picture=none/x.png"),
            "--picture=none/x.png: expected a folder none, found none;",
        ),
        (
            (*ASK, "--picture=file/x.png"),
            "--picture=file/x.png: expected a folder file, found none;",
        ),
        ((*ASK, "--picture=/proc/x.png"), "/proc/x.png: cannot be written: /proc: "),
        (
            (*ASK, "--picture=./photo.jpg"),
            "--picture=photo.jpg: expected a file of its own, found --image",
        ),
        (
            (*ASK, "--picture=photo.psd"),
            "--picture: expected an image's suffix such as .png, found '.psd'",
        ),
        ((*SCORE, "--out=file"), "file/eval: cannot be written: file: Not a directory"),
        ((*SCORE, "--out=/proc/x"), "/proc/x/eval: cannot be written: /proc: "),
        (
            (*SCORE, "--out=out", "--name=a/b"),
            "--name: expected a file's name, without /, found 'a/b'",
        ),
        ((*SCORE, "--out=out", "--name="), "--name: expected a file's name, without /, found ''"),
        (
            (*SCORE, "--out=scores"),
            "scores/eval/sft.json: expected no scores of this name, found a file",
        ),
        ((RATE, "--checkpoint=none", "--data=none", "--out=runs"), "runs: expected a file to"),
        ((RATE, "--checkpoint=none", "--data=none", "--out=file"), "--out=file: exists already"),
        ((CONVERT, "--checkpoint=none", "--out=/proc/x"), "/proc/x: cannot be written: /proc: "),
        ((CONVERT, "--checkpoint=none", "--out=file"), "file: expected a folder to write, found"),
        ((CONVERT, "--checkpoint=none", "--out=runs"), "--out=runs: exists already"),
        ((CONVERT, "--checkpoint=none", "--out=/"), "/: "),
        ((EVALUATE, "--checkpoint=~nobody-here/x", "--data=none", "--out=o"), "none/rel2id.json: "),
        (
            (CONVERT, "--checkpoint=~nobody-here/x", "--out=x"),
            "{here}/~nobody-here/x: expected a run",
        ),
        ((TFDS, "--folder=none", "--data_dir=file"), "file: expected a folder to write, found"),
        ((STUDY, "--folder=s", "--seeds=0,a"), "--seeds: expected whole numbers such"),
        ((STUDY, "--folder=file"), "file: expected a folder to write, found a file"),
        ((CONVERT, "--checkpoint=runs", "--out=x"), "runs: expected a run's workdir"),
        ((CONVERT, "--checkpoint=runs/old", "--out=x"), "runs/old: expected a run's workdir"),
        ((CONVERT, "--checkpoint=runs/dmo", "--out=x"), "runs/dmo: expected a run's workdir"),
        ((CONVERT, "--checkpoint=./dmo", "--out=x"), "./dmo: expected a run's workdir"),
        ((CONVERT, "--checkpoint=/a/b", "--out=x"), "/a/b: expected a run's workdir"),
        ((CONVERT, "--checkpoint=a/b/c", "--out=x"), "a/b/c: expected a run's workdir"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(command, folder, args, message):
    before = tree(folder)
    out, err = command(*args, code=2)
    message = message.replace("{here}", str(folder))
    assert err.startswith(f"error: {message}") or err.startswith("error: argument " + message), err
    assert err.count("\n") == 1
    assert out == ""
    assert tree(folder) == before


# What each command needs to get as far as its work.
ALONE = {
    PREDICT: ASK[1:],
    EVALUATE: ("--checkpoint=none", "--data=none", "--out=out"),
    "bench": (),
    "bench_data": (f"--config={ROOT / 'tests/configs/tiny.py'}",),
    "bench_saves": (),
    "build_tfds": ("--folder=none", "--data_dir=new"),
    "convert": ("--checkpoint=none", "--out=new"),
    "fingerprint": ("--out=new",),
    "rate_difficulty": ("--checkpoint=none", "--data=none", "--out=new"),
    "study": ("--folder=new",),
    "write_reasoning": ("--data=none", "--count=1", "--model=none"),
}


def test_every_tool_is_among_those_that_must_be_alone():
    """But the one that reads files and prints."""
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tools - {"compiled_table"} < ALONE.keys()


@pytest.mark.parametrize("name", ALONE)
def test_one_of_several_processes_is_refused_before_any_work(command, folder, monkeypatch, name):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    before = tree(folder)
    target = name if "." in name else str(ROOT / "tools" / f"{name}.py")
    out, err = command(target, *ALONE[name], code=2)
    assert err == (
        "error: expected one process, found 3: only `python -m morer1_jax.train` runs on several "
        "hosts (OMPI_COMM_WORLD_SIZE=3; start one process, or unset OMPI_COMM_WORLD_SIZE where "
        "this is the only one)\n"
    )
    assert out == ""
    assert tree(folder) == before


def test_training_is_refused_where_a_launcher_does_not_say_who_the_others_are(
    command, folder, monkeypatch
):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    before = tree(folder)
    config = f"--config={ROOT / 'tests/configs/tiny.py'}"
    out, err = command("morer1_jax.train", config, "--workdir=new", code=2)
    assert err.startswith(
        "error: expected to find the other processes of OMPI_COMM_WORLD_SIZE=3, found none: "
    )
    assert "; give --coordinator=" in err
    assert err.count("\n") == 1
    assert out == ""
    assert tree(folder) == before


BUCKET = "gs://bucket/x"


@pytest.mark.parametrize(
    "args",
    [
        (*ASK, f"--picture={BUCKET}.png"),
        (PREDICT, "--checkpoint=none", f"--jsonl={BUCKET}"),
        (*SCORE, f"--out={BUCKET}"),
        (RATE, "--checkpoint=none", "--data=none", f"--out={BUCKET}"),
        (CONVERT, "--checkpoint=none", f"--out={BUCKET}"),
        (STUDY, f"--folder={BUCKET}"),
        (FINGERPRINT, f"--out={BUCKET}"),
        (BENCH_DATA, f"--config={TINY}", f"--json={BUCKET}"),
        (BENCH_SAVES, f"--json={BUCKET}"),
    ],
    ids=lambda args: Path(args[0]).stem,
)
def test_what_works_on_a_disk_only_is_no_bucket(command, folder, args):
    out, err = command(*args, code=2)
    flag, _, given = args[-1].partition("=")
    assert err == (
        f"error: {flag}={given}: expected a path of this machine, found a URL; name another\n"
    )
    assert out == ""
    assert not Path("gs:").exists()


def test_half_of_a_buckets_name_is_no_folder(command):
    out, err = command(TRAIN, f"--config={TINY}", "--workdir=gs:/bucket/x", code=2)
    assert err == (
        "error: --workdir=gs:/bucket/x: expected a path or gs://…, found half of a URL; name one\n"
    )
    assert out == ""
    assert not Path("gs:").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (TRAIN, f"--config={TINY}", "--workdir="),
            "--workdir=: expected a path, found none; name one",
        ),
        ((*SCORE, "--out="), "--out=: expected a path, found none; name one"),
        ((*ASK, "--picture="), "--picture=: expected a path, found none; name one"),
        (
            (PREDICT, "--checkpoint=none", "--jsonl="),
            "--jsonl=: expected a path, found none; name one",
        ),
        (
            (CONVERT, "--checkpoint=", "--out=x"),
            "--checkpoint=: expected a path, found none; name one",
        ),
        (
            (EVALUATE, "--checkpoint=a", "--data=foo://b", "--out=x"),
            "--data=foo://b: expected a path or gs",
        ),
        (
            (CONVERT, "--checkpoint=foo://b", "--out=x"),
            "a checkpoint's path=foo://b: expected a path or gs",
        ),
        (
            (CONVERT, "--checkpoint=none", "--out=a\udcff"),
            "'--out=a\\udcff': expected UTF-8, found",
        ),
        ((CONVERT, "--checkpoint=none", "--out=" + "n" * 300), "n" * 300 + ": File name too long"),
        ((TRAIN, "--config=a:b.py"), "--config=a:b.py: what follows a colon is given to the conf"),
    ],
)
def test_what_is_no_path_is_one_line(command, folder, args, message):
    Path("a:b.py").write_text("")
    before = tree(folder)
    out, err = command(*args, code=2)
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert out == ""
    assert tree(folder) == before


def test_a_shells_home_is_the_home_of_flags(command, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "runs"))
    for args, message in (
        ((CONVERT, "--checkpoint=~/old", "--out=x"), f"{folder}/runs/old: expected a run's"),
        ((CONVERT, "--checkpoint=none", "--out=~/old"), f"--out={folder}/runs/old: exists already"),
        ((*SCORE, "--out=~/../file"), f"{folder}/runs/../file/eval: cannot be written"),
        ((STUDY, "--folder=~/../file"), f"{folder}/runs/../file: expected a folder to write"),
        ((TRAIN, "--config=~/none.py"), f"--config={folder}/runs/none.py: no such file"),
    ):
        _, err = command(*args, code=2)
        assert err.startswith(f"error: {message}"), err


@pytest.mark.parametrize(
    "args",
    [
        (*SCORE, "--out=scores", "--name=mine"),
        (RATE, "--checkpoint=none", "--data=none", "--out=new"),
        (CONVERT, "--checkpoint=none", "--out=new"),
        (TFDS, "--folder=none", "--data_dir=new"),
        (STUDY, "--folder=runs"),
    ],
    ids=lambda args: Path(args[0]).stem,
)
def test_who_writes_already_is_named(command, folder, args):
    given = dict(arg.split("=") for arg in args[1:])
    out = folder / next(
        given[name] for name in ("--out", "--data_dir", "--folder") if name in given
    )
    with hold(out, folder=args[0] not in (RATE, CONVERT)):
        before = tree(folder)
        _, err = command(*args, code=2)
        assert err.startswith(f"error: {out}: expected no other process to write into it, ")
        assert f", found process {os.getpid()} on " in err
        assert err.endswith("; wait until it has ended, or name another\n")
        assert err.count("\n") == 1
        assert tree(folder) == before


def test_a_checkpoint_is_sought_on_the_hub_only_where_none_here_is_meant(
    command, folder, monkeypatch
):
    asked = []

    def download(name, **_):
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr("morer1_jax.weights.folder.snapshot_download", download)
    _, err = command(CONVERT, "--checkpoint=Qwen/Qwen2.5-VL-3B-Instruct", "--out=x", code=2)
    assert "the hub does not give it: offline" in err
    command(CONVERT, "--checkpoint=runs/dmo", "--out=x", code=2)
    assert asked == ["Qwen/Qwen2.5-VL-3B-Instruct"]


def test_a_name_for_scores_is_the_checkpoints_last_part(command, folder, monkeypatch):
    monkeypatch.chdir(folder / "runs" / "old")
    Path("scores/eval").mkdir(parents=True)
    Path("scores/eval/old.json").write_text("{}")
    _, err = command(EVALUATE, "--checkpoint=.", "--data=none", "--out=scores", code=2)
    assert "scores/eval/old.json: expected no scores of this name, found a file" in err


def test_build_tfds_says_what_it_wrote_and_no_more(command, small_world, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    data_dir = tmp_path / "tfds"
    out, err = command(TFDS, f"--folder={small_world}", f"--data_dir={data_dir}", code=0)
    written, load, train = out.splitlines()
    folders = [f"{data_dir}/more/{name}/1.0.0" for name in ("facts", "photos")]
    assert written == f"written: {folders[0]} and {folders[1]}"
    assert "INFO" not in err
    assert not re.search(r"^[IWE]\d{4} ", err, re.MULTILINE)
    loaded = eval(load.removeprefix("to load: "), {"tfds": tfds})
    assert loaded[0]["id"] == b"train:1"
    assert train == (
        f"to train: --config.data.folder={data_dir}/more, with reasoning.jsonl put into it"
    )


def test_transformers_gives_no_advice_where_there_is_no_torch():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    shown = [
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.modules['torch'] = None; {code}"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=environment,
        )
        for code in ("import transformers", "import morer1_jax, transformers")
    ]
    assert ["PyTorch was not found" in done.stdout + done.stderr for done in shown] == [True, False]
