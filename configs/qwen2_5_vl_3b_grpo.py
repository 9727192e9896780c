"""Stage 2 for Qwen2.5-VL-3B on MORE: rating, then GRPO on a mix that grows harder.

    python -m morer1_jax.train --config=configs/qwen2_5_vl_3b_grpo.py:v5e:4x4 \\
        --workdir=runs/3b --config.data.folder=data/MORE

In the workdir of `qwen2_5_vl_3b_sft.py` it starts from the model that this trained. In a new
workdir it can start from an SFT model's folder, as `tools/convert.py` writes it:
`--config.rate.begin=checkpoint --config.model.path=…`.

It has not been run yet; README says which topologies it has been compiled for.
"""

from pathlib import Path

from ml_collections import ConfigDict

from morer1_jax.config.binding import read_config


def get_config(topology: str = "v5e:4x4") -> ConfigDict:
    # The two stages are one run: all keys but these are the SFT config's.
    config = read_config(Path(__file__).with_name("qwen2_5_vl_3b_sft.py"), topology)
    config.stages = "rate,grpo,evaluate"
    return config
