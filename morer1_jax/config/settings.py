"""A run's config as typed dataclasses: the one place that says which keys there are.

A config file begins from `default_config()` and changes what its run changes. Each branch is the
dataclass of the code that reads it, so a key nobody reads cannot exist, and what a config does not
say is the field's default. Defaults are those of Qwen2.5-VL-3B on MORE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from morer1_jax.bounds import above, at_least, check_bounds
from morer1_jax.config.schema import build, to_config
from morer1_jax.data.curriculum import MixConfig
from morer1_jax.data.loader import WorkerKind
from morer1_jax.errors import FieldError
from morer1_jax.learn.grpo import LossConfig
from morer1_jax.learn.state import OptimizerConfig
from morer1_jax.learn.trainable import TrainableParts
from morer1_jax.model.config import Runtime, TextConfig, VisionConfig
from morer1_jax.model.special import SPECIAL_TOKENS
from morer1_jax.rollout.config import check_stages, parse_stages
from morer1_jax.rollout.reward import RewardConfig
from morer1_jax.world.synthesise import WorldConfig


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the facts are, and the fixed shapes they are brought into.

    Attributes:
        folder: a dataset in MORE's released form, or the folder `more` of its TensorFlow dataset,
            local or in a bucket; None: the synthetic one in the workdir.
        reasoning: what SFT learns from, if not the folder's `reasoning.jsonl`: a JSONL or Parquet
            file or a dataset on the hub; see `data.reasoning`.
        vocabulary: size of the tokenizer that is trained on the training split's texts (the bytes
            and the special tokens among them); a checkpoint brings its own.
        prompt_length, completion_length: most tokens of a fact, vision and end-of-turn tokens among
            them.
        windows: most attention windows of the vision tower that a fact's images may fill; a photo
            of 640 × 480 fills 25.
        round_to: rows of tokens have a multiple of this length, as TPU kernels want it.
        shapes: programs that one kind of step may have, each for batches of another size; what
            sizes is chosen from the data (`data.shapes`).
        min_pixels, max_pixels, crop_margin, crop_least: see `model.config.ImageConfig`.
        keep_features: whether every image is encoded once and its features kept on disk; only where
            neither vision tower nor merger trains.
        workers: what prepares batches ahead of time, on each host.
        worker_kind: "thread", or "process" where photos are large and cores are many: training's
            batches then come from processes, which take some seconds to start.
    """

    folder: str | None = None
    reasoning: str | None = None
    vocabulary: int = at_least(256 + len(SPECIAL_TOKENS), 151_936)
    prompt_length: int = at_least(1, 1536)
    completion_length: int = at_least(1, 1024)
    windows: int = at_least(1, 80)
    round_to: int = at_least(1, 128)
    shapes: int = at_least(1, 3)
    min_pixels: int = at_least(1, 56 * 56)
    max_pixels: int = at_least(1, 512 * 28 * 28)
    crop_margin: float = at_least(0, 0.1)
    crop_least: int = at_least(1, 28)
    keep_features: bool = False
    workers: int = at_least(1, 8)
    worker_kind: WorkerKind = "process"

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.min_pixels > self.max_pixels:
            raise FieldError(
                "min_pixels",
                f"expected at most max_pixels = {self.max_pixels}, found {self.min_pixels}",
            )


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model.

    Attributes:
        path: a published checkpoint to begin with: a folder, a bucket's folder (`gs://…`) or a name
            on the hub; None: from scratch.
        text, vision: sizes of a model from scratch; a checkpoint has its own.
    """

    path: str | None = None
    text: TextConfig = TextConfig(tie_word_embeddings=True)
    vision: VisionConfig = VisionConfig()


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the device mesh's axes; one may be -1, whatever is left.

    Attributes:
        sampling_tensor: devices that parameters are split over by heads and features while answers
            are sampled, and that share the rows of a batch; the others hold copies. None: as
            `tensor`.
    """

    data: int = at_least(-1, 1)
    fsdp: int = at_least(-1, -1)
    tensor: int = at_least(-1, 1)
    sampling_tensor: int | None = at_least(1, None)

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def axes(self) -> dict[str, int]:
        """The sizes by the axes' names, outermost first."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """Places of a device's rows whose logits exist at once; at least one of each row."""

    chunk: int = at_least(1, 1024)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How slots of the decode loop become fewer as completions end.

    Beyond rounding no token depends on it.

    Attributes:
        stages: of the loop, share of the samples and tokens of each (`rollout.config.Stage`), such
            as `1:256,0.5:512,0.2:1024`. `auto`: those that cost least if completions are about as
            long as what SFT learns from; `whole`: every sample keeps its slot.
        cache: GB of a device's memory for keys and values of completions, which `auto` keeps to if
            it can.
    """

    stages: str = "auto"
    cache: float = above(0, 3.0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.stages not in ("auto", "whole"):
            try:
                parse_stages(self.stages)
            except ValueError as error:
                raise FieldError(
                    "stages",
                    "expected auto, whole or share:tokens of each stage, as "
                    f"1:256,0.5:512,0.2:1024, found {self.stages!r}",
                ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long a training is, and how often it does what; all counted in steps.

    Attributes:
        eval_every: steps between greedy validations; the best checkpoint by micro F1 is kept.
        keep_checkpoints: that stay while it trains.
    """

    steps: int = at_least(1, 200)
    eval_every: int = at_least(1, 50)
    save_every: int = at_least(1, 50)
    log_every: int = at_least(1, 1)
    keep_checkpoints: int = at_least(1, 2)

    def __post_init__(self) -> None:
        check_bounds(self)


_SFT_OPTIMIZER = OptimizerConfig(lr=1e-5, schedule="cosine", warmup=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings(LoopSettings):
    """Supervised fine-tuning.

    Attributes:
        batch: samples a step.
        micro_batches: parts of a batch whose activations exist at once.
        eval_facts: facts of the validation split that are asked; if it changes midway, the best is
            found among scores on different facts.
    """

    batch: int = at_least(1, 64)
    micro_batches: int = at_least(1, 1)
    eval_facts: int = at_least(1, 512)
    optimizer: OptimizerConfig = _SFT_OPTIMIZER


@dataclasses.dataclass(frozen=True)
class BaselineSettings:
    """Blind baselines: the same model trained to give the label without photo, or without title.

    Attributes:
        facts: whose labels are trained on: "written", those SFT learns from, or "all" of the
            training split, which GRPO learns from.
        steps, batch: of training.
        eval_every: steps between validations; the best by micro F1 is scored.
    """

    facts: Literal["written", "all"] = "written"
    steps: int = at_least(1, 200)
    batch: int = at_least(1, 64)
    eval_every: int = at_least(1, 50)
    eval_facts: int = at_least(1, 512)
    optimizer: OptimizerConfig = _SFT_OPTIMIZER

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class RateSettings:
    """Rating difficulty by sampling the starting model.

    Attributes:
        begin: whose answers are rated, and what GRPO begins with: "sft", what that stage trained,
            or "checkpoint", `model.path` as it is.
        file: ratings made before, as `tools/rate_difficulty.py` writes them; None: they are made
            now.
        samples: k, answers drawn to each training fact; as many as GRPO draws, since a fact is easy
            if its group mostly is right.
        batch: facts at once, filled up to what the mesh splits rows into.
        temperature: of sampling; 0 for the likeliest answer.
        easy_from: pass rate from which a fact is easy.
        never: what becomes of facts never solved: "hard" keeps them, "drop" leaves them out. Both
            may change after rating, until GRPO has begun: pools follow from the pass rates.
    """

    begin: Literal["sft", "checkpoint"] = "sft"
    file: str | None = None
    samples: int = at_least(1, 8)
    batch: int = at_least(1, 64)
    temperature: float = at_least(0, 1.0)
    easy_from: float = above(0, 0.5)
    never: Literal["hard", "drop"] = "hard"

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.easy_from > 1.0:
            raise FieldError("easy_from", f"expected at most 1, found {self.easy_from}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOSettings(LoopSettings):
    """GRPO with Progressive Sample-Mixing; a step is a rollout.

    Attributes:
        prompts: facts a rollout.
        group: samples a fact, which are compared.
        updates: optimizer updates on each rollout; 1 is on-policy, without old log-probabilities.
        micro_batches: parts that a rollout is scored and trained on in, one after another; fewer
            where a part would not fill the mesh.
        rollout_parts: parts that a rollout is sampled in, likewise, where keys and values of all
            completions would not fit.
        temperature: of sampling and scoring.
        scale_rewards: what advantages are divided by; see `rollout.reward.advantages`.
        mixing: False draws from all facts alike, rated easy or hard (an ablation).
        rollouts_every: steps between records in `rollouts.jsonl`.
    """

    eval_every: int = at_least(1, 20)
    save_every: int = at_least(1, 20)
    prompts: int = at_least(1, 128)
    group: int = at_least(2, 8)
    updates: int = at_least(1, 1)
    micro_batches: int = at_least(1, 4)
    rollout_parts: int = at_least(1, 1)
    temperature: float = above(0, 1.0)
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mixing: bool = True
    eval_facts: int = at_least(1, 512)
    rollouts_every: int = at_least(1, 10)
    mix: MixConfig = MixConfig(start=0.5, end=0.1, until=160)
    reward: RewardConfig = RewardConfig(format=0.5, effort=0.5, effort_from=200, effort_to=500)
    loss: LossConfig = LossConfig(beta=1e-3)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6, warmup=5)

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("micro_batches", "rollout_parts"):
            if self.prompts % getattr(self, name):
                raise FieldError(
                    name,
                    f"expected a divisor of the {self.prompts} prompts of a batch, found "
                    f"{getattr(self, name)}",
                )


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """SFT that goes on, for `steps`; None: for as long as rating and GRPO took."""

    steps: int | None = at_least(1, None)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Greedy scoring on the test split, `batch` facts at once, filled up as in rating."""

    batch: int = at_least(1, 64)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class CompileSettings:
    """How programs are compiled.

    Attributes:
        threads: number of threads in which the programs of the stages are compiled before a stage
            begins, as far as their shapes are known by then; 0: each when it is first called.
    """

    threads: int = at_least(0, 0)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
    """Which steps of each training are traced, `(first, last)`; none of them: `()`."""

    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise FieldError(
                "steps", f"expected () or (first, last), counted from 1, found {self.steps}"
            )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The whole config.

    Attributes:
        seed: of everything random.
        stages: comma-separated, run in that order; one whose output is whole is passed. Which there
            are is said by `stages.table`, which also checks these.
    """

    seed: int = at_least(0, 0)
    stages: str = "sft,evaluate"
    data: DataSettings = DataSettings()
    world: WorldConfig = WorldConfig()
    model: ModelSettings = ModelSettings()
    tune: TrainableParts = TrainableParts(vision=0.0, frozen_dtype="bfloat16")
    runtime: Runtime = Runtime(dtype="bfloat16", remat="full", decode_unroll=True)
    mesh: MeshSettings = MeshSettings()
    score: ScoreSettings = ScoreSettings()
    sampling: SamplingSettings = SamplingSettings()
    sft: SFTSettings = SFTSettings()
    baselines: BaselineSettings = BaselineSettings()
    rate: RateSettings = RateSettings()
    grpo: GRPOSettings = GRPOSettings()
    control: ControlSettings = ControlSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    compile: CompileSettings = CompileSettings()
    profile: ProfileSettings = ProfileSettings()

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.sampling.stages not in ("auto", "whole"):
            stages = parse_stages(self.sampling.stages)
            check_stages("sampling.stages", stages, self.data.completion_length)
        if (dtype := self.runtime.param_dtype) != "float32":
            raise FieldError(
                "runtime.param_dtype",
                f"expected 'float32', found {dtype!r}: an update at a usual learning rate is less "
                "than a rounding of a shorter type",
            )


def default_config() -> ConfigDict:
    """Returns a config of all keys with their defaults, for a config file to begin from."""
    return to_config(Settings())


def settings(config: ConfigDict | Mapping[str, Any], *, whole: bool = False) -> Settings:
    """Checks a config and builds it; see `schema.build`."""
    return build(Settings, config, whole=whole)
