"""A model of the published 3B shapes on one machine's CPU: loaded, trained a step, sampled from.

Run as a process of its own by `tests/run/test_big.py`, which reads the JSON it prints.
"""

import json
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data.collate import Collator
from morer1_jax.data.shapes import Shape
from morer1_jax.learn.sft import make_sft_step
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.run.batch_sampler import BatchSampler
from morer1_jax.run.mesh import shardings_of
from morer1_jax.run.setup import open_run, open_setup

ROOT = Path(__file__).parents[1]


class Peak:
    """The largest value of a field of /proc/self/status, in bytes, sampled while it is open."""

    def __init__(self, field):
        self._field = field
        self.most = 0

    def now(self):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(self._field):
                return 1024 * int(line.split()[1])
        raise KeyError(self._field)

    def __enter__(self):
        self._open = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._open = False
        self._thread.join()

    def _watch(self):
        while self._open:
            self.most = max(self.most, self.now())
            time.sleep(0.01)


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def main(model, data, workdir):
    config = read_config(ROOT / "configs" / "qwen2_5_vl_3b_sft.py")
    config.model.path = model
    config.data.folder = data
    config.data.update(max_pixels=112 * 112, prompt_length=384, completion_length=16, windows=8)
    config.data.update(workers=1, worker_kind="thread")
    config.tune.update(vision=0.0, merger=0.0)
    config.tune.lora.rank = 16
    run = open_run(open_setup(settings(config), Path(workdir)), reasoning_needed=False)
    trainee, reader, limits = run.trainee, run.reader, run.reader.limits
    facts = run.dataset.splits["train"][:1]
    out = {}

    with Peak("RssAnon") as loading:
        began = time.perf_counter()
        before = loading.now()
        frozen, adapters = jax.block_until_ready((trainee.frozen, trainee.init_params(0)))
        out["load_seconds"] = time.perf_counter() - began
    out["parameter_bytes"] = bytes_of(frozen) + bytes_of(adapters)
    out["load_peak_bytes"] = loading.most
    out["before_bytes"] = before

    policy = trainee.policy
    with Peak("VmRSS") as running:
        optimizer = run.settings.sft.optimizer.build(1, trainee.placed.trainable)
        state = trainee.new_state(adapters, optimizer)
        score = ScoreConfig(run.settings.grpo.temperature, run.settings.score.chunk)
        shardings = shardings_of(state)
        step = jax.jit(
            make_sft_step(policy.model, optimizer, score),
            in_shardings=(shardings, shardings_of(frozen), policy.placed.rows),
            out_shardings=(shardings, policy.placed.replicated),
            donate_argnums=0,
        )
        sample = reader.read(facts[0], "<answer>none</answer>")
        shape = Shape(limits.prompt + limits.completion, limits.slots)
        batch = policy.placed.put(Collator.of(reader).sequences([[sample]], shape))
        lowered = step.lower(state, frozen, batch)
        # No pass has this name: all passes run, whatever XLA_FLAGS says.
        every_pass = lowered.compile(compiler_options={"xla_disable_hlo_passes": "none"})
        out["step_temporary_bytes_without_flag"] = temporary_bytes(every_pass)
        del every_pass
        compiled = lowered.compile()
        out["step_temporary_bytes"] = temporary_bytes(compiled)
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
        out["step_seconds"] = time.perf_counter() - began
        out["loss"], out["grad_norm"] = float(metrics["loss"]), float(metrics["grad_norm"])
        out["step_peak_bytes"] = running.most
        # Adapters begin with B at 0.
        out["moved"] = float(jnp.abs(state.params["language"]["layers"]["q"]["lora_b"]).max())

        sampler = BatchSampler(policy, reader, batch=1, group=2, temperature=1.0)
        began = time.perf_counter()
        ((_, drawn),) = sampler.sample(trainee.whole(state.params), facts, "sample")
        out["rollout_seconds"] = time.perf_counter() - began
        out["rollout_tokens"] = [int(n) for n in drawn.mask.sum(-1)]
    out["peak_bytes"] = running.most
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
