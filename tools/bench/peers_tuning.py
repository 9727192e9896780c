"""Makes `transformers`' Qwen2.5-VL faster in known ways, which change no number beyond rounding."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen


def use_onednn(model: nn.Module) -> None:
    """Makes every linear map use oneDNN, forward and backward, in place of MKL.

    oneDNN is faster in float32 on many CPUs, AMD's above all; PyTorch uses it for half precision
    only.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_onednn_linear, module)


def _onednn_linear(self: nn.Linear, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _product(x, self.weight, self.bias)
    return _OneDNNLinear.apply(x, self.weight, self.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x weightᵀ + bias."""
    # The compiler refuses oneDNN's operator unless weights are constants, so it gets an operator
    # that it does not look into. Calling that takes long, so that eager code does without.
    multiply = opaque_product if torch.compiler.is_compiling() else _multiply
    return multiply(x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


opaque_product = torch.library.custom_op(
    "morer1_bench::product", _multiply, mutates_args=(), device_types="cpu"
)


@opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _OneDNNLinear(torch.autograd.Function):
    """`F.linear` and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        to_x = _product(rows, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        to_weight = _product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return to_x, to_weight, rows.sum(0) if ctx.has_bias else None


def batch_windows(model: PreTrainedModel) -> None:
    """Makes the vision tower faster.

    All windows of a length are attended to at once, not one after another, and patches are
    multiplied by one matrix, not convolved.
    """
    for module in model.modules():
        if isinstance(module, qwen.Qwen2_5_VLVisionAttention):
            module.forward = types.MethodType(_vision_attention, module)
        elif isinstance(module, qwen.Qwen2_5_VisionPatchEmbed):
            module.forward = types.MethodType(_patch_embedding, module)


def _patch_embedding(self: qwen.Qwen2_5_VisionPatchEmbed, patches: Tensor) -> Tensor:
    weight = self.proj.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1))


def _vision_attention(
    self: qwen.Qwen2_5_VLVisionAttention,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Tensor:
    query, key, value = self.qkv(hidden_states).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
    query, key = qwen.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    places, parts = [], []
    for length in lengths.unique().tolist():
        rows = starts[lengths == length, None] + torch.arange(length, device=starts.device)
        heads = (x[rows].transpose(1, 2) for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
        places.append(rows.flatten())
    in_order = torch.cat(parts)[torch.cat(places).argsort()]
    return self.proj(in_order.flatten(1))


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for all later tokens, which are written in place.

    Args:
        room: maximum number of tokens.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            b, heads, _, width = key_states.shape
            self._buffers = [key_states.new_empty(b, heads, self._room, width) for _ in range(2)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def keep_rows(self, kept: Tensor) -> None:
        """Keeps some rows of the batch; `kept` is bool [b]."""
        end = self.get_seq_length()
        self._buffers = [buffer[kept] for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)


def keep_rows(cache: Cache, kept: Tensor) -> None:
    """Keeps some rows of a `roomy_cache`; `kept` is bool [b]."""
    for layer in cache.layers:
        layer.keep_rows(kept)


def roomy_cache(model: PreTrainedModel, room: int) -> Cache:
    """Returns a cache for `generate` that is never copied."""
    return Cache(layers=[_RoomyLayer(room) for _ in model.model.language_model.layers])
