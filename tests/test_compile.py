"""The command that compiles a config's programs for a TPU topology, without a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from morer1_jax.config.topologies import PRESETS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "configs" / "tiny.py"
# The 3B's widths, with few layers.
WIDE = """
from morer1_jax.config.settings import default_config

def get_config():
    config = default_config()
    config.model.text.num_hidden_layers = 2
    config.model.vision.update(depth=2, fullatt_block_indexes=(1,))
    config.data.update(prompt_length=768, completion_length=256, windows=16)
    config.sft.batch = 16
    return config
"""


@pytest.fixture
def run(tmp_path):
    """`run(*flags, before="")`: exit code, what is printed, and the figures, if any.

    `before` is Python that runs first in the command's process.
    """
    pytest.importorskip("libtpu")

    def run(*flags, before=""):
        # As a user's process: with all optimisations, and no devices but the topology's.
        names = ("XLA_", "JAX_", "TPU_", "LIBTPU_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
        environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
        run_module = "import runpy; runpy.run_module('morer1_jax.compile', run_name='__main__')"
        code = f"{before}\n{run_module}"
        out = tmp_path / "figures.json"
        done = subprocess.run(
            [sys.executable, "-c", code, *flags, f"--json={out}"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        figures = json.loads(out.read_text()) if out.exists() else None
        return done.returncode, done.stdout, done.stderr, figures

    return run


def test_programs_of_a_small_config(run, tmp_path):
    code, printed, errors, figures = run(
        f"--config={TINY}",
        "--topology=v5e:2x2",
        "--config.stages=sft,rate,grpo,evaluate",
        "--config.grpo.prompts=4",
        "--config.mesh.fsdp=2",
        "--config.mesh.data=2",
        "--programs=score,move to the sampler",
        "--top=2",
        f"--hlo={tmp_path / 'hlo'}",
    )
    assert code == 0, errors
    assert "Compiled, not run: 4 × TPU v5e, data 2 × fsdp 2 × tensor 1" in printed
    assert list(figures["programs"]) == ["move to the sampler", "score"]
    written = {file.name: file.read_text() for file in (tmp_path / "hlo").iterdir()}
    assert written.keys() == {"move_to_the_sampler.txt", "score.txt"}
    assert all("HloModule" in text for text in written.values())
    assert figures["config"] == str(TINY)
    assert figures["changes"]["grpo.prompts"] == 4
    assert figures["faults"] == []
    score = figures["programs"]["score"]["estimate"]
    # The reference in float32, half of each matrix, and what else the score takes.
    assert score["memory"]["beside"].keys() == {"optimizer", "parameters", "next batch", "rollout"}
    assert 0 < score["once"]["compute"] < 0.1
    assert score["once"]["places"][0][0].startswith(("model/", "the compiler"))
    assert len([line for line in printed.splitlines() if "model/" in line]) == 2
    # Each device gets the other's half of every matrix; the mesh's axis `data` holds copies.
    moved = figures["programs"]["move to the sampler"]["estimate"]["once"]["sent"]
    assert {(sent["kind"], *sent["axes"]) for sent in moved} == {("all-gather", "fsdp")}


def test_programs_that_sample_are_read_by_samplings_own_axes(run):
    """Activations are summed over its heads, which lie on devices of training's rows."""
    code, _, errors, figures = run(
        f"--config={TINY}",
        "--topology=v5e:2x2",
        "--config.stages=evaluate",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=4",
        "--config.mesh.sampling_tensor=2",
        "--programs=greedy answers",
    )
    assert code == 0, errors
    assert figures["sampling"] == {"data": 2, "tensor": 2}
    sent = figures["programs"]["greedy answers"]["estimate"]["once"]["sent"]
    assert {tuple(one["axes"]) for one in sent} == {("tensor",)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e:3x5"], "--topology=v5e:3x5: expected a version and chips"),
        (
            ["--topology=v5e:2x2", "--config.mesh.fsdp=3"],
            "mesh.data: expected a multiple of fsdp 3",
        ),
        (
            ["--topology=v5e:2x2", "--config.stages=grpo", "--config.grpo.prompts=6"],
            "config.grpo.prompts: expected a multiple of mesh.data × mesh.fsdp = 4, found 6; use 8",
        ),
    ],
)
def test_errors_are_one_line(run, flags, message):
    code, _, errors, figures = run(f"--config={TINY}", "--config.stages=sft", *flags)
    assert (code, figures) == (2, None)
    assert message in errors.splitlines()[-1]


@pytest.mark.soak
def test_between_slices_only_gradients_are_summed_and_once(run):
    """Also with several micro-batches."""
    sizes = []
    for micro_batches in (1, 2):
        code, printed, errors, figures = run(
            f"--config={TINY}",
            "--topology=v5e:2x2",
            "--slices=2",
            "--config.stages=sft",
            "--config.sft.batch=16",
            f"--config.sft.micro_batches={micro_batches}",
            "--config.mesh.data=2",
            "--config.mesh.fsdp=4",
            "--programs=SFT step",
        )
        assert code == 0, errors
        assert "8 × TPU v5e, data 2 × fsdp 4" in printed
        sent = figures["programs"]["SFT step"]["estimate"]["once"]["sent"]
        across = [one for one in sent if one["across_slices"]]
        assert across
        large = [one for one in across if one["bytes"] > 1000]
        assert all(one["axes"] == ["data"] and one["summed"] for one in large)
        within = [one["axes"] for one in sent if not one["across_slices"]]
        assert ["fsdp"] in within
        assert all("data" not in axes for axes in within)
        sizes.append(sum(one["bytes"] for one in across))
    whole, in_parts = sizes
    # Parts have sums of their own over a slice, before these are added up once.
    assert in_parts <= 1.05 * whole


# What breaks the layout of activations, and what becomes of it: split by features, so that every
# product has to be summed; split as the compiler likes.
_BREAKAGES = {
    "features": (
        """
def rows(self, x, heads=None, axis=0):
    if self.mesh is None or heads is not None or x.ndim < 3:
        return x
    return self._constrained(x, P(*(None,) * (x.ndim - 1), 'fsdp'))
Layout.rows = rows
Layout.gathered = lambda self, path, kernel: kernel
""",
        "summed",
    ),
    "nothing": (
        """
Layout.rows = lambda self, x, heads=None, axis=0: x
Layout.gathered = lambda self, path, kernel: kernel
Layout.summed = lambda self, path, shape, own, arrays, heads, turned=0: own(*arrays)
""",
        "gathered",
    ),
}


@pytest.fixture
def wide(tmp_path):
    """Flags of the command that compiles a step with the 3B's widths."""
    config = tmp_path / "wide.py"
    config.write_text(WIDE)
    return f"--config={config}", "--topology=v5e:4x4", "--programs=SFT step"


@pytest.mark.soak
def test_a_step_that_scales(run, wide):
    code, _, errors, figures = run(*wide)
    assert (code, figures["faults"]) == (0, []), errors


@pytest.mark.soak
@pytest.mark.parametrize("name", _BREAKAGES)
def test_a_step_that_does_not_scale_is_a_fault(run, wide, name):
    breakage, says = _BREAKAGES[name]
    imports = "from jax.sharding import PartitionSpec as P\n"
    imports += "from morer1_jax.model.sharding import Layout\n"
    code, _, errors, figures = run(*wide, before=imports + breakage)
    assert code == 1
    text = f"activations are {says} over axes that split rows"
    assert any(text in fault for fault in figures["faults"])
    assert f"fault: SFT step: {text}" in errors


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize(
    ("model", "topology"), [(model, topology) for model in PRESETS for topology in PRESETS[model]]
)
def test_published_sizes_fit_their_topologies(run, model, topology, stage):
    """Some minutes for each program, of up to seven."""
    config = ROOT / "configs" / f"qwen2_5_vl_{model}_{stage}.py"
    code, printed, errors, figures = run(f"--config={config}:{topology}", f"--topology={topology}")
    assert (code, figures["faults"]) == (0, []), errors
    assert figures["programs"].keys() >= {"sft": {"SFT step"}, "grpo": {"rollout", "update"}}[stage]
    print(printed)
