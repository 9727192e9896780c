"""Small models, with the reference implementation beside them, whose weights make faults show."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from morer1_jax.data.positions import mrope_positions
from morer1_jax.model import vision_layout as tower
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.config import ModelConfig, Runtime, TextConfig, VisionConfig
from morer1_jax.model.vision import VisionInputs
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.weights import names

torch.set_num_threads(1)

VOCABULARY = 101
IMAGE, VIDEO, VISION_START, VISION_END, PAD = 91, 92, 93, 94, 95
SUPPRESSED = (IMAGE, VIDEO, VISION_START, VISION_END, PAD)
# Grids in merge units of each sample's images: 0, 1, 2 and 3 of them, most cut by windows.
SAMPLES = ((), ((3, 5),), ((2, 2), (1, 3)), ((4, 1), (3, 3), (1, 1)))


def _config(text, vision, tied):
    return ModelConfig(
        text=TextConfig(vocab_size=VOCABULARY, rope_theta=1e4, tie_word_embeddings=tied, **text),
        vision=VisionConfig(out_hidden_size=text["hidden_size"], **vision),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


CONFIGS = {
    "odd heads, untied, periodic": _config(
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "mrope_section": (1, 1, 2),
        },
        {
            "depth": 4,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_heads": 3,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": (1, 3),
        },
        tied=False,
    ),
    "odd kv heads, tied, aperiodic": _config(
        {
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "mrope_section": (2, 1, 1),
        },
        {
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 1,
            "patch_size": 2,
            "window_size": 12,
            "fullatt_block_indexes": (0, 2),
        },
        tied=True,
    ),
    "ungrouped heads, tied, merge of 3": _config(
        {
            "hidden_size": 40,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "mrope_section": (1, 2, 1),
        },
        {
            "depth": 3,
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_heads": 2,
            "patch_size": 2,
            "window_size": 12,
            "fullatt_block_indexes": (2,),
            "spatial_merge_size": 3,
            "in_channels": 1,
        },
        tied=True,
    ),
    "all blocks full, untied": _config(
        {
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mrope_section": (2, 1, 1),
            "rms_norm_eps": 1e-5,
        },
        {
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 20,
            "num_heads": 3,
            "patch_size": 2,
            "window_size": 8,
            "fullatt_block_indexes": (0, 1),
            "temporal_patch_size": 1,
        },
        tied=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt: token ids, its images' grids in patches, and the patches themselves."""

    tokens: np.ndarray
    grids: list[tuple[int, int, int]]
    patches: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """Samples laid out in rows, as the model takes them.  `sample_ids` is -1 in padding."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    sample_ids: np.ndarray
    vision_index: np.ndarray
    images: VisionInputs

    def arguments(self):
        """What `Qwen25VL.__call__` takes."""
        attend = PackedCausal(jnp.asarray(self.segment_ids))
        return self.tokens, self.positions, attend, self.images, self.vision_index


def lay_out(config, samples, rows, *, extra=3, extra_windows=1):
    """Packs `samples` as `rows` (lists of sample numbers) says, padded on the right."""
    vision = config.vision
    merge = vision.spatial_merge_size
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": merge,
        "window_size": vision.window_size,
    }
    packed = [[samples[i] for i in row] for row in rows]
    grids = [[grid for sample in row for grid in sample.grids] for row in packed]
    windows = max(tower.count_windows(g, **sizes) for g in grids) + extra_windows
    length = max(sum(len(sample.tokens) for sample in row) for row in packed) + extra
    out = {field.name: [] for field in dataclasses.fields(Rows)}
    for row, row_grids, numbers in zip(packed, grids, rows, strict=True):
        lengths = [len(sample.tokens) for sample in row]
        pad = length - sum(lengths)
        tokens = np.concatenate([*(sample.tokens for sample in row), np.full(pad, PAD)])
        counts = [*lengths, pad]
        segments = np.repeat([*range(1, len(row) + 1), 0], counts).astype(np.int32)
        slots = tower.vision_layout(row_grids, **sizes, pad_to_windows=windows)
        patches = np.concatenate([sample.patches for sample in row])
        out["tokens"].append(tokens.astype(np.int32))
        out["segment_ids"].append(segments)
        out["sample_ids"].append(np.repeat([*numbers, -1], counts))
        out["vision_index"].append(
            slots.feature_index(tokens, image_token_id=config.image_token_id)
        )
        out["positions"].append(
            mrope_positions(
                tokens, row_grids, merge_size=merge, image_token_id=config.image_token_id,
                video_token_id=config.video_token_id, segment_ids=segments,
            )
        )  # fmt: skip
        placed = slots.place(patches)
        out["images"].append(VisionInputs(placed, slots.positions, slots.image_ids, slots.part_ids))
    images = jax.tree.map(lambda *leaves: np.stack(leaves), *out.pop("images"))
    positions = np.stack(out.pop("positions"), axis=1)
    stacked = {key: np.stack(value) for key, value in out.items()}
    return Rows(positions=positions, images=images, **stacked)


def draw_samples(config, seed=0):
    """One sample for each entry of `SAMPLES`, with random text around the images."""
    rng = np.random.default_rng(seed)
    merge = config.vision.spatial_merge_size
    samples = []
    for images in SAMPLES:
        parts, grids = [rng.integers(0, IMAGE, 5)], []
        for rows, columns in images:
            grids.append((1, rows * merge, columns * merge))
            marks = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
            parts += [marks[:1], marks[1:2] * (rows * columns), marks[2:]]
            parts.append(rng.integers(0, IMAGE, rng.integers(0, 4)))
        parts.append(rng.integers(0, IMAGE, 6))
        count = sum(rows * columns for _, rows, columns in grids)
        patches = rng.standard_normal((count, config.vision.patch_dim)).astype(np.float32)
        samples.append(Sample(np.concatenate(parts).astype(np.int64), grids, patches))
    return samples


class Reference:
    """`transformers`' model of a config in float32, weights redrawn from a seed."""

    def __init__(self, config, seed=0):
        self.config = config
        hf = transformers.Qwen2_5_VLConfig(
            **config.to_hf(), bos_token_id=None, eos_token_id=None, pad_token_id=None
        )
        build = transformers.Qwen2_5_VLForConditionalGeneration._from_config
        self.model = build(hf, attn_implementation="eager").eval()
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                value = rng.standard_normal(parameter.shape)
                if name.endswith("bias"):
                    value *= 0.5
                elif parameter.ndim == 1:
                    value = 1 + 0.3 * value
                else:
                    value *= 1.5 / np.sqrt(np.prod(parameter.shape[1:]))
                parameter.copy_(torch.as_tensor(value, dtype=torch.float32))

    def tensors(self):
        """Its state dict as NumPy arrays."""
        return {name: value.numpy() for name, value in self.model.state_dict().items()}

    def inputs(self, samples, pad=0):
        """A right-padded batch of samples as its keyword arguments."""
        self.model.model.rope_deltas = None
        length = max(len(sample.tokens) for sample in samples) + pad
        ids = np.full((len(samples), length), PAD)
        mask = np.zeros((len(samples), length), np.int64)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.tokens)] = sample.tokens
            mask[row, : len(sample.tokens)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(sample.grids for sample in samples):
            inputs |= {
                "mm_token_type_ids": (ids == self.config.image_token_id).astype(np.int32),
                "image_grid_thw": np.array([g for sample in samples for g in sample.grids]),
                "pixel_values": np.concatenate([sample.patches for sample in samples]),
            }
        return {key: torch.as_tensor(value) for key, value in inputs.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, its samples, the reference, and our model with the same weights."""

    config: ModelConfig
    samples: list[Sample]
    reference: Reference
    params: dict
    model: Qwen25VL


@functools.cache
def case(name):
    config = CONFIGS[name]
    reference = Reference(config)
    params = jax.tree.map(jnp.asarray, names.from_hf(reference.tensors(), config))
    return Case(
        config=config,
        samples=draw_samples(config),
        reference=reference,
        params=params,
        model=Qwen25VL(config, Runtime()),
    )


def relative_error(ours, theirs):
    """Largest difference over the reference's largest absolute value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def reference_logits(case):
    """Logits of the padded batch, valid tokens only, sample after sample."""
    inputs = case.reference.inputs(case.samples)
    with torch.no_grad():
        logits = case.reference.model(**inputs).logits.numpy()
    return logits[inputs["attention_mask"].numpy() == 1]


def in_sample_order(rows, values):
    """Valid tokens' values, sample after sample."""
    flat = rows.sample_ids.ravel()
    order = np.argsort(flat, kind="stable")
    return np.asarray(values).reshape(flat.size, -1)[order[flat[order] >= 0]]


@functools.cache
def _outputs(model):
    """Compiled `(params, *arguments) -> (features, logits)`."""

    def run(params, tokens, positions, attend, images, vision_index):
        def verb(name, *args):
            return model.apply({"params": params}, *args, method=name)

        seen = verb("encode_images", images)
        x = verb("embed", tokens, seen, vision_index)
        features = jnp.take_along_axis(seen, jnp.maximum(vision_index, 0)[..., None], axis=1)
        return features, verb("logits", verb("forward", x, positions, attend))

    return jax.jit(run)


def evaluate(model, params, rows):
    """Image features and logits of all samples in the reference's order."""
    features, logits = _outputs(model)(params, *rows.arguments())
    is_image = in_sample_order(rows, rows.vision_index)[:, 0] >= 0
    return in_sample_order(rows, features)[is_image], in_sample_order(rows, logits)
