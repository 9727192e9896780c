"""A process of a run that does next to nothing; see `ACTIONS`. Started by the tests."""

import json
import os
import sys
import time

import jax
from absl import flags
from jax.experimental import multihost_utils

from morer1_jax.cli import run_main
from morer1_jax.errors import ConfigError
from morer1_jax.hosts import group
from morer1_jax.hosts.join import joined, undone
from morer1_jax.hosts.launch import find_place
from morer1_jax.hosts.stop import check_stop

COORDINATOR = flags.DEFINE_string("coordinator", None, "")
PROCESSES = flags.DEFINE_integer("processes", None, "")
PROCESS = flags.DEFINE_integer("process", None, "")
JOIN_SECONDS = flags.DEFINE_float("join_seconds", 30.0, "")
ACTION = flags.DEFINE_string("action", "talk", "")
CONFIG = flags.DEFINE_string("value", "same", "")
UNDO = flags.DEFINE_string("undo", None, "")


def talk():
    """Says everything once; prints what it heard."""
    made = []

    def make():
        made.append(group.index())
        return {"by": group.index()}

    heard = {
        "count": group.count(),
        "index": group.index(),
        "devices": jax.device_count(),
        "of_first": group.of_first("value", make),
        "made": made,
        "gather": group.gather("squares", group.index() ** 2),
        "unlike": group.unlike_first("parity", {"odd": group.index() % 2}),
        "to_first": group.to_first("cubes", group.index() ** 3),
        "long": len(group.of_first("long", lambda: "x" * 5_000_000)),
    }
    group.meet("here")
    print("only the first prints", flush=True)
    print(json.dumps(heard), file=sys.stderr, flush=True)


def wait_for_others():
    """Waits on the host for what never comes."""
    print("waits", file=sys.stderr, flush=True)
    group.of_first("never", lambda: time.sleep(1000))


def compute_with_others():
    """Computes with the others' devices for as long as they live."""
    number = 0
    while True:
        number += 1
        multihost_utils.process_allgather(jax.numpy.ones(1000) * number)
        if number == 3:
            print("computes", file=sys.stderr, flush=True)


def fail():
    time.sleep(1)
    raise ConfigError("config.key: expected 1, found 2; set it to 1")


def crash():
    time.sleep(1)
    raise ZeroDivisionError("a fault of the program")


def end_early():
    time.sleep(1)
    os._exit(0)


def stop_when_told():
    number = 0
    while True:
        number += 1
        check_stop()
        if number == 20:
            print("runs", file=sys.stderr, flush=True)
        time.sleep(0.01)


def save():
    """Saves the best parameters and a state at once, in the background, again and again."""
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from morer1_jax.run.checkpoint import Checkpointer

    mesh = Mesh(jax.devices(), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    make = jax.jit(lambda step: {"w": step + jnp.arange(1 << 16)}, out_shardings={"w": split})
    with Checkpointer(os.environ["FOLDER"], keep=2, background=True) as checkpoints:
        for step in range(1, 7):
            if step == 3 and "FAILS" in os.environ and not group.is_first():
                checkpoints.wait()
                import morer1_jax.run.checkpoint as module

                module.own_digests = lambda folder: 1 / 0
            state = make(step)
            checkpoints.save_best(step, state, float(step))
            checkpoints.save(step, state)
    restored = Checkpointer(os.environ["FOLDER"]).restore_newest(
        {"w": jax.ShapeDtypeStruct((1 << 16,), jnp.int32, sharding=split)}
    )
    shard = restored[1]["w"].addressable_shards[0]
    assert shard.data[0] == 6 + (shard.index[0].start or 0)
    print(f"restored {restored[0]}", file=sys.stderr)


def load():
    """Loads a checkpoint (PLACE) in shares, and compares it with its files (FOLDER)."""
    from pathlib import Path

    import numpy as np
    from safetensors.numpy import load_file

    from morer1_jax import stores
    from morer1_jax.learn.state import abstract_params
    from morer1_jax.model.config import Runtime
    from morer1_jax.model.vlm import Qwen25VL
    from morer1_jax.run import mesh as meshes
    from morer1_jax.weights import loading
    from morer1_jax.weights.names import from_hf
    from morer1_jax.weights.published import Checkpoint

    loading._SMALL = 256  # Of so small a model some tensors are in shares, some are not.
    checkpoint = Checkpoint(os.environ["PLACE"])
    mesh = meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": -1})
    if "ALTERNATE" in os.environ:  # No process has two devices beside each other.
        of_process: dict[int, list[jax.Device]] = {}
        for device in jax.devices():
            of_process.setdefault(device.process_index, []).append(device)
        devices = [device for row in zip(*of_process.values(), strict=True) for device in row]
        assert devices[0].process_index != devices[1].process_index
        mesh = jax.sharding.Mesh(np.reshape(devices, mesh.devices.shape), mesh.axis_names)
    abstract = abstract_params(Qwen25VL(checkpoint.config, Runtime()))
    like = meshes.like(abstract, meshes.param_shardings(mesh, abstract))
    checkpoint.digest  # noqa: B018  It is read now, and of so small tensors it is half of all.
    read, sizes = stores.read_range, []

    def counted(path, start, end):
        sizes.append(end - start)
        return read(path, start, end)

    stores.read_range = counted
    loaded = checkpoint.load(like)
    files = sorted(Path(os.environ["FOLDER"]).glob("*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}

    def check(leaf, value, target):
        assert leaf.sharding == target.sharding
        for shard in leaf.addressable_shards:
            expected = np.ascontiguousarray(value[shard.index])
            assert np.asarray(shard.data).tobytes() == expected.tobytes()

    jax.tree.map(check, loaded, from_hf(tensors, checkpoint.config), like)
    whole = sum(value.nbytes for value in tensors.values())
    print(json.dumps({"read": sum(sizes), "whole": whole}), file=sys.stderr)


ACTIONS = (
    load,
    talk,
    wait_for_others,
    compute_with_others,
    fail,
    crash,
    end_early,
    stop_when_told,
    save,
)


def main(argv):
    place = find_place(COORDINATOR.value, PROCESSES.value, PROCESS.value, JOIN_SECONDS.value)
    with joined(place, {"config.key": CONFIG.value}):
        action = next(action for action in ACTIONS if action.__name__ == ACTION.value)
        if UNDO.value is None:
            action()
            return
        with undone(lambda: os.remove(UNDO.value)):
            action()


if __name__ == "__main__":
    run_main(main)
