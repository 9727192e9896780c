"""What a checkout computes is told apart by its digests, and only by what is no time."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

import fingerprint


def test_parameters_are_told_apart_by_a_bit(small_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(small_run, workdir)
    before = fingerprint.parameters(workdir)
    assert before.keys() == {"sft, best of step 3"}  # The state went when the stage ended.
    assert fingerprint.parameters(small_run) == before
    (path,) = (workdir / "sft" / "checkpoints" / "best").rglob("_METADATA")
    checkpointer = ocp.PyTreeCheckpointer()
    tree = jax.tree.map(np.array, checkpointer.restore(path.parent))
    jax.tree.leaves(tree)[0].view(np.uint32).flat[0] ^= 1
    shutil.rmtree(path.parent)
    checkpointer.save(path.parent, tree)
    assert fingerprint.differences(before, fingerprint.parameters(workdir)) == [
        "sft, best of step 3"
    ]


def test_times_are_in_no_digest(tmp_path):
    def digests(name, loss, seconds):
        workdir = tmp_path / name
        (workdir / "eval").mkdir(parents=True)
        (workdir / "eval" / "sft.json").write_text("{}")
        (workdir / "rollouts.jsonl").write_text(json.dumps({"step": 1}) + "\n")
        record = {"loss": loss, "step_time": seconds, "time/update": seconds, "compilations": 1}
        (workdir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return fingerprint.texts(workdir)

    first = digests("a", 0.5, 1.0)
    assert first.keys() == {"eval/sft.json", "rollouts.jsonl", "metrics.jsonl"}
    assert fingerprint.differences(first, digests("b", 0.5, 2.0)) == []
    assert fingerprint.differences(first, digests("c", 0.25, 1.0)) == ["metrics.jsonl"]
    assert fingerprint.differences(first, {}) == sorted(first)
