"""Rates how often a checkpoint solves each training fact, which makes it easy or hard for GRPO.

python tools/rate_difficulty.py --checkpoint=runs/demo/sft --data=runs/demo/data --out=ratings.jsonl

A GRPO run takes the file by `--config.rate.file=ratings.jsonl`.
"""

from pathlib import Path

from absl import flags
from etils import epath

from morer1_jax.cli import run_main
from morer1_jax.config.settings import RateSettings
from morer1_jax.data.digests import of_lines
from morer1_jax.data.source import open_source
from morer1_jax.errors import ConfigError
from morer1_jax.files import check_writable
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import any_path, local_path
from morer1_jax.run.cache import use_program_cache
from morer1_jax.run.lock import hold
from morer1_jax.run.memory import keep_freed_memory
from morer1_jax.serve.loaded import open_model
from morer1_jax.stages.rate import rate
from morer1_jax.task.photos import check_photos

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A run's workdir, one of its stages, or a published folder, also gs://…; or a hub name.",
)
_DATA = flags.DEFINE_string("data", None, "A dataset's folder.")
_OUT = flags.DEFINE_string("out", None, "File to write; must not exist.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "Answers sampled for each fact.", 1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Sampling temperature; 0 takes the likeliest token.", 0.0
)
_EASY_FROM = flags.DEFINE_float("easy_from", 0.5, "Pass rate from which a fact is easy.", 0.0, 1.0)
_NEVER = flags.DEFINE_enum("never", "hard", ["hard", "drop"], "Pool of facts never solved.")
_BATCH = flags.DEFINE_integer("batch", 32, "Facts in a batch.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.")
_LENGTH = flags.DEFINE_integer(
    "length", None, "Maximum tokens of an answer; by default as in training.", 1
)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    keep_freed_memory()
    use_program_cache()
    check_alone()
    out, data = local_path(_OUT.value, "--out"), any_path(_DATA.value, "--data")
    check_writable(out)
    with hold(out):
        if out.exists():
            raise ConfigError(f"--out={out}: exists already; delete it or name another file")
        _rate(data, out)
    print(f"written: {out}")


def _rate(data: epath.Path, out: Path) -> None:
    """Rates the training facts and writes `out`, whose lock this process holds."""
    source = open_source(data, "--data")
    facts = source.facts("train")
    try:
        config = RateSettings(
            samples=_SAMPLES.value,
            batch=min(_BATCH.value, len(facts)),
            temperature=_TEMPERATURE.value,
            easy_from=_EASY_FROM.value,
            never=_NEVER.value,
            file=None,
            begin="checkpoint",
        )
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    loaded = open_model(_CHECKPOINT.value, labels=source.ontology, completion=_LENGTH.value)
    photos = check_photos(facts, source)
    sizes = {photo: info.size for photo, info in photos.items()}
    sampler = loaded.sampler(
        source,
        facts,
        sizes,
        batch=config.batch,
        group=config.samples,
        temperature=config.temperature,
        seed=_SEED.value,
    )
    names = ("samples", "temperature", "seed", "length")
    identity = {name: flags.FLAGS[name].value for name in names}
    identity |= {"checkpoint": loaded.digest, "data": source.digests()}
    identity["photos"] = of_lines(info.digest for info in photos.values())
    rate(sampler, loaded.params, facts, config, out, identity)


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "data", "out"])
    run_main(main, interrupted="interrupted; the same command goes on where it was")
