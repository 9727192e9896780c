"""Records digests of what a checkout computes, to check that a change alters no number.

python tools/fingerprint.py --checkout=. --out=before.json
python tools/fingerprint.py --checkout=. --out=after.json --compare=before.json

Runs the tests' tiny config through all stages, and the demo for a few steps, each in a process of
its own on one device. Records digests of the parameters after each stage, of every array that goes
to the device, of completions, scores, logged metrics (except times) and of an exported folder.
Digests depend on the machine and on its packages: compare checkouts on the same ones.
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
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import local_path

# Runs a command in a process that keeps digests of the arrays it puts on devices.
_WATCHED = """
import hashlib, json, runpy, sys
import jax, numpy as np

digests, put = [], jax.make_array_from_process_local_data

def watched(sharding, array, *args, **kwargs):
    array = np.ascontiguousarray(array)
    head = f"{array.dtype} {array.shape} ".encode()
    digests.append(hashlib.sha256(head + array.tobytes()).hexdigest()[:16])
    return put(sharding, array, *args, **kwargs)

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
# Every stage of the tests' config; `control` would otherwise take its length from the clock.
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
# First parts of the log's keys that depend on the clock.
_TIMES = ("time", "step_time", "throughput", "mfu", "seconds", "wall")


def fingerprint(checkout: Path, folder: Path) -> dict[str, str]:
    """Runs a checkout's code and returns digests by name.

    Args:
        checkout: a clone of this repository, at any commit.
        folder: an empty folder for the runs to write to.

    Raises:
        ConfigError: a command of the checkout failed.
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
        array_digests = json.loads(arrays.read_text(encoding="utf-8"))
        run_digests = {
            "arrays on the device, the first 200": _digest(*array_digests[:200]),
            f"arrays on the device, all {len(array_digests)}": _digest(*array_digests),
            **parameters(workdir),
            **texts(workdir),
        }
        out = folder / f"{name}-exported"
        _run(checkout, "tools/convert.py", f"--checkpoint={workdir}", f"--out={out}")
        run_digests |= {
            f"exported/{path.name}": _file_digest(path) for path in sorted(out.iterdir())
        }
        digests |= {f"{name}: {key}": value for key, value in run_digests.items()}
    return digests


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Returns the names whose digests differ, or that only one of the two has."""
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
    process = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if process.returncode:
        command_line = " ".join(a for a in arguments if "\n" not in a)
        raise ConfigError(
            f"{checkout}: {command_line}: expected exit code 0, found {process.returncode}; "
            f"correct the error that it printed: {process.stderr[-2000:]}"
        )


def parameters(workdir: Path) -> dict[str, str]:
    """Returns a digest of every checkpoint below a workdir, by stage, kind and step."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    digests = {}
    for path in sorted(workdir.rglob("_METADATA")):
        place = path.parent.relative_to(workdir)
        stage = "/".join(place.parts[: place.parts.index("checkpoints")])
        step = next(int("".join(filter(str.isdigit, p))) for p in place.parts if p[-1:].isdigit())
        kind = "best" if "best" in place.parts else "state"
        tree = ocp.PyTreeCheckpointer().restore(path.parent.resolve())
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        parts = []
        for key, leaf in sorted(leaves, key=lambda pair: jax.tree_util.keystr(pair[0])):
            array = np.ascontiguousarray(leaf)
            name = jax.tree_util.keystr(key)
            parts.append(f"{name} {array.dtype} {array.shape} {_digest(array.tobytes())}")
        digests[f"{stage}, {kind} of step {step}"] = _digest(*parts)
    return digests


def texts(workdir: Path) -> dict[str, str]:
    """Returns digests of completions, answers, scores, ratings and metrics, by file."""
    digests = {}
    for path in sorted(workdir.rglob("*.json*")):
        place = path.relative_to(workdir)
        if place.parts[0] in ("eval", "rate", "data") and path.name != "DONE.json":
            digests[str(place)] = _file_digest(path)
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        records = read_jsonl(workdir / name, lambda _, record: record, "a record", "run it again")
        kept = [
            {
                k: v
                for k, v in record.items()
                if k.split("/")[0] not in _TIMES and k != "compilations"
            }
            for record in records
        ]
        digests[name] = _digest(json.dumps(kept, sort_keys=True))
    return digests


def _digest(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _file_digest(path: Path) -> str:
    return _digest(path.read_bytes())


def main(_: list[str]) -> None:
    """Runs the command line."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--checkout", type=Path, default=Path(), help="clone whose code is run (default: here)")
    add("--out", required=True, help="file to write the digests to")
    add("--compare", type=Path, help="file of digests to compare with; exit code 1 if any differs")
    arguments = parser.parse_args(sys.argv[1:])
    check_alone(devices=False)  # each run's process takes them
    out = local_path(arguments.out, "--out")
    check_writable(out)
    before: dict[str, Any] | None = None
    if arguments.compare is not None:
        before = read_json(arguments.compare, "record it anew")
    with tempfile.TemporaryDirectory() as folder:
        digests = fingerprint(arguments.checkout, Path(folder))
    write_json(out, digests)
    print(f"{len(digests)} digests: {out}")
    if before is not None:
        changed = differences(before, digests)
        print("\n".join(f"differs: {name}" for name in changed) or "no digest differs")
        if changed:
            sys.exit(1)


if __name__ == "__main__":
    run_main(main, sys.argv[:1])
