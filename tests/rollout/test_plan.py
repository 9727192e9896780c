"""Stages are the cheapest by the lengths expected, and drop no sample that runs on for longer."""

import itertools
import math

import numpy as np
import pytest

from morer1_jax.rollout import plan
from morer1_jax.rollout.config import SampleConfig, Stage
from morer1_jax.rollout.plan import StepCost, planned_stages

# Of two cores and a model of 28 million parameters; of a v5e chip and one of three billion.
CPU = StepCost(weights=114e6, slot=57e6 / 13, token=8192)
TPU = StepCost(weights=6.2e9, slot=6.2e9 / 240, token=36_864)
LIMIT = 1024


def lengths_of(law, count, rng, limit=LIMIT):
    """Lengths of completions.

    Geometric, a mean of 0.2 of the limit; log-normal, a tenth at the limit; all about as long.
    """
    if law == "geometric":
        return np.minimum(rng.geometric(5 / limit, count), limit)
    if law == "log-normal":
        spread = np.log(1 / 0.3) / 1.2816
        drawn = np.exp(rng.normal(np.log(0.3 * limit), spread, count))
        return np.clip(drawn.astype(int), 1, limit)
    return np.clip(rng.normal(0.4 * limit, 0.05 * limit, count).astype(int), 1, limit)


def work(stages, lengths):
    """Decodes completions of these lengths.

    Returns:
        For each stage in its turn (slots, room of the cache, steps); more than once where samples
        begin anew.
    """
    samples, done, turns = len(lengths), np.zeros(len(lengths), bool), []
    while not done.all():
        held, now = np.flatnonzero(~done), 0
        for number, stage in enumerate(stages):
            slots, begins = stage.slots(samples), now
            following = stages[number + 1].slots(samples) if number + 1 < len(stages) else 0
            enough = following if following < slots else 0
            done[held[lengths[held] <= now]] = True
            held = held[lengths[held] > now][:slots]
            while now < stage.length and (lengths[held] > now).sum() > enough:
                now += 1
            turns.append((slots, stage.length, now - begins))
        done[held[lengths[held] <= now]] = True
    return turns


def cost_of(turns, cost):
    return sum(cost(slots, room) * steps for slots, room, steps in turns)


@pytest.mark.parametrize("law", ["geometric", "log-normal", "alike"])
@pytest.mark.parametrize(("samples", "cost"), [(256, CPU), (256, TPU), (64, TPU), (2048, TPU)])
def test_stages_follow_the_lengths(law, samples, cost):
    rng = np.random.default_rng(0)
    stages = planned_stages(lengths_of(law, 3000, rng), samples, LIMIT, cost)
    SampleConfig(group=1, length=LIMIT, temperature=1.0, ends=(), stages=stages)
    shares = []
    for _ in range(5):
        lengths = lengths_of(law, samples, rng)
        turns = work(stages, lengths)
        whole = [(samples, LIMIT, int(lengths.max()))]
        shares.append(cost_of(turns, cost) / cost_of(whole, cost))
    assert np.mean(shares) < {CPU: 0.6, TPU: 0.9}[cost]


@pytest.mark.parametrize("law", ["geometric", "log-normal", "alike"])
@pytest.mark.parametrize("samples", [64, 256])
def test_few_slots_are_idle_on_a_cpu(law, samples):
    """Slot-steps a token, those of samples that keep their slots beside."""
    rng = np.random.default_rng(0)
    stages = planned_stages(lengths_of(law, 3000, rng), samples, LIMIT, CPU)
    found, whole = [], []
    for _ in range(20):
        lengths = lengths_of(law, samples, rng)
        steps = sum(slots * steps for slots, _, steps in work(stages, lengths))
        found.append(steps / lengths.sum())
        whole.append(lengths.max() * samples / lengths.sum())
    print(f"{law}, {samples}: {np.mean(found):.2f} slot-steps a token, whole {np.mean(whole):.2f}")
    assert np.mean(found) < 1.45


@pytest.mark.parametrize("law", ["geometric", "log-normal", "alike"])
def test_longer_completions_find_slots_too(law):
    rng, samples = np.random.default_rng(0), 1000
    for cost in (CPU, TPU):
        stages = planned_stages(lengths_of(law, 3000, rng), samples, LIMIT, cost)
        longer = np.minimum(lengths_of(law, samples, rng) * 6 // 5, LIMIT)
        longer[rng.random(samples) < 0.03] = LIMIT
        assert len(work(stages, longer)) == len(stages)


@pytest.mark.parametrize("cost", [CPU, TPU, StepCost(weights=1.0, slot=1.0, token=0.0)])
@pytest.mark.parametrize("law", ["geometric", "alike"])
def test_no_other_stages_are_cheaper(monkeypatch, law, cost):
    monkeypatch.setattr(plan, "_SHARES", (1.0, 0.6, 0.3, 0.1))
    monkeypatch.setattr(plan, "_LENGTHS", (0.25, 0.5, 1.0))
    monkeypatch.setattr(plan, "_MOST", 4)
    limit, samples = 40, 10
    lengths = np.sort(lengths_of(law, samples, np.random.default_rng(1), limit))

    def price(stages):
        turns = work(stages, np.append(lengths[:-1], limit))
        return cost_of(turns, cost) * (1 + plan._WORTH * len(stages))

    def drops(stages):
        law_ = plan._Law(lengths, limit, samples, *plan._MARGINS[0])
        return any(
            b.share < a.share and a.length < limit and b.share < law_.open_at_most(a.length)
            for a, b in itertools.pairwise(stages)
        )

    choices = [Stage(share, room) for share in (1.0, 0.6, 0.3, 0.1) for room in (10, 20, 40)]
    best = min(
        price(stages)
        for count in range(1, 5)
        for stages in itertools.product(choices, repeat=count)
        if stages[0].share == 1.0
        and stages[-1].length == limit
        and all(
            a != b and a.share >= b.share and a.length <= b.length
            for a, b in itertools.pairwise(stages)
        )
        and not drops(stages)
    )
    np.testing.assert_allclose(
        price(planned_stages(lengths, samples, limit, cost)), best, rtol=0.02
    )


@pytest.mark.parametrize("law", ["geometric", "log-normal", "alike"])
def test_stages_take_no_more_memory_than_there_is(law):
    rng = np.random.default_rng(0)
    lengths = lengths_of(law, 3000, rng)
    sizes = []
    # Of whole caches for all: 9.7 GB, and half as much while they grow.
    for memory in (math.inf, 8e9, 6e9):
        stages = planned_stages(lengths, 256, LIMIT, TPU, memory)
        held = [stage.slots(256) * stage.length * TPU.token for stage in stages]
        sizes.append(max(a + b for a, b in zip(held, [*held[1:], 0], strict=True)))
        assert sizes[-1] <= memory
        assert len(work(stages, lengths[:256])) == len(stages)
    # Where so little is too little, little more: at most the least size that is known to do.
    stages = planned_stages(lengths, 256, LIMIT, TPU, 0.1e9)
    held = [stage.slots(256) * stage.length * TPU.token for stage in stages]
    assert max(a + b for a, b in zip(held, [*held[1:], 0], strict=True)) <= sizes[-1]


def test_caches_have_multiples_of_tokens():
    lengths = lengths_of("geometric", 3000, np.random.default_rng(0), 1000)
    stages = planned_stages(lengths, 256, 1000, CPU, round_to=128)
    assert {stage.length % 128 for stage in stages[:-1]} <= {0, 1000 % 128}
    assert stages[-1].length == 1000
    assert stages[0].length < 512


def test_without_lengths_every_sample_keeps_its_slot():
    assert planned_stages([], 64, LIMIT, CPU) == ()
