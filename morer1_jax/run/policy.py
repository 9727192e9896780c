"""A model with its tokenizer and labels, on a mesh; it knows no dataset and no workdir."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import PreTrainedTokenizerFast

from morer1_jax.data.grammar import GrammarTables, build_tables, token_bytes
from morer1_jax.data.tokenizer import check_labels
from morer1_jax.learn.state import abstract_params
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.sampler import allowed_ids
from morer1_jax.run import mesh as meshes
from morer1_jax.task.ontology import Ontology


class Policy:
    """A model with all that sampling, scoring and training share.

    Raises:
        DataError: a label that the tokenizer cannot write.

    Attributes:
        special: ids of the special tokens.
        replicated: the sharding of arrays that every device has whole.
        rows: the sharding of arrays whose leading axis is a batch's rows.
    """

    def __init__(
        self, model: Qwen25VL, tokenizer: PreTrainedTokenizerFast, ontology: Ontology, mesh: Mesh
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ontology = ontology
        self.mesh = mesh
        self.special = SpecialIds.of(tokenizer)
        check_labels(tokenizer, ontology.labels)
        self.replicated = NamedSharding(mesh, P())
        self.rows = meshes.batch_sharding(mesh)

    @functools.cached_property
    def param_shardings(self) -> Any:
        """The sharding of every parameter."""
        return meshes.param_shardings(self.mesh, abstract_params(self.model))

    @functools.cached_property
    def grammar(self) -> GrammarTables:
        """The automata of a readable answer over this vocabulary, on the mesh."""
        pieces = token_bytes(self.tokenizer, self.model.config.text.vocab_size)
        return jax.device_put(build_tables(pieces, self.ontology.labels), self.replicated)

    @functools.cached_property
    def allowed(self) -> jax.Array:
        """Whether each id may be sampled: bool [v], on the mesh."""
        rows = self.model.config.text.vocab_size
        return jax.device_put(
            jnp.asarray(allowed_ids(self.special, len(self.tokenizer), rows)), self.replicated
        )

    def put(self, batch: Any) -> Any:
        """Puts this host's rows of a batch on the mesh; see `put_batch`."""
        return meshes.put_batch(batch, self.mesh)
