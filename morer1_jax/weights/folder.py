"""Finds a checkpoint folder, and checks that it holds a whole model in safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerFast

from morer1_jax import files
from morer1_jax.errors import WeightsError, one_line
from morer1_jax.model.config import DEFAULT_IDS
from morer1_jax.model.special import SpecialIds
from morer1_jax.paths import any_path, did_you_mean, expand_home, hub_hint, is_hub_name

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# Suffixes of what is published beside tensors.
TEXT_SUFFIXES = (".json", ".txt", ".jinja")
# Suffixes of tensors in formats that are not read, or under other names.
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".safetensors")


def find_folder(path: str, files_of_hub: Sequence[str] | None = None) -> Path:
    """Returns a checkpoint's folder, downloaded if it is on the hub.

    Args:
        path: a local folder, a folder of a bucket (`gs://…`), or a name on the hub (`owner/name`).
        files_of_hub: patterns of the files to download; None: tensors and all text.

    Raises:
        WeightsError: there is no such folder.
    """
    if "://" in path:
        folder = any_path(path, "a checkpoint's path")
    else:
        path = expand_home(path, "a checkpoint's path")
        folder = Path(path)
        if not folder.is_dir() and is_hub_name(path):
            whole = ["*.safetensors", *(f"*{suffix}" for suffix in TEXT_SUFFIXES)]
            patterns = whole if files_of_hub is None else list(files_of_hub)
            try:
                return Path(snapshot_download(path, allow_patterns=patterns))
            except (OSError, ValueError) as e:
                raise WeightsError(
                    f"{path}: no such folder, and the hub does not give it: {one_line(e)}"
                ) from e
    try:
        exists = folder.is_dir()
    except ImportError as e:
        raise WeightsError(f"{path}: {one_line(e)}; {files.INSTALL_CLIENT}") from None
    if not exists:
        raise WeightsError(
            f"{path}: expected a folder with a {CONFIG}, or a name on the hub{hub_hint(path)}, "
            f"found no such folder{did_you_mean(path)}"
        )
    return folder


def check_kind(folder: Path) -> None:
    """Checks that a folder holds no adapter.

    Raises:
        WeightsError: the folder holds an adapter, alone or beside the model that it would change.
    """
    if not (folder / _ADAPTER).exists():
        return
    base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
    whole = any((folder / name).exists() for name in (SINGLE, INDEX))
    raise WeightsError(
        f"{folder}: expected a whole model, found {_ADAPTER}, so an adapter"
        f"{f' of {base}' if base else ''}{' beside a model' if whole else ''}; merge it "
        "(peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out))"
        f" and name that folder{f', or remove {_ADAPTER}' if whole else ''}"
    )


def tensor_files(folder: Path) -> list[str]:
    """Returns the names of a folder's safetensors files, each once.

    A single file goes before an index, as in `transformers`.

    Raises:
        WeightsError: the folder has neither, or the index does not say which tensor is where.
    """
    if (folder / SINGLE).exists():
        return [SINGLE]
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise WeightsError(
                f"{folder / INDEX}: expected a weight_map of tensors to files, found none; copy it "
                "anew"
            )
        return sorted(set(index["weight_map"].values()))
    names = (path.name for path in folder.iterdir() if path.suffix in _FOREIGN)
    others = sorted(names, key=lambda name: ("model" not in name, name))
    tensors = f"only {others[0]}, which is not read" if others else "neither"
    raise WeightsError(
        f"{folder}: expected {SINGLE} or {INDEX}, as save_pretrained writes, found {tensors}"
    )


def token_ids(
    config_ids: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, path: Path
) -> dict[str, int]:
    """Returns the tokenizer's ids that stand for images and videos, by the config's keys.

    Args:
        config_ids: those of the config, by key; None where it leaves one out.
        tokenizer: of the same model.
        path: of the config, which errors name.

    Raises:
        WeightsError: an id of the config differs from the tokenizer's.
        DataError: the tokenizer lacks a token.
    """
    special = SpecialIds.of(tokenizer)
    ids = {key: getattr(special, key.removesuffix("_token_id")) for key in DEFAULT_IDS}
    for key, expected in ids.items():
        if (config_id := config_ids.get(key)) not in (None, expected):
            raise WeightsError(
                f"{path}: {key}: expected the tokenizer's {expected}, found {config_id!r}; take "
                "config and tokenizer of one model"
            )
    return ids


def read_json(path: Path, *, needed: bool = True) -> dict[str, Any]:
    """Returns the JSON object of a checkpoint's file.

    Args:
        path: the file.
        needed: whether the file must exist; else a missing one is an empty object.

    Raises:
        WeightsError: the file is missing or holds something else.
    """
    if not needed and not path.exists():
        return {}
    return files.read_json(path, "copy it anew", error=WeightsError)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented as `transformers` does."""
    files.write_json(path, value, indent=2)
