"""What the stages of a run share: data, tokenizer, encoder, model, mesh, and jitted programs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerFast

from morer1_jax.config.settings import Settings, VisionSettings
from morer1_jax.data import digests
from morer1_jax.data.encoder import Encoder, Limits
from morer1_jax.data.features import FeatureStore
from morer1_jax.data.reasoning import read_reasoning_dataset
from morer1_jax.data.shapes import Need
from morer1_jax.data.tokenizer import load_tokenizer, train_tokenizer
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.files import atomic_dir
from morer1_jax.learn.state import TrainState, abstract_params, init_sharded, new_state
from morer1_jax.learn.trainable import ADAPTER, TrainableParts, join, select, split
from morer1_jax.model.config import ImageConfig, ModelConfig, VisionConfig
from morer1_jax.model.layers import Params
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.paths import any_path
from morer1_jax.run import mesh as meshes
from morer1_jax.run.features import check_frozen, feature_store
from morer1_jax.run.kernels import choose
from morer1_jax.run.policy import Policy
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import student_prompt
from morer1_jax.weights import published as weights
from morer1_jax.weights.processor import read_images

SPLITS = ("train", "valid", "test")
REASONING = "reasoning.jsonl"
# The embedding's rows are a multiple of this, so that a mesh can split them.
_ROWS = 64


class Job:
    """One run: its settings, its workdir, and what is derived from the two, made when first used.

    Attributes:
      settings, workdir: as given.
      data: the dataset's folder, local or in a bucket (`gs://…`).
    """

    def __init__(
        self, settings: Settings, workdir: str | Path, ontology: Ontology | None = None
    ) -> None:
        self.settings = settings
        self._ontology = ontology
        self.workdir = Path(workdir)
        folder = settings.data.folder
        self.data = self.workdir / "data"
        if folder is not None:
            self.data = any_path(folder, "config.data.folder")

    @functools.cached_property
    def ontology(self) -> Ontology:
        """The labels: those given, or the dataset's."""
        return self._ontology or more.read_ontology(self.data)

    @functools.cached_property
    def facts(self) -> dict[str, list[Fact]]:
        """The facts of each split."""
        return {split: more.read_split(self.data, split, self.ontology) for split in SPLITS}

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Each fact's place in its split, by id."""
        return {fact.id: i for facts in self.facts.values() for i, fact in enumerate(facts)}

    @functools.cached_property
    def reasoning(self) -> dict[str, str]:
        """Written reasoning and answer by training fact's id."""
        source = self.settings.data.reasoning
        if source is not None:
            return read_reasoning_dataset(source, self.facts["train"], self.ontology)
        path = self.data / REASONING
        if not path.exists():
            raise DataError(
                f"{path}: no such file; SFT learns from written reasoning, a line "
                '{"fact": "train:1", "text": "<think>…</answer>"} each; put it there, or say '
                "where with data.reasoning"
            )
        return more.read_reasoning(path, self.facts["train"], self.ontology)

    @functools.cached_property
    def photos(self) -> dict[str, more.PhotoInfo]:
        """Size and digest of every photo; decodes each once, so that a bad one is found now."""
        return more.check_photos([f for facts in self.facts.values() for f in facts], self.data)

    @functools.cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(width, height) of every photo."""
        return {photo: seen.size for photo, seen in self.photos.items()}

    @functools.cached_property
    def needs(self) -> dict[str, Need]:
        """What each fact takes, by its id: with its written reasoning, if it has some.

        Raises:
          DataError: a fact that does not fit its limits.
        """
        facts = [fact for facts in self.facts.values() for fact in facts]
        encoder = self.new_encoder(pixels=True)
        found = encoder.needs(facts, self.sizes, self._known_reasoning())
        return {fact.id: need for fact, need in zip(facts, found, strict=True)}

    @functools.cached_property
    def checkpoint(self) -> weights.Checkpoint | None:
        """The published checkpoint the run begins with, if it does."""
        path = self.settings.model.path
        if path is None:
            return None
        checkpoint = weights.Checkpoint(path)
        held = self.settings.tune.frozen_dtype
        if held != "float32" and (wider := {*checkpoint.dtypes.values()} - {held}):
            raise ConfigError(
                f"config.tune.frozen_dtype: {held!r} would round what {checkpoint.folder} has in "
                f"{', '.join(sorted(wider))}; 'float32' expected"
            )
        return checkpoint

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The run's tokenizer: the checkpoint's, or one trained on the training split's texts.

        It is kept in the workdir, with whatever else the checkpoint has beside its tensors.
        """
        folder = self.workdir / "tokenizer"
        if not folder.exists():
            if self.checkpoint is not None:
                with atomic_dir(folder) as partial:
                    weights.copy_others(self.checkpoint.folder, partial)
            else:
                texts = (
                    student_prompt(fact, self.ontology) + self.reasoning.get(fact.id, "")
                    for fact in self.facts["train"]
                )
                train_tokenizer(texts, self.settings.data.vocabulary, folder)
        return load_tokenizer(folder)

    @property
    def _vision(self) -> VisionSettings | VisionConfig:
        """The vision tower's sizes."""
        if self.checkpoint is not None:
            return self.checkpoint.config.vision
        return self.settings.model.vision

    @functools.cached_property
    def images(self) -> ImageConfig:
        """How photos and crops are cut to patches, everywhere: pixel limits and crop as the config
        says, the rest as the checkpoint's processor does."""
        data, vision = self.settings.data, self._vision
        keys = ("min_pixels", "max_pixels", "crop_margin", "crop_least")
        said = {key: getattr(data, key) for key in keys}
        if self.checkpoint is None:
            return ImageConfig(
                patch_size=vision.patch_size,
                merge_size=vision.spatial_merge_size,
                temporal_patch_size=vision.temporal_patch_size,
                **said,
            )
        return dataclasses.replace(read_images(self.checkpoint.local_files, vision), **said)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder of the model proper, which sees all there is."""
        return self.new_encoder()

    @functools.cached_property
    def features(self) -> FeatureStore | None:
        """Kept features of all images, if the config wants them."""
        return feature_store(self) if self.settings.data.keep_features else None

    def new_encoder(self, *, pixels: bool = False, **blind: Any) -> Encoder:
        """An encoder; `completion=`, `show_photo=`, `show_title=` make it a blind baseline's.

        Args:
          pixels: whether to read photos even where features are kept.
        """
        data, window = self.settings.data, self._vision.window_size
        sees = blind.get("show_photo", True)
        limits = Limits(
            prompt=data.prompt_length,
            completion=blind.pop("completion", data.completion_length),
            windows=data.windows if sees else 0,
        )
        return Encoder(
            self.data,
            self.tokenizer,
            self.ontology,
            self.images,
            window,
            limits,
            features=None if pixels or not sees else self.features,
            **blind,
        )

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return meshes.make_mesh(dataclasses.asdict(self.settings.mesh))

    @functools.cached_property
    def policy(self) -> Policy:
        """The model with its tokenizer and labels, on the mesh."""
        settings = self.settings.runtime
        config = self._model_config()
        kernels = choose(settings.attention, settings.dtype, config.head_sizes, self.mesh)
        model = Qwen25VL(config, settings.runtime(kernels), self.parts.lora)
        return Policy(model, self.tokenizer, self.ontology, self.mesh)

    def _model_config(self) -> ModelConfig:
        special, sizes = SpecialIds.of(self.tokenizer), self.settings.model
        if self.checkpoint is not None:
            config = self.checkpoint.config_with(self.tokenizer)
        else:
            rows = -(-len(self.tokenizer) // _ROWS) * _ROWS
            config = ModelConfig(
                text=sizes.text.config(sizes.text.vocab_size or rows),
                vision=sizes.vision.config(sizes.text.hidden_size),
                image_token_id=special.image,
                video_token_id=special.video,
                vision_start_token_id=special.vision_start,
                vision_end_token_id=special.vision_end,
                tie_word_embeddings=sizes.text.tie_word_embeddings,
            )
        if (rows := config.text.vocab_size) < len(self.tokenizer):
            raise ConfigError(
                f"config.model.text.vocab_size: {rows} found, at least the tokenizer's "
                f"{len(self.tokenizer)} expected"
            )
        return config

    @property
    def parts(self) -> TrainableParts:
        """What of the model trains."""
        return self.settings.tune.parts()

    @functools.cached_property
    def score(self) -> ScoreConfig:
        """How GRPO scores: at the temperature it samples with."""
        return ScoreConfig(
            temperature=self.settings.grpo.temperature, chunk=self.settings.score.chunk
        )

    @functools.cached_property
    def like(self) -> tuple[Params, Params]:
        """Shapes, dtypes and shardings of the parameters that train, and of those that do not."""
        whole = like(abstract_params(self.policy.model), self.policy.param_shardings)
        trained, frozen = split(whole, self.parts)
        dtype = jnp.dtype(self.settings.tune.frozen_dtype)
        return trained, jax.tree.map(lambda leaf: leaf.update(dtype=dtype), frozen)

    @functools.cached_property
    def frozen(self) -> Params:
        """The parameters that do not train, on the mesh: held once, for all stages."""
        return self._begin(self.like[1], stream=0)

    def init_params(self, stream: int) -> Params:
        """The parameters that train, as training begins; `stream` sets one model of the run apart
        from another in what is drawn."""
        return self._begin(self.like[0], stream)

    def _begin(self, wanted: Params, stream: int) -> Params:
        drawn, loaded = wanted, {}
        if self.checkpoint is not None:
            drawn = select(wanted, lambda path: path[-1] in ADAPTER)
            loaded = select(wanted, lambda path: path[-1] not in ADAPTER)
        key = jax.random.fold_in(jax.random.key(self.settings.seed), stream)
        made = init_sharded(self.policy.model, key, drawn) if drawn else {}
        return join(made, self.checkpoint.load(loaded)) if loaded else made

    def whole(self, params: Params) -> Params:
        """A whole model's parameters, from those that train."""
        return join(params, self.frozen)

    def like_state(self, optimizer: Any) -> TrainState:
        """Shapes, dtypes and shardings of a train state."""
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer), self.like[0])
        return like(abstract, meshes.state_shardings(self.mesh, abstract, abstract.params))

    def new_state(self, params: Params, optimizer: Any) -> TrainState:
        """A state at step 0 around a copy of `params`, on the mesh.

        A copy, because a train step gives its state's buffers away and `params` may be needed on.
        """
        make = jax.jit(
            lambda p: new_state(jax.tree.map(jnp.copy, p), optimizer),
            out_shardings=meshes.shardings_of(self.like_state(optimizer)),
        )
        return make(params)

    @property
    def loading(self) -> dict[str, Any]:
        """How training loads its batches; see `load_ahead`."""
        data = self.settings.data
        return {"workers": data.workers, "kind": data.worker_kind}

    def check(self) -> None:
        """Finds bad data, and batches that the mesh cannot split, before a step is spent on them.

        Raises:
          ConfigError: a batch whose rows do not divide over the mesh.
          DataError: a photo that cannot be read, a fact that does not fit its bucket, or data that
            is not what the run began with.
        """
        config = self.settings
        parts = meshes.batch_parts(self.mesh)
        for key, rows in (
            ("rate.batch", config.rate.batch),
            ("grpo.prompts", config.grpo.prompts),
            ("evaluate.batch", config.evaluate.batch),
        ):
            if rows % parts:
                raise ConfigError(
                    f"config.{key}: {rows} found, a multiple of mesh.data × mesh.fsdp = {parts} "
                    "expected"
                )
        if config.data.keep_features:
            check_frozen(self.parts)
        self.policy  # noqa: B018  (finds labels that the tokenizer cannot write)
        self.needs  # noqa: B018  (finds what does not fit)
        if "baselines" in config.stages.split(","):
            # What stands for a hidden title may be longer than a short one.
            facts = [fact for facts in self.facts.values() for fact in facts]
            self.new_encoder(pixels=True, show_title=False).needs(facts, self.sizes, {})
        self._check_digests(self._known_reasoning())
        if self.checkpoint is not None:
            theirs = read_images(self.checkpoint.local_files, self._vision)
            for key in ("min_pixels", "max_pixels"):
                if (said := getattr(self.images, key)) != (own := getattr(theirs, key)):
                    print(f"data.{key}: {said}, though the processor of model.path has {own}")

    def _known_reasoning(self) -> dict[str, str]:
        """The written reasoning; none is an error only where a stage learns from it."""
        stages, config = self.settings.stages.split(","), self.settings
        learnt = {"sft", "control"} & {*stages} or (
            "baselines" in stages and config.baselines.facts == "written"
        )
        there = config.data.reasoning is not None or (self.data / REASONING).exists()
        return self.reasoning if learnt or there else {}

    def _check_digests(self, reasoning: dict[str, str]) -> None:
        """Keeps digests of the data, so that a run goes on with the same data only."""
        found = more.digests(self.data) | more.photo_digests(self.photos)
        found |= digests.of_tokenizer(self.workdir / "tokenizer")
        if self.checkpoint is not None:
            found["model.path"] = self.checkpoint.digest
        if self.settings.data.reasoning is not None:
            texts = json.dumps(reasoning, sort_keys=True).encode()
            found[self.settings.data.reasoning] = hashlib.sha256(texts).hexdigest()
        digests.bind(self.workdir / "data.json", found, self.data)
        if self.settings.data.keep_features and (self.workdir / "features").exists():
            self.features  # noqa: B018  (whether they are of these photos)


def like(state: Any, shardings: Any) -> Any:
    """The tree a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
