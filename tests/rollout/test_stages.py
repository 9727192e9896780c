"""Stages with fewer and fewer slots: the same completions as with a slot for each sample."""

import functools

import jax
import numpy as np
import pytest

from morer1_jax.errors import FieldError
from morer1_jax.model.decoding import separate_layers
from morer1_jax.rollout.config import SampleConfig, Stage, slots_again
from morer1_jax.rollout.sampler import sample

# Slots and lengths, of 32 samples of 8 prompts: slots with shared prompts and with their own;
# samples that find no slot and begin anew; one slot alone.
STAGES = [
    [(32, 4), (20, 8), (10, 12), (5, 16)],
    [(32, 16), (16, 16), (9, 16), (8, 16), (3, 16)],
    [(32, 2), (7, 3), (7, 16)],
    [(32, 1), (1, 16)],
]


def stages_of(pairs, length=16):
    return tuple(Stage(slots / 32, -(-end * length // 16)) for slots, end in pairs)


def drawn(tiny, stages, params, mesh=None, **options):
    config, prompts = tiny.sample_config(**options, stages=stages), tiny.prompts()
    keys = tiny.keys(3, np.int32(5), prompts.fact, config.group)
    return jax.device_get(program(tiny, config, mesh)(params, prompts, keys))


@functools.cache
def program(tiny, config, mesh):
    def run(params, prompts, keys):
        model = tiny.model(mesh=mesh)
        return sample(model, params, prompts, tiny.GRAMMAR, tiny.ALLOWED, keys, config)

    return tiny.jit(run)


def assert_equal(ours, theirs, bound=1e-5):
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=bound)
    assert (theirs.attempts == 1).all()
    assert (ours.attempts >= 1).all()
    ours, theirs = (x.replace(logprobs=None, attempts=None) for x in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"guided": True}, {"temperature": 0.0}, {"temperature": 0.7, "length": 21}],
    ids=["sampled", "guided", "greedy", "longer"],
)
def test_the_completions_are_those_of_a_slot_for_each(tiny, options):
    assert tiny.PROMPTS * tiny.GROUP == 32
    expected = drawn(tiny, (), tiny.params(), **options)
    if not options:
        assert len(np.unique(expected.mask.sum(-1))) > 3
    for pairs in STAGES if not options else STAGES[::2]:
        stages = stages_of(pairs, options.get("length", 16))
        assert_equal(drawn(tiny, stages, tiny.params(), **options), expected)


@pytest.mark.parametrize("end", [-9.0, 9.0, 2.0], ids=["never", "at once", "soon"])
def test_samples_that_end_at_once_or_never(tiny, end):
    """Logits depend on the last token alone, so that nothing is rounded in another order."""
    params = tiny.chain_params(0.0, end)
    expected = drawn(tiny, (), params, length=24)
    lengths = expected.mask.sum(-1)
    assert {-9.0: lengths.min() > 20, 9.0: lengths.max() < 3, 2.0: lengths.std() > 1}[end]
    for pairs in STAGES:
        assert_equal(drawn(tiny, stages_of(pairs, 24), params, length=24), expected, bound=0)


def test_several_ids_may_end_a_completion(tiny):
    ends = tuple(np.flatnonzero(tiny.ALLOWED)[::7].tolist())
    expected = drawn(tiny, (), tiny.params(), ends=ends)
    last = np.take_along_axis(expected.tokens, expected.mask.sum(-1, keepdims=True) - 1, -1)[..., 0]
    assert (np.isin(last, ends) == expected.ended).all()
    assert len(np.unique(last[expected.ended])) > 1
    assert not np.isin(expected.tokens, ends)[..., :-1][expected.mask[..., 1:]].any()
    assert_equal(drawn(tiny, stages_of(STAGES[0]), tiny.params(), ends=ends), expected)


@pytest.mark.parametrize(
    ("axes", "pairs"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, STAGES[0]),
        ({"data": 4}, STAGES[2]),
        ({"fsdp": 8}, STAGES[1]),
    ],
)
def test_each_part_of_the_rows_has_slots_of_its_own(tiny, axes, pairs):
    mesh = tiny.mesh(**axes)
    expected = drawn(tiny, (), tiny.params(), mesh)
    assert_equal(drawn(tiny, stages_of(pairs), tiny.params(), mesh), expected)


def test_one_sample_of_a_prompt_and_layers_apart(tiny):
    params = separate_layers(tiny.params())
    expected = drawn(tiny, (), params, group=1, temperature=0.0)
    for stages in ((Stage(1.0, 4), Stage(0.6, 9), Stage(0.3, 16)), (Stage(1.0, 2), Stage(0.1, 16))):
        assert_equal(drawn(tiny, stages, params, group=1, temperature=0.0), expected)


def test_what_begins_anew_is_counted_and_has_a_slot_to_the_end(tiny):
    """Of 32 samples that never end 7 get to the end, and then 7 of the others at a time."""
    config = tiny.sample_config(length=24, stages=stages_of(STAGES[2], 24))
    assert slots_again(config, 32) == 7
    ours = drawn(tiny, config.stages, tiny.chain_params(0.0, -9.0), length=24)
    assert np.bincount(ours.attempts.ravel()).tolist() == [0, 7, 7, 7, 7, 4]


@pytest.mark.parametrize(
    "pairs", [[(31, 16)], [(32, 15)], [(32, 8), (33, 16)], [(32, 16), (8, 8), (8, 16)]]
)
def test_stages_that_do_not_fit_are_refused(pairs):
    options = {"group": 4, "temperature": 1.0, "ends": ()}
    with pytest.raises(FieldError, match=r"stages.*begin with 1 .*end with the 16 tokens"):
        SampleConfig(**options, length=16, stages=stages_of(pairs))
    SampleConfig(**options, length=16, stages=stages_of([(32, 8), (7, 16)]))


def test_a_stage_has_slots():
    with pytest.raises(FieldError, match="share"):
        Stage(0.0, 3)
    assert [Stage(share, 1).slots(10) for share in (1.0, 0.7, 0.11, 1e-9)] == [10, 7, 2, 1]
