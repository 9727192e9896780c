"""The whole of MORE-R1 on a laptop: a synthetic world, a tiny model from scratch, two cores.

    python -m morer1_jax.train --config=configs/demo.py

Any key can be set on the command line: --config.seed=1 --config.grpo.steps=20
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    # Stages run in this order; one whose output is whole is not run again. `control` (SFT that goes
    # on for as long as rating and GRPO took) is for ablations.
    config.stages = "synthesise,sft,baselines,rate,grpo,evaluate"

    # The dataset that the stage `synthesise` writes.
    config.world = ConfigDict(
        dict(
            train=4500,
            valid=200,
            test=1000,
            cast=4,  # names of each entity type, one a colour
            facts_per_photo=2,
            fit=0.85,  # share of photos that show something of their title
            none=0.5,  # share of facts so labelled
            night=0.4,  # share of photos taken at night
            written=0.33,  # reasoning is paid for, so a minority of the facts has it
            gives_up=0.9,  # how often its writer does not try to read a night photo
            noise=8.0,
        )
    )

    config.data = ConfigDict(
        dict(
            folder=placeholder(str),  # none: what `synthesise` wrote; a path: MORE's own files
            reasoning=placeholder(str),  # none: the folder's; or JSONL, Parquet, a hub name
            vocabulary=1024,
            prompt_length=208,
            completion_length=128,
            windows=8,
            round_to=16,
            shapes=2,  # programs of a step, each for batches of another size
            min_pixels=56 * 56,
            max_pixels=84 * 84,
            crop_margin=0.1,
            crop_least=28,
            keep_features=False,  # may be True where tune.vision and tune.merger are 0
            workers=1,
            worker_kind="thread",  # photos this small are read sooner than processes start
        )
    )

    # Qwen2.5-VL's architecture at under half a million parameters.
    config.model = ConfigDict()
    config.model.path = placeholder(str)  # none: from scratch; or a published folder or hub name
    config.model.text = ConfigDict(
        dict(
            vocab_size=placeholder(int),  # none: as the tokenizer needs
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,  # none shared: one head alone is narrow at this width
            mrope_section=(4, 6, 6),
            rope_theta=10_000.0,
            initializer_range=0.1,  # about 1/√width: 0.02 suits wide models, learns slowly here
            tie_word_embeddings=True,
        )
    )
    config.model.vision = ConfigDict(
        dict(
            depth=2,
            hidden_size=48,
            intermediate_size=96,
            num_heads=2,
            fullatt_block_indexes=(1,),
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=56,  # a crop is one window, a photo a few
            initializer_range=0.1,
        )
    )
    # All of it trains. Shares of the learning rate; 0 freezes.
    config.tune = ConfigDict(
        dict(
            vision=1.0,
            merger=1.0,
            language=1.0,
            frozen_dtype="float32",
            lora=ConfigDict(
                dict(rank=0, alpha=32.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
            ),
        )
    )
    config.runtime = ConfigDict(
        dict(
            param_dtype="float32",
            dtype="float32",
            remat="dots",  # a CPU works attention scores out again sooner than it stores them
            scan_unroll=1,
            decode_unroll=True,  # on a CPU; see model.config.Runtime
            attention="auto",
        )
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    config.score = ConfigDict(dict(chunk=128))

    config.sft = ConfigDict(
        dict(
            steps=600,
            batch=16,
            micro_batches=1,
            eval_every=150,
            eval_facts=200,
            save_every=150,
            log_every=1,
            keep_checkpoints=2,
            optimizer=_adamw(lr=3e-3, schedule="cosine", warmup=20, weight_decay=0.01),
        )
    )
    config.baselines = ConfigDict(
        dict(
            facts="written",  # as SFT has them
            steps=150,
            batch=16,
            eval_every=50,
            eval_facts=200,
            optimizer=_adamw(lr=2e-3, schedule="cosine", warmup=20, weight_decay=0.01),
        )
    )
    config.rate = ConfigDict(
        dict(
            begin="sft",  # what is rated and GRPO begins with; or "checkpoint", model.path as it is
            file=placeholder(str),  # none: rated here; or what tools/rate_difficulty.py wrote
            samples=1,
            batch=128,
            temperature=1.0,
            easy_from=0.5,
            never="hard",
        )
    )
    config.grpo = ConfigDict(
        dict(
            steps=20,
            prompts=32,
            group=8,
            updates=1,
            micro_batches=1,
            temperature=1.0,
            scale_rewards="group",
            mixing=True,
            eval_every=5,
            eval_facts=200,
            save_every=5,
            log_every=1,
            rollouts_every=10,
            keep_checkpoints=2,
            mix=ConfigDict(dict(start=0.5, end=0.4, until=20, shape="linear")),
            reward=ConfigDict(
                dict(format=0.2, effort=0.1, accuracy=1.0, effort_from=150, effort_to=190)
            ),
            loss=ConfigDict(
                dict(
                    clip_low=0.2,
                    clip_high=0.28,
                    beta=0.0,
                    normalisation="token",
                    importance_cap=2.0,
                    mask_truncated=False,
                )
            ),
            optimizer=_adamw(lr=3e-4, schedule="cosine", warmup=2, weight_decay=0.0),
        )
    )
    config.control = ConfigDict(dict(steps=placeholder(int)))  # none: as long as GRPO took
    config.evaluate = ConfigDict(dict(batch=128))
    # (first, last) step of each training to write a profiler's trace of.
    config.profile = ConfigDict(dict(steps=()))
    return config


def _adamw(lr: float, schedule: str, warmup: int, weight_decay: float) -> ConfigDict:
    return ConfigDict(
        dict(
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            final=0.1,
            b1=0.9,
            b2=0.99,
            eps=1e-8,
            weight_decay=weight_decay,
            clip_norm=1.0,
        )
    )
