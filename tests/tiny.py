"""A model of a few thousand parameters and eight prompts, shared by tests of learn and rollout.

Every id of its vocabulary is a whole piece of the answer's grammar, so that a completion of twelve
tokens is well formed. Programs are compiled once a session.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax.data.collate import Collator
from morer1_jax.data.grammar import build_tables
from morer1_jax.data.images import Patches
from morer1_jax.data.sample import Sample
from morer1_jax.data.shapes import Shape
from morer1_jax.learn.state import new_state
from morer1_jax.model.attention import XLA
from morer1_jax.model.config import ImageConfig, ModelConfig, Runtime, TextConfig, VisionConfig
from morer1_jax.model.scorer import ScoreConfig, group_logprobs
from morer1_jax.model.sharding import Layout
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL, init_params
from morer1_jax.rollout.config import SampleConfig
from morer1_jax.rollout.sampler import allowed_ids, sample, sample_keys
from morer1_jax.run import mesh as meshes
from morer1_jax.task.answer import Special

# Of programs this small compiling is most of the time: compile fast, run slow.
jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0},
)

PLAIN = XLA()
LABELS = ("none", "/per/org/member_of", "/org/loc/locate_at")
_BYTES = (
    b"!",
    b"<think>\n",
    *(b"Step %d: a%s\n" % (k, b" dog" * k) for k in range(1, 7)),
    b"</think>\n",
    b"<answer>",
    *(label.encode() for label in LABELS),
    b"</answer>",
)
_TEXT = (b" and more", b"\n", b"Step 2:", b"\xff", b"Step 9: no\n")
END = len(_BYTES)  # end-of-turn
_MARK = END + 1 + len(_TEXT)  # the first special id after it
_NAMES = {
    "<|im_end|>": END,
    "<|im_start|>": _MARK,
    "<|endoftext|>": _MARK + 1,
    "<|vision_start|>": _MARK + 2,
    "<|vision_end|>": _MARK + 3,
    "<|vision_pad|>": _MARK + 4,
    "<|image_pad|>": _MARK + 5,
    "<|video_pad|>": _MARK + 6,
}
OPEN, IMAGE = _NAMES["<|im_start|>"], _NAMES["<|image_pad|>"]
SIZE = _MARK + 7  # ids of the tokenizer
ROWS = 32  # rows of the embedding
# Padding, image, vision and video tokens, and rows without a token.
BANNED = (*range(_MARK + 1, SIZE), *range(SIZE, ROWS))
PIECES = (
    *_BYTES,
    Special.END,
    *_TEXT,
    *[Special.OTHER] * (ROWS - _MARK),
)
TABLES = build_tables(PIECES, LABELS)
PROMPTS, GROUP, LENGTH = 8, 4, 16
# Rows and columns, in patches, of each prompt's images.
GRIDS = (
    (),
    ((4, 6),),
    ((2, 2), (6, 4)),
    ((8, 4),),
    ((2, 4), (4, 4)),
    ((6, 6),),
    ((2, 2),),
    ((4, 4), (2, 2), (2, 8)),
)
CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(2, 1, 1),
        rope_theta=1e4,
    ),
    vision=VisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=4,
        out_hidden_size=32,
        fullatt_block_indexes=(1,),
        patch_size=2,
        window_size=8,
    ),
    image_token_id=IMAGE,
    video_token_id=_NAMES["<|video_pad|>"],
    vision_start_token_id=_NAMES["<|vision_start|>"],
    vision_end_token_id=_NAMES["<|vision_end|>"],
)


SPECIAL = SpecialIds.of(types.SimpleNamespace(get_vocab=lambda: _NAMES, name_or_path="tiny"))
COLLATOR = Collator(SPECIAL, CONFIG.vision, ImageConfig())
ALLOWED = allowed_ids(SPECIAL, SIZE, ROWS)


@functools.cache
def samples():
    """A sample for each of `GRIDS`: prompts of unequal lengths, targets of 1 to 15 tokens."""
    rng = np.random.default_rng(0)
    made = []
    for number, sizes in enumerate(GRIDS):
        words = functools.partial(rng.integers, 0, END)
        parts = [words(size=2 + number % 3)]
        for rows, columns in sizes:
            marks = [SPECIAL.vision_start], [IMAGE] * (rows * columns // 4), [SPECIAL.vision_end]
            parts += [*marks, words(size=number % 2)]
        tokens = np.concatenate([*parts, [OPEN]]).astype(np.int32)
        target = np.append(words(size=2 * number), END).astype(np.int32)
        grids = tuple((1, *size) for size in sizes)
        count = sum(rows * columns for rows, columns in sizes)
        patches = rng.integers(0, 256, (count, CONFIG.vision.frame_dim), np.uint8)
        gold = number % len(LABELS)
        made.append(Sample(f"fact {number}", tokens, target, Patches(patches, grids), gold))
    return made


@functools.cache
def prompts(sharing=1):
    """All prompts, a row each; `sharing` of them share a row of images."""
    shape = Shape(32, 5 * sharing, sharing)
    return COLLATOR.prompts(samples(), [100 + i for i in range(PROMPTS)], shape)


def sequences(rows=None, prompt=32, completion=LENGTH, windows=5):
    """Samples by number, packed as `rows` says; by default a row each."""
    rows = [[number] for number in range(PROMPTS)] if rows is None else rows
    shape = Shape(prompt + completion, windows)
    return COLLATOR.sequences([[samples()[i] for i in row] for row in rows], shape)


def with_photo(batch, row, seed=5):
    """A batch in which one row's photos are others of the same sizes."""
    patches = batch.vision.patches.copy()
    noise = np.random.default_rng(seed).integers(0, 256, patches[row].shape, np.uint8)
    patches[row] = np.where(batch.vision.image_ids[row][..., None] >= 0, noise, 0)
    return batch._replace(vision=batch.vision._replace(patches=patches))


def model(dtype="float32", kernels=PLAIN, mesh=None):
    layout = Layout(mesh)
    runtime = Runtime(param_dtype=dtype, dtype=dtype, kernels=kernels, layout=layout)
    return Qwen25VL(CONFIG, runtime)


@functools.cache
def params(seed=0):
    """Random parameters that hide nothing: no zero bias, no unit norm, matrices that matter."""
    shapes = jax.eval_shape(lambda key: init_params(model(), key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = rng.standard_normal(leaf.shape)
        if name.endswith("scale"):
            value = 1 + 0.3 * value
        elif name != "embedding":
            value *= 0.27
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def chain_params(strength, end=0.0):
    """Parameters under which the logits depend on the last token alone and favour a good answer.

    Args:
        strength: logit of the well-formed answer's next token (shared by the labels); others have
            0.
        end: logit of end-of-turn everywhere else.
    """
    logits = np.zeros((ROWS, ROWS), np.float32)
    logits[:, END] = end
    logits[OPEN, 1] = strength
    for token in range(1, 9):
        logits[token, token + 1] = strength
    for label in range(10, 13):
        logits[9, label] = strength - 1
        logits[label, 13] = strength
    logits[13, END] = strength + end
    drawn = jax.tree.map(lambda x: x, params())
    # The residual stream keeps the token's own one-hot embedding to the end.
    layers = drawn["language"]["layers"]
    layers["o"] = jax.tree.map(jnp.zeros_like, layers["o"])
    layers["mlp"]["down"] = jax.tree.map(jnp.zeros_like, layers["mlp"]["down"])
    drawn["language"]["norm"] = jax.tree.map(jnp.ones_like, drawn["language"]["norm"])
    return drawn | {
        "embedding": jnp.eye(ROWS, CONFIG.text.hidden_size),
        "head": jnp.asarray(logits.T) / np.sqrt(CONFIG.text.hidden_size),
    }


@functools.cache
def completions():
    """Random completions: tokens, mask and whether they ended, lengths from 1 to `LENGTH`."""
    rng = np.random.default_rng(1)
    tokens = rng.choice(np.flatnonzero(ALLOWED), (PROMPTS, GROUP, LENGTH)).astype(np.int32)
    lengths = rng.integers(1, LENGTH + 1, (PROMPTS, GROUP))
    lengths[0] = (1, 2, LENGTH, LENGTH)
    mask = np.arange(LENGTH) < lengths[..., None]
    ended = lengths < LENGTH
    return tokens, mask, ended


GRAMMAR = jax.tree.map(jnp.asarray, TABLES)


def sample_config(group=GROUP, temperature=1.0, **options):
    given = {"length": LENGTH, "temperature": temperature, "ends": (END,)} | options
    return SampleConfig(group=group, **given)


# Each one program, that would be many small ones: `(seed, step, facts, group)` and
# `(params, optimizer)`.
keys = jit(sample_keys, static_argnums=(0, 3))
fresh_state = jit(new_state, static_argnums=1)


def sampler(group=GROUP, temperature=1.0, dtype="float32", **options):
    """Compiled `(params, prompts, keys, allowed) -> Rollout`."""
    return _sampler(dtype, sample_config(group, temperature, **options))


@functools.cache
def _sampler(dtype, config):
    return jit(
        lambda params, prompts, keys, allowed: sample(
            model(dtype), params, prompts, GRAMMAR, allowed, keys, config
        )
    )


def scorer(temperature=1.0, dtype="float32", kernels=PLAIN):
    """Compiled `(params, prompts, tokens, mask, allowed) -> (logprobs, entropy)`."""
    return _scorer(ScoreConfig(temperature=temperature, chunk=192), dtype, kernels)


@functools.cache
def _scorer(config, dtype, kernels):
    return jit(
        lambda params, prompts, tokens, mask, allowed: group_logprobs(
            model(dtype, kernels), params, prompts, tokens, mask, allowed, config
        )
    )


def pullback(kernels=PLAIN):
    """Compiled scorer at temperature 1, and its gradient by a cotangent of the log-probabilities.

    `(params, prompts, tokens, mask, allowed, cotangent) -> ((logprobs, entropy), gradients)`
    """
    return _pullback(ScoreConfig(chunk=192), kernels)


@functools.cache
def _pullback(config, kernels):
    def run(params, prompts, tokens, mask, allowed, cotangent):
        logprobs, pull, entropy = jax.vjp(
            lambda params: group_logprobs(
                model(kernels=kernels), params, prompts, tokens, mask, allowed, config
            ),
            params,
            has_aux=True,
        )
        return (logprobs, entropy), pull(cotangent)[0]

    return jit(run)


def place(tree, shardings):
    """`jax.device_put` by way of NumPy: to take arrays apart on their device is compiled."""
    return jax.device_put(jax.device_get(tree), shardings)


def mesh(**axes):
    """A mesh over as many of the virtual devices as the axes ask for."""
    return meshes.make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])


def apart(model):
    """A model whose mesh's copies of the parameters count as far apart, as on several slices."""
    layout = dataclasses.replace(model.runtime.layout, apart=True)
    return model.clone(runtime=dataclasses.replace(model.runtime, layout=layout))


def norm(tree):
    """Global norm, in NumPy."""
    return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))


def distance(ours, theirs):
    """Global norm of the difference of two trees, in NumPy."""
    return norm(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), ours, theirs))


def assert_near(ours, theirs, bound):
    """Every leaf lies within `bound` of its counterpart, relative to that one's largest value."""

    def check(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(b).all()
        worst = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        name = jax.tree_util.keystr(path)
        assert worst <= bound, f"{name}: {worst:.2e} of the largest value, {bound:.0e} allowed"

    jax.tree_util.tree_map_with_path(check, ours, theirs)
