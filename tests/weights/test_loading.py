"""Tensors on meshes of eight devices: read whole by a process alone, in shares by several."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from morer1_jax import stores
from morer1_jax.errors import WeightsError
from morer1_jax.learn.state import abstract_params
from morer1_jax.model.config import Runtime
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.run import mesh as meshes
from morer1_jax.weights import loading, ranges
from morer1_jax.weights.loading import Target, own_runs
from morer1_jax.weights.names import from_hf
from morer1_jax.weights.published import INDEX, SINGLE, Checkpoint

pytestmark = pytest.mark.usefixtures("quick_compiles")

MESHES = (
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 8, "fsdp": 1, "tensor": 1},
    {"data": 1, "fsdp": 2, "tensor": 3},
)


def wanted(config, axes, dtype="float32"):
    mesh = meshes.make_mesh(axes, jax.local_devices()[: int(np.prod(list(axes.values())))])
    abstract = abstract_params(Qwen25VL(config, Runtime(param_dtype=dtype)))
    return meshes.like(abstract, meshes.param_shardings(mesh, abstract))


def tensors_of(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def shared(monkeypatch):
    """All tensors are read in shares, as if devices were other processes'."""
    monkeypatch.setattr(Target, "shared", property(lambda target: target.stored.size > 0))


def same(loaded, expected, like):
    def check(leaf, value, target):
        assert (leaf.sharding, leaf.dtype) == (target.sharding, target.dtype)
        for shard in leaf.addressable_shards:
            found = np.asarray(shard.data)
            part = np.ascontiguousarray(value[shard.index].astype(leaf.dtype))
            assert found.tobytes() == part.tobytes()

    jax.tree.map(check, loaded, expected, like)


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("tied", "saved", "dtype"),
    [
        ("untied", "float32", "float32"),
        pytest.param("untied", "float32", "bfloat16", marks=pytest.mark.soak),
        pytest.param("untied", "bfloat16", "float32", marks=pytest.mark.soak),
        pytest.param("untied", "float16", "bfloat16", marks=pytest.mark.soak),
        ("tied", "bfloat16", "bfloat16"),
    ],
)
def test_shares_make_the_same_parameters(published, shared, axes, tied, saved, dtype):
    case, folder = published(tied, saved)
    like = wanted(case.config, axes, dtype)
    same(Checkpoint(folder).load(like), from_hf(tensors_of(folder), case.config, saved), like)


def test_bits_are_moved_only(published, shared, tmp_path):
    """Of negative zeros and of numbers less than normal, which sums would change."""
    case, source = published()
    folder = shutil.copytree(source, tmp_path / "odd")
    tensors = load_file(folder / SINGLE)
    for value in tensors.values():
        value.reshape(-1)[::3] = -0.0
        value.reshape(-1)[1::3] = 1e-40
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    like = wanted(case.config, MESHES[0])
    same(Checkpoint(folder).load(like), from_hf(tensors, case.config), like)


@pytest.mark.parametrize("axes", MESHES[:3], ids=str)
@pytest.mark.parametrize("size", [5, 16, 8 * 999, 8 * 999 + 3])
def test_all_processes_read_every_value_once(axes, size):
    """Each as much as it has devices, whichever these are."""
    mesh = meshes.make_mesh(axes, jax.local_devices())
    devices = np.random.default_rng(size).permutation(jax.local_devices()).tolist()
    read = np.zeros(size, int)
    for number in range(4):
        runs = own_runs(size, mesh, devices[2 * number : 2 * number + 2])
        assert sum(stop - start for start, stop in runs) <= 2 * -(-size // 8)
        for start, stop in runs:
            assert 0 <= start < stop <= size
            read[start:stop] += 1
    assert (read == 1).all()
    neighbours = mesh.devices.flat[2:4]
    assert len(own_runs(8 * 999, mesh, list(neighbours))) == 1


class Alone:
    """A process of four that has two of the mesh's eight devices."""

    def __init__(self, number):
        self.number = number

    def runs(self, size, mesh, _):
        return own_runs(size, mesh, mesh.devices.flatten()[2 * self.number :][:2])


def test_a_process_reads_its_share_of_the_bytes(published, shared, bucket, monkeypatch):
    """A quarter of them, from a folder and from a bucket, and headers; none is read twice."""
    case, folder = published("untied", "bfloat16", "30KB")
    there = stores.absolute(f"{bucket}/published")
    stores.copy({there / path.name: path for path in folder.iterdir()})
    whole = sum(value.nbytes for value in tensors_of(folder).values())
    asked, read = [], stores.read_range

    def counted(path, start, end):
        asked.append((path.name, start, end))
        return read(path, start, end)

    monkeypatch.setattr(stores, "read_range", counted)
    # What devices of the other processes would have been given is left out.
    monkeypatch.setattr(loading, "put", lambda leaf, target, part, runs: np.zeros(()))
    like = wanted(case.config, MESHES[0], "bfloat16")
    for place in (folder, there):
        found = []
        for number in range(4):
            monkeypatch.setattr(loading, "own_runs", Alone(number).runs)
            checkpoint = Checkpoint(str(place))
            del asked[:]
            checkpoint.load(like)
            assert sum(end - start for _, start, end in asked) == pytest.approx(whole / 4, rel=0.03)
            found += asked
        assert len(found) == len(set(found))
        assert sum(end - start for _, start, end in found) == whole


def test_small_tensors_and_those_of_one_process_are_read_whole(published):
    case, folder = published()
    like = wanted(case.config, MESHES[0])
    checkpoint = Checkpoint(folder)
    for name, stored in checkpoint._stored.items():
        leaf_slice = checkpoint.slices[name]
        leaf = like
        for key in leaf_slice.path:
            leaf = leaf[key]
        target = Target(stored, leaf_slice, leaf)
        assert not target.shared
        assert target.part == ranges.Part.whole(stored)


def test_a_bucket_gives_the_parameters_and_the_digest_of_the_folder(published, bucket, capsys):
    case, folder = published("untied", "float32", "30KB")
    there = stores.absolute(f"{bucket}/same")
    stores.copy({there / path.name: path for path in folder.iterdir()})
    like = wanted(case.config, MESHES[0])
    ours, theirs = Checkpoint(folder), Checkpoint(f"{bucket}/same")
    assert ours.digest == theirs.digest
    capsys.readouterr()
    same(theirs.load(like), from_hf(tensors_of(folder), case.config), like)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.endswith("MB/s")]
    size = sum(value.nbytes for value in tensors_of(folder).values())
    assert line.startswith(f"load same: {size / 1e6:.1f} MB in ")


@pytest.mark.soak  # It mostly waits.
def test_a_bucket_that_often_fails_gives_all(published, served):
    case, folder = published("untied", "float32", "30KB")
    with served(faults=0.2) as root:
        there = stores.absolute(f"{root}/faults")
        stores.copy({there / path.name: path for path in folder.iterdir()})
        like = wanted(case.config, MESHES[1])
        loaded = Checkpoint(f"{root}/faults").load(like)
    same(loaded, from_hf(tensors_of(folder), case.config), like)


def test_a_bucket_that_fails_in_the_middle_is_named(published, bucket, monkeypatch):
    case, folder = published("untied", "float32", "30KB")
    there = stores.absolute(f"{bucket}/middle")
    stores.copy({there / path.name: path for path in folder.iterdir()})
    checkpoint = Checkpoint(f"{bucket}/middle")
    file = sorted(path.name for path in folder.glob("*.safetensors"))[2]
    stores.delete(there / file)
    with pytest.raises(WeightsError) as error:
        checkpoint.load(wanted(case.config, MESHES[0]))
    message = str(error.value)
    name = next(s.name for s in checkpoint._stored.values() if s.file == there / file)
    assert message.startswith(f"{there / file}: {name}: expected bytes ")
    assert message.endswith("; start again, or copy the file anew")
    assert "\n" not in message


@pytest.mark.parametrize("place", [5, -1])
def test_a_tied_heads_shares_are_compared(published, shared, tmp_path, place):
    case, source = published("tied")
    folder = shutil.copytree(source, tmp_path / "copy")
    like = wanted(case.config, MESHES[0])
    tensors = load_file(folder / SINGLE)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = tensors[name].copy()
    save_file(tensors, folder / SINGLE)
    Checkpoint(folder).load(like)
    tensors["lm_head.weight"].reshape(-1)[place] += 1
    save_file(tensors, folder / SINGLE)
    with pytest.raises(WeightsError, match=r"lm_head\.weight: expected model\.embed_tokens"):
        Checkpoint(folder).load(like)
    # Nor is it read where the embedding is not.
    Checkpoint(folder).load({"vision": like["vision"]})


def test_the_digest_is_that_of_earlier_versions(tmp_path, published):
    """Or runs would refuse the checkpoint that they began with."""
    _, source = published("untied", "float32", "30KB")
    folder = shutil.copytree(source, tmp_path / "copy")
    expected = hashlib.sha256()
    texts = [path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".jinja")]
    for path in sorted(texts):
        if path.name != INDEX:
            expected.update(path.name.encode() + path.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        expected.update(data[8 : 8 + length])
        entries = json.loads(data[8 : 8 + length])
        entries.pop("__metadata__", None)
        for name in sorted(entries):
            begin, end = (8 + length + offset for offset in entries[name]["data_offsets"])
            expected.update(data[begin : min(end, begin + 4096)])
    assert Checkpoint(folder).digest == expected.hexdigest()
