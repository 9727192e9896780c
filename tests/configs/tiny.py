"""The demo, shrunk until a stage takes seconds: the same keys, sizes that show nothing but faults.

python -m morer1_jax.train --config=tests/configs/tiny.py --workdir=/tmp/tiny
"""

from pathlib import Path

from ml_collections import ConfigDict

from morer1_jax.config.binding import read_config

_DEMO = Path(__file__).parents[2] / "configs" / "demo.py"


def get_config() -> ConfigDict:
    config = read_config(_DEMO)
    config.world.update(train=24, valid=4, test=8, written=0.5)
    # Room for any wording of the world's: what is tested is not whether the demo's texts are short.
    config.data.update(vocabulary=1024, prompt_length=224, completion_length=136, windows=10)
    config.data.shapes = 1  # Compiles fewer programs.
    config.model.text.update(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        mrope_section=(2, 3, 3),
    )
    config.model.vision.update(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, fullatt_block_indexes=(1,)
    )
    config.runtime.remat = "none"  # Compiles faster.
    config.sft.update(
        steps=40, batch=4, micro_batches=1, eval_every=100, eval_facts=4, save_every=15, log_every=1
    )
    config.baselines.update(steps=2, batch=4, eval_every=2, eval_facts=4)
    config.rate.update(samples=2, batch=8, easy_from=0.5, never="hard")
    # A model of a dozen steps solves nothing, so no fact is easy.
    config.grpo.mix.update(start=0.0, end=0.0)
    # A KL, so that a resumed run must find its reference again.
    config.grpo.update(
        steps=8,
        prompts=2,
        group=2,
        updates=1,
        micro_batches=1,
        eval_every=100,
        eval_facts=4,
        save_every=3,
        log_every=1,
        rollouts_every=1,
    )
    config.grpo.loss.beta = 0.01
    # Enough of SFT for a few answers to begin with a step, and cool sampling, so that some groups
    # differ in their rewards and GRPO changes the parameters.
    config.sft.optimizer.lr = 0.01
    config.grpo.temperature = 0.5
    # So that more steps may be asked for, and the optimizer's state is kept for them.
    config.grpo.optimizer.schedule = "constant"
    # An untrained model earns nothing but for effort, so effort begins with the first byte.
    config.grpo.reward.update(effort_from=0, effort_to=100)
    config.evaluate.batch = 4
    return config
