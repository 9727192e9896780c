"""Stage 1 for Qwen2.5-VL-7B on MORE: SFT on written reasoning.

    python -m morer1_jax.train --config=configs/qwen2_5_vl_7b_sft.py \\
        --workdir=runs/7b --config.data.folder=data/MORE

As `qwen2_5_vl_3b_sft.py`, except for what the larger model changes.
"""

from pathlib import Path

from ml_collections import ConfigDict

from morer1_jax.config.binding import read_config
from morer1_jax.config.topologies import fit


def get_config(topology: str = "v6e:4x4") -> ConfigDict:
    config = read_config(Path(__file__).with_name("qwen2_5_vl_3b_sft.py"), None)
    config.model.path = "Qwen/Qwen2.5-VL-7B-Instruct"
    config.model.text.update(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    config.data.vocabulary = 152_064
    return fit(config, "7b", topology)
