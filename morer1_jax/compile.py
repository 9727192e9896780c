"""Compiles the programs of a config for a TPU topology, and reads their costs off.

    python -m morer1_jax.compile --config=configs/qwen2_5_vl_3b_grpo.py --topology=v5e:4x4

It needs neither a TPU nor weights nor data, only TPUs' compiler (`pip install 'morer1-jax[tpu]'`).
Nothing is run: memory is what the compiler allots, times are estimates. Batches are the largest
that the config permits; training of the blind baselines, which is smaller, is left out. A topology
is a TPU's version and the chips along each axis: v5e:4x4, v6e:2x2, v5p:2x2x4. For GPUs, such as
h100:8, TPUs' compiler stands in: temporary memory is an estimate too, and times are not given. The
exit code is 1 where something does not fit or does not scale: too little memory stays free,
activations are summed or gathered over axes that split rows, weights are sent for every token, or
a chip computes far more than its share of the model's FLOPs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from morer1_jax.cli import run_main
from morer1_jax.config.settings import Settings, settings
from morer1_jax.cost.chips import Chip
from morer1_jax.cost.estimate import Estimate, Part, estimate
from morer1_jax.cost.topology import describe
from morer1_jax.errors import ConfigError
from morer1_jax.files import write_json
from morer1_jax.model.config import DEFAULT_IDS, ModelConfig
from morer1_jax.model.family import published_sizes
from morer1_jax.model.logprobs import CHUNKS
from morer1_jax.paths import local_path
from morer1_jax.rollout.sampler import ATTEMPTS
from morer1_jax.run import mesh as meshes
from morer1_jax.run.placed import Placed, place
from morer1_jax.run.trainee import embedding_rows
from morer1_jax.stages.ahead import in_threads
from morer1_jax.stages.programs import PlannedProgram, planned_programs
from morer1_jax.stages.table import stages_to_run
from morer1_jax.weights.folder import find_folder, read_json
from morer1_jax.weights.published import CONFIG

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, a Python file.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:4x4, v5p:2x2x4 or h100:8.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology.", 1)
_THREADS = flags.DEFINE_integer("threads", 1, "Programs to compile at once.", 1)
_PROGRAMS = flags.DEFINE_list("programs", [], "Names of programs; by default all.")
_JSON = flags.DEFINE_string("json", None, "A file for all figures.")
_HLO = flags.DEFINE_string("hlo", None, "A folder for each program's optimised HLO.")
_TOP = flags.DEFINE_integer("top", 0, "Source lines to list of each program, the costliest.", 0)

# The share of a chip's memory that must stay free: fragments, and what other programs leave.
_SPARE = 0.08


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program with its costs.

    Attributes:
        estimate: None: it does not compile.
        problem: why not.
        seconds: that compiling took.
    """

    planned: PlannedProgram
    estimate: Estimate | None
    problem: str
    seconds: float


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    out = None if _JSON.value is None else local_path(_JSON.value, "--json")
    hlo = None if _HLO.value is None else local_path(_HLO.value, "--hlo")
    run_settings = settings(_CONFIG.value)
    topology = describe(_TOPOLOGY.value, _SLICES.value)
    mesh, target = meshes.make_mesh(run_settings.mesh.axes, topology.devices), topology.chip
    sizes = model_sizes(run_settings)
    placed = place(
        sizes,
        run_settings.runtime,
        mesh,
        run_settings.tune,
        run_settings.mesh.sampling_tensor,
    )
    if any(stage.name == "grpo" for stage in stages_to_run(run_settings)):
        meshes.check_rows("grpo.prompts", run_settings.grpo.prompts, mesh)
    planned = planned_programs(run_settings, placed)
    if unknown := {*_PROGRAMS.value} - {program.name for program in planned}:
        raise ConfigError(
            f"--programs: expected some of {', '.join(p.name for p in planned)}, found "
            f"{', '.join(sorted(unknown))}"
        )
    print(_head(placed, target), flush=True)
    chosen = [p for p in planned if not _PROGRAMS.value or p.name in _PROGRAMS.value]
    calls = [functools.partial(compiled, program, target, hlo) for program in chosen]
    ready: dict[int, Compiled] = {}
    for number, result in in_threads(calls, _THREADS.value):
        ready[number] = result
        print("\n".join(_lines(result, mesh, target, _TOP.value)), flush=True)
    results = [ready[number] for number in range(len(chosen))]
    faults = [line for result in results for line in faults_of(result, mesh.size, target)]
    if out is not None:
        write_json(out, _figures(placed, target, results, faults))
    if faults:
        print("\n".join(f"fault: {line}" for line in faults), file=sys.stderr)
        sys.exit(1)


def model_sizes(run_settings: Settings) -> ModelConfig:
    """Returns the sizes of a config's model: of its checkpoint, or the config's own.

    A name of the published family is known; of another checkpoint its `config.json` is read.
    """
    path, own = run_settings.model.path, run_settings.model
    if path is None:
        rows = own.text.vocab_size or embedding_rows(run_settings.data.vocabulary)
        text = dataclasses.replace(own.text, vocab_size=rows)
        vision = dataclasses.replace(own.vision, out_hidden_size=text.hidden_size)
        return ModelConfig(text=text, vision=vision, **DEFAULT_IDS)
    if not Path(path).exists() and (sizes := published_sizes(path)) is not None:
        return sizes
    return ModelConfig.from_hf(read_json(find_folder(path, [CONFIG]) / CONFIG))


def compiled(planned: PlannedProgram, target: Chip, hlo: Path | None = None) -> Compiled:
    """Compiles a program and reads its costs off.

    Args:
        hlo: a folder for its optimised form.
    """
    before = time.perf_counter()
    try:
        executable = planned.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - before
        return Compiled(planned, None, _compile_problem(str(error)), seconds)
    seconds = time.perf_counter() - before
    if hlo is not None:
        hlo.mkdir(parents=True, exist_ok=True)
        (hlo / f"{planned.name.replace(' ', '_')}.txt").write_text(
            executable.as_text(), encoding="utf-8"
        )
    beside = {name: meshes.device_bytes(tree) for name, tree in planned.beside.items()}
    # Sampling's mesh has axes of its own over the same devices.
    mesh = jax.tree.leaves(planned.params)[0].sharding.mesh
    turns = {CHUNKS: planned.chunks, ATTEMPTS: 0}
    costs = estimate(executable, mesh, target, planned.params, beside, turns)
    return Compiled(planned, costs, "", seconds)


def _compile_problem(message: str) -> str:
    """Returns the line of the compiler's error that says most."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if "Used " in line), lines[0])


def faults_of(result: Compiled, devices: int, target: Chip) -> list[str]:
    """Returns what does not fit, or does not scale, in one line each."""
    planned, name = result.planned, result.planned.name
    if result.estimate is None:
        return [f"{name}: does not compile: {result.problem}"]
    lines, live = [], result.estimate.memory.live
    if live > (1 - _SPARE) * target.hbm:
        lines.append(
            f"{name}: expected {_SPARE:.0%} of {_size(target.hbm)} to stay free, found "
            f"{_size(live)} in use"
        )
    lines += [f"{name}: {line}" for line in result.estimate.once.faults(in_decode_loop=False)]
    repeated = result.estimate.once.repeated(target, planned.flops / devices)
    lines += [f"{name}: {line}" for line in repeated]
    for loop, part in zip(planned.loops, result.estimate.loops, strict=True):
        found = part.faults(in_decode_loop=True)
        found += part.repeated(target, loop.flops / devices)
        lines += [f"{name}, a token: {line}" for line in found]
    return lines


def _head(placed: Placed, target: Chip) -> str:
    mesh = placed.mesh
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    sampling = dict(placed.sampling_mesh.shape)["tensor"]
    times = "Times are estimates."
    if target.clock is None:
        times = "TPUs stand in for it: memory is an estimate, and times are not given."
    return (
        f"Compiled, not run: {mesh.size} × {target.name}, {axes}; sampling splits weights over "
        f"{sampling}.\n{times} A chip: {target.flops / 1e12:g} TFLOP/s, "
        f"{_size(target.hbm)} for programs at {target.hbm_bytes / 1e9:g} GB/s, links "
        f"{target.link_bytes / 1e9:g} GB/s, between slices {target.network_bytes / 1e9:g} GB/s."
    )


def _lines(result: Compiled, mesh: Mesh, target: Chip, top: int) -> Iterator[str]:
    """Yields a program's figures, by chip."""
    planned, costs = result.planned, result.estimate
    if costs is None:
        yield f"\n{planned.name}: does not compile ({result.seconds:.0f} s): {result.problem}"
        return
    memory = costs.memory
    parts = {"arguments": memory.arguments, "temporary": memory.temporary, **memory.beside}
    shown = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    free = 1 - memory.live / target.hbm
    yield f"\n{planned.name} (compiled in {result.seconds:.0f} s)"
    yield f"  memory   {_size(memory.live)} of {_size(target.hbm)}, {free:.0%} free: {shown}"
    yield from _part_lines(costs.once, planned.flops / mesh.size, memory.arguments, target, top)
    for loop, part in zip(planned.loops, costs.loops, strict=True):
        yield f"  a token of {loop.slots} samples, in a cache of {loop.cache}"
        yield from _part_lines(part, loop.flops / mesh.size, loop.reads, target, top)


def _part_lines(part: Part, flops: float, reads: float, target: Chip, top: int) -> Iterator[str]:
    seconds = part.seconds(target)
    if seconds is not None:
        mfu = f"; estimated MFU {flops / target.flops / seconds:.0%}" if flops else ""
        yield (
            f"  time     {_time(seconds)}: compute {_time(part.compute)}, sending "
            f"{_time(part.wire_seconds(target))}{mfu}"
        )
    again = f" (computed: {part.flops / flops:.2f} times as many)" if flops else ""
    yield (
        f"  bounds   FLOPs at peak {_time(flops / target.flops)}{again}, bytes of memory "
        f"{_time(reads / target.hbm_bytes)}, bytes sent {_time(part.wire_seconds(target))}"
    )
    for sent in part.sent:
        if sent.bytes >= 1e6:
            where = ", between slices" if sent.across_slices else ""
            yield (
                f"  sent     {_size(sent.bytes)} {sent.what} by {sent.kind} over "
                f"{' and '.join(sent.axes)}{where}"
            )
    for kernel in part.unknown_kernels:
        yield f"  not counted: kernel {kernel}"
    for line, seconds in part.places[:top]:
        yield f"  {_time(seconds):>9} {line}"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _figures(
    placed: Placed, target: Chip, results: list[Compiled], faults: list[str]
) -> dict[str, Any]:
    """Returns all figures, JSON-ready; bytes and seconds are of a chip."""
    programs = {}
    for result in results:
        planned, costs = result.planned, result.estimate
        programs[planned.name] = {
            "flops": planned.flops / placed.mesh.size,
            "loops": [dataclasses.asdict(loop) for loop in planned.loops],
            "compile_seconds": round(result.seconds, 1),
            "problem": result.problem,
            "estimate": None if costs is None else dataclasses.asdict(costs),
        }
    figures = {
        "config": config_flags.get_config_filename(flags.FLAGS["config"]),
        "changes": config_flags.get_override_values(flags.FLAGS["config"]),
        "topology": _TOPOLOGY.value,
        "slices": _SLICES.value,
        "chip": dataclasses.asdict(target),
        "mesh": dict(placed.mesh.shape),
        "sampling": dict(placed.sampling_mesh.shape),
        "programs": programs,
        "faults": faults,
    }
    return json.loads(json.dumps(figures))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    run_main(main)
