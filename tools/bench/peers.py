"""Serves PyTorch's side: `transformers` and TRL, in their default form and in faster ones.

python -m bench.peers --folder=model --preset=small --form=onednn
"""

from __future__ import annotations

from pathlib import Path

import torch

from bench.cases import PRESETS, Preset
from bench.peers_model import DEVICE, FORMS, Policy
from bench.peers_transformers import (
    DroppingTask,
    GRPOTask,
    SampleTask,
    SFTTask,
    TailTask,
    UpdateTask,
)
from bench.task import Task, arguments, process_peak, serve
from morer1_jax.run.memory import keep_freed_memory

_TRAINING = ("default", "tuned", "onednn", "compiled")
_SAMPLING = ("default", "tuned", "onednn", "static", "shared")
_FORMS_OF = {
    "sft": _TRAINING,
    "sft_mixed": _TRAINING,
    "update": _TRAINING,
    "grpo": _TRAINING,
    "grpo_plain": ("default", "tuned", "onednn", "shared", "compiled"),
    "sample": _SAMPLING,
    "first": _SAMPLING,
    "tail": _SAMPLING,
    "tail_dropping": ("default", "tuned", "onednn"),
}


class Peer:
    """PyTorch's side; see `task.Side`.

    Args:
        form: one of `FORMS`.
    """

    FORMS = tuple(FORMS)

    @staticmethod
    def forms(name: str) -> tuple[str, ...]:
        """Returns those of `FORMS` that make a difference to a task on this device."""
        forms = _FORMS_OF[name.partition("/")[0]]
        return tuple(form for form in forms if form != "onednn" or DEVICE.type == "cpu")

    def __init__(self, folder: Path, preset: Preset, form: str = "default") -> None:
        self._folder, self._preset, self._form = folder, preset, FORMS[form]

    def task(self, name: str) -> Task:
        kind, *sizes = name.split("/")
        lengths = map(int, sizes)
        if kind == "grpo":
            # TRL takes seconds to import, and other tasks do not need it.
            from bench.peers_trl import TRLTask

            return TRLTask(self._folder, self._preset, self._form, *lengths)
        policy = Policy(self._folder, self._preset, self._form)
        match kind:
            case "sft":
                return SFTTask(policy, policy.inputs.examples())
            case "sft_mixed":
                return SFTTask(policy, policy.inputs.mixed())
            case "sample":
                return SampleTask(policy, *lengths, policy.preset.completion)
            case "first":
                return SampleTask(policy, *lengths, 1)
            case "tail":
                return TailTask(policy, *lengths)
            case "tail_dropping":
                return DroppingTask(policy, *lengths)
            case "grpo_plain":
                return GRPOTask(policy, *lengths)
            case "update":
                return UpdateTask(policy, *lengths)
        raise ValueError(f"task: expected one of {', '.join(_FORMS_OF)}, found {name!r}")

    def peak_bytes(self) -> int:
        if DEVICE.type == "cpu":
            return process_peak()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


if __name__ == "__main__":
    flags = arguments()
    if flags.form != "default":
        # As our side does; it makes PyTorch's steps faster, too.
        keep_freed_memory()
    serve(lambda: Peer(flags.folder, PRESETS[flags.preset], flags.form))
