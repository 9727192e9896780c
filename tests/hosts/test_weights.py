"""A checkpoint read by several processes: from a folder and a bucket, whole and damaged."""

import json
import shutil

import jax
import numpy as np
import pytest
from processes import MEMBER, environment, flags, free_port, start, wait
from safetensors.numpy import load_file, save_file

from morer1_jax import stores
from morer1_jax.model.config import Runtime
from morer1_jax.model.vlm import Qwen25VL, init_params
from morer1_jax.weights.published import CONFIG, INDEX, SINGLE, save_tensors

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "model"
    folder.mkdir()
    params = jax.jit(lambda key: init_params(Qwen25VL(tiny.CONFIG, Runtime()), key))(
        jax.random.key(0)
    )
    save_tensors(folder, params, tiny.CONFIG, dtype="float32", shard_bytes=8000)
    (folder / CONFIG).write_text(json.dumps(tiny.CONFIG.to_hf()))
    return folder


def processes(count, place, folder):
    port = free_port()
    return [
        start(
            [MEMBER, *flags(number, count, port), "--action=load"],
            env=environment(4 // count, PLACE=str(place), FOLDER=str(folder)),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "faults"),
    [(2, 0.0), pytest.param(4, 0.2, marks=pytest.mark.soak)],
)
def test_each_process_reads_its_share_from_a_bucket(folder, served, count, faults, monkeypatch):
    if count == 2:
        monkeypatch.setenv("ALTERNATE", "1")
    with served(faults) as root:
        there = stores.absolute(f"{root}/model")
        stores.copy({there / path.name: path for path in folder.iterdir()})
        ended = wait(processes(count, there, folder), 180)
    assert [one.code for one in ended] == [0] * count, [one.err[-3000:] for one in ended]
    said = [one.err.splitlines() for one in ended]
    for lines in said:
        found = json.loads(next(line for line in lines if line.startswith('{"read"')))
        assert found["read"] == pytest.approx(found["whole"] / count, rel=0.25)
        assert found["read"] < 0.7 * found["whole"]
    # The first tells how fast it read.
    speeds = [[line for line in lines if line.endswith(" MB/s")] for lines in said]
    assert [len(lines) for lines in speeds] == [1] + [0] * (count - 1)
    assert speeds[0][0].startswith("load model: ")
    assert " MB of " in speeds[0][0]


@pytest.mark.parametrize("change", ["value", "files"])
def test_processes_with_other_files_are_told_apart(folder, tmp_path, change):
    """Each reads a share: of other values, or of another order of tensors, they would mix."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    files = sorted(copy.glob("*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    if change == "value":
        first = load_file(files[0])
        next(iter(first.values())).reshape(-1)[0] += 1
        save_file(first, files[0])
    else:
        for file in [*files, copy / INDEX]:
            file.unlink()
        save_file(tensors, copy / SINGLE)
    port = free_port()
    ended = wait(
        [
            start(
                [MEMBER, *flags(number, 2, port), "--action=load"],
                env=environment(2, PLACE=str(place), FOLDER=str(folder)),
            )
            for number, place in enumerate((folder, copy))
        ]
    )
    assert [one.code for one in ended] == [2, 2], [one.err[-3000:] for one in ended]
    for one in ended:
        assert "in the same files, on every process, found others on process 1; copy " in one.err


def test_what_one_process_finds_ends_all(folder, tmp_path):
    """The last value of the embedding, which the last process alone reads."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    name = "model.embed_tokens.weight"
    file = copy / json.loads((copy / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].reshape(-1)[-1] = np.nan
    save_file(tensors, file)
    ended = wait(processes(2, copy, folder))
    assert [one.code for one in ended] == [2, 2], [one.err[-3000:] for one in ended]
    size = tensors[name].size
    line = f"{file}: {name}: expected finite values, found 1 of {size // 2} that are not; "
    for one in ended:
        assert line in one.err
        assert "Traceback" not in one.err
