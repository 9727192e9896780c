"""Checkpoint folders as `transformers` saves them."""

import dataclasses

import pytest

from morer1_jax.task import more

ROWS = 576  # of the embedding: more than the tokenizer has
TIED = {"tied": "odd kv heads, tied, aperiodic", "untied": "odd heads, untied, periodic"}


@pytest.fixture(scope="session")
def published(reference, small_tokenizer, small_world, tmp_path_factory):
    """`(tied, dtype, shard size) -> (case, folder)` as `transformers` saves it, weights redrawn."""
    import torch
    import transformers

    from morer1_jax.model.config import Runtime
    from morer1_jax.model.special import SpecialIds
    from morer1_jax.model.vlm import Qwen25VL

    special = SpecialIds.of(small_tokenizer)
    folder, made = tmp_path_factory.mktemp("published"), {}

    def case_of(tied):
        config = reference.CONFIGS[TIED[tied]]
        return dataclasses.replace(
            config,
            text=dataclasses.replace(config.text, vocab_size=ROWS),
            image_token_id=special.image,
            video_token_id=special.video,
            vision_start_token_id=special.vision_start,
            vision_end_token_id=special.vision_end,
        )

    def make(tied="untied", dtype="float32", shard="10GB"):
        key = f"{tied}-{dtype}-{shard}"
        if key not in made:
            config = case_of(tied)
            theirs = reference.Reference(config)
            theirs.model.to(getattr(torch, dtype)).save_pretrained(
                folder / key, max_shard_size=shard
            )
            small_tokenizer.save_pretrained(folder / key)
            more.write_ontology(folder / key, more.read_ontology(small_world))
            # What was rounded stays rounded; buffers, which are not saved, never are.
            load = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
            theirs.model = load(
                folder / key, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            made[key] = reference.Case(
                config, reference.draw_samples(config), theirs, {}, Qwen25VL(config, Runtime())
            )
        return made[key], folder / key

    return make
