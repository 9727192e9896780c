"""Batches as functions of the step: the same on any number of hosts, from any kind of worker."""

import functools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.data.curriculum import MixConfig, Mixer, Pool
from morer1_jax.data.feed import Host, PromptFeed, SequenceFeed, noise_ids
from morer1_jax.data.images import ImageReader
from morer1_jax.data.loader import load_ahead
from morer1_jax.data.rows import plan_rows
from morer1_jax.data.sample import Limits, SampleReader
from morer1_jax.data.shapes import plan_prompts
from morer1_jax.errors import DataError
from morer1_jax.model.config import ImageConfig, VisionConfig
from morer1_jax.task import more
from morer1_jax.task.photos import PhotoFiles, photo_sizes

ROWS, SAMPLES, STEPS = 8, 20, 3
TOWER = VisionConfig(
    depth=1,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    out_hidden_size=16,
    fullatt_block_indexes=(0,),
)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_no_two_rows_of_a_batch_share_their_noise(drawn):
    ids = noise_ids(np.asarray(drawn), 10)
    assert len(set(ids.tolist())) == len(drawn)
    # A fact's first row is keyed by the fact alone, wherever it stands.
    assert [ids[drawn.index(fact)] for fact in set(drawn)] == list(set(drawn))
    assert (ids % 10).tolist() == drawn


def test_rows_that_do_not_divide_into_the_parts_are_an_error():
    message = "^a batch of 8 rows does not divide into the 3 parts of the mesh$"
    with pytest.raises(DataError, match=message):
        Host((0,), 3).rows(range(8))


def test_a_host_counts_only_the_rows_that_no_host_before_it_counts():
    host = Host((0, 2, 3), 4, (2,))
    assert host.rows(range(8)) == [0, 1, 4, 5, 6, 7]
    batch = {"x": np.asarray(host.rows(range(8))), "images": np.asarray(host.rows(range(4)))}
    counted = host.counted_rows(batch)
    assert counted["x"].tolist() == [4, 5]
    assert counted["images"].tolist() == [2]
    nothing = Host((1,), 4, ()).counted_rows({"x": np.ones((2, 3))})
    assert nothing["x"].shape == (0, 3)


@pytest.fixture(scope="module", params=[1, 2])
def feeds(request, small_world, small_tokenizer):
    """What makes the feed of a host: of samples, and of prompts from an easy and a hard pool.

    Rows share their images with none, or with the next one.
    """
    ontology = more.read_ontology(small_world)
    facts = more.read_split(small_world, "train", ontology)
    texts = more.read_reasoning(small_world / "reasoning.jsonl", facts, ontology)
    written = [fact for fact in facts if fact.id in texts]
    photos = ImageReader(PhotoFiles(small_world), ImageConfig(max_pixels=84 * 84))
    reader = SampleReader(small_tokenizer, ontology, photos, TOWER, Limits(512, 512, 12))
    # Fewer facts than rows, so that batches cross epochs and repeat facts.
    pool = Pool("training", np.arange(6), (1,))
    mixer = Mixer(range(5), range(5, 12), MixConfig(until=2), ROWS, STEPS, seed=1)
    sizes = photo_sizes(facts, PhotoFiles(small_world))
    written_sizes = reader.sizes(written, sizes, texts)
    draw = functools.partial(pool.batch, size=SAMPLES)
    plan = plan_rows(
        [[written_sizes[i] for i in draw(step)] for step in range(STEPS)],
        lambda shape: shape.length,
        multiple=4,
        sharing=[request.param],
    )
    asked = reader.sizes(facts, sizes, {})
    shapes = plan_prompts(
        [[asked[i] for i in mixer.batch(step)] for step in range(STEPS)],
        lambda shape: shape.length,
        round_to=1,
        sharing=[request.param],
    )

    def sequences(host):
        return SequenceFeed(reader, written, texts, draw, host, written_sizes, plan)

    def prompts(host):
        return PromptFeed(reader, facts, mixer.batch, host, asked, shapes)

    return {"sequences": sequences, "prompts": prompts}


def test_a_step_of_prompts_has_the_facts_that_are_drawn(feeds):
    feed = feeds["prompts"](Host())
    for step in range(STEPS):
        drawn, batch = feed.draw(step), feed(step)
        assert sorted(feed.indices(step)) == sorted(drawn)
        # The key of a fact's noise is its own, whatever row it has.
        assert sorted(batch.fact) == sorted(noise_ids(drawn, len(feed.facts)))
        np.testing.assert_array_equal(batch.fact % len(feed.facts), feed.indices(step))
        assert len(batch.vision.patches) * feed.shapes[0].sharing == len(batch.tokens)


def equal(ours, theirs):
    if isinstance(ours, tuple):
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            equal(a, b)
    else:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def in_order(shares, parts):
    """The rows of the hosts' batches, as a batch of one host has them."""
    if isinstance(shares[0], tuple):
        fields = zip(*shares, strict=True)
        return type(shares[0])(*(in_order(field, parts) for field in fields))
    by_part = {}
    for share, own in zip(shares, parts, strict=True):
        by_part |= dict(zip(own, np.split(share, len(own)), strict=True))
    return np.concatenate([by_part[part] for part in sorted(by_part)])


@pytest.mark.parametrize("name", ["sequences", "prompts"])
def test_the_hosts_rows_are_the_batch_of_one_host(feeds, name):
    whole = feeds[name](Host())
    for hosts in (2, 4):
        # Each has one part, or two that are not neighbours.
        for parts in ([(i,) for i in range(hosts)], [(i, i + hosts) for i in range(hosts)]):
            total = sum(map(len, parts))
            if len(whole(0).vision.patches) % total:
                continue
            for step in range(STEPS):
                shares = [feeds[name](Host(own, total))(step) for own in parts]
                assert {len(share.tokens) for share in shares} == {len(whole(step).tokens) // hosts}
                equal(in_order(shares, parts), whole(step))


@pytest.mark.parametrize("name", ["sequences", "prompts"])
def test_a_feed_and_its_copy_give_the_same(feeds, name):
    feed = feeds[name](Host())
    equal(pickle.loads(pickle.dumps(feed))(1), feed(1))
    assert not np.array_equal(feed(0).tokens, feed(1).tokens)


@pytest.mark.parametrize("feeds", [2], indirect=True)
def test_worker_processes_give_what_threads_give(feeds):
    both = [feeds[name](Host((1,), 2)) for name in ("sequences", "prompts")]

    def make(step):
        return tuple(feed(step) for feed in both)

    batches = list(load_ahead(make, 0, STEPS, workers=1, kind="process"))
    assert len(batches) == STEPS
    for step, batch in enumerate(batches):
        equal(batch, make(step))
