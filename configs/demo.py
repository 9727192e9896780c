"""The whole of MORE-R1 on a laptop's two cores: a synthetic dataset, a tiny model from scratch.

    python -m morer1_jax.train --config=configs/demo.py

It states what differs from the defaults (`morer1_jax/config/settings.py`; the docstrings of its
dataclasses describe the keys).
Any key can be set on the command line: --config.seed=1 --config.grpo.steps=20
"""

from ml_collections import ConfigDict

from morer1_jax.config.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    # Stages run in this order; one whose output is whole is not run again. `control` (SFT that goes
    # on for as long as rating and GRPO took) is for ablations.
    config.stages = "synthesise,sft,baselines,rate,grpo,evaluate"

    # The dataset that the stage `synthesise` writes.
    config.world.update(
        train=4500,
        cast=4,  # names of each entity type, one a colour
        facts_per_photo=2,
        night=0.4,  # share of photos taken at night
        written=0.33,  # reasoning is paid for, so a minority of the facts has it
        gives_up=0.9,  # how often its writer does not try to read a night photo
    )
    config.data.update(
        vocabulary=1024,
        prompt_length=208,
        completion_length=128,
        windows=8,
        round_to=16,
        shapes=2,
        max_pixels=84 * 84,
        workers=1,
        worker_kind="thread",  # photos this small are read sooner than processes start
    )

    # Qwen2.5-VL's architecture at under half a million parameters.
    config.model.text.update(
        vocab_size=None,  # as the tokenizer needs
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,  # none shared: one head alone is narrow at this width
        mrope_section=(4, 6, 6),
        rope_theta=10_000.0,
        initializer_range=0.1,  # about 1/√width: 0.02 suits wide models, learns slowly here
    )
    config.model.vision.update(
        depth=2,
        hidden_size=48,
        intermediate_size=96,
        num_heads=2,
        fullatt_block_indexes=(1,),
        window_size=56,  # a crop is one window, a photo a few
        initializer_range=0.1,
    )
    # All of it trains, from scratch.
    config.tune.update(vision=1.0, frozen_dtype="float32")
    config.tune.lora.alpha = 32.0
    config.runtime.update(
        dtype="float32",
        remat="dots",  # a CPU works attention scores out again sooner than it stores them
        decode_unroll=True,  # on a CPU; see model.config.Runtime
    )
    config.mesh.update(data=-1, fsdp=1)

    config.sft.update(steps=600, batch=16, eval_every=150, eval_facts=200, save_every=150)
    config.sft.optimizer.update(lr=3e-3, warmup=20, b2=0.99, weight_decay=0.01)
    config.baselines.update(steps=150, batch=16, eval_facts=200)
    config.baselines.optimizer.update(lr=2e-3, warmup=20, b2=0.99, weight_decay=0.01)
    config.rate.update(samples=1, batch=128)
    config.grpo.update(steps=20, prompts=32, micro_batches=1)
    config.grpo.update(eval_every=5, eval_facts=200, save_every=5)
    config.grpo.mix.update(end=0.4, until=20)
    config.grpo.reward.update(format=0.2, effort=0.1, effort_from=150, effort_to=190)
    config.grpo.loss.beta = 0.0
    config.grpo.optimizer.update(lr=3e-4, schedule="cosine", warmup=2, b2=0.99)
    config.evaluate.batch = 128
    return config
