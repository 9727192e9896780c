"""Scores a checkpoint on a split of a dataset: tables, answers and a page.

    python -m morer1_jax.evaluate --checkpoint=runs/demo/sft --data=runs/demo/data --out=scores

Writes `eval/<name>.json`, `eval/<name>.answers.jsonl` and `report.html` into `--out`, a folder that
may hold the scores of several checkpoints, each under a name of its own. Checkpoint and data may be
in a bucket (`gs://…`), `--out` is of this machine.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from etils import epath

from morer1_jax.cli import run_main
from morer1_jax.data.source import open_source
from morer1_jax.errors import ConfigError
from morer1_jax.files import check_writable, read_jsonl
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import any_path, expand_home, local_path
from morer1_jax.report.report import write_report
from morer1_jax.run.cache import use_program_cache
from morer1_jax.run.lock import hold
from morer1_jax.run.memory import keep_freed_memory
from morer1_jax.serve.loaded import open_model
from morer1_jax.stages.evaluate import read_scores, write_scores
from morer1_jax.task import metrics, more
from morer1_jax.task.photos import photo_sizes

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A run's workdir, one of its stages, or a published folder, also gs://…; or a hub name.",
)
_DATA = flags.DEFINE_string("data", None, "A dataset's folder, which says the labels.")
_SPLIT = flags.DEFINE_enum("split", "test", list(more.SPLITS), "The split.")
_OUT = flags.DEFINE_string("out", None, "The folder to write to.")
_NAME = flags.DEFINE_string("name", None, "The system's; by default the checkpoint's last part.")
_GUIDED = flags.DEFINE_bool("guided", False, "Permit only tokens that lead to a readable answer.")
_LENGTH = flags.DEFINE_integer(
    "length", None, "Most tokens of an answer; by default as trained.", 1
)
_BATCH = flags.DEFINE_integer("batch", 64, "Facts at once.", 1)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    keep_freed_memory()
    use_program_cache()
    check_alone()
    out, name = local_path(_OUT.value, "--out"), _NAME.value
    data = any_path(_DATA.value, "--data")
    if name is None:
        name = _last_part(_CHECKPOINT.value)
    check_writable(out / "eval", folder=True)
    with hold(out, folder=True):
        _check_out(out, _SPLIT.value, name)
        _evaluate(data, out, _SPLIT.value, name)


def _evaluate(data: epath.Path, out: Path, split: str, name: str) -> None:
    """Scores a split, into a folder that this process has locked."""
    source = open_source(data, "--data")
    facts = source.facts(split)
    loaded = open_model(_CHECKPOINT.value, labels=source.ontology, completion=_LENGTH.value)
    sizes = photo_sizes(facts, source)
    batch = min(_BATCH.value, len(facts))
    sampler = loaded.sampler(source, facts, sizes, batch=batch, guided=_GUIDED.value)
    answers = sampler.answers(loaded.params, facts, f"evaluate {name}")
    write_scores(out, name, facts, answers, loaded.policy.ontology)
    print(metrics.format_table(read_scores(out)))
    page = write_report(
        out, data, split=split, sections=("scores", "gallery"), images=loaded.images
    )
    print(f"report: {page}")


def _last_part(checkpoint: str) -> str:
    """Returns the name of a checkpoint's folder, or of a hub's model without its owner."""
    if "://" in checkpoint:
        return checkpoint.rstrip("/").rpartition("/")[2]
    return Path(expand_home(checkpoint, "--checkpoint")).resolve().name


def _check_out(out: Path, split: str, name: str) -> None:
    """Checks that all scores in the folder are of one split, and that the name is new.

    Raises:
        ConfigError: the folder has answers for another split's facts, or scores of this name.
    """
    if not name or name != Path(name).name:
        raise ConfigError(
            f"--name: expected a file's name, without /, found {name!r}; give another"
        )
    scores = out / "eval" / f"{name}.json"
    if scores.exists():
        raise ConfigError(
            f"{scores}: expected no scores of this name, found a file; delete it, or give another "
            "--name or --out"
        )
    for path in sorted((out / "eval").glob("*.answers.jsonl")):
        first = read_jsonl(path, lambda _, answer: answer["fact"], "an answer", "delete it")[0]
        if first.partition(":")[0] != split:
            raise ConfigError(
                f"--out={out}: expected answers to the split {split}, found {path.name} of "
                f"{first}; name another"
            )


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "data", "out"])
    run_main(main)
