"""Measures how fast data is read: a folder of MORE's size and form, its TFDS build, the loader.

Needs the packages of the extra `bench`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
from PIL import Image

from morer1_jax.config.settings import Settings
from morer1_jax.data import more_tfds
from morer1_jax.data.curriculum import Pool
from morer1_jax.data.feed import SequenceFeed
from morer1_jax.data.loader import load_ahead
from morer1_jax.files import atomic_write
from morer1_jax.run.mesh import this_host
from morer1_jax.run.setup import Run, open_run, open_setup, with_features
from morer1_jax.run.shapes import sequence_plan
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.photos import PhotoFiles, check_photos
from morer1_jax.world.synthesise import synthesise

# Numbers of facts and photos of MORE's release; the photos' division over the splits is ours.
FACTS = MappingProxyType({"train": 15_486, "valid": 1_742, "test": 3_036})
PHOTOS = MappingProxyType({"train": 2_720, "valid": 306, "test": 533})
_LABELS = ("none", "/per/org/member_of", "/per/per/self", "/org/loc/locate_at")
_SIZE = (640, 480)
# Number of different pictures; each serves as many photos, since drawing is not measured.
_PICTURES = 8


def write_released(folder: Path, facts: Mapping[str, int], photos: Mapping[str, int]) -> None:
    """Writes a dataset in MORE's released form: 640 × 480 JPEGs of 65 KB, random titles.

    Args:
        folder: to write to.
        facts, photos: numbers in each split, at least one fact for each photo.
    """
    rng = np.random.default_rng(0)
    pictures = [_picture(rng) for _ in range(_PICTURES)]
    more.write_ontology(folder, Ontology(_LABELS))
    for split, count in photos.items():
        photo_folder = folder / "img_org" / split
        photo_folder.mkdir(parents=True)
        for number in range(count):
            (photo_folder / f"{number}.jpg").write_bytes(pictures[number % _PICTURES])
        # As in the release, facts of a photo stand together and share its title.
        photo_of_fact = np.sort(np.r_[:count, rng.integers(0, count, facts[split] - count)])
        titles = [_title(rng) for _ in range(count)]
        more.write_split(
            folder,
            split,
            [
                _fact(f"{split}:{line}", titles[photo], f"{photo}.jpg", rng)
                for line, photo in enumerate(photo_of_fact, start=1)
            ],
        )


def _picture(rng: np.random.Generator) -> bytes:
    """Returns a JPEG of blurred blotches with a sensor's noise, which makes the file large."""
    blotches = Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)).resize(_SIZE)
    grain = rng.normal(0, 2, (_SIZE[1], _SIZE[0], 1))
    pixels = (np.asarray(blotches) + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def _title(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(f"word{i}" for i in rng.integers(0, 5000, rng.integers(6, 20)))


def _fact(fact_id: str, title: tuple[str, ...], image: str, rng: np.random.Generator) -> Fact:
    start = int(rng.integers(0, len(title)))
    width, height = rng.uniform(0.05, 0.6, 2).tolist()
    x, y = rng.uniform((width / 2, height / 2), (1 - width / 2, 1 - height / 2)).tolist()
    return Fact(
        id=fact_id,
        tokens=title,
        entity_name=title[start],
        entity_span=(start, start + 1),
        object_name=f"[OBJ{rng.integers(0, 4)}]",
        box=(x, y, width, height),
        image=image,
        label=str(rng.choice(_LABELS)),
    )


@contextlib.contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds the block's wall-clock seconds, and this process's CPU seconds, under `name`."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    seconds[f"{name}_seconds"] = round(time.perf_counter() - wall, 2)
    seconds[f"{name}_cpu_seconds"] = round(time.process_time() - cpu, 2)


def time_reading(folder: Path) -> dict[str, Any]:
    """Times reading and checking a folder: its facts, and every photo, decoded."""
    seconds: dict[str, Any] = {}
    with _timed("read", seconds):
        ontology = more.read_ontology(folder)
        facts = [f for split in more.SPLITS for f in more.read_split(folder, split, ontology)]
    with _timed("photos", seconds):
        sizes = check_photos(facts, PhotoFiles(folder))
    return {"facts": len(facts), "photos": len(sizes)} | seconds


def time_tfds(folder: Path, data_dir: Path) -> dict[str, Any]:
    """Times building and reading the TensorFlow dataset; compares its facts with the folder's."""
    seconds: dict[str, Any] = {}
    with _timed("build", seconds):
        more_tfds.build(folder, data_dir)
    with _timed("read", seconds):
        built = {split: more_tfds.read_facts(data_dir, split) for split in more.SPLITS}
    ontology = more.read_ontology(folder)
    direct = {split: more.read_split(folder, split, ontology) for split in more.SPLITS}
    return seconds | {"equal": built == direct}


def sequence_feed(run: Run, epochs: int) -> tuple[SequenceFeed, int]:
    """Returns the feed of SFT's batches, with the rows of a run of so many epochs.

    Also returns the number of an epoch's steps.
    """
    dataset, data, reasoning = run.dataset, run.settings.data, run.dataset.reasoning
    facts = [fact for fact in dataset.splits["train"] if fact.id in reasoning]
    batch = run.settings.sft.batch
    pool = Pool("training", np.arange(len(facts)), (run.settings.seed,))
    draw = functools.partial(pool.batch, size=batch)
    epoch = -(-len(facts) // batch)
    sizes = [run.sizes[fact.id] for fact in facts]
    placed = run.trainee.placed
    plan, host = sequence_plan(placed, data, sizes, draw, epochs * epoch, 1), this_host(placed.mesh)
    return SequenceFeed(run.reader, facts, reasoning, draw, host, sizes, plan), epoch


def time_loading(run: Run, epochs: int = 3) -> dict[str, Any]:
    """Times SFT's batches, taken and dropped as fast as the config's workers make them.

    Returns:
        `samples_per_second` over all epochs, without the time to the first batch; milliseconds of
        CPU per sample; and the resident memory in MB of this process and its workers after each
        epoch.
    """
    data, batch = run.settings.data, run.settings.sft.batch
    feed, epoch = sequence_feed(run, epochs)
    # The first batch, which waits for the workers to start.
    options = {"workers": data.workers, "kind": data.worker_kind}
    start = time.perf_counter()
    batches = load_ahead(feed, 0, epochs * epoch + 1, **options)
    next(batches)
    # All other batches.
    first, cpu = time.perf_counter(), _cpu_seconds()
    memory = []
    for _ in range(epochs):
        for _ in range(epoch):
            next(batches)
        memory.append(_resident_megabytes())
    seconds, cpu = time.perf_counter() - first, _cpu_seconds() - cpu
    batches.close()
    samples = epochs * epoch * batch
    return {
        **options,
        "samples_an_epoch": epoch * batch,
        "seconds_to_first": round(first - start, 2),
        "samples_per_second": round(samples / seconds, 1),
        "cpu_milliseconds_a_sample": round(1e3 * cpu / samples, 2),
        "megabytes": memory,
    }


def _processes() -> list[psutil.Process]:
    """Returns this process and its workers."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _cpu_seconds() -> float:
    return sum(sum(p.cpu_times()[:2]) for p in _processes())


def _resident_megabytes() -> float:
    return round(sum(p.memory_info().rss for p in _processes()) / 1e6, 1)


def run_bench(
    config: Settings,
    workdir: Path,
    facts: Mapping[str, int] = FACTS,
    photos: Mapping[str, int] = PHOTOS,
    out: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures reading a dataset of MORE's size, and a run's loader on the run's own data.

    Args:
        workdir: to write data to; several hundred MB, none of which is used again.
        facts, photos: numbers of the dataset of MORE's size, by split.
        out: a JSON file for the results; None: no file. Results of an unfinished run are kept
            beside it in `….unfinished`, and an equal run goes on from them.

    Returns:
        Figures by name, of `reading`, `tfds` and `loading`.

    Raises:
        ConfigError, DataError: the config's own data is wrong; raised before anything is measured.
    """
    # The run, whose own data must be right before anything is measured.
    setup = open_setup(config, workdir)
    if config.data.folder is None:
        synthesise(setup.data, config.world, config.seed)
    run = with_features(open_run(setup, reasoning_needed=True))

    @functools.cache
    def folder() -> Path:
        write_released(workdir / "released", facts, photos)
        return workdir / "released"

    measurements = {
        "reading": lambda: time_reading(folder()),
        "tfds": lambda: time_tfds(folder(), workdir / "tfds"),
        "loading": lambda: time_loading(run),
    }
    # Results of an equal, interrupted run.
    identity = json.loads(json.dumps([dataclasses.asdict(config), dict(facts), dict(photos)]))
    results, unfinished = {}, None
    if out is not None:
        unfinished = out.with_name(f"{out.name}.unfinished")
        # Earlier versions wrote this name, without the name of `out` in the file.
        earlier = out.with_suffix(".unfinished")
        results = _read_unfinished(unfinished, identity, out.name)
        if not unfinished.exists() and (results := _read_unfinished(earlier, identity)):
            earlier.rename(unfinished)
    # The other measurements, each kept as soon as it is made.
    for name, measure in measurements.items():
        if name not in results:
            results[name] = measure()
            if unfinished is not None:
                atomic_write(
                    unfinished, json.dumps({"of": identity, "out": out.name, "results": results})
                )
    if unfinished is not None:
        atomic_write(out, json.dumps(results, indent=1) + "\n")
        unfinished.unlink()
    return results


def _read_unfinished(
    path: Path, identity: Any, out_name: str | None = None
) -> dict[str, dict[str, Any]]:
    """Returns the results of an equal, interrupted run for the file `out_name`; {} if none."""
    try:
        unfinished = json.loads(path.read_text(encoding="utf-8"))
        is_equal = unfinished["of"] == identity and unfinished.get("out") in (None, out_name)
        return unfinished["results"] if is_equal else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
