"""Measures a step of GRPO by TRL's trainer, which is stopped and resumed between steps."""

from __future__ import annotations

import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.cases import Inputs, Preset
from bench.peers_model import DEVICE, Form, load_network, load_processor, tune
from bench.peers_transformers import (
    BETA,
    CLIP_HIGH,
    CLIP_LOW,
    GRPO_LR,
    MAX_NORM,
    reward,
    rollout_path,
)
from bench.task import Numbers
from morer1_jax.model.special import SpecialIds

_LOGGED = ("loss", "grad_norm", "kl", "entropy")
# Never reached: `run` asks for each step.
_STEPS = 1_000_000


class TRLTask:
    """A step of GRPO with KL: samples, the reference's log-probabilities, an update.

    The trainer runs in its own thread, which waits at the beginning of each step for `run`; `run`
    waits until the step is logged. Loading of data lies between, and is not timed.
    """

    flops: float | None = None  # They would have to be counted in that thread.

    def __init__(self, folder: Path, preset: Preset, form: Form, length: int) -> None:
        self._path = rollout_path(folder, length)
        self._turns = turns = _Turns()
        self._output = tempfile.TemporaryDirectory()
        self._trainer = _trainer(folder, preset, form, length, self._output.name)
        self._trainer.add_callback(turns)
        # The thread holds no reference to the task, so that it ends, and frees its memory, with it.
        weakref.finalize(self, turns.stop)
        threading.Thread(target=_train, args=(self._trainer, turns), daemon=True).start()

    def numbers(self) -> Numbers:
        """Returns what was logged of the first step; writes its rollout into the folder."""
        rollout = self._trainer.rollout
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        arrays = {name: rollout[name].cpu().numpy() for name in names}
        group = self._trainer.num_generations
        for name in ("prompt_ids", "prompt_mask"):
            arrays[name] = arrays[name][::group]
        np.savez(self._path, **{name: _compact(array) for name, array in arrays.items()})
        return {name: self._turns.logged[name] for name in _LOGGED}

    def prepare(self) -> None:
        self.run()

    def run(self) -> None:
        self._turns.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()


class _Turns(TrainerCallback):
    """Passes control between the trainer's thread and the thread that asks for steps.

    Attributes:
        logged: metrics of the last step.
    """

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self._error: Exception | None = None
        self._stopped = False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)

    def step(self) -> None:
        """Lets the trainer take one step, and waits for it.

        Raises:
            RuntimeError: the trainer failed.
        """
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("TRL's trainer failed") from self._error

    def fail(self, error: Exception) -> None:
        """Ends the wait for a step that failed."""
        self._error = error
        self._done.release()

    def stop(self) -> None:
        """Ends the trainer's thread."""
        self._stopped = True
        self._go.release()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._go.acquire()
        if self._stopped:
            raise SystemExit

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logged = dict(logs)
        self._done.release()


class _Trainer(GRPOTrainer):
    """A trainer that keeps its last rollout, and samples without compiled layers.

    Attributes:
        rollout: the loss's arguments, in the prompts' order.
    """

    rollout: dict[str, Tensor]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.rollout = super()._generate_and_score_completions(inputs)
        return self.rollout


def _train(trainer: GRPOTrainer, turns: _Turns) -> None:
    try:
        trainer.train()
    except Exception as error:
        turns.fail(error)


def _trainer(folder: Path, preset: Preset, form: Form, length: int, output: str) -> _Trainer:
    # The prompts, in the form of TRL's datasets.
    processor = load_processor(folder)
    prompts = Inputs(preset, processor.tokenizer).prompts(length, preset.batch)
    special = SpecialIds.of(processor.tokenizer)
    parts = preset.batch * preset.group // preset.micro
    # The trainer; its loss is that of `peers_transformers.backward`.
    trainer = _Trainer(
        model=load_network(folder, Form(tuned=False)),
        reward_funcs=_rewards,
        processing_class=processor,
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": p.words}], "images": p.pictures()}
                for p in prompts
            ]
        ),
        args=GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=preset.micro,
            gradient_accumulation_steps=parts,
            num_generations=preset.group,
            max_completion_length=preset.completion,
            generation_kwargs={
                "min_new_tokens": preset.completion,
                "suppress_tokens": list(special.never_sampled),
            },
            temperature=1.0,
            beta=BETA,
            epsilon=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            loss_type="dapo",
            scale_rewards="group",
            learning_rate=GRPO_LR,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_NORM,
            gradient_checkpointing=False,
            max_steps=_STEPS,
            logging_steps=1,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=DEVICE.type == "cpu",
            bf16=DEVICE.type == "cuda" and preset.dtype == "bfloat16",
        ),
    )
    # Tuned here, since TRL itself loads the reference.
    for network in (trainer.model, trainer.ref_model):
        tune(network, form)
    return trainer


def _rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward(tokens) for tokens in completion_ids]


def _compact(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
