"""A process of a run that gets a signal at a moment of the run.

    python doomed.py '{"moment": "update", "times": 3, "number": 9, "file": "…"}' flags of train…

These are the arguments of `doom`; the flags are those of `morer1_jax.train`.
"""

import functools
import importlib
import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path

# Functions that are called at a moment, and whether a call is one, by its arguments.
MOMENTS = {
    # The host is through, and the device computes.
    "update": ("run.phases:PhaseTimer.phase", lambda _, name, result: name == "update"),
    "rollout": ("run.phases:PhaseTimer.phase", lambda _, name, result: name == "rollout"),
    # Each batch of facts that is asked, and what for.
    "rate": ("run.batch_sampler:progress", lambda **given: given["desc"] == "rate"),
    "validate": ("run.batch_sampler:progress", lambda **given: given["desc"] == "validate"),
    "evaluate": ("run.batch_sampler:progress", lambda **given: "evaluate" in given["desc"]),
    # The device's arrays are on the host; nothing is written yet, or all but the manifest.
    "save": ("run.checkpoint:Checkpointer._finish", lambda *_: True),
    "saved": ("run.checkpoint:write_manifest", lambda *_: True),
    "restore": ("run.checkpoint:verify", lambda *_: True),
    "open": ("train:open_run", lambda *_, **__: True),
    "report": ("stages.evaluate:write_report", lambda *_: True),
}


def doom(moment, number, file, times=1, delay=0.0, held=0.0):
    """Has this process get a signal, and make a file then.

    Args:
        moment: at which it does, one of `MOMENTS`.
        number: of the signal.
        times: that the run comes to the moment until it is the one.
        delay: seconds between the moment and the signal.
        held: seconds for which the run stays at the moment, as in a slow batch.
    """
    place, is_one = MOMENTS[moment]
    module_name, _, name = place.partition(":")
    owner = importlib.import_module(f"morer1_jax.{module_name}")
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, name), []

    def strike():
        Path(file).touch()
        os.kill(os.getpid(), number)

    @functools.wraps(real)
    def called(*args, **kwargs):
        if is_one(*args, **kwargs):
            calls.append(1)
            if len(calls) == times:
                threading.Timer(delay, strike).start()
                time.sleep(held)
        return real(*args, **kwargs)

    setattr(owner, name, called)


if __name__ == "__main__":
    fate = json.loads(sys.argv.pop(1))
    # `train`'s own module is run as the main one below: what it has imported is replaced before.
    doom(**fate)
    from absl import flags

    sys.argv[0] = "morer1_jax.train"
    module = sys.modules.get("morer1_jax.train")
    if module is None:
        runpy.run_module("morer1_jax.train", run_name="__main__", alter_sys=True)
    else:
        flags.mark_flag_as_required("config")
        module.run_main(module.main)
