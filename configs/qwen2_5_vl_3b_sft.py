"""Stage 1 for Qwen2.5-VL-3B on MORE: SFT on written reasoning.

    python -m morer1_jax.train --config=configs/qwen2_5_vl_3b_sft.py \\
        --workdir=runs/3b --config.data.folder=data/MORE

The folder is MORE's released form with `reasoning.jsonl` in it (`tools/write_reasoning.py`). GRPO
goes on in the same workdir with `configs/qwen2_5_vl_3b_grpo.py`. Sizes are those of the published
config.json; batches, rates and limits are what others use for this class of model, and ours where
nothing is public.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from morer1_jax.world.synthesise import WorldConfig


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.stages = "sft,evaluate"
    # Read by the stage `synthesise` alone, which this config does not have.
    config.world = ConfigDict(dataclasses.asdict(WorldConfig()))

    config.data = ConfigDict(
        dict(
            folder="data/MORE",
            reasoning=placeholder(str),  # none: the folder's; or JSONL, Parquet, a hub name
            vocabulary=151_936,  # of a tokenizer trained here; the checkpoint brings its own
            prompt_length=1536,  # two images of 512 tokens each at most, labels, title
            completion_length=1024,
            windows=80,  # a 640 x 480 photo fills 25; room for two images of any usual shape
            round_to=128,  # as TPU kernels want it
            shapes=3,  # programs of a step, each for batches of another size
            min_pixels=56 * 56,
            max_pixels=512 * 28 * 28,  # about 401k, 512 vision tokens
            crop_margin=0.1,
            crop_least=28,
            keep_features=False,  # may be True where tune.vision and tune.merger are 0
            workers=8,
            worker_kind="process",  # real photos: a decoder thread would wait for Python's lock
        )
    )

    config.model = ConfigDict()
    config.model.path = "Qwen/Qwen2.5-VL-3B-Instruct"  # or a folder, also a bucket's
    config.model.text = ConfigDict(
        dict(
            vocab_size=151_936,
            hidden_size=2048,
            intermediate_size=11_008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            mrope_section=(16, 24, 24),
            rope_theta=1_000_000.0,
            initializer_range=0.02,
            tie_word_embeddings=True,
        )
    )
    config.model.vision = ConfigDict(
        dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            fullatt_block_indexes=(7, 15, 23, 31),
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            initializer_range=0.02,
        )
    )
    config.tune = ConfigDict(
        dict(
            vision=0.0,  # photos of news are not new to the tower; frozen, it needs no optimizer
            merger=1.0,
            language=1.0,
            frozen_dtype="bfloat16",  # as published
            # LoRA: rank=64, ten times the learning rates below, and merger=0.1 (or 0) for it.
            lora=ConfigDict(
                dict(rank=0, alpha=128.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
            ),
        )
    )
    config.runtime = ConfigDict(
        dict(
            param_dtype="float32",  # what trains: an update at 1e-6 is less than bfloat16 can hold
            dtype="bfloat16",
            remat="full",  # long prompts: activations, not FLOPs, are what a chip runs out of
            scan_unroll=1,
            decode_unroll=False,  # on accelerators; see model.config.Runtime
            attention="auto",  # splash on TPUs, cuDNN on NVIDIA's GPUs
        )
    )
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    config.score = ConfigDict(dict(chunk=128))  # 128 x 151,936 logits at once and a row

    config.sft = ConfigDict(
        dict(
            steps=200,  # about 3 epochs of 4,000 written facts
            batch=64,
            micro_batches=1,
            eval_every=50,
            eval_facts=512,
            save_every=50,
            log_every=1,
            keep_checkpoints=2,
            optimizer=_adamw(lr=1e-5, schedule="cosine", warmup=10),  # full; 1e-4 with LoRA
        )
    )
    config.baselines = ConfigDict(
        dict(
            facts="written",
            steps=200,
            batch=64,
            eval_every=50,
            eval_facts=512,
            optimizer=_adamw(lr=1e-5, schedule="cosine", warmup=10),
        )
    )
    config.rate = ConfigDict(
        dict(
            begin="sft",  # what is rated, and GRPO begins with; "checkpoint": model.path as it is
            file=placeholder(str),  # none: rated here; or what tools/rate_difficulty.py wrote
            samples=8,  # as many as GRPO draws: a fact is easy if its group mostly is right
            batch=64,
            temperature=1.0,
            easy_from=0.5,
            never="hard",
        )
    )
    config.grpo = ConfigDict(
        dict(
            steps=200,
            prompts=128,
            group=8,
            updates=1,  # on-policy: no old log-probabilities, no clipping
            micro_batches=4,
            temperature=1.0,
            scale_rewards="group",
            mixing=True,
            eval_every=20,
            eval_facts=512,
            save_every=20,
            log_every=1,
            rollouts_every=10,
            keep_checkpoints=2,
            # Half easy at first is the paper's; the end and the shape are ours.
            mix=ConfigDict(dict(start=0.5, end=0.1, until=160, shape="linear")),
            # Six steps of a sentence or two are 400 to 900 bytes; the ramp is ours.
            reward=ConfigDict(
                dict(format=0.5, effort=0.5, accuracy=1.0, effort_from=200, effort_to=500)
            ),
            loss=ConfigDict(
                dict(
                    clip_low=0.2,
                    clip_high=0.28,
                    beta=1e-3,
                    normalisation="token",
                    importance_cap=2.0,
                    mask_truncated=False,
                )
            ),
            optimizer=_adamw(lr=1e-6, schedule="constant", warmup=5),  # full; 1e-5 with LoRA
        )
    )
    config.control = ConfigDict(dict(steps=placeholder(int)))  # none: as long as GRPO took
    config.evaluate = ConfigDict(dict(batch=64))
    # (first, last) step of each training to write a profiler's trace of.
    config.profile = ConfigDict(dict(steps=()))
    return config


def _adamw(lr: float, schedule: str, warmup: int) -> ConfigDict:
    return ConfigDict(
        dict(
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            final=0.1,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=1.0,
        )
    )
