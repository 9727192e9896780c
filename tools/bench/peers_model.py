"""Runs a model of `transformers` in one of several forms: log-probabilities and samples."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bench import peers_tuning
from bench.cases import Inputs, Preset, Prompt
from morer1_jax.model.special import SpecialIds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Form:
    """How a model is run; none of it changes the numbers beyond rounding.

    Attributes:
        tuned: whether AdamW is one kernel, logits are computed only where they count, images are
            encoded once a prompt, and all attention windows are computed at once.
        onednn: whether linear maps are oneDNN's; on a CPU only.
        compiled: whether decoder layers are compiled by `torch.compile`, which needs a C++
            compiler; not in sampling, where each shape occurs once.
        cache: of sampling. "dynamic" and "static" are the library's, and each sample has its own
            prefill; "shared" prefills a prompt once, and is never copied.
    """

    tuned: bool = True
    onednn: bool = False
    compiled: bool = False
    cache: Literal["dynamic", "static", "shared"] = "dynamic"


FORMS = MappingProxyType(
    {
        "default": Form(tuned=False),
        "tuned": Form(),
        "onednn": Form(onednn=True),
        "static": Form(onednn=True, cache="static"),
        "shared": Form(onednn=True, cache="shared"),
        "compiled": Form(onednn=True, cache="shared", compiled=True),
    }
)


class Processor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without videos, whose processor needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)


def load_processor(folder: Path) -> Processor:
    """Loads the folder's tokenizer and image processor."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return Processor(images, tokenizer, chat_template=tokenizer.chat_template)


def load_network(
    folder: Path, form: Form, dtype: torch.dtype = torch.float32
) -> Qwen2_5_VLForConditionalGeneration:
    """Loads the folder's model onto the device, in a form."""
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(DEVICE)
    tune(network, form)
    return network


def tune(network: Qwen2_5_VLForConditionalGeneration, form: Form) -> None:
    """Brings a model into a form, in place."""
    if form.tuned:
        peers_tuning.batch_windows(network)
    if form.onednn and DEVICE.type == "cpu":
        peers_tuning.use_onednn(network)
    if form.compiled:
        for layer in network.model.language_model.layers:
            layer.compile()


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one length, whose images have the same sizes.

    Attributes:
        tokens: int64 [b, s].
        pixels: float32 [b, patches, channels · frames · rows · columns].
        grids: int64 [b, images, 3].
    """

    tokens: Tensor
    pixels: Tensor
    grids: Tensor

    def images(self, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
        """Returns the model's arguments for the images of these prompts."""
        return {
            "pixel_values": self.pixels[rows].flatten(0, 1),
            "image_grid_thw": self.grids[rows].flatten(0, 1),
        }


class Policy:
    """A model that is trained and sampled from.

    Attributes:
        forbidden: excludes ids that are not sampled.
    """

    def __init__(self, folder: Path, preset: Preset, form: Form) -> None:
        self.folder, self.preset, self.form = folder, preset, form
        self.dtype = getattr(torch, preset.dtype) if DEVICE.type == "cuda" else torch.float32
        self.processor = load_processor(folder)
        self.inputs = Inputs(preset, self.processor.tokenizer)
        self.network = load_network(folder, form)
        self.forbidden = Forbidden(self.network.config, self.processor.tokenizer)

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr, fused=self.form.tuned or None)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns a context that computes in the preset's dtype; parameters are float32."""
        return torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32)

    def process(self, prompts: list[Prompt]) -> dict[str, Tensor]:
        """Returns the model's arguments for prompts, padded on the right."""
        tokenizer = self.processor.tokenizer
        inputs = self.processor(
            text=[prompt.text(tokenizer) for prompt in prompts],
            images=[prompt.pictures() for prompt in prompts],
            padding=True,
            return_tensors="pt",
        )
        return dict(inputs.to(DEVICE))

    def prompts(self, length: int, count: int | None = None) -> Prompts:
        """Returns prompts of this length in tokens, on the device; as many as the preset's."""
        b = count or self.preset.batch
        inputs = self.process(self.inputs.prompts(length, b))
        pixels, grids = (
            inputs[name].unflatten(0, (b, -1)) for name in ("pixel_values", "image_grid_thw")
        )
        return Prompts(inputs["input_ids"], pixels, grids)

    def logprobs(
        self,
        network: Qwen2_5_VLForConditionalGeneration,
        prompts: Prompts,
        rows: Tensor,
        completions: Tensor,
    ) -> Tensor:
        """Returns the log-probabilities of completions, float32 [n, t].

        Args:
            network: the policy's or the reference's.
            prompts: of all completions.
            rows: the prompt of each completion, int64 [n].
            completions: int64 [n, t].
        """
        tokens = torch.cat([prompts.tokens[rows], completions], dim=1)
        arguments: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "mm_token_type_ids": token_types(network, tokens),
            **prompts.images(rows),
        }
        with self.autocast():
            if self.form.tuned:
                del arguments["pixel_values"]
                arguments["mm_encoder_outputs"] = {"image": _encoded_once(network, prompts, rows)}
            places = completions.shape[1] + 1
            logits = network(**arguments, logits_to_keep=places, use_cache=False).logits[:, :-1]
        flat = logits.flatten(0, 1).float(), completions.flatten()
        return -F.cross_entropy(*flat, reduction="none").view_as(completions)

    def generate(
        self,
        prompts: Prompts,
        group: int,
        length: int,
        greedy: bool = False,
        ends: Sequence[int] = (),
    ) -> Tensor:
        """Samples completions of at most `length` tokens, `group` for each prompt.

        Args:
            ends: ids that end a completion.

        Returns:
            int64 [b · group, tokens of the longest].
        """
        sampling = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        network = self._sampled_network()
        stance = "force_eager" if self.form.compiled else "default"
        with torch.compiler.set_stance(stance), self.autocast():
            if self.form.cache == "shared":
                arguments = prefilled(network, prompts, group, length)
            else:
                arguments = self._whole_prompts(prompts, group)
            tokens = network.generate(
                **arguments,
                **sampling,
                max_new_tokens=length,
                logits_processor=[self.forbidden],
                eos_token_id=list(ends) or None,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        return tokens[:, prompts.tokens.shape[1] :]

    @torch.no_grad()
    def _sampled_network(self) -> Qwen2_5_VLForConditionalGeneration:
        """Returns the policy with its parameters in the compute dtype.

        Without gradients, autocast would convert them again for every token.
        """
        if self.dtype == torch.float32 or not self.form.tuned:
            return self.network
        for copy, parameter in zip(self._copy.parameters(), self.network.parameters(), strict=True):
            copy.copy_(parameter)
        return self._copy

    @functools.cached_property
    def _copy(self) -> Qwen2_5_VLForConditionalGeneration:
        return load_network(self.folder, self.form, self.dtype)

    def _whole_prompts(self, prompts: Prompts, group: int) -> dict[str, Any]:
        """Returns arguments of `generate` that prefill a prompt for each sample."""
        return {
            "input_ids": prompts.tokens,
            "attention_mask": torch.ones_like(prompts.tokens),
            "mm_token_type_ids": token_types(self.network, prompts.tokens),
            "num_return_sequences": group,
            "cache_implementation": "static" if self.form.cache == "static" else None,
            **prompts.images(),
        }


class Forbidden(LogitsProcessor):
    """Excludes tokens that answers never have, and end-of-turn, so that all samples are as long.

    Attributes:
        allowed: ids that are left.
    """

    def __init__(self, config: Any, tokenizer: Any) -> None:
        special = SpecialIds.of(tokenizer)
        mask = torch.arange(config.text_config.vocab_size) >= len(tokenizer)
        mask[[*special.never_sampled, special.end_of_turn]] = True
        self._mask = mask.to(DEVICE)
        self.allowed: list[int] = (~mask).nonzero()[:, 0].tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self._mask, -torch.inf)


def token_types(network: Qwen2_5_VLForConditionalGeneration, tokens: Tensor) -> Tensor:
    """Returns 1 for tokens of an image and 0 for others; the model's positions depend on it."""
    return (tokens == network.config.image_token_id).int()


@torch.no_grad()
def prefilled(
    network: Qwen2_5_VLForConditionalGeneration, prompts: Prompts, group: int, length: int
) -> dict[str, Any]:
    """Returns arguments of `generate` with a cache of all but each prompt's last token."""
    inner, tokens = network.model, prompts.tokens[:, :-1]
    prefix = DynamicCache(config=network.config.text_config)
    inner.rope_deltas = None
    inner(
        input_ids=tokens,
        mm_token_type_ids=token_types(network, tokens),
        past_key_values=prefix,
        use_cache=True,
        **prompts.images(),
    )
    inner.rope_deltas = inner.rope_deltas.repeat_interleave(group, 0)
    cache = peers_tuning.roomy_cache(network, prompts.tokens.shape[1] + length)
    for number, layer in enumerate(prefix.layers):
        pair = (x.repeat_interleave(group, 0) for x in (layer.keys, layer.values))
        cache.update(*pair, number)
    rows = prompts.tokens.repeat_interleave(group, 0)
    return {
        "input_ids": rows,
        "attention_mask": torch.ones_like(rows),
        "past_key_values": cache,
    }


def _encoded_once(
    network: Qwen2_5_VLForConditionalGeneration, prompts: Prompts, rows: Tensor
) -> Any:
    """Returns features of the rows' images; a prompt's are encoded once for all its rows."""
    distinct, places = rows.unique(return_inverse=True)
    encoded = network.model.get_image_features(**prompts.images(distinct), return_dict=True)
    images = prompts.grids.shape[1]
    features = encoded.pooler_output
    encoded.pooler_output = [
        feature for n in places.tolist() for feature in features[n * images : (n + 1) * images]
    ]
    return encoded


def count_flops(compute: Callable[[], Any]) -> float:
    """Returns the FLOPs of all matrix products in a call, by any operator."""
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    # Formulas of operators that PyTorch's counter does not know.
    formulas = {
        torch.ops.mkldnn._linear_pointwise: _product_flops,
        getattr(torch.ops.aten, attention): functools.partial(_attention_flops, 2),
        getattr(torch.ops.aten, f"{attention}_backward"): _attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.compiler.set_stance("force_eager"), counter:
        compute()
    return float(counter.get_total_flops())


def _product_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _attention_backward_flops(_: Any, *shapes: Any, **__: Any) -> int:
    return _attention_flops(5, *shapes)


def _attention_flops(
    products: int, query: Sequence[int], key: Sequence[int], *_: Any, **__: Any
) -> int:
    """Returns the FLOPs of `products` products of queries' and keys' sizes, masked places too."""
    return 2 * products * math.prod(query) * key[2]
