"""What a checkpoint folder holds: a whole model in safetensors, or something else, as is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from morer1_jax import files
from morer1_jax.errors import WeightsError
from morer1_jax.model.config import DEFAULT_IDS
from morer1_jax.model.special import SpecialIds

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# Tensors as others keep them.
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".safetensors")


def check_kind(folder: Path) -> None:
    """Finds out whether a folder holds a whole model.

    Raises:
      WeightsError: it holds an adapter, by itself or beside a model that it would change.
    """
    if not (folder / _ADAPTER).exists():
        return
    base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
    whole = any((folder / name).exists() for name in (SINGLE, INDEX))
    raise WeightsError(
        f"{folder}: {_ADAPTER} found, so {'beside a model ' if whole else ''}an adapter"
        f"{f' of {base}' if base else ''}; a whole model expected: merge it "
        "(peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out))"
        f" and name that folder{f', or remove {_ADAPTER}' if whole else ''}"
    )


def tensor_files(folder: Path) -> list[str]:
    """The files of tensors, each once: the single one if it is there, as `transformers` reads."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise WeightsError(f"{folder / INDEX}: no weight_map, expected tensor name to file")
        return sorted(set(index["weight_map"].values()))
    names = (path.name for path in folder.iterdir() if path.suffix in _FOREIGN)
    others = sorted(names, key=lambda name: ("model" not in name, name))
    found = f" but {others[0]}, which is not read" if others else ""
    raise WeightsError(
        f"{folder}: neither {SINGLE} nor {INDEX} found{found}; expected one of them, as "
        "save_pretrained writes"
    )


def token_ids(
    said: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, path: Path
) -> dict[str, int]:
    """The ids that stand for images and videos: the tokenizer's, which a config may leave out.

    Args:
      said: those that the config has, by key.
      path: of the config, which errors name.

    Raises:
      WeightsError: one that it has is another than the tokenizer's.
      DataError: the tokenizer has none.
    """
    special = SpecialIds.of(tokenizer)
    ids = {key: getattr(special, key.removesuffix("_token_id")) for key in DEFAULT_IDS}
    for key, expected in ids.items():
        if (found := said.get(key)) not in (None, expected):
            raise WeightsError(
                f"{path}: {key}: found {found!r}, but its tokenizer has {expected}; expected "
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
