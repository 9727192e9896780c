"""Runs a step of SFT, an update of GRPO, a rollout and greedy answers of a tiny model.

As one process of a run, on all its devices; the first writes the results as NumPy arrays:

    programs.py --mesh=2,2,2 --order=3 --out=… [--coordinator=… --processes=… --process=…]

`order` is the seed of the devices' order on the mesh; 0 leaves them in theirs.
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags

from morer1_jax.cli import run_main
from morer1_jax.hosts import group
from morer1_jax.hosts.join import joined
from morer1_jax.hosts.launch import find_place

COORDINATOR = flags.DEFINE_string("coordinator", None, "")
PROCESSES = flags.DEFINE_integer("processes", None, "")
PROCESS = flags.DEFINE_integer("process", None, "")
MESH = flags.DEFINE_list("mesh", ["2", "2", "2"], "")
ORDER = flags.DEFINE_integer("order", 0, "")
OUT = flags.DEFINE_string("out", None, "")


def results():
    """What the programs give, whole, by name; each process has prepared its own rows."""
    # Not before the processes are joined: these make arrays.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import jax
    import test_meshes as meshes
    import tiny
    from jax.sharding import AxisType, Mesh

    from morer1_jax.learn.grpo import GroupBatch, token_weights
    from morer1_jax.model.config import Runtime
    from morer1_jax.run.batch_sampler import sampler_program
    from morer1_jax.run.mesh import fetch, path_name, this_host
    from morer1_jax.run.placed import place
    from morer1_jax.stages.sft import sft_program

    devices = np.array(jax.devices())
    if ORDER.value:
        devices = np.random.default_rng(ORDER.value).permutation(devices)
    shape = [int(size) for size in MESH.value]
    mesh = Mesh(devices.reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    placed = place(tiny.CONFIG, Runtime(), mesh)
    host = this_host(mesh)

    def put(batch):
        return placed.put(jax.tree.map(lambda x: np.asarray(host.rows(x)), batch))

    def whole(x):
        return tiny.place(x, jax.tree.map(lambda _: placed.replicated, x))

    def smaller(path, x):
        return np.asarray(x if path[-1].key in ("scale", "embedding") else 0.6 * x)

    params = jax.tree_util.tree_map_with_path(smaller, tiny.params())
    others = whole((tiny.GRAMMAR, tiny.ALLOWED))
    out = {}

    def keep(name, tree):
        for path, leaf in jax.tree_util.tree_leaves_with_path(fetch(tree)):
            out[f"{name}/{path_name(path)}"] = np.asarray(leaf)

    # A step of SFT; its optimizer's trace is the gradient.
    step = sft_program(placed, meshes.OPTIMIZER, 1, meshes.SCORE.chunk)
    state, metrics = step(meshes.state_on(tiny, placed, params), {}, put(meshes.sixteen_rows(tiny)))
    keep("sft", (state.params, state.opt_state, metrics))
    # An update of GRPO on given completions.
    programs = meshes.programs_on(tiny, placed)
    tokens, mask, ended = (np.concatenate([x, x[::-1]]) for x in tiny.completions())
    rng = np.random.default_rng(2)
    logprobs = -rng.random((3, *mask.shape)).astype(np.float32)
    batch = GroupBatch(
        prompts=meshes.sixteen_prompts(tiny),
        tokens=tokens,
        mask=mask,
        weights=np.asarray(token_weights(mask, ended, meshes.SETTINGS.loss)),
        advantages=rng.standard_normal(mask.shape[:2]).astype(np.float32),
        sampler=logprobs[0],
        old=logprobs[1],
        reference=logprobs[2],
    )
    state, metrics = programs.update(
        meshes.state_on(tiny, placed, params), {}, put(batch), others[1]
    )
    keep("grpo", (state.params, state.opt_state, metrics))
    # A rollout and greedy answers.
    greedy = sampler_program(placed, tiny.sample_config(group=1, temperature=0.0), meshes.SEED)
    prompts = put(tiny.prompts())
    params = tiny.place(tiny.params(), placed.param_shardings)
    encoded, ready = placed.encode(params, prompts), placed.sampling.params(params)
    keep("rollout", programs.rollout(ready, encoded, *others, np.int32(meshes.STEP)))
    keep("greedy", greedy(ready, encoded, *others))
    # Which rows each process prepared.
    of_each = group.gather("parts", list(host.parts))
    return out | {"parts": np.array(sorted(part for parts in of_each for part in parts))}


def main(argv):
    place = find_place(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    with joined(place, {}):
        found = results()
        if group.is_first():
            np.savez(OUT.value, **found)


if __name__ == "__main__":
    run_main(main)
