"""Text and printing in any locale, and where nobody listens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from morer1_jax.data.ratings import Rating, histogram

ROOT = Path(__file__).parents[1]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

# Writes what a run writes, prints what it prints, and says at the end that it came so far.
SCRIPT = """
import contextlib, os, sys
from pathlib import Path
from morer1_jax.cli import run_main
from morer1_jax.config.binding import bind
from morer1_jax.progress import progress
from morer1_jax.stages.marker import read_results, write_marker

def main(argv):
    workdir, lines = Path("run"), int(os.environ["LINES"])
    for _ in range(2):  # The second time it is read.
        bind({"data": {"folder": "Fußball/日本"}}, workdir)
        write_marker(workdir / "rate", {}, {"best": "é"})
        assert read_results(workdir / "rate") == {"best": "é"}
    for _ in progress(range(3), desc="größer"):
        with contextlib.suppress(BrokenPipeError):  # `head` may have ended by now.
            os.write(2, b"of a library\\n")
    print(Path("histogram").read_text(encoding="utf-8"))
    for _ in range(lines):
        print("✓ größer 日本", flush=True)
    print("größer", file=sys.stderr)
    Path("done").write_text("whole", encoding="utf-8")

run_main(main, sys.argv[:1])
"""


def run(tmp_path, shell, environment=(), lines=1):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    # Made here: importing what makes it would be most of the script's work.
    shown = histogram([Rating("train:1", 0.5, "easy")])
    (tmp_path / "histogram").write_text(shown, encoding="utf-8")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell.format(f"{sys.executable} script.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LINES": str(lines), **dict(environment)},
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["", "latin-1"])
def test_text_is_utf_8_and_printing_escapes_what_a_locale_lacks(tmp_path, encoding):
    done = run(tmp_path, "{}", C_LOCALE | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "config.json").read_bytes().decode())
    assert found == {"data": {"folder": "Fußball/日本"}}
    lines = done.stdout.decode("latin-1").splitlines()
    assert lines[1].split() == ["0.50", "#" * 40, "1"]
    assert lines[-1] == (
        "\\u2713 größer \\u65e5\\u672c" if encoding else "\\u2713 gr\\xf6\\xdfer \\u65e5\\u672c"
    )


@pytest.mark.parametrize(
    "shell",
    [
        "{} 2>&1 | head -n 1",  # A pipe whose reader ends.
        "{} > /dev/full 2> /dev/full",  # A full disk.
        "{} >&- 2>&-",  # Never open, as under some schedulers.
    ],
)
def test_nobody_need_listen(tmp_path, shell):
    done = run(tmp_path, shell, lines=20_000)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_bytes() == b"whole"
    # No file got what was meant for stderr.
    assert json.loads((tmp_path / "run" / "config.json").read_bytes())
    assert not done.stderr


@pytest.mark.soak
def test_a_run_ends_in_a_locale_of_ascii_and_with_nobody_listening(tmp_path):
    command = [sys.executable, "-X", "warn_default_encoding", "-m", "morer1_jax.train"]
    command += ["--config=tests/configs/tiny.py", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.sft.steps=4", "--config.grpo.steps=2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **C_LOCALE, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 0, said
    assert (tmp_path / "run" / "report.html").exists()
    assert not [
        line for line in said.splitlines() if "EncodingWarning" in line and "morer1_jax" in line
    ]
