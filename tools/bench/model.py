"""Writes the model that both sides load: random weights of a preset's sizes, exported as usual."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax

from bench.cases import LABELS, Preset, make_tokenizer
from morer1_jax.model.config import ImageConfig, ModelConfig, Runtime
from morer1_jax.model.layers import Params
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL, init_params
from morer1_jax.run import mesh as meshes
from morer1_jax.run.placed import place
from morer1_jax.serve.export import export
from morer1_jax.serve.loaded import LoadedModel
from morer1_jax.task.ontology import Ontology

_PACKAGES = ("jax", "torch", "transformers", "trl")


def write_model(preset: Preset, folder: Path) -> None:
    """Writes weights, config, tokenizer and processor into `folder`, which must not exist."""
    source = folder.with_name(f"{folder.name}-tokenizer")
    special = SpecialIds.of(tokenizer := make_tokenizer(preset, source))
    config = ModelConfig(
        text=dataclasses.replace(preset.text, tie_word_embeddings=True),
        vision=preset.vision,
        image_token_id=special.image,
        video_token_id=special.video,
        vision_start_token_id=special.vision_start,
        vision_end_token_id=special.vision_end,
    )
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    placed = place(config, Runtime(), mesh)
    loaded = LoadedModel(
        placed=placed,
        load=lambda: _random_params(placed.model),
        images=ImageConfig(),
        completion=preset.completion,
        source=source,
        tokenizer=tokenizer,
        dtypes="float32",
        ontology=Ontology(LABELS),
        digest="random",
        checkpoint=None,
    )
    export(loaded, folder)


def _random_params(model: Qwen25VL) -> Params:
    """Returns random parameters with which every layer influences the next token.

    With those of `init_params` a tied head would repeat the last token, whatever is before it.
    """

    def scaled(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        layer_out = {"o", "down"} & {entry.key for entry in path}
        return 8.0 * leaf if layer_out else leaf

    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return jax.tree_util.tree_map_with_path(scaled, params)


def device_name() -> str:
    """Returns the name of the machine's accelerator, or its CPU's with the number of cores."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    return f"{os.cpu_count()} cores, {_processor() or 'unknown processor'}"


def _processor() -> str | None:
    """Returns the CPU's name by Linux; None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def made_now() -> str:
    """Returns the date, and the versions of the installed packages that are measured."""
    versions = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([datetime.date.today().isoformat(), *versions])
