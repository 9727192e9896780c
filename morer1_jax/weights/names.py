"""The name map between Hugging Face checkpoints of Qwen2.5-VL and our parameter tree.

Each tensor of a checkpoint is one slice of one leaf of ours: `tensor_specs` lists them all, so a
loader can go tensor by tensor.  Names are the published ones (`model.layers.0…`, `visual.…`);
reading accepts those of transformers 5 state dicts (`model.language_model.…`, `model.visual.…`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from morer1_jax.errors import WeightsError
from morer1_jax.model.config import ModelConfig

Params = dict[str, Any]
_FORMS = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("language_model.", "model."),
)
# Buffers of old saves.
_FREQUENCIES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
# Most faults in one message.
_MOST = 12


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Where one checkpoint tensor lives in our tree, and how its axes map.

    Attributes:
        shape: of the checkpoint's tensor.
        path: keys of our leaf, from the root.
        index: place on the leaf's leading, stacked axes.
        split: shape the checkpoint's tensor takes before its axes are permuted.
        permutation: of the split axes, giving ours.
    """

    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[int, ...] = ()
    split: tuple[int, ...] = ()
    permutation: tuple[int, ...] = ()

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The checkpoint's tensor in our axes."""
        return tensor.reshape(self.split).transpose(self.permutation)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Our slice in the checkpoint's axes."""
        back = np.argsort(self.permutation)
        return np.ascontiguousarray(value.transpose(back).reshape(self.shape))

    @property
    def our_shape(self) -> tuple[int, ...]:
        return tuple(self.split[axis] for axis in self.permutation)


def canonical_name(name: str) -> str:
    """The published name of a tensor, from it, from the transformers 5 form, or from that of a
    model saved without its head."""
    for new, published in _FORMS:
        if name.startswith(new):
            return published + name.removeprefix(new)
    return name


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Each tensor's published name to the one it has.

    Rotary frequencies, which old releases of transformers saved, follow from the config and are
    passed over, as transformers does.

    Raises:
        WeightsError: a tensor is there under both names.
    """
    found: dict[str, str] = {}
    for name in names:
        if name.endswith(_FREQUENCIES):
            continue
        if (other := found.setdefault(canonical_name(name), name)) != name:
            raise WeightsError(
                f"{other} and {name} are one tensor under two names; remove the one that is stale"
            )
    return found


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint of this model, by its published name.

    A tied head is the embedding and has no tensor of its own.
    """
    text = config.text
    d, table = text.hidden_size, (text.vocab_size, text.hidden_size)
    specs = {
        "model.embed_tokens.weight": _as_is(table, "embedding"),
        "model.norm.weight": _as_is((d,), "language", "norm", "scale"),
    }
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = _as_is(table, "head")
    for i in range(text.num_hidden_layers):
        theirs, ours, at = f"model.layers.{i}.", ("language", "layers"), (i,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            our_name = name.replace("layernorm", "norm")
            specs[f"{theirs}{name}.weight"] = _as_is((d,), *ours, our_name, "scale", index=at)
        for name in ("q", "k", "v"):
            heads = text.num_attention_heads if name == "q" else text.num_key_value_heads
            specs |= _linear(
                f"{theirs}self_attn.{name}_proj", (*ours, name), at, (heads, text.head_dim), (d,)
            )
        attention_out = f"{theirs}self_attn.o_proj"
        heads = (text.num_attention_heads, text.head_dim)
        specs |= _linear(attention_out, (*ours, "o"), at, (d,), heads, bias=False)
        specs |= _swiglu(theirs, ours, at, d, text.intermediate_size, bias=False)
    return specs | _vision_specs(config)


def from_hf(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, dtype: str = "float32"
) -> Params:
    """Our parameter tree (NumPy leaves of `dtype`) from a checkpoint's tensors.

    Raises:
        WeightsError: tensors are missing, unexpected, of the wrong shape or there under two names,
            or a tied model comes with a head that is not its embedding.
    """
    there = [*tensors]
    tensors = {ours: tensors[theirs] for ours, theirs in canonical_names(tensors).items()}
    if config.tie_word_embeddings and (head := tensors.pop("lm_head.weight", None)) is not None:
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is not None and not np.array_equal(head, embedding):
            raise WeightsError(
                "lm_head.weight: differs from model.embed_tokens.weight, but the config has "
                "tie_word_embeddings; set it to false to keep the head"
            )
    specs = tensor_specs(config)
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, specs, there)
    params = empty_params(specs, dtype)
    for name, spec in specs.items():
        leaf = _leaf(params, spec.path)
        leaf[spec.index] = spec.to_ours(np.asarray(tensors[name]))
    return params


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """A checkpoint's tensors, by published name, from our parameter tree (or one like it, such
    as gradients)."""
    return {
        name: spec.to_theirs(np.asarray(_leaf(params, spec.path))[spec.index])
        for name, spec in tensor_specs(config).items()
    }


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, TensorSpec],
    there: Iterable[str],
) -> None:
    """Compares a checkpoint's tensors, by canonical name, with those the config calls for.

    Args:
        there: the names that the tensors have in their files.

    Raises:
        WeightsError: names missing, unexpected and misshapen tensors, the first of them where they
            are many, or the prefix that is all that is wrong with their names.
    """
    if (prefix := _foreign_prefix([*there], specs)) is not None:
        raise WeightsError(
            f"{prefix!r} stands before the names of tensors, which another library's wrapper puts "
            "there; save the model inside it, or rename them"
        )
    faults = [f"missing {name} {specs[name].shape}" for name in specs.keys() - shapes.keys()]
    faults += [f"unexpected {name}" for name in shapes.keys() - specs.keys()]
    faults += [
        f"{name} has shape {tuple(shapes[name])}, expected {specs[name].shape}"
        for name in specs.keys() & shapes.keys()
        if tuple(shapes[name]) != specs[name].shape
    ]
    if faults:
        more = f"; and {len(faults) - _MOST} more" if len(faults) > _MOST else ""
        raise WeightsError(
            f"checkpoint does not fit the model's config: {'; '.join(sorted(faults)[:_MOST])}{more}"
        )


def _foreign_prefix(there: Sequence[str], specs: Mapping[str, TensorSpec]) -> str | None:
    """What stands before the names of most tensors that are not found, which without it would be
    those expected."""
    missing = specs.keys() - {canonical_name(name) for name in there}
    # With whatever is before it, the norm's name belongs to one tensor alone.
    for name in there:
        found = re.fullmatch(r"(.+?)model\.(?:language_model\.)?norm\.weight", name)
        if found is None or canonical_name(name) in specs:
            continue
        prefix = found.group(1)
        inner = {canonical_name(n.removeprefix(prefix)) for n in there if n.startswith(prefix)}
        # Of a wrapper by the name of a known form only some of the tensors look strange.
        if len(inner & missing) > max(len(missing) // 2, len(specs) // 8):
            return prefix
    return None


def empty_params(specs: Mapping[str, TensorSpec], dtype: str) -> Params:
    """The parameter tree with uninitialised leaves, to be filled slice by slice."""
    stacks: dict[tuple[str, ...], tuple[int, ...]] = {}
    for spec in specs.values():
        shape = (*(i + 1 for i in spec.index), *spec.our_shape)
        known = stacks.setdefault(spec.path, shape)
        stacks[spec.path] = tuple(map(max, known, shape))
    params: Params = {}
    for path, shape in stacks.items():
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = np.empty(shape, jnp.dtype(dtype))
    return params


def _vision_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    vision = config.vision
    d = vision.hidden_size
    merged = d * vision.spatial_merge_size**2
    heads = (vision.num_heads, vision.head_dim)
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    specs = {
        "visual.patch_embed.proj.weight": TensorSpec(
            shape=(d, *kernel),
            path=("vision", "patch_embed", "kernel"),
            split=(d, math.prod(kernel)),
            permutation=(1, 0),
        ),
        "visual.merger.ln_q.weight": _as_is((d,), "vision", "merger_norm", "scale"),
    }
    specs |= _linear("visual.merger.mlp.0", ("vision", "merger_in"), (), (merged,), (merged,))
    out = (vision.out_hidden_size,)
    specs |= _linear("visual.merger.mlp.2", ("vision", "merger_out"), (), out, (merged,))
    for i in range(vision.depth):
        theirs = f"visual.blocks.{i}."
        ours, at = _block_place(i, vision.period)
        for name in ("norm1", "norm2"):
            specs[f"{theirs}{name}.weight"] = _as_is((d,), *ours, name, "scale", index=at)
        specs |= _linear(f"{theirs}attn.qkv", (*ours, "attn", "qkv"), at, (3, *heads), (d,))
        specs |= _linear(f"{theirs}attn.proj", (*ours, "attn", "proj"), at, (d,), heads)
        specs |= _swiglu(theirs, ours, at, d, vision.intermediate_size, bias=True)
    return specs


def _block_place(i: int, period: int | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if period is None:
        return ("vision", f"block_{i}"), ()
    group, place = divmod(i, period)
    if place == period - 1:
        return ("vision", "groups", "full"), (group,)
    return ("vision", "groups", "windowed"), (group, place)


def _as_is(shape: tuple[int, ...], *path: str, index: tuple[int, ...] = ()) -> TensorSpec:
    return TensorSpec(shape, path, index, split=shape, permutation=tuple(range(len(shape))))


def _linear(
    name: str,
    path: tuple[str, ...],
    index: tuple[int, ...],
    outputs: tuple[int, ...],
    inputs: tuple[int, ...],
    bias: bool = True,
) -> dict[str, TensorSpec]:
    # Theirs is [outputs, inputs] with heads folded in; ours [*inputs, *outputs].
    axes = range(len(outputs) + len(inputs))
    specs = {
        f"{name}.weight": TensorSpec(
            shape=(math.prod(outputs), math.prod(inputs)),
            path=(*path, "kernel"),
            index=index,
            split=(*outputs, *inputs),
            permutation=(*axes[len(outputs) :], *axes[: len(outputs)]),
        )
    }
    if bias:
        specs[f"{name}.bias"] = TensorSpec(
            shape=(math.prod(outputs),),
            path=(*path, "bias"),
            index=index,
            split=outputs,
            permutation=tuple(range(len(outputs))),
        )
    return specs


def _swiglu(
    theirs: str, ours: tuple[str, ...], index: tuple[int, ...], d: int, f: int, *, bias: bool
) -> dict[str, TensorSpec]:
    specs = {}
    for name, outputs, inputs in (("gate", f, d), ("up", f, d), ("down", d, f)):
        path = (*ours, "mlp", name)
        specs |= _linear(f"{theirs}mlp.{name}_proj", path, index, (outputs,), (inputs,), bias)
    return specs


def _leaf(params: Params, path: Iterable[str]) -> Any:
    for key in path:
        params = params[key]
    return params
