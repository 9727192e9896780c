"""Opens a model by its path: a published folder, or a training run's workdir or stage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from morer1_jax import stores
from morer1_jax.config.binding import FILE as RUN_CONFIG
from morer1_jax.config.settings import CompileSettings, DataSettings, MeshSettings, settings
from morer1_jax.data.digests import of_lines, of_tokenizer
from morer1_jax.data.images import ImageReader
from morer1_jax.data.sample import Limits, SampleReader
from morer1_jax.data.shapes import SampleSize, widest
from morer1_jax.data.source import open_source
from morer1_jax.data.tokenizer import load_tokenizer
from morer1_jax.errors import ConfigError, DataError, WeightsError, one_line
from morer1_jax.model.config import ImageConfig, Runtime
from morer1_jax.model.layers import Params
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.paths import any_path, did_you_mean, expand_home, hub_hint, is_hub_name
from morer1_jax.run.batch_sampler import BatchSampler
from morer1_jax.run.fit import any_mesh
from morer1_jax.run.manifest import MANIFEST
from morer1_jax.run.placed import Placed, place
from morer1_jax.run.policy import Policy
from morer1_jax.run.setup import image_config, open_setup
from morer1_jax.run.shapes import ask_plan
from morer1_jax.run.shelf import Shelf
from morer1_jax.run.store import CHECKPOINTS, listed
from morer1_jax.run.trainee import open_trainee
from morer1_jax.stages.table import STAGES
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology, read_ontology_file
from morer1_jax.task.photos import Photos
from morer1_jax.weights import published as weights
from morer1_jax.weights.folder import check_kind, read_json
from morer1_jax.weights.processor import read_images

# Our own files in a published folder: crop and answer's length as in training, and the labels.
TASK = "more_r1.json"
LABELS = "rel2id.json"
# Stages whose models can be opened; a workdir stands for the first that it has.
_BY_RANK = [s.name for s in sorted(STAGES, key=lambda stage: -stage.rank) if s.rank]
# How the shapes of batches are chosen. A prompt has some hundred tokens.
_DATA = DataSettings(round_to=16)


@dataclasses.dataclass
class LoadedModel:
    """A model with what is needed to sample answers from it.

    Attributes:
        load: reads the parameters; see `params`.
        images: pixel limits and crop as in training.
        completion: most tokens of an answer, as in training.
        source: the folder of its tokenizer and of other files that are published beside tensors.
        dtypes: of the saved tensors: one for all, or by tensor's name.
        ontology: the labels it answers with; None if unknown.
        digest: differs between models.
        checkpoint: the published one that it is or was trained from, if any.
        copy: of the files of a run in a bucket, on this machine; it, and the checkpoint's, last as
            long as this object.
    """

    placed: Placed
    load: Callable[[], Params]
    images: ImageConfig
    completion: int
    source: Path
    tokenizer: PreTrainedTokenizerFast
    dtypes: str | Mapping[str, str]
    ontology: Ontology | None
    digest: str
    checkpoint: weights.Checkpoint | None
    copy: tempfile.TemporaryDirectory[str] | None = None

    @property
    def model(self) -> Qwen25VL:
        """The model."""
        return self.placed.model

    @functools.cached_property
    def params(self) -> Params:
        """The whole model's parameters, adapters among them, on the mesh.

        Read when first used, so that other errors of checkpoint and input are found before.
        """
        return self.load()

    @functools.cached_property
    def policy(self) -> Policy:
        """The model with tokenizer and labels, on the mesh.

        Raises:
            ConfigError: its labels are unknown.
            WeightsError: the tokenizer has more tokens than the model has embeddings.
        """
        if self.ontology is None:
            raise ConfigError(
                f"{self.source}: expected a file {LABELS}, found none; name one with --labels="
            )
        tokens, rows = len(self.tokenizer), self.model.config.text.vocab_size
        if tokens > rows:
            raise WeightsError(
                f"{self.source}: expected an embedding row for each of the tokenizer's {tokens} "
                f"tokens, found {rows} rows; use a tokenizer and a model of one kind"
            )
        return Policy(self.placed, self.tokenizer, self.ontology)

    def reader(
        self,
        photos: Photos,
        facts: Sequence[Fact],
        photo_sizes: Mapping[str, tuple[int, int]],
    ) -> SampleReader:
        """Returns a reader whose limits fit these facts.

        Args:
            photos: where the facts' photos are.
            photo_sizes: (width, height) of the photos, by `Fact.photo`.
        """
        return self._measured(photos, facts, photo_sizes)[0]

    def sampler(
        self,
        photos: Photos,
        facts: Sequence[Fact],
        photo_sizes: Mapping[str, tuple[int, int]],
        *,
        batch: int,
        group: int = 1,
        temperature: float = 0.0,
        guided: bool = False,
        seed: int = 0,
    ) -> BatchSampler:
        """Returns a sampler whose batches have the shapes that cost least on these facts.

        Args and errors are those of `reader` and of `BatchSampler`.
        """
        reader, sizes = self._measured(photos, facts, photo_sizes)
        return BatchSampler(
            self.policy,
            reader,
            batch=batch,
            group=group,
            temperature=temperature,
            guided=guided,
            seed=seed,
            plan=ask_plan(self.placed, _DATA, sizes, [facts], batch),
        )

    def _measured(
        self,
        photos: Photos,
        facts: Sequence[Fact],
        photo_sizes: Mapping[str, tuple[int, int]],
    ) -> tuple[SampleReader, dict[str, SampleSize]]:
        """Returns a reader of the facts, and what each of them takes of a row, by its id."""
        reader = SampleReader(
            self.policy.tokenizer,
            self.policy.ontology,
            ImageReader(photos, self.images),
            self.model.config.vision,
            Limits(prompt=0, completion=self.completion, slots=0),
        )
        sizes = {fact.id: reader.size(fact, photo_sizes[fact.photo]) for fact in facts}
        needed = widest(list(sizes.values())).rounded(_DATA.round_to)
        limits = Limits(needed.length, self.completion, needed.slots)
        return dataclasses.replace(reader, limits=limits), sizes


def open_model(
    path: str, *, labels: Path | Ontology | None = None, completion: int | None = None
) -> LoadedModel:
    """Opens a checkpoint, on all devices.

    Args:
        path: a published folder or a name on the hub; a run's workdir, for the best parameters of
            its last stage; or one of its stages, such as `runs/demo/sft`. Folders are local or in a
            bucket (`gs://…`).
        labels: to answer from, or the `rel2id.json` that has them; None: the checkpoint's or the
            run's.
        completion: most tokens of an answer; None: as in training.

    Raises:
        ConfigError, WeightsError, CheckpointError, DataError: a file is missing or does not fit.
    """
    # A run's stage, else what must be a published folder.
    ontology = labels if isinstance(labels, Ontology | None) else _read_labels(labels)
    if "://" not in path:
        path = expand_home(path, "--checkpoint")
    in_bucket = path.startswith("gs://")
    folder = any_path(path, "--checkpoint") if in_bucket else Path(path)
    try:
        stage = _stage(folder)
        has_config = stage is None and (folder / weights.CONFIG).exists()
    except (ConfigError, DataError):
        raise
    except Exception as e:  # Clients of buckets have classes of their own.
        if not in_bucket:
            raise
        raise WeightsError(f"{path}: cannot be read: {one_line(e)}; start again") from e
    if stage is not None:
        return _trained(stage, ontology, completion)
    other_url = "://" in path and not in_bucket
    on_hub = not in_bucket and is_hub_name(path) and not folder.exists()
    if not (has_config or other_url or on_hub):
        check_kind(folder)
        problem = "no checkpoint" if folder.is_dir() else f"no such folder{did_you_mean(path)}"
        raise WeightsError(
            f"{path}: expected a run's workdir, one of its stages {', '.join(_BY_RANK)}, a "
            f"published folder (with a {weights.CONFIG}), or a name on the hub"
            f"{'' if folder.is_dir() else hub_hint(path)}, found {problem}"
        )
    return _published(path, ontology, completion)


def _read_labels(path: Path) -> Ontology:
    return read_ontology_file(any_path(path, "--labels"))


def _stage(path: Path) -> Path | None:
    """Returns the folder of the stage that a path means, or None if the path is not a run's."""
    if _is_there(path / CHECKPOINTS) and _counts(path.parent, RUN_CONFIG):
        return path
    try:
        described = read_json(path / RUN_CONFIG) if _counts(path, RUN_CONFIG) else {}
    except WeightsError:
        return None
    if "model_type" in described or "stages" not in described:
        return None
    for name in _BY_RANK:
        if Shelf(path / name / CHECKPOINTS).best() is not None:
            return path / name
    raise ConfigError(
        f"{path}: expected a run with a trained model, found one that has trained nothing yet; run "
        "its stage sft"
    )


def _is_there(folder: Path) -> bool:
    return bool(stores.names(folder)) if stores.in_bucket(folder) else folder.is_dir()


def _counts(workdir: Path, name: str) -> bool:
    """Returns whether a run has a file; in a bucket only what its index lists counts."""
    return name in listed(workdir) if stores.in_bucket(workdir) else (workdir / name).exists()


def _local(workdir: Path) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """Returns a run's workdir; of one in a bucket a copy of its config, tokenizer and labels."""
    if not stores.in_bucket(workdir):
        return workdir, None
    copy = tempfile.TemporaryDirectory()
    wanted = [
        name
        for name in listed(workdir)
        if name in (RUN_CONFIG, f"data/{LABELS}") or name.startswith("tokenizer/")
    ]
    stores.copy({Path(copy.name) / name: workdir / name for name in wanted})
    return Path(copy.name), copy


def _trained(stage: Path, ontology: Ontology | None, completion: int | None) -> LoadedModel:
    """Opens the model that a stage of a run trained."""
    # The run's config, for this machine's devices instead of those it was trained on.
    workdir, copy = _local(stage.parent)
    config = read_json(workdir / RUN_CONFIG, needed=False)
    config["mesh"] = dataclasses.asdict(MeshSettings())
    # Runs of older versions had not this branch, and a model that is asked does not need it.
    config["compile"] = dataclasses.asdict(CompileSettings())
    if isinstance(runtime := config.get("runtime"), dict):
        runtime["attention"] = "auto"
    try:
        setup = open_setup(settings(config, whole=True), workdir)
    except ConfigError as error:
        raise ConfigError(f"{stage.parent / RUN_CONFIG}: {error}") from None
    folder, data, checkpoint = setup.tokenizer, setup.settings.data, setup.checkpoint
    # The model with the run's own tokenizer: a new one would number tokens differently.
    if not folder.is_dir():
        raise WeightsError(
            f"{stage.parent / folder.name}: expected the run's tokenizer, found no such folder; "
            "copy the run's workdir anew"
        )
    tokenizer = load_tokenizer(folder)
    ontology = ontology or open_source(setup.data).ontology
    trainee = open_trainee(setup.settings, tokenizer, ontology, checkpoint, mesh_of_config=False)
    return LoadedModel(
        placed=trainee.placed,
        load=lambda: trainee.whole(trainee.best_params(stage / CHECKPOINTS)),
        images=image_config(data, trainee.placed.model.config.vision, checkpoint),
        completion=completion or data.completion_length,
        source=folder,
        tokenizer=tokenizer,
        dtypes="float32" if checkpoint is None else checkpoint.dtypes,
        ontology=ontology,
        digest=_digest(stage, folder),
        checkpoint=checkpoint,
        copy=copy,
    )


def _digest(stage: Path, tokenizer: Path) -> str:
    """Returns a digest of the best parameters, by their manifest, and of the tokenizer.

    It is the same wherever the run lies.
    """
    best, manifests = stage / CHECKPOINTS / "best", []
    for name in sorted(stores.names(best)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            manifests.append(stores.read_bytes(best / name / MANIFEST).decode())
    tokens = of_tokenizer(tokenizer)
    return of_lines([stage.name, *manifests, *tokens, *tokens.values()])


def _task(path: Path) -> dict[str, Any]:
    """Reads the crop and the answer's length of training, as far as the file exists and has them.

    Raises:
        WeightsError: a value is of another type or out of its bounds.
    """
    task = read_json(path, needed=False)
    for key, kinds, least in (
        ("crop_margin", (int, float), 0),
        ("crop_least", (int,), 1),
        ("completion_length", (int,), 1),
    ):
        value = task.get(key)
        if value is not None and not (type(value) in kinds and least <= value < math.inf):
            kind = "a number" if float in kinds else "a whole number"
            raise WeightsError(
                f"{path}: {key}: expected {kind}, at least {least}, found {value!r}; copy it anew"
            )
    return task


def _published(path: str, ontology: Ontology | None, completion: int | None) -> LoadedModel:
    checkpoint = weights.Checkpoint(path)
    folder = checkpoint.local_files
    if ontology is None and (folder / LABELS).exists():
        ontology = read_ontology_file(folder / LABELS)
    dtype = checkpoint.dtype
    tokenizer = load_tokenizer(folder)
    runtime, sizes = Runtime(param_dtype=dtype, dtype=dtype), checkpoint.config_with(tokenizer)
    # Parameters are split over all devices, so that a large model fits.
    placed = place(sizes, runtime, any_mesh(sizes))
    task = _task(folder / TASK)
    return LoadedModel(
        placed=placed,
        load=lambda: checkpoint.load(placed.like),
        images=read_images(folder, checkpoint.config.vision, task),
        completion=completion or task.get("completion_length", 1024),
        source=folder,
        tokenizer=tokenizer,
        dtypes=checkpoint.dtypes,
        ontology=ontology,
        digest=checkpoint.digest,
        checkpoint=checkpoint,
    )
