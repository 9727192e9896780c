"""A model with its tokenizer and labels, on a mesh; it knows no dataset and no workdir."""

from __future__ import annotations

import functools

import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from morer1_jax.data.grammar import GrammarTables, build_tables, token_bytes
from morer1_jax.data.tokenizer import check_labels
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.sampler import allowed_ids
from morer1_jax.run.placed import Placed
from morer1_jax.task.ontology import Ontology


class Policy:
    """A model with all that sampling, scoring and training share.

    Raises:
        DataError: a label that the tokenizer cannot write.

    Attributes:
        special: ids of the special tokens.
    """

    def __init__(
        self, placed: Placed, tokenizer: PreTrainedTokenizerFast, ontology: Ontology
    ) -> None:
        self.placed = placed
        self.tokenizer = tokenizer
        self.ontology = ontology
        self.special = SpecialIds.of(tokenizer)
        check_labels(tokenizer, ontology.labels)

    @property
    def model(self) -> Qwen25VL:
        """The model."""
        return self.placed.model

    @functools.cached_property
    def grammar(self) -> GrammarTables:
        """The automata of a readable answer over this vocabulary, on the mesh."""
        pieces = token_bytes(self.tokenizer, self.model.config.text.vocab_size)
        return jax.device_put(build_tables(pieces, self.ontology.labels), self.placed.replicated)

    @functools.cached_property
    def allowed(self) -> jax.Array:
        """Whether each id may be sampled: bool [v], on the mesh."""
        rows = self.model.config.text.vocab_size
        return jax.device_put(
            np.asarray(allowed_ids(self.special, len(self.tokenizer), rows)),
            self.placed.replicated,
        )
