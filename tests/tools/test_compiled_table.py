"""The table of what compiled programs need."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import compiled_table

CHIP = {"hbm": 16e9, "flops": 200e12, "link_bytes": 100e9, "network_bytes": 10e9}


def figures(programs, **changes):
    own = {
        "config": "configs/small_grpo.py:v5e:2x2",
        "changes": {},
        "topology": "v5e:2x2",
        "slices": 1,
        "chip": CHIP,
        "programs": programs,
    }
    return own | changes


def part(compute, *sent):
    return {
        "compute": compute,
        "sent": [{"bytes": size, "across_slices": across} for size, across in sent],
    }


def program(live, once, *loops, flops=0.0):
    memory = {"arguments": live - 3e9, "temporary": 1e9, "beside": {"a": 1.5e9, "b": 0.5e9}}
    return {"flops": flops, "estimate": {"memory": memory, "once": once, "loops": loops}}


# 2 s, of which 0.1 s is sent between chips and 0.4 s between slices; a quarter of the peak.
UPDATE = program(11e9, part(1.5, (10e9, False), (4e9, True)), flops=100e12)
ROLLOUT = program(9e9, part(0.5), part(0.010), part(0.011), part(0.0125, (1e8, False)))


def test_programs_of_several_files_are_one_row():
    rows = compiled_table.rows([figures({"update": UPDATE}), figures({"rollout": ROLLOUT})])
    assert rows == [
        "| small_grpo | v5e:2x2 | update: 11.0 of 16.0 GB |  | 2.0 s, MFU 25% | 10.0 to 13.5 ms |"
    ]


def test_what_differs_has_a_row_of_its_own():
    changed = figures({"SFT step": UPDATE}, changes={"sft.batch": 4}, slices=2)
    rows = compiled_table.rows([figures({"update": UPDATE}), changed])
    assert len(rows) == 2
    assert rows[1] == (
        "| small_grpo with `sft.batch=4` | 2 × v5e:2x2 | SFT step: 11.0 of 16.0 GB "
        "| 2.0 s, MFU 25% |  |  |"
    )


def test_what_is_not_known_is_left_out():
    """GPUs' times, and what does not compile."""
    gpu, failing = copy.deepcopy({"update": UPDATE, "rollout": ROLLOUT}), {"estimate": None}
    for made in gpu.values():
        for one in (made["estimate"]["once"], *made["estimate"]["loops"]):
            one["compute"] = None
    (row,) = compiled_table.rows([figures(gpu)])
    assert row == "| small_grpo | v5e:2x2 | update: 11.0 of 16.0 GB |  |  |  |"
    (row,) = compiled_table.rows([figures({"update": failing, "rollout": ROLLOUT})])
    assert row == "| small_grpo | v5e:2x2 | update: does not compile |  |  | 10.0 to 13.5 ms |"


def test_the_command_reads_files(tmp_path):
    names = []
    for name, made in (("sft", {"SFT step": UPDATE}), ("grpo", {"update": UPDATE})):
        (tmp_path / f"{name}.json").write_text(
            json.dumps(figures(made, config=f"configs/small_{name}.py"))
        )
        names.append(str(tmp_path / f"{name}.json"))
    done = subprocess.run(
        [sys.executable, compiled_table.__file__, f"--figures={','.join(names)}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(compiled_table.__file__).parents[1],
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("| config | topology |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| small_sft", "| small_grpo"]
