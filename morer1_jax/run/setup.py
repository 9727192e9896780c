"""Opens and checks what the stages of a run share, before a step is spent."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morer1_jax.config.settings import DataSettings, Settings
from morer1_jax.data import digests
from morer1_jax.data.dataset import Dataset, open_dataset
from morer1_jax.data.images import ImageReader
from morer1_jax.data.sample import Limits, SampleReader, View
from morer1_jax.data.shapes import SampleSize
from morer1_jax.data.tokenizer import load_tokenizer, train_tokenizer
from morer1_jax.errors import ConfigError, DataError, abridged
from morer1_jax.files import atomic_dir
from morer1_jax.hosts import group
from morer1_jax.model.config import ImageConfig, VisionConfig
from morer1_jax.paths import any_path
from morer1_jax.run import mesh as meshes
from morer1_jax.run.batch_sampler import BatchSampler, greedy_sampler
from morer1_jax.run.features import (
    check_features,
    check_frozen,
    features_origin,
    open_features,
)
from morer1_jax.run.store import Store
from morer1_jax.run.trainee import Trainee, open_trainee
from morer1_jax.weights import published
from morer1_jax.weights.processor import read_images


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a config names, before any of the dataset is read.

    Attributes:
        store: the workdir.
        data: the dataset's folder, local or in a bucket (`gs://…`).
        checkpoint: the published checkpoint that the run starts from; None: from scratch.
    """

    settings: Settings
    store: Store
    data: Path
    checkpoint: published.Checkpoint | None

    @property
    def workdir(self) -> Path:
        """The local folder in which the run works."""
        return self.store.folder

    @property
    def tokenizer(self) -> Path:
        """The folder of the run's tokenizer and of a checkpoint's other files beside tensors."""
        return self.workdir / "tokenizer"

    @property
    def trains_tokenizer(self) -> bool:
        """Whether a tokenizer must be trained, on the training facts and the reasoning."""
        return self.checkpoint is None and not self.tokenizer.exists()


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages share.

    Attributes:
        store: the workdir.
        dataset: facts, labels, reasoning and photos.
        trainee: the model, what of it trains and what is frozen.
        images: how photos and crops become patches, everywhere in the run.
        reader: facts as the model proper sees them; with kept features, once these are encoded.
        sizes: what each fact takes of a row, by its id; with its written reasoning, if it has any.
        prepared: by their names, what stages have made ready before they begin, programs among it;
            a stage takes it out, so that it is freed at the stage's end.
    """

    settings: Settings
    store: Store
    dataset: Dataset
    trainee: Trainee
    images: ImageConfig
    reader: SampleReader
    sizes: Mapping[str, SampleSize]
    prepared: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def workdir(self) -> Path:
        """The local folder in which the run works."""
        return self.store.folder

    @functools.cached_property
    def greedy(self) -> BatchSampler:
        """Samples the likeliest answer to any fact; the same programs serve all stages."""
        settings, splits = self.settings, self.dataset.splits
        counts = {settings.sft.eval_facts, settings.grpo.eval_facts}
        sets = [*(splits["valid"][:count] for count in sorted(counts)), splits["test"]]
        return greedy_sampler(settings, self.trainee.policy, self.reader, self.sizes, sets)

    @property
    def loop_options(self) -> dict[str, Any]:
        """The options of `loop.train` that are equal for all trainings."""
        data = self.settings.data
        return {
            "workers": data.workers,
            "kind": data.worker_kind,
            "profile": self.settings.profile.steps,
        }


def open_setup(settings: Settings, workdir: str | os.PathLike[str]) -> Setup:
    """Resolves the dataset's folder and opens the checkpoint; writes nothing.

    Args:
        workdir: local, or in a bucket.

    Raises:
        ConfigError, WeightsError: the checkpoint is missing, damaged, or would be rounded.
    """
    folder, path = settings.data.folder, settings.model.path
    store = Store(workdir)
    data = store.folder / "data" if folder is None else any_path(folder, "config.data.folder")
    checkpoint = None if path is None else published.Checkpoint(path)
    frozen_dtype = settings.tune.frozen_dtype
    others = set() if checkpoint is None else {*checkpoint.dtypes.values()} - {frozen_dtype}
    if frozen_dtype != "float32" and others:
        raise ConfigError(
            f"config.tune.frozen_dtype: expected 'float32', found {frozen_dtype!r}, which would "
            f"round what {checkpoint.folder} has in {', '.join(sorted(others))}"
        )
    return Setup(settings, store, data, checkpoint)


def open_run(setup: Setup, *, reasoning_needed: bool, blind_views: Sequence[View] = ()) -> Run:
    """Opens and checks all that the stages of a run share; makes and reads no parameters.

    Writes the run's tokenizer and the digests of its data into the workdir, where they are missing.

    Args:
        reasoning_needed: whether a stage learns from written reasoning.
        blind_views: of the baselines that will be trained.

    Raises:
        ConfigError: a batch whose rows do not divide over the mesh, or sizes that do not fit.
        DataError: a photo that cannot be read, a fact that does not fit its bucket, or data that is
            not what the run began with.
    """
    # Settings, data and tokenizer.
    settings, checkpoint = setup.settings, setup.checkpoint
    _check_batches(settings)
    if settings.data.keep_features:
        check_frozen(settings.tune)
    setup.store.share("data")
    dataset = open_dataset(
        setup.data,
        reasoning=settings.data.reasoning,
        reasoning_needed=reasoning_needed or setup.trains_tokenizer,
    )
    group.by_first("tokenizer", lambda: make_tokenizer(setup, dataset))
    setup.store.share("tokenizer")
    tokenizer = load_tokenizer(setup.tokenizer)
    # The model, and the reader of what it sees.
    trainee = open_trainee(settings, tokenizer, dataset.ontology, checkpoint)
    vision = trainee.policy.model.config.vision
    images = image_config(settings.data, vision, checkpoint)
    limits = Limits(
        prompt=settings.data.prompt_length,
        completion=settings.data.completion_length,
        slots=settings.data.windows,
    )
    reader = SampleReader(
        tokenizer, dataset.ontology, ImageReader(dataset.source, images), vision, limits
    )
    # Measure every fact, so that one that does not fit is found before a step is spent.
    sizes = reader.sizes(dataset.facts, dataset.photo_sizes, dataset.reasoning)
    for view in blind_views:
        # The text in place of a hidden title may be longer than a short title.
        if view.photo:
            blind = reader.showing(view, limits.completion)
            blind.sizes(dataset.facts, dataset.photo_sizes, {})
    # Compare with the data and the features that the workdir began with.
    _bind_data(setup, dataset)
    if settings.data.keep_features:
        origin = features_origin(settings, dataset, images, checkpoint)
        group.by_first("features", lambda: check_features(setup.workdir, vision, origin))
    if checkpoint is not None:
        _print_other_limits(images, vision, checkpoint)
    return Run(
        settings=settings,
        store=setup.store,
        dataset=dataset,
        trainee=trainee,
        images=images,
        reader=reader,
        sizes={fact.id: size for fact, size in zip(dataset.facts, sizes, strict=True)},
    )


def with_features(run: Run) -> Run:
    """Returns the run with kept features of all images, if its config sets `keep_features`.

    Encodes them if they are missing.
    """
    settings = run.settings
    if not settings.data.keep_features:
        return run
    origin = features_origin(settings, run.dataset, run.images, run.trainee.checkpoint)
    features = open_features(
        run.store, origin, run.dataset, run.trainee, run.reader, settings.data.workers
    )
    return dataclasses.replace(run, reader=dataclasses.replace(run.reader, features=features))


def make_tokenizer(setup: Setup, dataset: Dataset) -> None:
    """Makes the run's tokenizer: the checkpoint's, or one trained on the training facts' texts.

    The workdir keeps it, with the checkpoint's other files beside its tensors.
    """
    folder = setup.tokenizer
    if folder.exists():
        return
    if setup.checkpoint is not None:
        with atomic_dir(folder) as partial:
            published.copy_others(setup.checkpoint.folder, partial)
    else:
        train_tokenizer(dataset.texts(), setup.settings.data.vocabulary, folder)


def image_config(
    data: DataSettings, vision: VisionConfig, checkpoint: published.Checkpoint | None
) -> ImageConfig:
    """Returns how photos and crops become patches.

    Pixel limits and crop are the config's, the rest is the checkpoint's processor's.
    """
    keys = ("min_pixels", "max_pixels", "crop_margin", "crop_least")
    chosen = {key: getattr(data, key) for key in keys}
    if checkpoint is None:
        return ImageConfig(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            **chosen,
        )
    return dataclasses.replace(read_images(checkpoint.local_files, vision), **chosen)


def _print_other_limits(
    images: ImageConfig, vision: VisionConfig, checkpoint: published.Checkpoint
) -> None:
    """Prints pixel limits in which the config differs from the checkpoint's processor."""
    processor = read_images(checkpoint.local_files, vision)
    for key in ("min_pixels", "max_pixels"):
        if (chosen := getattr(images, key)) != (own := getattr(processor, key)):
            print(f"data.{key}: {chosen}, though the processor of model.path has {own}")


def _check_batches(settings: Settings) -> None:
    """Checks that the mesh can split the rows of a rollout; all other batches are filled up."""
    mesh = meshes.make_mesh(settings.mesh.axes)
    meshes.check_rows("grpo.prompts", settings.grpo.prompts, mesh)


def _bind_data(setup: Setup, dataset: Dataset) -> None:
    """Stores digests of the data, or checks that they are those stored when the run began.

    Raises:
        DataError: they are not, or another process has other data.
    """
    digest_by_name = {**dataset.digests, **digests.of_tokenizer(setup.tokenizer)}
    if setup.checkpoint is not None:
        digest_by_name["model.path"] = setup.checkpoint.digest
    if others := group.unlike_first("data", digest_by_name):
        raise DataError(
            f"{setup.data}: expected process 0's data, tokenizer and checkpoint on every process, "
            f"found others on process {abridged(others)}; copy one folder to all hosts, or name "
            "one that they share"
        )
    bound = setup.workdir / "data.json"
    group.by_first("data", lambda: digests.bind(bound, digest_by_name, setup.data))
