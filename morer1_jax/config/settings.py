"""A run's config as typed dataclasses: the one place that says which keys there are.

A config file gives an ml-collections `ConfigDict`; each of its branches is the dataclass of the
code that reads it, so a key nobody reads cannot exist and a key that is read cannot be missing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from morer1_jax.config.schema import build
from morer1_jax.data.curriculum import MixConfig
from morer1_jax.data.loader import WorkerKind
from morer1_jax.learn.grpo import LossConfig
from morer1_jax.learn.state import OptimizerConfig
from morer1_jax.learn.trainable import TrainableParts
from morer1_jax.model.attention import Kernels
from morer1_jax.model.config import AttentionChoice, LoRA, Runtime, TextConfig, VisionConfig
from morer1_jax.model.special import SPECIAL_TOKENS
from morer1_jax.rollout.reward import RewardConfig
from morer1_jax.world.synthesise import WorldConfig


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the facts are, and the fixed shapes they are brought into.

    Attributes:
      folder: a dataset in MORE's released form; None: the synthetic one in the workdir.
      reasoning: what SFT learns from, if not the folder's `reasoning.jsonl`: a JSONL or Parquet
        file or a dataset on the hub; see `data.reasoning`.
      vocabulary: size of the tokenizer that is trained on the training split's texts.
      prompt_length, completion_length: most tokens of a fact, vision and end-of-turn tokens among
        them.
      windows: most attention windows of the vision tower that a fact's images may fill.
      round_to: rows of tokens have a multiple of this length.
      shapes: programs that one kind of step may have, each for batches of another size; what sizes
        is chosen from the data (`data.shapes`).
      min_pixels, max_pixels, crop_margin, crop_least: see `data.images.ImageConfig`.
      keep_features: whether every image is encoded once and its features kept on disk; only where
        neither vision tower nor merger trains.
      workers: what prepares batches ahead of time, on each host.
      worker_kind: "thread", or "process" where photos are large and cores are many: training's
        batches then come from processes, which take some seconds to start.
    """

    folder: str | None
    reasoning: str | None
    vocabulary: int
    prompt_length: int
    completion_length: int
    windows: int
    round_to: int
    shapes: int
    min_pixels: int
    max_pixels: int
    crop_margin: float
    crop_least: int
    keep_features: bool
    workers: int
    worker_kind: WorkerKind

    def __post_init__(self) -> None:
        least = 256 + len(SPECIAL_TOKENS)
        if self.vocabulary < least:
            raise ValueError(
                f"vocabulary: {self.vocabulary} found, at least {least} expected (the bytes and "
                "the special tokens)"
            )
        if self.round_to < 1 or self.shapes < 1:
            raise ValueError(
                f"round_to {self.round_to} and shapes {self.shapes}: at least 1 expected of both"
            )
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels: {self.min_pixels} found, at most max_pixels = {self.max_pixels} "
                "expected"
            )


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """The vision tower; names as in Hugging Face's config."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    fullatt_block_indexes: tuple[int, ...]
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    initializer_range: float

    def __post_init__(self) -> None:
        # Sizes that do not fit each other are found before there is data.
        self.config(out_hidden_size=1)

    def config(self, out_hidden_size: int) -> VisionConfig:
        """The tower with features as wide as the decoder."""
        return VisionConfig(out_hidden_size=out_hidden_size, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """The decoder; names as in Hugging Face's config.

    Attributes:
      vocab_size: rows of the embedding; None: as many as the tokenizer needs.
    """

    vocab_size: int | None
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float
    initializer_range: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        self.config(vocab_size=1)

    def config(self, vocab_size: int) -> TextConfig:
        """The decoder over a vocabulary."""
        sizes = dataclasses.asdict(self)
        del sizes["tie_word_embeddings"]
        return TextConfig(**{**sizes, "vocab_size": vocab_size})


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model.

    Attributes:
      path: a published checkpoint to begin with: a folder, a bucket's folder (`gs://…`) or a name
        on the hub; None: from scratch.
      text, vision: sizes of a model from scratch; a checkpoint has its own.
    """

    path: str | None
    text: TextSettings
    vision: VisionSettings


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    """Adapters; see `model.config.LoRA`. Rank 0: none."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        self.lora()

    def lora(self) -> LoRA | None:
        """The adapters, or None."""
        return LoRA(self.rank, self.alpha, self.targets) if self.rank else None


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """What of the model trains; see `learn.trainable.TrainableParts`.

    Attributes:
      frozen_dtype: what parameters that do not train are held in.
    """

    vision: float
    merger: float
    language: float
    frozen_dtype: Literal["float32", "bfloat16"]
    lora: LoRASettings

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> TrainableParts:
        """As `learn` takes it."""
        return TrainableParts(self.vision, self.merger, self.language, self.lora.lora())


@dataclasses.dataclass(frozen=True)
class RuntimeSettings:
    """How a run computes; see `model.config.Runtime`.

    Attributes:
      attention: which kernels; see `run.kernels`.
    """

    param_dtype: str
    dtype: str
    remat: Literal["none", "full", "dots"]
    scan_unroll: int
    decode_unroll: bool
    attention: AttentionChoice

    def __post_init__(self) -> None:
        Runtime(**self._values())
        if self.param_dtype != "float32":
            raise ValueError(
                f"param_dtype: {self.param_dtype!r} found, 'float32' expected: an update at a "
                "usual learning rate is less than a rounding of a shorter type"
            )

    def runtime(self, kernels: Kernels) -> Runtime:
        return Runtime(**self._values(), kernels=kernels)

    def _values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["attention"]
        return values


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the device mesh's axes; one may be -1, whatever is left."""

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """Places of a sequence whose logits exist at once."""

    chunk: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long a training is, and how often it does what; all counted in steps.

    Attributes:
      eval_every: steps between greedy validations; the best checkpoint by micro F1 is kept.
    """

    steps: int
    eval_every: int
    save_every: int
    log_every: int
    keep_checkpoints: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings(LoopSettings):
    """Supervised fine-tuning.

    Attributes:
      batch: samples a step.
      micro_batches: parts of a batch whose activations exist at once.
      eval_facts: facts of the validation split that are asked; if it changes midway, the best is
        found among scores on different facts.
    """

    batch: int
    micro_batches: int
    eval_facts: int
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches: {self.micro_batches} found, at least 1 expected")


@dataclasses.dataclass(frozen=True)
class BaselineSettings:
    """Blind baselines: the same model trained to give the label without photo, or without title.

    Attributes:
      facts: whose labels are trained on: "written", those SFT learns from, or "all" of the training
        split, which GRPO learns from.
      steps, batch: of training.
      eval_every: steps between validations; the best by micro F1 is scored.
    """

    facts: Literal["written", "all"]
    steps: int
    batch: int
    eval_every: int
    eval_facts: int
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RateSettings:
    """Rating difficulty by sampling the SFT model.

    Attributes:
      begin: whose answers are rated, and what GRPO begins with: "sft", what that stage trained, or
        "checkpoint", `model.path` as it is.
      file: ratings made before, as `tools/rate_difficulty.py` writes them; None: they are made now.
      samples: k, answers drawn to each training fact.
      batch: facts at once.
      temperature: of sampling.
      easy_from: pass rate from which a fact is easy.
      never: what becomes of facts never solved: "hard" keeps them, "drop" leaves them out.
        Both may change after rating, until GRPO has begun: pools follow from the pass rates.
    """

    begin: Literal["sft", "checkpoint"]
    file: str | None
    samples: int
    batch: int
    temperature: float
    easy_from: float
    never: Literal["hard", "drop"]

    def __post_init__(self) -> None:
        if not 0.0 < self.easy_from <= 1.0:
            raise ValueError(f"easy_from: {self.easy_from} found, above 0 and at most 1 expected")
        if not self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} found, a finite number expected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOSettings(LoopSettings):
    """GRPO with Progressive Sample-Mixing.

    Attributes:
      prompts: facts a rollout.
      group: samples a fact.
      updates: optimizer updates on each rollout.
      micro_batches: parts of a rollout whose activations exist at once.
      temperature: of sampling and scoring.
      scale_rewards: what advantages are divided by; see `rollout.reward.advantages`.
      mixing: False draws from all facts alike, rated easy or hard (an ablation).
      rollouts_every: steps between records in `rollouts.jsonl`.
    """

    prompts: int
    group: int
    updates: int
    micro_batches: int
    temperature: float
    scale_rewards: Literal["group", "batch", "none"]
    mixing: bool
    eval_facts: int
    rollouts_every: int
    mix: MixConfig
    reward: RewardConfig
    loss: LossConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"group: {self.group} found, at least 2 expected: a group is compared")
        if self.temperature == 0.0:
            raise ValueError("temperature: 0 found, above 0 expected: a group must differ")
        if self.prompts % self.micro_batches:
            raise ValueError(
                f"micro_batches: {self.micro_batches} found, a divisor of the {self.prompts} "
                "prompts of a batch expected"
            )


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """SFT that goes on, for `steps`; None: for as long as rating and GRPO took."""

    steps: int | None


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Greedy scoring on the test split, `batch` facts at once."""

    batch: int


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
    """Which steps of each training are traced, `(first, last)`; none of them: `()`."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise ValueError(
                f"profile.steps: {self.steps} found, () or (first, last) expected, counted from 1"
            )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole config.

    Attributes:
      seed: of everything random.
      stages: comma-separated, run in that order; one whose output is whole is passed. Which there
        are is said by `stages.table`, which also checks these.
    """

    seed: int
    stages: str
    data: DataSettings
    world: WorldConfig
    model: ModelSettings
    tune: TuneSettings
    runtime: RuntimeSettings
    mesh: MeshSettings
    score: ScoreSettings
    sft: SFTSettings
    baselines: BaselineSettings
    rate: RateSettings
    grpo: GRPOSettings
    control: ControlSettings
    evaluate: EvaluateSettings
    profile: ProfileSettings


def settings(config: ConfigDict | Mapping[str, Any]) -> Settings:
    """Checks a whole config and builds it; see `schema.build`."""
    return build(Settings, config)
