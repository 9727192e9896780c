"""Compiles small programs for one or two slices of sixteen TPU chips; writes their optimised HLO.

    python programs.py FOLDER

No TPU is needed. It is run as a process of its own, because libtpu reads its settings when it is
loaded, and programs must not be compiled as the tests' own are.
"""

import os
import sys
from pathlib import Path

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5e-16",
    # Else of two processes that load the library at once one ends with an error.
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_LOG_DIR="disabled",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.model.splash import Splash

LAYERS, WIDTH, ROWS = 6, 2048, 4096


def constrained(x, mesh, *spec):
    return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def array(mesh, shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def of_each(mesh, body, *arguments, out=None):
    """A program written as one chip sees it; `arguments` are (shape over all, dtype, spec)."""
    specs = tuple(spec for _, _, spec in arguments)
    out = P() if out is None else out
    program = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return program, [array(mesh, shape, dtype, *spec) for shape, dtype, spec in arguments]


ALL = P(("data", "fsdp"))
# x is f32[64, 1024] on each chip; so is x @ w, of which each chip has a part of the sum.
X_AND_W = (((64, 1024), jnp.float32, P()), ((16 * 1024, 1024), jnp.float32, ALL))


def gather(mesh):
    """One all-gather, of bf16[1024, 512] over all chips."""

    def program(x):
        return constrained(x * 2, mesh, None, None)

    return program, [array(mesh, (1024, 512), jnp.bfloat16, *ALL)]


def gather_columns(mesh):
    """An all-gather over `data` alone, of f32[512, 128] on each chip."""

    def program(x):
        return constrained(x * 2, mesh, None, "fsdp")

    return program, [array(mesh, (512, 512), jnp.float32, "data", "fsdp")]


def gather_turned(mesh):
    """An all-gather over both axes, the outer one first in the array's second axis."""

    def program(x):
        return constrained(x * 2, mesh, None, None)

    return program, [array(mesh, (512, 512), jnp.float32, "fsdp", "data")]


def loop_of_three(mesh):
    """An all-reduce of f32[64, 1024] in a loop of three."""

    def body(x, w):
        return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(lax.psum(x @ w, ALL[0])), x)

    return of_each(mesh, body, *X_AND_W)


def nested(mesh):
    """An all-reduce of f32[64, 1024] over `fsdp` in a loop of five in a loop of three."""

    def body(x, w):
        def inner(_, x):
            return jnp.tanh(lax.psum(x @ w, "fsdp"))

        return lax.fori_loop(0, 3, lambda _, x: jnp.sin(lax.fori_loop(0, 5, inner, x)), x)

    return of_each(mesh, body, *X_AND_W)


def until(mesh):
    """A loop that ends by data, with an all-reduce of f32[64, 1024] in each turn."""

    def body(x, w):
        def goes_on(state):
            return (jnp.sum(state[0]) < 1000) & (state[1] < 100)

        def turn(state):
            return lax.psum(state[0] @ w, ALL[0]), state[1] + 1

        return lax.while_loop(goes_on, turn, (x, 0))[0]

    return of_each(mesh, body, *X_AND_W)


def branches(mesh):
    """Two branches: one sends f32[512, 1024] and multiplies, one sends that three times."""

    def body(number, x, w):
        def multiplies(x):
            return lax.psum(x @ w, ALL[0]) @ w

        def sends(x):
            for axis in ("data", "fsdp", "data"):
                x = lax.psum(x, axis) * 0.5
            return x

        return lax.cond(number[0] > 0, sends, multiplies, x)

    number, x = ((1,), jnp.int32, P()), ((512, 1024), jnp.float32, P())
    return of_each(mesh, body, number, x, X_AND_W[1])


def permute(mesh):
    """Each chip sends bf16[256, 512] to the next one of its row."""

    def body(x):
        return lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]) * 2

    return of_each(mesh, body, ((16 * 256, 512), jnp.bfloat16, ALL), out=ALL)


def exchange(mesh):
    """An all-to-all of f32[64, 2048]."""

    def body(x):
        return lax.all_to_all(x, ALL[0], 1, 0, tiled=True)

    return of_each(mesh, body, ((16 * 64, 2048), jnp.float32, ALL), out=ALL)


def _scattered(mesh, axes, rows, width):
    def body(x):
        return lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)

    return of_each(mesh, body, ((16 * rows, width), jnp.float32, ALL), out=ALL)


def scatter(mesh):
    """A reduce-scatter of f32[1024, 256] over `fsdp`: small, it is printed as one."""
    return _scattered(mesh, "fsdp", 1024, 256)


def scatter_fused(mesh):
    """A reduce-scatter of f32[4096, 1024]: a fusion of an all-reduce and a slice.

    The chips' parts come out padded, and 24 rows go to the next chip.
    """
    return _scattered(mesh, "fsdp", 4096, 1024)


def scatter_not_fused(mesh):
    """A reduce-scatter over both axes, compiled to a sum that each chip receives whole."""
    return _scattered(mesh, ALL[0], 4096, 1024)


def windowed(mesh):
    """A product whose weight, bf16[2048, 8192], goes round in shards while they are multiplied."""

    def program(x, w):
        return x @ w

    x = array(mesh, (65536, 2048), jnp.bfloat16, *ALL)
    return program, [x, array(mesh, (2048, 8192), jnp.bfloat16, *ALL)]


def layers(mesh):
    """Linear layers in a scan, forward and backward, each gathered in bfloat16 where it is used."""

    def program(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ constrained(w.astype(jnp.bfloat16), mesh, None, None)), None

        return jnp.sum(lax.scan(layer, x, weights)[0].astype(jnp.float32))

    def gradients(weights, x):
        return constrained(jax.grad(program)(weights, x), mesh, None, ALL[0], None)

    weights = array(mesh, (LAYERS, WIDTH, WIDTH), jnp.float32, None, ALL[0], None)
    return gradients, [weights, array(mesh, (ROWS, WIDTH), jnp.bfloat16, *ALL)]


def feed_forward(mesh):
    """Two products a layer, in four layers: the second's weight is gathered beside the first."""

    def program(weights, x):
        def layer(x, weights):
            up, down = (constrained(w.astype(jnp.bfloat16), mesh, None, None) for w in weights)
            return constrained(x + jnp.tanh(x @ up) @ down, mesh, ALL[0], None), None

        return lax.scan(layer, x, weights)[0]

    up = array(mesh, (4, 1024, 4096), jnp.float32, None, ALL[0], None)
    down = array(mesh, (4, 4096, 1024), jnp.float32, None, None, ALL[0])
    return program, [(up, down), array(mesh, (16384, 1024), jnp.bfloat16, *ALL)]


def contracted(mesh):
    """Layers whose weights are split along the axis that products sum over, and are not gathered.

    The compiler multiplies parts and sums activations over `fsdp`, bf16[1024, 2048] on each chip.
    """

    def program(weights, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16)), None), x, weights)[0]

    weights = array(mesh, (LAYERS, WIDTH, WIDTH), jnp.float32, None, "fsdp", None)
    return program, [weights, array(mesh, (ROWS, WIDTH), jnp.bfloat16, "data")]


def sum_over_slices(mesh):
    """A sum over all chips of two slices, of f32[2, 1048576] on each; the first axis goes."""

    def program(x):
        return constrained(jnp.sum(x, 0), mesh, None)

    return program, [array(mesh, (64, 2**20), jnp.float32, ALL[0], None)]


def gather_over_slices(mesh):
    """An all-gather of f32[64, 65536], a half of it from each slice."""

    def program(x):
        return constrained(x * 2, mesh, None, "fsdp")

    return program, [array(mesh, (64, 2**20), jnp.float32, "data", "fsdp")]


def permute_over_slices(mesh):
    """Two slices exchange f32[1024, 1024] of each chip."""

    def body(x):
        return lax.ppermute(x, "data", [(0, 1), (1, 0)])

    return of_each(mesh, body, ((32 * 1024, 1024), jnp.float32, ALL), out=ALL)


def attention(mesh):
    """Three layers of causal attention of a row on each chip, forward, again, and backward.

    6 of 9 blocks are left. The heads, of 80, are padded to 128.
    """

    def body(q, k, v, ids):
        def out(q, k, v):
            @jax.checkpoint
            def layer(x, _):
                return x + Splash().causal(x, k, v, ids), None

            x, _ = lax.scan(layer, q, length=3)
            return jnp.sum(x.astype(jnp.float32))

        return jax.grad(out, argnums=(0, 1, 2))(q, k, v)

    q, kv = (((16, 1536, heads, 80), jnp.bfloat16, ALL) for heads in (4, 2))
    return of_each(mesh, body, q, kv, kv, ((16, 1536), jnp.int32, ALL), out=ALL)


def attention_of_groups(mesh):
    """Attention of a prompt and two completions, forward; 5 of 9 blocks are left."""

    def body(q, k, v, prompt, completions):
        return Splash().shared_prefix(q, k, v, prompt, completions)

    q = ((16, 1536, 4, 128), jnp.bfloat16, ALL)
    prompt, completions = ((16, 512), jnp.bool_, ALL), ((16, 2, 512), jnp.bool_, ALL)
    return of_each(mesh, body, q, q, q, prompt, completions, out=ALL)


PROGRAMS = (
    gather,
    gather_columns,
    gather_turned,
    loop_of_three,
    nested,
    until,
    branches,
    permute,
    exchange,
    scatter,
    scatter_fused,
    scatter_not_fused,
    windowed,
    layers,
    feed_forward,
    contracted,
    attention,
    attention_of_groups,
)
OF_TWO_SLICES = (sum_over_slices, gather_over_slices, permute_over_slices)


def main(folder):
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = topologies.make_mesh(topology, (4, 4), ("data", "fsdp"))
    # Sixteen chips a slice; slices are the outer axis.
    slices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", num_slices=2
    ).devices
    slices = np.array(sorted(slices, key=lambda device: device.slice_index)).reshape(2, 16)
    between = Mesh(slices, ("data", "fsdp"))
    for make in (*PROGRAMS, *OF_TWO_SLICES):
        program, arguments = make(between if make in OF_TWO_SLICES else mesh)
        text = jax.jit(program).lower(*arguments).compile().as_text()
        (Path(folder) / f"{make.__name__}.hlo").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
