"""Checkpoint folders in the published form: read onto the mesh, tensor by tensor, and written.

folder/
  config.json                       the model's shapes
  model.safetensors                 all tensors, or
  model-00001-of-00002.safetensors  … some of them, with
  model.safetensors.index.json      which tensor is in which file
  tokenizer.json, …                 what is not ours to read
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from morer1_jax.errors import ConfigError, NotFiniteError, WeightsError, one_line
from morer1_jax.files import INSTALL_CLIENT
from morer1_jax.model.config import DEFAULT_IDS, LoRA, ModelConfig
from morer1_jax.model.layers import merged_kernel
from morer1_jax.paths import any_path, did_you_mean, expand_home, hub_hint, is_hub_name
from morer1_jax.progress import progress
from morer1_jax.weights.finite import count_not_finite
from morer1_jax.weights.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    check_kind,
    read_json,
    tensor_files,
    token_ids,
    write_json,
)
from morer1_jax.weights.names import (
    Params,
    TensorSpec,
    canonical_names,
    check_tensors,
    tensor_specs,
)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SUFFIXES = (".json", ".txt", ".jinja")
_WANTED = ("*.safetensors", *(f"*{suffix}" for suffix in _SUFFIXES))
# Bytes of each tensor that tell it from another.
_SAMPLE = 4096
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Checkpoint:
    """A checkpoint folder whose tensors are those its config calls for.

    Args:
      path: a local folder, a folder of a bucket (`gs://…`), or a name on the hub (`owner/name`).

    Attributes:
      folder: where it is.
      config: the model's; see `config_with` for its ids of tokens.
      dtypes: of the tensors, by name.
      dtype: what the model is held and computed in, so that nothing is rounded: bfloat16 if all
        have it, else float32. Not float16, in which activations overflow.

    Raises:
      WeightsError: there is no such folder; a file is missing or damaged; tensors are missing,
        unexpected or of the wrong shape, all of which are named.
      ConfigError: the config asks for what is not implemented.
    """

    def __init__(self, path: str | Path) -> None:
        path = str(path)
        self.folder = _find(path if "://" in path else expand_home(path, "a checkpoint's path"))
        check_kind(self.folder)
        described = read_json(self.folder / CONFIG)
        try:
            self.config = ModelConfig.from_hf(described)
        except ConfigError as e:
            raise ConfigError(f"{self.folder / CONFIG}: {e}") from None
        except (AttributeError, TypeError) as e:  # Of a value of another type than expected.
            raise ConfigError(
                f"{self.folder / CONFIG}: {one_line(e)}; expected Qwen2.5-VL's, copy it anew"
            ) from e
        self._ids = {key: described.get(key) for key in DEFAULT_IDS}
        self.specs = tensor_specs(self.config)
        shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, dict[str, str]] = {}
        for file in tensor_files(self.folder):
            with self._open(file) as tensors:
                try:
                    self._files[file] = canonical_names(list(tensors.keys()))
                except WeightsError as e:
                    raise WeightsError(f"{self.folder / file}: {e}") from None
                for ours, theirs in self._files[file].items():
                    part = tensors.get_slice(theirs)
                    if part.get_dtype() not in _DTYPES:
                        raise WeightsError(
                            f"{self.folder / file}: {theirs} is of type {part.get_dtype()}, "
                            f"expected one of {', '.join(_DTYPES)}; save it as one of them"
                        )
                    if ours in shapes:
                        raise WeightsError(f"{self.folder / file}: {theirs} is in two files")
                    shapes[ours] = tuple(part.get_shape())
                    self.dtypes[ours] = _DTYPES[part.get_dtype()]
        if self.config.tie_word_embeddings:
            # Some savers write a tied head out; `load` sees to it that it is the embedding.
            shapes.pop(_HEAD, None)
        try:
            there = [name for names in self._files.values() for name in names.values()]
            check_tensors(shapes, self.specs, there)
        except WeightsError as e:
            raise WeightsError(f"{self.folder}: {e}") from None
        self.dtype = "bfloat16" if {*self.dtypes.values()} == {"bfloat16"} else "float32"

    def config_with(self, tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
        """The config, with its tokenizer's ids where it leaves them out; see `token_ids`."""
        ids = token_ids(self._ids, tokenizer, self.folder / CONFIG)
        return dataclasses.replace(self.config, **ids)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of config, tokenizer and the beginning of every tensor.

        It tells a model from another, one that was trained on included, in far less time than
        reading them whole.
        """
        digest = hashlib.sha256()
        for path in sorted(_others(self.folder), key=lambda path: path.name):
            digest.update(path.name.encode() + path.read_bytes())
        for file in sorted(self._files):
            with self._file(file).open("rb") as content:
                header = content.read(int.from_bytes(content.read(8), "little"))
                digest.update(header)
                start = 8 + len(header)
                described = json.loads(header)
                for name in sorted(described.keys() - {"__metadata__"}):
                    begin, end = described[name]["data_offsets"]
                    content.seek(start + begin)
                    digest.update(content.read(min(end - begin, _SAMPLE)))
        return digest.hexdigest()

    def load(self, like: Params) -> Params:
        """Parameters on the mesh.

        Tensors are read one at a time, so that the host holds no more than one beside what its
        devices hold.

        Args:
          like: the leaves wanted, all or some, of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          WeightsError: a tensor of them has values that are not finite, or a tied head is another
            than its embedding.
        """
        leaves: dict[tuple[str, ...], jax.Array] = {}
        wanted = {
            tuple(key.key for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(like)
        }
        digests: dict[str, bytes] = {}
        total = sum(len(names) for names in self._files.values())
        with progress(desc=f"load {self.folder.name}", total=total, unit="tensor") as bar:
            for file, names in self._files.items():
                with self._open(file) as tensors:
                    for ours, theirs in names.items():
                        bar.update()
                        spec = self.specs.get(ours)
                        tied = self.config.tie_word_embeddings and ours in (_EMBEDDING, _HEAD)
                        if not tied and spec.path not in wanted:
                            continue
                        tensor = tensors.get_tensor(theirs)
                        if bad := count_not_finite(tensor):
                            raise WeightsError(
                                f"{self.folder / file}: {bad} of the {tensor.size} values of "
                                f"{theirs} are not finite; copy it anew, or take a checkpoint from "
                                "before its training broke"
                            )
                        if tied:
                            digests[ours] = hashlib.sha256(tensor.view(np.uint8)).digest()
                        if spec is not None and spec.path in wanted:
                            leaf = leaves.pop(spec.path, None)
                            leaves[spec.path] = _insert(leaf, wanted[spec.path], spec, tensor)
        if len(set(digests.values())) > 1:
            raise WeightsError(
                f"{self.folder}: {_HEAD} differs from {_EMBEDDING}, but its config has "
                "tie_word_embeddings; set that to false to keep the head"
            )
        return jax.tree_util.tree_map_with_path(
            lambda path, _: leaves[tuple(key.key for key in path)], like
        )

    @functools.cached_property
    def local_files(self) -> Path:
        """A local folder with whatever there is beside the tensors; for a bucket's, a copy that
        lasts as long as the checkpoint."""
        if isinstance(self.folder, Path):
            return self.folder
        copy_others(self.folder, self._copies)
        return self._copies

    @functools.cached_property
    def _copies(self) -> Path:
        self._temporary = tempfile.TemporaryDirectory()  # gone with the checkpoint
        return Path(self._temporary.name)

    def _file(self, file: str) -> Path:
        """The file on this machine: a bucket's cannot be mapped into memory, so it is copied."""
        path = self.folder / file
        if isinstance(path, Path):
            return path
        if not (local := self._copies / file).exists():
            path.copy(local)
        return local

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            opened = safe_open(self._file(file), "numpy")
        except (OSError, SafetensorError) as e:
            raise WeightsError(
                f"{self.folder / file}: {one_line(e)}; expected a whole safetensors file, "
                "copy it anew"
            ) from e
        with opened as tensors:
            yield tensors


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
      folder: is there already.
      params: the whole tree, on the mesh or the host; adapters are merged into their kernels.
      dtype: of the written tensors, one or by name.
      shard_bytes: most bytes of tensors in a file.

    Raises:
      NotFiniteError: a tensor has values that are not finite, or that `dtype` has not.
    """
    specs = tensor_specs(config)
    dtypes, sizes = _dtypes_and_sizes(specs, dtype)
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
    with progress(desc="save", total=len(specs), unit="tensor") as bar:
        for file, names in zip(files, shards, strict=True):
            tensors = {}
            for name in names:
                with np.errstate(over="ignore"):  # What overflows is named.
                    value = _slice(params, specs[name], lora).astype(dtypes[name])
                if bad := count_not_finite(value):
                    raise NotFiniteError(
                        f"{name}: {bad} of its {value.size} values are not finite as "
                        f"{dtypes[name].name}, so that nothing is written; take another dtype, or "
                        "an earlier checkpoint"
                    )
                tensors[name] = specs[name].to_theirs(value)
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        places = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_json(folder / INDEX, index)


def tensor_bytes(config: ModelConfig, dtype: str | Mapping[str, str]) -> int:
    """Bytes of all tensors that `save_tensors` writes."""
    return sum(_dtypes_and_sizes(tensor_specs(config), dtype)[1].values())


def _dtypes_and_sizes(
    specs: Mapping[str, TensorSpec], dtype: str | Mapping[str, str]
) -> tuple[dict[str, jnp.dtype], dict[str, int]]:
    """The type and the bytes of each tensor, by name."""
    dtypes = {name: jnp.dtype(dtype if isinstance(dtype, str) else dtype[name]) for name in specs}
    sizes = {name: math.prod(spec.shape) * dtypes[name].itemsize for name, spec in specs.items()}
    return dtypes, sizes


def _slice(params: Params, spec: TensorSpec, lora: LoRA | None) -> np.ndarray:
    """The part of a leaf that is one tensor, its adapter merged into it."""
    *branch, leaf = spec.path
    layer = _at(params, branch)
    if leaf != "kernel" or "lora_a" not in layer:
        return np.asarray(jax.device_get(layer[leaf][spec.index]))
    # One layer at a time, so that no second copy of a whole stack is made.
    one = {name: value[spec.index][None] for name, value in layer.items()}
    return np.asarray(jax.device_get(merged_kernel(one, lora)[0]))


def _find(path: str) -> Path:
    if "://" in path:
        folder = any_path(path, "a checkpoint's path")
    elif Path(path).is_dir():
        return Path(path)
    elif is_hub_name(path):
        try:
            return Path(snapshot_download(path, allow_patterns=list(_WANTED)))
        except (OSError, ValueError) as e:
            raise WeightsError(
                f"{path}: no such folder, and the hub does not give it: {one_line(e)}"
            ) from e
    else:
        folder = Path(path)
    try:
        there = folder.is_dir()
    except ImportError as e:
        raise WeightsError(f"{path}: {one_line(e)}; {INSTALL_CLIENT}") from None
    if not there:
        raise WeightsError(
            f"{path}: no such folder{did_you_mean(path)}; expected one with a {CONFIG}, or a name "
            f"on the hub{hub_hint(path)}"
        )
    return folder


def copy_others(source: Path, folder: Path) -> None:
    """Copies what is published beside tensors: config, tokenizer, processor, chat template, …"""
    for path in _others(source):
        (folder / path.name).write_bytes(path.read_bytes())


def _others(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file() and path.suffix in _SUFFIXES and path.name != INDEX:
            yield path


def _insert(
    leaf: jax.Array | None, like: jax.ShapeDtypeStruct, spec: TensorSpec, tensor: np.ndarray
) -> jax.Array:
    """`leaf`, or zeros if there is none yet, with the tensor in its place.

    The old leaf's buffers are given away, so that it is never held twice.
    """
    value = spec.to_ours(tensor)
    if value.dtype == np.float16:  # Which not every device knows.
        value = value.astype(like.dtype)
    sharding = like.sharding
    if not spec.index:
        return jax.make_array_from_callback(
            like.shape, sharding, lambda part: np.asarray(value[part], like.dtype)
        )
    if leaf is None:
        leaf = _zeros(like.shape, like.dtype, sharding)
    split = NamedSharding(sharding.mesh, P(*tuple(sharding.spec)[len(spec.index) :]))
    on_mesh = jax.make_array_from_callback(value.shape, split, lambda part: value[part])
    return _inserter(sharding)(leaf, on_mesh, spec.index)


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def _inserter(sharding: NamedSharding) -> Any:
    return jax.jit(
        lambda leaf, value, index: leaf.at[index].set(value.astype(leaf.dtype)),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
