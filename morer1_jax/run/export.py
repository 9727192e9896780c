"""Publishing a model: a folder that `transformers` loads as it is, and that we load again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from morer1_jax.data.images import ImageConfig
from morer1_jax.data.tokenizer import SpecialIds, load_tokenizer
from morer1_jax.files import atomic_dir
from morer1_jax.run import weights
from morer1_jax.run.student import LABELS, TASK, Student
from morer1_jax.task.ontology import write_ontology_file

PROCESSOR = "preprocessor_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
# Qwen2.5-VL's conversation, as `task.prompt` writes it.
_TEMPLATE = """\
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def export(
    student: Student,
    folder: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes tensors, config, tokenizer, processor, chat template and generation config.

    What the student began with is kept; what it never had is made. Beside the published files lie
    `rel2id.json` and `more_r1.json`: labels, crop and answer's length, for our own commands.

    Args:
      folder: where to; must not exist. It becomes whole or does not become.
      dtype: of the tensors; None: the student's own.

    Raises:
      FileExistsError: the folder is there already.
    """
    dtypes = dtype or student.dtypes
    with atomic_dir(folder) as partial:
        weights.copy_others(student.source, partial)
        special = SpecialIds.of(tokenizer := load_tokenizer(student.source))
        # What a model of other sizes would take by default is no token of a small vocabulary.
        ids = {"bos_token_id": None, "eos_token_id": special.end_of_turn}
        _write_config(partial / weights.CONFIG, student.model.config.to_hf() | ids, dtypes)
        _write_processor(partial / PROCESSOR, student.images)
        _write_generation(partial, tokenizer, special)
        _write_task(partial, student)
        weights.save_tensors(
            partial,
            student.params,
            student.model.config,
            dtype=dtypes,
            lora=student.model.lora,
            shard_bytes=shard_bytes,
        )


def _write_config(path: Path, ours: dict[str, Any], dtypes: str | Mapping[str, str]) -> None:
    # A config that is there already says more than ours.
    described = json.loads(path.read_text()) if path.exists() else ours
    described.pop("torch_dtype", None)  # the older name of dtype
    if not isinstance(dtypes, str):
        # Of several, the one that most tensors have, as `transformers` would load them.
        dtypes = Counter(dtypes.values()).most_common(1)[0][0]
    _write(path, {**described, "dtype": dtypes})


def _write_processor(path: Path, images: ImageConfig) -> None:
    limits = {"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels}
    if not path.exists():
        Qwen2VLImageProcessorPil(
            size=limits,
            patch_size=images.patch_size,
            merge_size=images.merge_size,
            temporal_patch_size=images.temporal_patch_size,
        ).save_pretrained(path.parent)
    described = json.loads(path.read_text())
    # As trained; older files have the limits under names of their own, too.
    older = {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels}
    described |= {name: value for name, value in older.items() if name in described}
    _write(path, {**described, "size": limits})


def _write_generation(
    folder: Path, tokenizer: PreTrainedTokenizerFast, special: SpecialIds
) -> None:
    if not (folder / GENERATION).exists():
        ids = {"eos_token_id": [special.end_of_turn, special.pad], "pad_token_id": special.pad}
        _write(folder / GENERATION, {**ids, "do_sample": False})
    if not tokenizer.chat_template and not (folder / "chat_template.json").exists():
        (folder / TEMPLATE).write_text(_TEMPLATE)


def _write_task(folder: Path, student: Student) -> None:
    images = student.images
    task = {
        "crop_margin": images.crop_margin,
        "crop_least": images.crop_least,
        "completion_length": student.completion,
    }
    _write(folder / TASK, task)
    if student.ontology is not None:
        write_ontology_file(folder / LABELS, student.ontology.labels)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
