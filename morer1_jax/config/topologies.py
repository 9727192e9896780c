"""Values of the configs of Qwen2.5-VL by the topology that they run on.

    --config=configs/qwen2_5_vl_3b_grpo.py:v6e:2x2

A topology is named as `python -m morer1_jax.compile --topology=…` names it: a TPU's version and its
chips along each axis; or GPUs and their number, `h100:8`. That command tells whether a config fits;
README says which have been compiled. The others are where to begin.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from morer1_jax.errors import ConfigError

_BFLOAT16_MOMENTS = {"sft.optimizer.moments": "bfloat16", "grpo.optimizer.moments": "bfloat16"}
# By the model's size, then by topology: dotted keys.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "3b": {
        "v5e:2x4": {
            "sft.micro_batches": 4,
            "grpo.micro_batches": 16,
            "mesh.sampling_tensor": 2,
            "score.chunk": 512,
            **_BFLOAT16_MOMENTS,
        },
        "v5e:4x4": {"grpo.micro_batches": 8},
        "v5e:8x8": {"mesh.data": 4, "mesh.fsdp": 16, "grpo.micro_batches": 2},
        "v5p:2x2x4": {"grpo.micro_batches": 2},
        "v6e:2x2": {
            "sft.micro_batches": 4,
            "grpo.micro_batches": 32,
            "mesh.sampling_tensor": 2,
        },
        "v6e:2x4": {"sft.micro_batches": 2, "grpo.micro_batches": 16},
        "v6e:4x4": {"grpo.micro_batches": 8},
        "h100:1": {
            "sft.micro_batches": 16,
            "grpo.micro_batches": 128,
            "grpo.rollout_parts": 8,
        },
        "h100:8": {"sft.micro_batches": 2, "grpo.micro_batches": 4},
    },
    "7b": {
        "v5e:2x4": {
            # Adapters: the whole model's state does not fit.
            "tune.lora.rank": 64,
            "tune.merger": 0.0,
            "sft.optimizer.lr": 1e-4,
            "grpo.optimizer.lr": 1e-5,
            "sft.micro_batches": 8,
            "grpo.micro_batches": 16,
            "grpo.rollout_parts": 4,
            "mesh.sampling_tensor": 4,
        },
        "v5e:8x8": {
            "sft.micro_batches": 1,
            "grpo.micro_batches": 2,
            "mesh.sampling_tensor": 4,
        },
        "v5p:2x2x4": {"sft.micro_batches": 1, "grpo.micro_batches": 4},
        "v6e:2x4": {
            # With `tensor` of 1, or two prompts a chip at once, TPUs' compiler ends with a fault of
            # its own in the update.
            "mesh.tensor": 2,
            "sft.micro_batches": 8,
            "grpo.micro_batches": 32,
            "mesh.sampling_tensor": 4,
            **_BFLOAT16_MOMENTS,
        },
        "v6e:4x4": {"sft.micro_batches": 1, "grpo.micro_batches": 4, "mesh.sampling_tensor": 4},
        "h100:8": {"sft.micro_batches": 4, "grpo.micro_batches": 8},
    },
}


def fit(config: ConfigDict, model: str, topology: str) -> ConfigDict:
    """Returns the config with a topology's values.

    Args:
        model: its size, a key of `PRESETS`.

    Raises:
        ConfigError: there are no values for the topology.
    """
    presets = PRESETS[model]
    if topology not in presets:
        raise ConfigError(
            f"topology: expected one of {', '.join(presets)}, found {topology!r}; choose the "
            "nearest, and change its keys by --config.… flags"
        )
    config.update_from_flattened_dict(presets[topology])
    return config
