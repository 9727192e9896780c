"""Records digests of what a checkout computes, for changes that are meant to change nothing.

python tools/fingerprint.py --checkout=. --out=before.json
python tools/fingerprint.py --checkout=. --out=after.json --compare=before.json

Runs the tests' tiny config through all stages, and the demo for a few steps, each in a process of
its own on one device. Written are digests of the parameters after each stage, of every array that
goes to the device, of completions, scores, logged metrics (but times) and of an exported folder.
The bits are those of one machine and one set of packages: compare checkouts on the same ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morer1_jax.cli import ArgumentParser, run_main
from morer1_jax.errors import ConfigError
from morer1_jax.files import check_writable, read_json, read_jsonl, write_json
from morer1_jax.paths import local_path
from morer1_jax.processes import check_alone

# Runs a command in a process that keeps digests of the arrays it puts on devices.
_WATCHED = """
import hashlib, json, runpy, sys
import jax, numpy as np

digests, put = [], jax.make_array_from_process_local_data

def watched(sharding, array, *more, **named):
    array = np.ascontiguousarray(array)
    head = f"{array.dtype} {array.shape} ".encode()
    digests.append(hashlib.sha256(head + array.tobytes()).hexdigest()[:16])
    return put(sharding, array, *more, **named)

jax.make_array_from_process_local_data = watched
out, module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code:
        raise
with open(out, "w", encoding="utf-8") as file:
    json.dump(digests, file)
"""
# Every stage of the tests' config; what follows the clock is told how long to train.
_TINY = (
    "--config=tests/configs/tiny.py",
    "--config.stages=synthesise,sft,baselines,rate,grpo,control,evaluate",
    "--config.control.steps=3",
)
# The demo's model and batches, on fewer facts.
_DEMO = (
    "--config=configs/demo.py",
    "--config.stages=synthesise,sft,rate,grpo,evaluate",
    "--config.world.train=300",
    "--config.world.valid=32",
    "--config.world.test=32",
    "--config.rate.samples=1",
    "--config.sft.steps=20",
    "--config.sft.eval_every=20",
    "--config.grpo.steps=3",
    "--config.grpo.eval_every=3",
    "--config.sft.log_every=1",
    "--config.grpo.log_every=1",
    "--config.grpo.rollouts_every=1",
    "--config.grpo.mix.start=0.0",
    "--config.grpo.mix.end=0.0",
)
# Keys of the log that are of time, or of where the run was.
_TIMES = ("time", "step_time", "throughput", "mfu", "seconds", "wall")


def fingerprint(checkout: Path, folder: Path) -> dict[str, str]:
    """Runs a checkout's code and returns digests by name.

    Args:
      checkout: a clone of this repository, at any commit.
      folder: where the runs write; empty.

    Raises:
      ConfigError: a command of the checkout fails.
    """
    digests = {}
    for name, overrides in (("tiny", _TINY), ("demo", _DEMO)):
        workdir = folder / name
        arrays = folder / f"{name}.arrays.json"
        _run(
            checkout,
            *("-c", _WATCHED, str(arrays), "morer1_jax.train"),
            *(f"--workdir={workdir}", *overrides),
        )
        put = json.loads(arrays.read_text(encoding="utf-8"))
        found = {
            "arrays on the device, the first 200": _of(*put[:200]),
            f"arrays on the device, all {len(put)}": _of(*put),
            **parameters(workdir),
            **texts(workdir),
        }
        out = folder / f"{name}-exported"
        _run(checkout, "tools/convert.py", f"--checkpoint={workdir}", f"--out={out}")
        found |= {f"exported/{path.name}": _of_file(path) for path in sorted(out.iterdir())}
        digests |= {f"{name}: {key}": value for key, value in found.items()}
    return digests


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Names whose digests differ, or that only one of the two has."""
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )


def _run(checkout: Path, *arguments: str) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve()),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        shown = " ".join(a for a in arguments if "\n" not in a)
        raise ConfigError(
            f"{checkout}: {shown} ended with {done.returncode}: {done.stderr[-2000:]}"
        )


def parameters(workdir: Path) -> dict[str, str]:
    """Digests of every checkpoint that orbax wrote below a folder, by stage and kind."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found = {}
    for path in sorted(workdir.rglob("_METADATA")):
        place = path.parent.relative_to(workdir)
        stage = "/".join(place.parts[: place.parts.index("checkpoints")])
        step = next(int("".join(filter(str.isdigit, p))) for p in place.parts if p[-1:].isdigit())
        kind = "best" if "best" in place.parts else "state"
        tree = ocp.PyTreeCheckpointer().restore(path.parent.resolve())
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        parts = []
        for where, leaf in sorted(leaves, key=lambda pair: jax.tree_util.keystr(pair[0])):
            array = np.ascontiguousarray(leaf)
            name = jax.tree_util.keystr(where)
            parts.append(f"{name} {array.dtype} {array.shape} {_of(array.tobytes())}")
        found[f"{stage}, {kind} of step {step}"] = _of(*parts)
    return found


def texts(workdir: Path) -> dict[str, str]:
    """Digests of completions, answers, scores, ratings and metrics."""
    found = {}
    for path in sorted(workdir.rglob("*.json*")):
        place = path.relative_to(workdir)
        if place.parts[0] in ("eval", "rate", "data") and path.name != "DONE.json":
            found[str(place)] = _of_file(path)
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        records = read_jsonl(workdir / name, lambda _, record: record, "a record", "run it again")
        kept = [
            {k: v for k, v in one.items() if k.split("/")[0] not in _TIMES and k != "compilations"}
            for one in records
        ]
        found[name] = _of(json.dumps(kept, sort_keys=True))
    return found


def _of(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _of_file(path: Path) -> str:
    return _of(path.read_bytes())


def main(_: list[str]) -> None:
    """The command line's entry."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkout", type=Path, default=Path())
    parser.add_argument("--out", required=True)
    parser.add_argument("--compare", type=Path)
    given = parser.parse_args(sys.argv[1:])
    check_alone(devices=False)  # each run's process takes them
    out = local_path(given.out, "--out")
    check_writable(out)
    before: dict[str, Any] | None = None
    if given.compare is not None:
        before = read_json(given.compare, "record it anew")
    with tempfile.TemporaryDirectory() as folder:
        found = fingerprint(given.checkout, Path(folder))
    write_json(out, found)
    print(f"{len(found)} digests: {out}")
    if before is not None:
        changed = differences(before, found)
        print("\n".join(f"differs: {name}" for name in changed) or "no digest differs")
        if changed:
            sys.exit(1)


if __name__ == "__main__":
    run_main(main, sys.argv[:1])
