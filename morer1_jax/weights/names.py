"""Maps the tensors of Hugging Face checkpoints of Qwen2.5-VL to our parameter tree, and back.

Each tensor of a checkpoint is one slice of one of our leaves: `leaf_slices` lists them all, so that
a loader can go tensor by tensor.  Names are the published ones (`model.layers.0…`, `visual.…`);
names of transformers 5's state dicts (`model.language_model.…`, `model.visual.…`) are read too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from morer1_jax.errors import WeightsError, abridged
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.layers import Params

_FORMS = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("language_model.", "model."),
)
# Suffixes of buffers that old releases of transformers saved.
_FREQUENCIES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
# Faults that one message names at most.
_MAX_FAULTS = 12


@dataclasses.dataclass(frozen=True)
class LeafSlice:
    """One checkpoint tensor as a slice of a leaf of our tree.

    Attributes:
        shape: of the checkpoint's tensor.
        path: keys of our leaf, from the root.
        index: of the slice on the leaf's leading, stacked axes.
        split: shape that the checkpoint's tensor takes before its axes are permuted.
        permutation: order of the split axes in our leaf.
    """

    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[int, ...] = ()
    split: tuple[int, ...] = ()
    permutation: tuple[int, ...] = ()

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the checkpoint's tensor in our axes."""
        return tensor.reshape(self.split).transpose(self.permutation)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Returns our slice in the checkpoint's axes."""
        inverse = np.argsort(self.permutation)
        return np.ascontiguousarray(value.transpose(inverse).reshape(self.shape))

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our slice."""
        return tuple(self.split[axis] for axis in self.permutation)


def canonical_name(name: str) -> str:
    """Returns a tensor's published name.

    Args:
        name: published, of transformers 5, or of a model saved without its head.
    """
    for new, published in _FORMS:
        if name.startswith(new):
            return published + name.removeprefix(new)
    return name


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the tensors' own names by their published ones.

    Rotary frequencies, which old releases of transformers saved, follow from the config and are
    left out, as in transformers.

    Raises:
        WeightsError: two names are of one tensor.
    """
    by_published: dict[str, str] = {}
    for name in names:
        if name.endswith(_FREQUENCIES):
            continue
        if (first_name := by_published.setdefault(canonical_name(name), name)) != name:
            raise WeightsError(
                f"{first_name} and {name} are one tensor under two names; remove the one that "
                "is stale"
            )
    return by_published


def leaf_slices(config: ModelConfig) -> dict[str, LeafSlice]:
    """Returns the slices of every tensor of a model's checkpoint, by published name.

    A tied head is the embedding and has no tensor of its own.
    """
    text = config.text
    d, table = text.hidden_size, (text.vocab_size, text.hidden_size)
    slices = {
        "model.embed_tokens.weight": _as_is(table, "embedding"),
        "model.norm.weight": _as_is((d,), "language", "norm", "scale"),
    }
    if not config.tie_word_embeddings:
        slices["lm_head.weight"] = _as_is(table, "head")
    for i in range(text.num_hidden_layers):
        theirs, ours, at = f"model.layers.{i}.", ("language", "layers"), (i,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            our_name = name.replace("layernorm", "norm")
            slices[f"{theirs}{name}.weight"] = _as_is((d,), *ours, our_name, "scale", index=at)
        for name in ("q", "k", "v"):
            heads = text.num_attention_heads if name == "q" else text.num_key_value_heads
            slices |= _linear(
                f"{theirs}self_attn.{name}_proj", (*ours, name), at, (heads, text.head_dim), (d,)
            )
        attention_out = f"{theirs}self_attn.o_proj"
        heads = (text.num_attention_heads, text.head_dim)
        slices |= _linear(attention_out, (*ours, "o"), at, (d,), heads, bias=False)
        slices |= _swiglu(theirs, ours, at, d, text.intermediate_size, bias=False)
    return slices | _vision_specs(config)


def from_hf(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, dtype: str = "float32"
) -> Params:
    """Returns our parameter tree, of NumPy leaves of `dtype`, from a checkpoint's tensors.

    Raises:
        WeightsError: tensors are missing, unexpected, of the wrong shape or under two names, or a
            tied model comes with a head that is not its embedding.
    """
    file_names = [*tensors]
    tensors = {ours: tensors[theirs] for ours, theirs in canonical_names(tensors).items()}
    if config.tie_word_embeddings and (head := tensors.pop("lm_head.weight", None)) is not None:
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is not None and not np.array_equal(head, embedding):
            raise WeightsError(
                "lm_head.weight: expected model.embed_tokens.weight's values, since the config has "
                "tie_word_embeddings, found others; set it to false to keep the head"
            )
    slices = leaf_slices(config)
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, slices, file_names)
    params = empty_params(slices, dtype)
    for name, leaf_slice in slices.items():
        leaf = _leaf(params, leaf_slice.path)
        leaf[leaf_slice.index] = leaf_slice.to_ours(np.asarray(tensors[name]))
    return params


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns a checkpoint's tensors, by published name, from our parameter tree.

    Args:
        params: parameters, or a tree like them such as gradients.
    """
    return {
        name: leaf_slice.to_theirs(np.asarray(_leaf(params, leaf_slice.path))[leaf_slice.index])
        for name, leaf_slice in leaf_slices(config).items()
    }


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    slices: Mapping[str, LeafSlice],
    file_names: Iterable[str],
) -> None:
    """Checks a checkpoint's tensors against those that the config calls for.

    Args:
        shapes: of the tensors, by published name.
        slices: of `leaf_slices`.
        file_names: the names that the tensors have in their files.

    Raises:
        WeightsError: tensors are missing, unexpected or of the wrong shape (the first of them are
            named), or all of their names have a prefix.
    """
    if (prefix := _foreign_prefix([*file_names], slices)) is not None:
        raise WeightsError(
            f"names of tensors: expected no prefix, found {prefix!r}, which another library's "
            "wrapper puts there; save the model inside it, or rename them"
        )
    faults = [f"missing {name} {slices[name].shape}" for name in slices.keys() - shapes.keys()]
    faults += [f"unexpected {name}" for name in shapes.keys() - slices.keys()]
    faults += [
        f"{name}: expected shape {slices[name].shape}, found {tuple(shapes[name])}"
        for name in slices.keys() & shapes.keys()
        if tuple(shapes[name]) != slices[name].shape
    ]
    if faults:
        named = abridged(sorted(faults), _MAX_FAULTS, "; ")
        raise WeightsError(f"checkpoint does not fit the model's config: {named}")


def _foreign_prefix(file_names: Sequence[str], slices: Mapping[str, LeafSlice]) -> str | None:
    """Returns the prefix without which most of the missing tensors would be there, if any."""
    missing = slices.keys() - {canonical_name(name) for name in file_names}
    # The norm's name is unique, whatever its prefix.
    for name in file_names:
        norm = re.fullmatch(r"(.+?)model\.(?:language_model\.)?norm\.weight", name)
        if norm is None or canonical_name(name) in slices:
            continue
        prefix = norm.group(1)
        stripped = [n.removeprefix(prefix) for n in file_names if n.startswith(prefix)]
        inner = {canonical_name(name) for name in stripped}
        # Where the prefix begins like a known form, only a part of the names are foreign.
        if len(inner & missing) > max(len(missing) // 2, len(slices) // 8):
            return prefix
    return None


def empty_params(slices: Mapping[str, LeafSlice], dtype: str) -> Params:
    """Returns the parameter tree with uninitialised NumPy leaves, to be filled slice by slice."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for leaf_slice in slices.values():
        # A leaf's stacked axes reach as far as the last of its slices.
        shape = (*(i + 1 for i in leaf_slice.index), *leaf_slice.our_shape)
        shapes[leaf_slice.path] = tuple(map(max, shapes.get(leaf_slice.path, shape), shape))
    params: Params = {}
    for path, shape in shapes.items():
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = np.empty(shape, jnp.dtype(dtype))
    return params


def _vision_specs(config: ModelConfig) -> dict[str, LeafSlice]:
    vision = config.vision
    d = vision.hidden_size
    merged = d * vision.spatial_merge_size**2
    heads = (vision.num_heads, vision.head_dim)
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    slices = {
        "visual.patch_embed.proj.weight": LeafSlice(
            shape=(d, *kernel),
            path=("vision", "patch_embed", "kernel"),
            split=(d, math.prod(kernel)),
            permutation=(1, 0),
        ),
        "visual.merger.ln_q.weight": _as_is((d,), "vision", "merger_norm", "scale"),
    }
    slices |= _linear("visual.merger.mlp.0", ("vision", "merger_in"), (), (merged,), (merged,))
    out = (vision.out_hidden_size,)
    slices |= _linear("visual.merger.mlp.2", ("vision", "merger_out"), (), out, (merged,))
    for i in range(vision.depth):
        theirs = f"visual.blocks.{i}."
        ours, at = _block_place(i, vision.period)
        for name in ("norm1", "norm2"):
            slices[f"{theirs}{name}.weight"] = _as_is((d,), *ours, name, "scale", index=at)
        slices |= _linear(f"{theirs}attn.qkv", (*ours, "attn", "qkv"), at, (3, *heads), (d,))
        slices |= _linear(f"{theirs}attn.proj", (*ours, "attn", "proj"), at, (d,), heads)
        slices |= _swiglu(theirs, ours, at, d, vision.intermediate_size, bias=True)
    return slices


def _block_place(i: int, period: int | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns the path of a tower's block in our tree, and its index on the stacked axes."""
    if period is None:
        return ("vision", f"block_{i}"), ()
    group, place = divmod(i, period)
    if place == period - 1:
        return ("vision", "groups", "full"), (group,)
    return ("vision", "groups", "windowed"), (group, place)


def _as_is(shape: tuple[int, ...], *path: str, index: tuple[int, ...] = ()) -> LeafSlice:
    return LeafSlice(shape, path, index, split=shape, permutation=tuple(range(len(shape))))


def _linear(
    name: str,
    path: tuple[str, ...],
    index: tuple[int, ...],
    outputs: tuple[int, ...],
    inputs: tuple[int, ...],
    bias: bool = True,
) -> dict[str, LeafSlice]:
    # Theirs is [outputs, inputs] with heads folded in; ours [*inputs, *outputs].
    axes = range(len(outputs) + len(inputs))
    slices = {
        f"{name}.weight": LeafSlice(
            shape=(math.prod(outputs), math.prod(inputs)),
            path=(*path, "kernel"),
            index=index,
            split=(*outputs, *inputs),
            permutation=(*axes[len(outputs) :], *axes[: len(outputs)]),
        )
    }
    if bias:
        slices[f"{name}.bias"] = LeafSlice(
            shape=(math.prod(outputs),),
            path=(*path, "bias"),
            index=index,
            split=outputs,
            permutation=tuple(range(len(outputs))),
        )
    return slices


def _swiglu(
    theirs: str, ours: tuple[str, ...], index: tuple[int, ...], d: int, f: int, *, bias: bool
) -> dict[str, LeafSlice]:
    slices = {}
    for name, outputs, inputs in (("gate", f, d), ("up", f, d), ("down", d, f)):
        path = (*ours, "mlp", name)
        slices |= _linear(f"{theirs}mlp.{name}_proj", path, index, (outputs,), (inputs,), bias)
    return slices


def _leaf(params: Params, path: Iterable[str]) -> Any:
    for key in path:
        params = params[key]
    return params
