"""What the stages of a run share: data, tokenizer, encoder, model, mesh, and jitted programs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import PreTrainedTokenizerFast

from morer1_jax.data.batch import Buckets, Encoder
from morer1_jax.data.feed import Host
from morer1_jax.data.images import ImageConfig
from morer1_jax.data.tokenizer import SpecialIds, load_tokenizer, train_tokenizer
from morer1_jax.data.tokens import build_tables, token_bytes
from morer1_jax.files import atomic_write
from morer1_jax.learn.scorer import ScoreConfig
from morer1_jax.learn.state import TrainState, abstract_params, init_sharded, new_state
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.sampler import Reader, allowed_ids
from morer1_jax.run import mesh as meshes
from morer1_jax.run.config import ConfigError
from morer1_jax.run.settings import Settings
from morer1_jax.task import more
from morer1_jax.task.fact import DataError, Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import student_prompt

SPLITS = ("train", "valid", "test")
# The embedding's rows are a multiple of this, so that a mesh can split them.
_ROWS = 64


class Job:
    """One run: its settings, its workdir, and what is derived from the two, made when first used.

    Attributes:
      settings, workdir: as given.
      data: the dataset's folder, local or in a bucket (`gs://…`).
    """

    def __init__(self, settings: Settings, workdir: str | Path) -> None:
        self.settings = settings
        self.workdir = Path(workdir)
        folder = settings.data.folder
        self.data = self.workdir / "data" if folder is None else epath.Path(folder)

    @functools.cached_property
    def ontology(self) -> Ontology:
        return more.read_ontology(self.data)

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
        path = self.data / "reasoning.jsonl"
        if not path.exists():
            raise DataError(
                f"{path}: no such file; SFT learns from written reasoning, a line "
                '{"fact": "train:1", "text": "<think>…</answer>"} each'
            )
        return more.read_reasoning(path, self.facts["train"], self.ontology)

    @functools.cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(width, height) of every photo; decodes each once, so that a bad one is found now."""
        return more.check_photos([f for facts in self.facts.values() for f in facts], self.data)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The run's tokenizer, trained on the training split's texts if it is not there yet."""
        folder = self.workdir / "tokenizer"
        if not folder.exists():
            texts = (
                student_prompt(fact, self.ontology) + self.reasoning.get(fact.id, "")
                for fact in self.facts["train"]
            )
            train_tokenizer(texts, self.settings.data.vocabulary, folder)
        return load_tokenizer(folder)

    @functools.cached_property
    def special(self) -> SpecialIds:
        return SpecialIds.of(self.tokenizer)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder of the model proper, which sees all there is."""
        return self.new_encoder()

    def new_encoder(self, **blind: Any) -> Encoder:
        """An encoder; `completion=`, `show_photo=`, `show_title=` make it a blind baseline's."""
        data, vision = self.settings.data, self.settings.model.vision
        images = ImageConfig(
            min_pixels=data.min_pixels,
            max_pixels=data.max_pixels,
            crop_margin=data.crop_margin,
            crop_least=data.crop_least,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )
        buckets = Buckets(
            prompt=data.prompt_length,
            completion=blind.pop("completion", data.completion_length),
            windows=data.windows if blind.get("show_photo", True) else 0,
        )
        return Encoder(
            self.data, self.tokenizer, self.ontology, images, vision.window_size, buckets, **blind
        )

    @functools.cached_property
    def model(self) -> Qwen25VL:
        sizes = self.settings.model
        rows = -(-len(self.tokenizer) // _ROWS) * _ROWS
        config = ModelConfig(
            text=sizes.text.config(rows),
            vision=sizes.vision.config(sizes.text.hidden_size),
            image_token_id=self.special.image,
            video_token_id=self.special.video,
            vision_start_token_id=self.special.vision_start,
            vision_end_token_id=self.special.vision_end,
            tie_word_embeddings=sizes.text.tie_word_embeddings,
        )
        return Qwen25VL(config, self.settings.runtime)

    @functools.cached_property
    def score(self) -> ScoreConfig:
        """How GRPO scores: at the temperature it samples with."""
        return ScoreConfig(
            temperature=self.settings.grpo.temperature, chunk=self.settings.score.chunk
        )

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return meshes.make_mesh(dataclasses.asdict(self.settings.mesh))

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @functools.cached_property
    def rows(self) -> NamedSharding:
        """The sharding of anything whose leading axis is a batch's rows."""
        return meshes.batch_sharding(self.mesh)

    @functools.cached_property
    def param_shardings(self) -> Any:
        return meshes.param_shardings(self.mesh, abstract_params(self.model))

    @functools.cached_property
    def reader(self) -> Reader:
        """The answer's automata over this vocabulary, on the mesh."""
        pieces = token_bytes(self.tokenizer, self.model.config.text.vocab_size)
        tables = build_tables(pieces, self.ontology.labels)
        return jax.device_put(Reader.of(tables), self.replicated)

    @functools.cached_property
    def allowed(self) -> jax.Array:
        """Which ids may be sampled, on the mesh."""
        rows = self.model.config.text.vocab_size
        return jax.device_put(
            jnp.asarray(allowed_ids(self.special, len(self.tokenizer), rows)), self.replicated
        )

    def init_params(self, stream: int) -> Any:
        """Parameters from scratch; `stream` tells one model of the run from another."""
        key = jax.random.fold_in(jax.random.key(self.settings.seed), stream)
        return init_sharded(self.model, key, self.param_shardings)

    def new_state(self, params: Any, optimizer: Any) -> tuple[TrainState, Any]:
        """A state at step 0 around a copy of `params`, on the mesh, and its shardings.

        A copy, because a train step gives its state's buffers away and `params` may be needed on.
        """
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer), params)
        shardings = meshes.state_shardings(self.mesh, abstract, abstract.params)
        make = jax.jit(
            lambda p: new_state(jax.tree.map(jnp.copy, p), optimizer), out_shardings=shardings
        )
        return make(params), shardings

    def like_params(self) -> Any:
        """The tree that saved parameters are restored into."""
        return like(abstract_params(self.model), self.param_shardings)

    def put(self, batch: Any) -> Any:
        """A host's rows of a batch, onto the mesh."""
        return meshes.put_batch(batch, self.mesh)

    @property
    def host(self) -> Host:
        """This process, which prepares its rows of every batch."""
        return Host(jax.process_index(), jax.process_count())

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
        parts = math.prod(self.mesh.shape[name] for name in meshes.BATCH_AXES)
        for key, rows in (
            ("sft.batch", config.sft.batch),
            ("baselines.batch", config.baselines.batch),
            ("rate.batch", config.rate.batch),
            ("grpo.prompts", config.grpo.prompts),
            ("evaluate.batch", config.evaluate.batch),
        ):
            if rows % parts:
                raise ConfigError(
                    f"config.{key}: {rows} found, a multiple of mesh.data × mesh.fsdp = {parts} "
                    "expected"
                )
        for facts in self.facts.values():
            self.encoder.check(facts, self.sizes, self.reasoning)
        self._check_digests()

    def _check_digests(self) -> None:
        """Keeps the digests of the data's files, so that a run goes on with the same data only."""
        path, found = self.workdir / "data.json", more.digests(self.data)
        if not path.exists():
            atomic_write(path, json.dumps(found, indent=1) + "\n")
        kept = json.loads(path.read_text())
        names = sorted({*kept, *found})
        if changed := [name for name in names if kept.get(name) != found.get(name)]:
            raise DataError(
                f"{self.data}: {', '.join(changed)} changed since the run began ({path}); put it "
                "back, or use a new --workdir"
            )


def like(state: Any, shardings: Any) -> Any:
    """The tree a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
