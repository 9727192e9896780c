"""MORE as a TensorFlow dataset: `more/facts` and `more/photos`. TensorFlow itself is not needed.

    python tools/build_tfds.py --folder=data/MORE --data_dir=data/tfds

    facts = tfds.data_source("more/facts", split="train", data_dir="data/tfds")
    photos = tfds.data_source("more/photos", split="train", data_dir="data/tfds",
                              decoders={"photo": tfds.decode.SkipDecoding()})
    photo = open_photo(photos[facts[7]["photo"]]["photo"])

A run trains from it by `--config.data.folder=data/tfds/more`; see `data.tfds_source`.

An example of `more/facts` is one fact with every field of `task.fact.Fact`, in the order of its
split's file; `photo` is the place of its photo in the same split of `more/photos`. There each photo
is once, its file's bytes untouched: with a photo in every fact the dataset would be 5.7 times as
large, and reading titles and boxes alone would load all of it. TFDS's own decoding of photos knows
no EXIF, so leave it to `open_photo`, which is what training sees.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from morer1_jax.data.tfds_source import DIGESTS, FACTS, NAME, PHOTOS, VERSION, TfdsSource
from morer1_jax.errors import DataError
from morer1_jax.files import check_writable
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.photos import PhotoFiles, check_photos


class MORE(tfds.core.GeneratorBasedBuilder):
    """Builds `more/facts` and `more/photos`; see `build`, which checks the data first."""

    VERSION = tfds.core.Version(VERSION)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "MORE is behind a sign-in. Give its folder, with rel2id.json, txt/ and img_org/ in it, as "
        "manual_dir."
    )
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name=FACTS, version=VERSION, description="A fact an example."),
        tfds.core.BuilderConfig(name=PHOTOS, version=VERSION, description="A photo an example."),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        if self.builder_config.name == FACTS:
            features: dict[str, Any] = {
                "id": tfds.features.Text(),
                "tokens": tfds.features.Sequence(tfds.features.Text()),
                "entity_name": tfds.features.Text(),
                "entity_span": tfds.features.Tensor(shape=(2,), dtype=np.int64),
                "object_name": tfds.features.Text(),
                # As bytes, because examples hold no float64.
                "box": tfds.features.Tensor(
                    shape=(4,), dtype=np.float64, encoding=tfds.features.Encoding.BYTES
                ),
                "image": tfds.features.Text(),
                "photo": tfds.features.Scalar(dtype=np.int64),
                "label": tfds.features.ClassLabel(),
            }
        else:
            features = {"image": tfds.features.Text(), "photo": tfds.features.Image()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="How an object in a news photo relates to an entity in its title.",
            homepage="https://arxiv.org/abs/2312.09753",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = dl_manager.manual_dir
        ontology = more.read_ontology(folder)
        if self.builder_config.name == FACTS:
            self.info.features["label"].names = ontology.labels
            # What binds to the data binds to either form of it.
            self.info.metadata[DIGESTS] = more.digests(folder, more.TEXTS)
        return {
            split: self._generate_examples(folder, more.read_split(folder, split, ontology))
            for split in more.SPLITS
        }

    def _generate_examples(
        self, folder: epath.Path, facts: list[Fact]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        fact_by_image = {fact.image: fact for fact in reversed(facts)}
        places = {image: place for place, image in enumerate(dict.fromkeys(f.image for f in facts))}
        if self.builder_config.name == PHOTOS:
            for image, place in places.items():
                data = more.photo_path(folder, fact_by_image[image]).read_bytes()
                yield place, {"image": image, "photo": data}
            return
        for number, fact in enumerate(facts):
            example = vars(fact) | {
                "entity_span": np.array(fact.entity_span),
                "box": np.array(fact.box),
                "photo": places[fact.image],
            }
            yield number, example


def build(folder: epath.PathLike, data_dir: epath.PathLike) -> list[str]:
    """Checks a folder in MORE's released form, its photos too, and builds the dataset from it.

    A build that was cut off after its facts is completed with its photos.

    Args:
        folder: local, or in a bucket.
        data_dir: the folder of `more/facts` and `more/photos`.

    Returns:
        The folders of the two, as `tfds.builder_from_directory` takes them.

    Raises:
        DataError: the folder's data is malformed, or the dataset exists already.
        OSError: nothing can be written to `data_dir`.
    """
    if "://" not in os.fspath(data_dir):
        check_writable(data_dir, folder=True)
    # What is there already: nothing, or the facts of a build that was cut off.
    builders = [
        MORE(data_dir=data_dir, config=name, file_format="array_record") for name in (FACTS, PHOTOS)
    ]
    existing = [builder for builder in builders if builder.data_path.exists()]
    if existing and existing != builders[:1]:
        raise DataError(
            f"{existing[0].data_path}: there is a dataset already; delete it, or use another folder"
        )
    # The data, and whether the existing facts are the same.
    ontology = more.read_ontology(folder)
    facts = {split: more.read_split(folder, split, ontology) for split in more.SPLITS}
    if existing and any(read_facts(data_dir, split) != facts[split] for split in facts):
        raise DataError(
            f"{existing[0].data_path}: there is a dataset of other facts already; delete it, or "
            "use another folder"
        )
    check_photos([fact for split in facts.values() for fact in split], PhotoFiles(folder))
    # Build what is missing.
    options = tfds.download.DownloadConfig(manual_dir=folder)
    # TFDS says at length that it downloads, which it does not.
    with contextlib.redirect_stdout(io.StringIO()):
        for builder in builders[len(existing) :]:
            builder.download_and_prepare(download_config=options)
    return [os.fspath(builder.data_path) for builder in builders]


def read_facts(data_dir: epath.PathLike, split: str) -> list[Fact]:
    """Returns the facts of a split, equal to those of `more.read_split`.

    Raises:
        DataError: there is no such dataset or split.
    """
    folder = epath.Path(data_dir) / NAME
    return TfdsSource(folder, folder).facts(split)
