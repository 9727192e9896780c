"""A run on one device over photos of mixed sizes and titles of mixed lengths, watched.

python tests/steady.py --folder=/tmp/steady --steps=50

Half of the steps are SFT's, half GRPO's with a KL. Writes `shapes.json`: by stage, the shapes of
each step's batch.
"""

import argparse
import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from morer1_jax.config.binding import read_config
from morer1_jax.run import loop
from morer1_jax.task import more
from morer1_jax.train import train
from morer1_jax.world.synthesise import WorldConfig, synthesise

TINY = Path(__file__).with_name("configs") / "tiny.py"
SPLITS = ("train", "valid", "test")


def mixed_world(folder, train):
    """A synthetic world whose photos are stretched and whose titles go on, each in its own way."""
    synthesise(folder, WorldConfig(train=train, valid=4, test=4, written=0.5), seed=0)
    ontology, noise = more.read_ontology(folder), np.random.default_rng(0)
    for split in SPLITS:
        facts = more.read_split(folder, split, ontology)
        more_words = {}
        for path in sorted({more.photo_path(folder, fact) for fact in facts}):
            size = tuple(int(side) for side in noise.integers(60, 200, 2))
            Image.open(path).resize(size).save(path)
            more_words[path.name] = ("again",) * int(noise.integers(0, 60))
        longer = [
            dataclasses.replace(fact, tokens=fact.tokens + more_words[fact.image]) for fact in facts
        ]
        more.write_split(folder, split, longer)


def config_of(data, steps):
    config = read_config(TINY)
    config.stages = "sft,rate,grpo"
    config.data.update(folder=str(data), max_pixels=168 * 168, prompt_length=320, windows=16)
    config.sft.update(steps=steps - steps // 2, batch=8, save_every=1000, eval_every=1000)
    config.rate.update(samples=1, batch=24)
    config.grpo.update(steps=steps // 2, mixing=False, save_every=1000, eval_every=1000)
    config.data.shapes = 2
    return config


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    given = parser.parse_args()
    data, workdir = given.folder / "data", given.folder / "run"
    # Enough for as many shapes as there are, in few steps and in many.
    mixed_world(data, train=min(96, 2 * given.steps))
    shapes, stages = defaultdict(list), ["sft", "grpo"]
    load_ahead = loop.load_ahead

    def watched(*args, **options):
        stage = stages.pop(0)
        for batch in load_ahead(*args, **options):
            shapes[stage].append([list(leaf.shape) for leaf in jax.tree.leaves(batch)])
            yield batch

    loop.load_ahead = watched
    train(config_of(data, given.steps), workdir)
    (given.folder / "shapes.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
    main()
