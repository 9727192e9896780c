"""A bit that has changed, or bytes that are missing, in any file of a checkpoint."""

import logging
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.run.checkpoint import Checkpointer


def state(step):
    return {
        "params": {"w": jnp.full((40, 50), step, jnp.bfloat16), "b": jnp.arange(7.0) * step},
        "step": jnp.int32(step),
    }


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2; tests must not change it."""
    folder = tmp_path_factory.mktemp("damage") / "checkpoints"
    checkpoints = Checkpointer(folder)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"step": step})
    return folder


def flip(draw, content):
    """Changes one bit."""
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def truncate(draw, content):
    """Leaves out bytes at the end, all of them sometimes."""
    return content[: draw.randrange(len(content))]


@pytest.mark.parametrize("damage", [flip, truncate], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("times", [16, pytest.param(100, marks=pytest.mark.soak)])
def test_any_damage_is_found_and_the_checkpoint_before_it_used(
    two_steps, tmp_path, caplog, damage, times
):
    draw = random.Random(times)
    paths = (two_steps / "step_00000002").rglob("*")
    names = sorted(p.relative_to(two_steps) for p in paths if p.is_file() and p.stat().st_size)
    assert 5 < len(names) <= times
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
    # Each file at least once, then any.
    drawn = names + draw.choices(names, k=times - len(names))
    for number, name in enumerate(drawn):
        folder = shutil.copytree(two_steps, tmp_path / str(number))
        (folder / name).write_bytes(damage(draw, (folder / name).read_bytes()))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            step, found, extra = Checkpointer(folder).restore_newest(like)
        assert (step, extra) == (1, {"step": 1}), name
        jax.tree.map(np.testing.assert_array_equal, found, state(1))
        assert str(folder / "step_00000002") in caplog.text, name
        # Its step is saved anew.
        Checkpointer(folder).save(2, state(2))
        assert Checkpointer(folder).latest() == 2
        shutil.rmtree(folder)
