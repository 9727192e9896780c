"""Publishes a model as a folder that `transformers` loads unchanged, and this package too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from morer1_jax.files import atomic_dir, read_text, temporary_path
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.special import END_OF_TURN, SpecialIds
from morer1_jax.rollout.sampler import allowed_ids
from morer1_jax.serve.loaded import LABELS, TASK, LoadedModel
from morer1_jax.stages.disk import bytes_in, check_free
from morer1_jax.task.ontology import write_ontology_file
from morer1_jax.task.prompt import conversation
from morer1_jax.weights import published as weights
from morer1_jax.weights.folder import read_json, write_json
from morer1_jax.weights.processor import PROCESSOR, write_images

TOKENIZER = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
# Keys of the starting model's config that our config does not have and the export keeps. Its other
# keys might be another library's or another release's, such as those of quantisation.
_KEPT = ("bos_token_id", "vision_token_id")
_KEPT_VISION = ("spatial_patch_size",)
# The oldest release of transformers that reads the folder. If a config names a release above
# 4.57.2, or none, releases from 4.57.3 on warn that a large vocabulary is Mistral's broken one.
_RELEASE = "4.51.3"
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
    loaded: LoadedModel,
    folder: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes tensors, config, tokenizer, processor, chat template and generation config.

    Config, processor and generation config are written anew, so that every release of transformers
    from 4.51 on reads the model, sees our pixels and by default generates our greedy answer; the
    tokenizer is the one the model began with, and so is a chat template that writes our
    conversation. Beside them lie `rel2id.json` and `more_r1.json`: labels, crop and answer's
    length, for our own commands.

    Args:
        folder: must not exist; after an error it does not exist either.
        dtype: of the tensors; None: the model's own.

    Raises:
        FileExistsError: the folder exists.
        ConfigError: the disk has no room for the tensors.
    """
    dtypes = dtype or loaded.dtypes
    needed = weights.tensor_bytes(loaded.model.config, dtypes)
    # Files that a killed export left are deleted first.
    needed -= bytes_in(temporary_path(folder))
    check_free(Path(folder), needed, "make room, or name another --out")
    with atomic_dir(folder) as partial:
        weights.copy_others(loaded.source, partial)
        special = SpecialIds.of(tokenizer := loaded.tokenizer)
        _write_config(partial / weights.CONFIG, loaded.model.config, special, dtypes)
        write_images(partial, loaded.images)
        _write_generation(partial / GENERATION, loaded, special, len(tokenizer))
        _write_tokenizer(partial, tokenizer)
        _write_task(partial, loaded)
        weights.save_tensors(
            partial,
            loaded.params,
            loaded.model.config,
            dtype=dtypes,
            lora=loaded.model.lora,
            shard_bytes=shard_bytes,
        )


def _write_config(
    path: Path, config: ModelConfig, special: SpecialIds, dtypes: str | Mapping[str, str]
) -> None:
    """Writes the config in the published, flat form; releases before 4.52 read no other."""
    # Our config, with the keys that are kept from the starting model's.
    theirs, ours = read_json(path, needed=False), config.to_hf()
    text = theirs.get("text_config") or theirs
    kept = {key: text[key] for key in _KEPT if text.get(key) is not None}
    vision = theirs.get("vision_config") or {}
    ours["vision_config"] |= {key: vision[key] for key in _KEPT_VISION if key in vision}
    # Release 5.4 multiplies photos' time positions, too, by this rate, which is meant for videos.
    ours["vision_config"]["tokens_per_second"] = 1
    if not isinstance(dtypes, str):
        # The dtype of most tensors: `transformers` would load all tensors in it.
        dtypes = Counter(dtypes.values()).most_common(1)[0][0]
    # The default ids of bos and eos may lie outside a small vocabulary.
    ids = {"bos_token_id": None, "eos_token_id": special.end_of_turn}
    # Each release reads one of the dtype's two names.
    release = {"dtype": dtypes, "torch_dtype": dtypes, "transformers_version": _RELEASE}
    write_json(path, ours | ids | kept | release)


def _write_generation(path: Path, loaded: LoadedModel, special: SpecialIds, tokens: int) -> None:
    """Writes the config with which `generate()` gives our greedy answer by default."""
    allowed = allowed_ids(special, tokens, loaded.model.config.text.vocab_size)
    described = {
        "do_sample": False,
        "eos_token_id": [special.end_of_turn, special.pad],
        "pad_token_id": special.pad,
        "max_new_tokens": loaded.completion,
        "suppress_tokens": np.flatnonzero(~allowed).tolist(),
    }
    write_json(path, described)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes a tokenizer's config that older releases read too, and the chat template."""
    # The config, with keys and classes as older releases name them.
    described = read_json(folder / TOKENIZER, needed=False)
    described.pop("backend", None)
    if described.get("tokenizer_class") == "TokenizersBackend":
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
        described["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(extra := described.get("extra_special_tokens"), list):
        del described["extra_special_tokens"]
        described["additional_special_tokens"] = extra
    # The chat template, which releases keep in different files; the text is the same in all.
    processor = read_json(folder / PROCESSOR, needed=False)
    templates = [
        described.pop("chat_template", None),
        processor.pop("chat_template", None),
        read_json(folder / _OLD_TEMPLATE, needed=False).get("chat_template"),
        read_text(folder / TEMPLATE) if (folder / TEMPLATE).exists() else None,
    ]
    templates = [template for template in templates if template is not None]
    if not all(_writes_ours(template, tokenizer) for template in templates):
        print("chat template: not that of the conversation trained on; replaced by ours")
        templates = []
    template = templates[-1] if templates else _TEMPLATE
    write_json(folder / TOKENIZER, described | {"chat_template": template})
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    (folder / _OLD_TEMPLATE).unlink(missing_ok=True)
    if processor:
        write_json(folder / PROCESSOR, processor)


def _writes_ours(template: Any, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Returns whether a chat template writes the conversation trained on, answer included."""
    question, answer = "Is it {{ red }}?\nEntity: Heat", "<think>\nStep 1: a\n</think>\n<answer>"
    images = [{"type": "image"}] * 2
    prompt = [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]
    system = [{"role": "system", "content": "You are a helpful assistant."}]
    expected = conversation(question, 2)

    def written(messages: list[dict[str, Any]], turn: bool) -> str:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=turn
        )

    try:
        return all(
            written(before + prompt, True) == expected
            and written([*before, *prompt, {"role": "assistant", "content": answer}], False)
            == f"{expected}{answer}{END_OF_TURN}\n"
            for before in ([], system)
        )
    except ImportError:
        raise
    except Exception:  # A template is a program, which may raise anything.
        return False


def _write_task(folder: Path, loaded: LoadedModel) -> None:
    images = loaded.images
    task = {
        "crop_margin": images.crop_margin,
        "crop_least": images.crop_least,
        "completion_length": loaded.completion,
    }
    write_json(folder / TASK, task)
    if loaded.ontology is not None:
        write_ontology_file(folder / LABELS, loaded.ontology.labels)
