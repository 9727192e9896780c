"""Facts asked in batches of about one size: each fact's answer is its own, whatever its batch."""

import types

import jax
import numpy as np
import pytest

from morer1_jax.data.asking import AskPlan, plan_asked
from morer1_jax.data.sample import Limits
from morer1_jax.data.shapes import SampleSize
from morer1_jax.model.config import ImageConfig, Runtime
from morer1_jax.run import mesh as meshes
from morer1_jax.run.batch_sampler import BatchSampler
from morer1_jax.run.placed import place

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Tokenizer:
    """Writes ids as they are."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def facts(tiny):
    return [types.SimpleNamespace(id=f"fact {number}") for number in range(tiny.PROMPTS)]


@pytest.fixture(scope="module")
def make(tiny, facts):
    """`make(plan, batch)`: a sampler of two answers to a fact, that notes what it reads."""
    placed = place(tiny.CONFIG, Runtime(), meshes.make_mesh({"data": 1}, jax.devices()[:1]))
    policy = types.SimpleNamespace(
        placed=placed,
        model=placed.model,
        special=types.SimpleNamespace(end_of_turn=tiny.END),
        grammar=tiny.GRAMMAR,
        allowed=tiny.ALLOWED,
        ontology=types.SimpleNamespace(labels=tiny.LABELS),
        tokenizer=Tokenizer(),
    )

    def make(plan=None, batch=4):
        read = []

        def read_one(fact):
            read.append(fact.id)
            return tiny.samples()[facts.index(fact)]

        reader = types.SimpleNamespace(
            limits=Limits(32, tiny.LENGTH, 5),
            special=tiny.SPECIAL,
            vision=tiny.CONFIG.vision,
            photos=types.SimpleNamespace(config=ImageConfig()),
            features=None,
            read=read_one,
        )
        sampler = BatchSampler(policy, reader, batch=batch, group=2, temperature=1.0, plan=plan)
        return sampler, read

    return make


@pytest.fixture(scope="module")
def plan(tiny, facts):
    """Two shapes; pairs of prompts share a row of images."""
    sizes = {
        fact.id: SampleSize(
            len(sample.prompt), 0, tiny.CONFIG.vision.image_cost(sample.images.grids).slots
        )
        for fact, sample in zip(facts, tiny.samples(), strict=True)
    }
    shapes = plan_asked(
        [list(sizes.values())],
        4,
        lambda shape: shape.length + 100 * shape.slots / shape.sharing,
        max_shapes=2,
        round_to=4,
        sharing=[2],
    )
    assert len(shapes) == 2
    return AskPlan(sizes, shapes)


@pytest.fixture(scope="module")
def planned(make, plan):
    """A sampler by the plan, and what it has read."""
    return make(plan)


@pytest.fixture(scope="module")
def expected(tiny, make, facts):
    """What is drawn for each fact in batches of the facts' order, all of one shape."""
    sampler, read = make()
    drawn = dict(draw(sampler, tiny, facts))
    assert list(drawn) == read == [fact.id for fact in facts]
    assert len({tuple(rollout.tokens.ravel()) for rollout in drawn.values()}) == len(facts)
    return drawn


def draw(sampler, tiny, facts, **options):
    found = sampler.sample(tiny.params(), facts, "sample", **options)
    return [(fact.id, rollout) for fact, rollout in found]


def test_neither_order_nor_shape_changes_what_is_drawn(tiny, planned, facts, plan, expected):
    sampler, read = planned
    read.clear()
    drawn = draw(sampler, tiny, facts)
    assert len(drawn) == len(facts)
    assert read != [fact.id for fact in facts]
    for name, rollout in drawn:
        for field in ("tokens", "mask", "answer", "effort"):
            np.testing.assert_array_equal(
                getattr(rollout, field), getattr(expected[name], field), f"{name}: {field}"
            )
        np.testing.assert_allclose(rollout.logprobs, expected[name].logprobs, atol=2e-5)
    assert sampler.program._cache_size() == len(plan.shapes)


def test_answers_are_in_the_order_of_the_facts(tiny, planned, facts, expected):
    sampler, _ = planned
    answers = sampler.answers(tiny.params(), facts, "ask")
    assert [answer.fact for answer in answers] == [fact.id for fact in facts]
    for answer in answers:
        first = expected[answer.fact]
        assert answer.text == Tokenizer().decode(first.tokens[0][first.mask[0]])


@pytest.mark.parametrize("count", [0, 3, 4, 8])
def test_what_was_interrupted_goes_on_as_if_it_had_not_been(tiny, planned, facts, count):
    """Bit for bit: the facts that are left have the neighbours that they would have had."""
    sampler, read = planned
    whole = draw(sampler, tiny, facts)
    done = [name for name, _ in whole[:count]]
    read.clear()
    rest = draw(sampler, tiny, facts, done=frozenset(done))
    assert [name for name, _ in rest] == [name for name, _ in whole[count:]]
    for (_, ours), (_, theirs) in zip(rest, whole[count:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # Of the batches that were done nothing is read again.
    assert len(read) == 4 * -(-(len(facts) - count) // 4)


def test_facts_that_fill_no_batch_are_asked_once(tiny, planned, facts, expected):
    sampler, read = planned
    read.clear()
    drawn = draw(sampler, tiny, facts[:5])
    assert sorted(name for name, _ in drawn) == [fact.id for fact in facts[:5]]
    assert len(read) == 8
    for name, rollout in drawn:
        np.testing.assert_array_equal(rollout.tokens, expected[name].tokens)
