"""Checkpoint folders in the published form: read onto the mesh by byte ranges, and written.

folder/
  config.json                       the model's shapes
  model.safetensors                 all tensors, or
  model-00001-of-00002.safetensors  … some of them, with
  model.safetensors.index.json      which tensor is in which file
  tokenizer.json, …                 files that are copied unread
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from morer1_jax.errors import ConfigError, NotFiniteError, WeightsError, abridged, one_line
from morer1_jax.hosts import group
from morer1_jax.model.config import DEFAULT_IDS, LoRA, ModelConfig
from morer1_jax.model.layers import Params, merged_kernel
from morer1_jax.progress import progress
from morer1_jax.weights.finite import count_not_finite
from morer1_jax.weights.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    TEXT_SUFFIXES,
    check_kind,
    find_folder,
    read_json,
    tensor_files,
    token_ids,
    write_json,
)
from morer1_jax.weights.loading import Target, load
from morer1_jax.weights.names import (
    LeafSlice,
    canonical_names,
    check_tensors,
    leaf_slices,
)
from morer1_jax.weights.ranges import DTYPES, Stored, read_beginnings, read_header

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# First bytes of each tensor that go into the digest.
_DIGEST_BYTES = 4096


class Checkpoint:
    """A checkpoint folder whose tensors are those its config calls for.

    Args:
        path: a local folder, a folder of a bucket (`gs://…`), or a name on the hub (`owner/name`).

    Attributes:
        folder: local, or of a bucket.
        config: the model's; see `config_with` for its ids of tokens.
        slices: where each tensor goes in the parameter tree, by published name.
        dtypes: of the tensors, by published name.
        dtype: of parameters and activations, so that nothing is rounded: bfloat16 if all tensors
            have it, else float32. Not float16, in which activations overflow.

    Raises:
        WeightsError: there is no such folder; a file is missing or damaged; tensors are missing,
            unexpected or of the wrong shape, which the error names.
        ConfigError: the config asks for what is not implemented.
    """

    def __init__(self, path: str | Path) -> None:
        # The folder and its config.
        self.folder = find_folder(str(path))
        check_kind(self.folder)
        hf_config = read_json(self.folder / CONFIG)
        try:
            self.config = ModelConfig.from_hf(hf_config)
        except ConfigError as e:
            raise ConfigError(f"{self.folder / CONFIG}: {e}") from None
        except (AttributeError, TypeError) as e:  # Of a value of another type than expected.
            raise ConfigError(
                f"{self.folder / CONFIG}: {one_line(e)}; expected Qwen2.5-VL's, copy it anew"
            ) from e
        self._ids = {key: hf_config.get(key) for key in DEFAULT_IDS}
        # What every file holds, by its header: no tensor is read yet.
        self.slices = leaf_slices(self.config)
        self.dtypes: dict[str, str] = {}
        self._headers: dict[str, tuple[bytes, dict[str, Stored]]] = {}
        self._stored: dict[str, Stored] = {}
        for file in tensor_files(self.folder):
            self._headers[file] = read_header(self.folder / file)
            self._add(self.folder / file, self._headers[file][1])
        # Whether these are the config's tensors.
        shapes = {ours: stored.shape for ours, stored in self._stored.items()}
        if self.config.tie_word_embeddings:
            # Some savers write a tied head out; `load` checks that it is the embedding.
            shapes.pop(_HEAD, None)
        try:
            file_names = [stored.name for stored in self._stored.values()]
            check_tensors(shapes, self.slices, file_names)
        except WeightsError as e:
            raise WeightsError(f"{self.folder}: {e}") from None
        self.dtype = "bfloat16" if {*self.dtypes.values()} == {"bfloat16"} else "float32"

    def config_with(self, tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
        """Returns the config, with the tokenizer's ids where it leaves them out."""
        ids = token_ids(self._ids, tokenizer, self.folder / CONFIG)
        return dataclasses.replace(self.config, **ids)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of config, tokenizer and the first bytes of every tensor.

        It differs between models, and between a model and its fine-tuned ones, and takes far less
        time than reading tensors whole.
        """
        digest = hashlib.sha256()
        for path in sorted(_others(self.folder), key=lambda path: path.name):
            digest.update(path.name.encode() + path.read_bytes())
        for _, (header, tensors) in sorted(self._headers.items()):
            digest.update(header)
            for beginning in read_beginnings(
                [tensors[name] for name in sorted(tensors)], _DIGEST_BYTES
            ):
                digest.update(beginning)
        return digest.hexdigest()

    def load(self, like: Params) -> Params:
        """Returns parameters on the mesh.

        Tensors are read a few at a time, of several processes each reads a share of them; see
        `weights.loading`. All processes call it with the same leaves.

        Args:
            like: the leaves to load, all or some, of `jax.ShapeDtypeStruct` with shardings.

        Raises:
            WeightsError: a file cannot be read, a tensor of those leaves has values that are not
                finite, or a tied head differs from the embedding.
        """
        self._check_same()
        like_by_path = {
            tuple(key.key for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(like)
        }
        # A tied head that was written out is read to be compared, as the embedding is.
        written_out = self.config.tie_word_embeddings and _HEAD in self._stored
        targets = {}
        # In an order that no file decides: processes exchange what they read.
        for name, stored in sorted(self._stored.items()):
            is_tied = written_out and name == _HEAD
            leaf_slice = self.slices[_EMBEDDING if is_tied else name]
            if leaf_slice.path in like_by_path:
                leaf = like_by_path[leaf_slice.path]
                targets[name] = Target(stored, leaf_slice, leaf, kept=not is_tied)
        both = (_EMBEDDING, _HEAD) if written_out else ()
        leaves, digests = load(self.folder.name, targets, both)
        if len(set(digests.values())) > 1:
            raise WeightsError(
                f"{self.folder}: {_HEAD}: expected {_EMBEDDING}'s values, since the config has "
                "tie_word_embeddings, found others; set it to false to keep the head"
            )
        return jax.tree_util.tree_map_with_path(
            lambda path, _: leaves[tuple(key.key for key in path)], like
        )

    @functools.cached_property
    def local_files(self) -> Path:
        """A local folder with the files beside the tensors.

        Of a bucket's it is a copy that lasts as long as the checkpoint.
        """
        if isinstance(self.folder, Path):
            return self.folder
        self._copies = tempfile.TemporaryDirectory()  # Removed with the checkpoint.
        folder = Path(self._copies.name)
        copy_others(self.folder, folder)
        return folder

    def _check_same(self) -> None:
        """Checks that all processes have the same checkpoint, of which each reads a share.

        Raises:
            WeightsError: they do not.
        """
        if group.count() == 1:
            return
        if others := group.unlike_first("checkpoint", self.digest):
            raise WeightsError(
                f"{self.folder}: expected process 0's config, tokenizer and tensors, in the same "
                f"files, on every process, found others on process {abridged(others)}; copy one "
                "folder to all hosts, or name one that they share"
            )

    def _add(self, path: Path, tensors: Mapping[str, Stored]) -> None:
        """Adds a file's tensors to those of the checkpoint; raises WeightsError if it cannot."""
        try:
            names = canonical_names(tensors)
        except WeightsError as e:
            raise WeightsError(f"{path}: {e}") from None
        for ours, theirs in names.items():
            stored = tensors[theirs]
            if stored.kind not in DTYPES:
                raise WeightsError(
                    f"{path}: {theirs}: expected dtype {', '.join(DTYPES)}, found {stored.kind}; "
                    "save it as one of them"
                )
            if ours in self._stored:
                raise WeightsError(f"{path}: {theirs} is in two files")
            self._stored[ours], self.dtypes[ours] = stored, DTYPES[stored.kind]


def save_tensors(
    folder: Path,
    params: Params,
    config: ModelConfig,
    *,
    dtype: str | Mapping[str, str],
    lora: LoRA | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the tensors, one file at a time, and their index if there are several files.

    Args:
        folder: exists.
        params: the whole tree, on the mesh or the host; adapters are merged into their kernels.
        dtype: of the written tensors, one or by name.
        lora: the adapters' config, if there are any.
        shard_bytes: most bytes of tensors in a file.

    Raises:
        NotFiniteError: a tensor has values that are not finite, or are not in `dtype`.
    """
    # Which tensors are in which file.
    slices = leaf_slices(config)
    dtypes, sizes = _dtypes_and_sizes(slices, dtype)
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, needed in sizes.items():
        if needed > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= needed
    count = len(shards)
    files = [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
    files = files if count > 1 else [SINGLE]
    # The files, one in memory at a time.
    with progress(desc="save", total=len(slices), unit="tensor") as bar:
        for file, names in zip(files, shards, strict=True):
            tensors = {}
            for name in names:
                with np.errstate(over="ignore"):  # What overflows is named.
                    value = _slice(params, slices[name], lora).astype(dtypes[name])
                if bad := count_not_finite(value):
                    raise NotFiniteError(
                        f"{name}: expected finite values as {dtypes[name].name}, found {bad} of "
                        f"{value.size} that are not; take another dtype, or an earlier checkpoint"
                    )
                tensors[name] = slices[name].to_theirs(value)
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        places = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_json(folder / INDEX, index)


def tensor_bytes(config: ModelConfig, dtype: str | Mapping[str, str]) -> int:
    """Returns the bytes of all tensors that `save_tensors` writes."""
    return sum(_dtypes_and_sizes(leaf_slices(config), dtype)[1].values())


def _dtypes_and_sizes(
    slices: Mapping[str, LeafSlice], dtype: str | Mapping[str, str]
) -> tuple[dict[str, jnp.dtype], dict[str, int]]:
    """Returns the dtype and the bytes of each tensor, by name."""
    dtypes = {name: jnp.dtype(dtype if isinstance(dtype, str) else dtype[name]) for name in slices}
    sizes = {
        name: math.prod(leaf_slice.shape) * dtypes[name].itemsize
        for name, leaf_slice in slices.items()
    }
    return dtypes, sizes


def _slice(params: Params, leaf_slice: LeafSlice, lora: LoRA | None) -> np.ndarray:
    """Returns the part of a leaf that is one tensor, with its adapter merged in."""
    *branch, leaf = leaf_slice.path
    layer = _at(params, branch)
    if leaf != "kernel" or "lora_a" not in layer:
        return np.asarray(jax.device_get(layer[leaf][leaf_slice.index]))
    # One layer at a time, so that no second copy of a whole stack exists.
    one_layer = {name: value[leaf_slice.index][None] for name, value in layer.items()}
    return np.asarray(jax.device_get(merged_kernel(one_layer, lora)[0]))


def copy_others(source: Path, folder: Path) -> None:
    """Copies what is published beside tensors: config, tokenizer, processor, chat template, etc."""
    for path in _others(source):
        (folder / path.name).write_bytes(path.read_bytes())


def _others(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file() and path.suffix in TEXT_SUFFIXES and path.name != INDEX:
            yield path


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
