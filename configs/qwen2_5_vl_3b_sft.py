"""Stage 1 for Qwen2.5-VL-3B on MORE: SFT on written reasoning.

    python -m morer1_jax.train --config=configs/qwen2_5_vl_3b_sft.py \\
        --workdir=runs/3b --config.data.folder=data/MORE

The folder has MORE's released form, with `reasoning.jsonl` in it (`tools/write_reasoning.py`). GRPO
goes on in the same workdir with `configs/qwen2_5_vl_3b_grpo.py`. The defaults are made for this
model (`morer1_jax/config/settings.py`); here are the keys that a run is most likely to change, with
reasons. Batches, rates and limits are what others use for this class of model, and our own choice
where nothing is public.
"""

from ml_collections import ConfigDict

from morer1_jax.config.settings import default_config
from morer1_jax.config.topologies import fit


def get_config(topology: str | None = "v5e:4x4") -> ConfigDict:
    config = default_config()
    config.stages = "sft,evaluate"
    config.data.folder = "data/MORE"
    config.model.path = "Qwen/Qwen2.5-VL-3B-Instruct"  # or a folder, also a bucket's

    config.data.update(
        prompt_length=1536,  # two images of 512 tokens each at most, labels, title
        max_pixels=512 * 28 * 28,  # about 401k, 512 vision tokens
        worker_kind="process",  # real photos: a decoder thread would wait for Python's lock
    )
    # Photos of news are not new to the tower; frozen, it needs no optimizer.
    # LoRA: lora.rank=64, ten times the learning rates below, and merger=0.1 (or 0) for it.
    config.tune.vision = 0.0
    # Long prompts: activations, not FLOPs, are what a chip runs out of.
    config.runtime.remat = "full"
    config.mesh.update(data=1, fsdp=-1, tensor=1)

    config.sft.update(steps=200, batch=64)  # about 3 epochs of 4,000 written facts
    config.sft.optimizer.lr = 1e-5  # full; 1e-4 with LoRA
    config.grpo.optimizer.lr = 1e-6  # full; 1e-5 with LoRA
    # Half easy at first is the paper's; the end and the shape are ours.
    config.grpo.mix.update(start=0.5, end=0.1, until=160, shape="linear")
    # Six steps of a sentence or two are 400 to 900 bytes; the ramp is ours.
    config.grpo.reward.update(effort_from=200, effort_to=500)
    return config if topology is None else fit(config, "3b", topology)
