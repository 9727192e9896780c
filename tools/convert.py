"""Writes a trained model as a folder in the published form, which `transformers` loads as it is.

python tools/convert.py --checkpoint=runs/demo --out=exported
"""

from absl import flags

from morer1_jax.cli import run_main
from morer1_jax.errors import ConfigError
from morer1_jax.files import check_writable
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import local_path
from morer1_jax.run.lock import hold
from morer1_jax.serve.export import export
from morer1_jax.serve.loaded import open_model

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "A run's workdir, one of its stages, or a published folder, also gs://…; or a hub name.",
    required=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Dtype to write; by default the model's."
)
_LABELS = flags.DEFINE_string("labels", None, "A rel2id.json; by default the checkpoint's.")
_SHARD = flags.DEFINE_integer("shard_mb", 5000, "Maximum megabytes of tensors in a file.", 1)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    check_alone()
    out = local_path(_OUT.value, "--out")
    check_writable(out, folder=True)
    with hold(out):
        if out.exists():
            raise ConfigError(f"--out={out}: exists already; delete it or name another folder")
        loaded = open_model(_CHECKPOINT.value, labels=_LABELS.value)
        export(loaded, out, dtype=_DTYPE.value, shard_bytes=_SHARD.value * 1_000_000)
    print(f"written: {out}")


if __name__ == "__main__":
    run_main(main)
