"""The group sampler: what it draws, with what probability, and what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.data.grammar import run
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.vision import VisionInputs
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.config import SampleConfig
from morer1_jax.rollout.sampler import allowed_ids, sample
from morer1_jax.task.answer import Outcome, read


@pytest.fixture
def draw(tiny):
    """`draw(params, step=0, ...)`: a rollout of the tiny prompts, as NumPy arrays."""

    def draw(params, step=0, seed=0, group=tiny.GROUP, temperature=1.0, prompts=None, **options):
        prompts = tiny.prompts() if prompts is None else prompts
        keys = tiny.keys(seed, np.int32(step), prompts.fact, group)
        allowed = options.pop("allowed", tiny.ALLOWED)
        program = tiny.sampler(group, temperature, **options)
        return jax.device_get(program(params, prompts, keys, allowed))

    return draw


def take_rows(tree, rows):
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(rows)], tree)


def assert_same_draw(ours, theirs):
    """Equal tokens and outcomes; log-probabilities equal but for rounding."""
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
    ours, theirs = (x.replace(logprobs=None) for x in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_scorers(tiny, draw, temperature):
    params, prompts = tiny.params(), tiny.prompts()
    assert len(set(prompts.mask.sum(1))) > 4
    drawn = draw(params, temperature=temperature)
    scored, _ = tiny.scorer(temperature)(params, prompts, drawn.tokens, drawn.mask, tiny.ALLOWED)
    assert drawn.mask.sum() > 300
    assert np.abs(scored - drawn.logprobs)[drawn.mask].max() < 1e-4
    assert (drawn.logprobs[~drawn.mask] == 0).all()


def test_logprobs_in_bfloat16(tiny, draw):
    params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), tiny.params())
    drawn = draw(params, dtype="bfloat16")
    asked = (tiny.prompts(), drawn.tokens, drawn.mask, tiny.ALLOWED)
    scored, _ = tiny.scorer(dtype="bfloat16")(params, *asked)
    exact, _ = tiny.scorer()(tiny.params(), *asked)
    for name, other in ("scorer", scored), ("float32", exact):
        difference = np.abs(other - drawn.logprobs)[drawn.mask]
        print(f"bfloat16 - {name}: mean {difference.mean():.1e}, max {difference.max():.1e}")
        assert difference.mean() < 0.1
        assert difference.max() < 0.5
    # The last difference, to float32: were it nil, this would be no bfloat16.
    assert difference.mean() > 1e-3
    assert np.abs(scored - drawn.logprobs)[drawn.mask].mean() < 0.02


def test_tokens_are_drawn_with_their_probabilities(tiny, draw):
    params, prompts = tiny.params(), tiny.prompts()
    draws = [draw(params, step) for step in range(60)]
    logprobs = np.concatenate([drawn.logprobs[..., 0] for drawn in draws], axis=1)
    first = draws[0]
    _, entropy = tiny.scorer()(params, prompts, first.tokens, first.mask, tiny.ALLOWED)
    # The mean log-probability of a draw is minus the entropy.
    error = logprobs.std(1) / np.sqrt(logprobs.shape[1])
    assert (np.abs(logprobs.mean(1) + entropy[:, 0, 0]) < 4 * error).all()
    # Samples of a group are drawn apart from each other.
    assert len({tuple(sample) for sample in first.tokens[5]}) == tiny.GROUP


def test_a_photo_matters_to_its_own_row_alone(tiny, draw):
    params, prompts = tiny.params(), tiny.prompts()
    before = draw(params)
    row = 3
    after = draw(params, prompts=tiny.with_photo(prompts, row))
    rest = np.arange(tiny.PROMPTS) != row
    assert_same_draw(take_rows(after, rest), take_rows(before, rest))
    assert (np.abs(after.logprobs - before.logprobs)[row, :, 0] > 1e-3).all()
    no_photo = 0
    assert (prompts.vision.image_ids[no_photo] == -1).all()
    assert_same_draw(draw(params, prompts=tiny.with_photo(prompts, no_photo)), before)


@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampled", "greedy"])
def test_banned_ids_are_never_drawn(tiny, draw, temperature):
    banned = np.array(tiny.BANNED)
    params = tiny.params()
    head = params["head"].at[banned].mul(40.0).at[tiny.END].set(0.0)
    params = params | {"head": head}
    steps = range(12 if temperature else 1)
    everything = np.ones_like(tiny.ALLOWED)
    # Left to itself this model says little else.
    free = draw(params, temperature=temperature, allowed=everything)
    assert np.isin(free.tokens[free.mask], banned).mean() > 0.95
    draws = [draw(params, step, temperature=temperature) for step in steps]
    tokens = np.concatenate([drawn.tokens[drawn.mask] for drawn in draws])
    assert len(tokens) > 400 * len(steps)
    assert not np.isin(tokens, banned).any()
    assert all(np.isfinite(drawn.logprobs).all() for drawn in draws)
    assert len(np.unique(tokens)) > 10


def test_allowed_ids(tiny):
    np.testing.assert_array_equal(np.flatnonzero(~tiny.ALLOWED), np.sort(tiny.BANNED))
    assert tiny.ALLOWED[[tiny.END, tiny.OPEN]].all()
    assert allowed_ids(tiny.SPECIAL, tiny.SIZE, tiny.SIZE).shape == (tiny.SIZE,)


def test_greedy_takes_the_likeliest(tiny, draw):
    """Checked against whole sequences, [prompt | completion] by itself, under a plain mask."""
    params, prompts = tiny.params(), tiny.prompts()
    drawn = draw(params, temperature=0.0)
    for one in range(1, tiny.GROUP):
        np.testing.assert_array_equal(drawn.tokens[:, one], drawn.tokens[:, 0])
    s, t = prompts.tokens.shape[1], tiny.LENGTH
    begins = prompts.mask.sum(1)[:, None]
    place = np.arange(s + t) - begins
    inside = (place >= 0) & (place < t)

    def put(whole, own):
        padded = np.pad(whole, [(0, 0)] * (whole.ndim - 1) + [(0, t)])
        at = inside if whole.ndim == 2 else inside[:, None]
        return np.where(at, own, padded)

    completion = np.take_along_axis(drawn.tokens[:, 0], np.clip(place, 0, t - 1), axis=1)
    tokens = put(prompts.tokens, completion)
    positions = put(prompts.positions, (prompts.next_position[:, None] + place)[:, None])
    index = np.pad(prompts.vision_index, ((0, 0), (0, t)), constant_values=-1)
    attend = PackedCausal(jnp.asarray(place < t, jnp.int32))

    @tiny.jit
    def logits(params):
        images = VisionInputs.of(prompts.vision, tiny.CONFIG.vision.temporal_patch_size)
        return tiny.model().apply(
            {"params": params},
            method=lambda m: m.logits(
                m(tokens, np.moveaxis(positions, 1, 0), attend, images, index)
            ),
        )

    found = np.where(tiny.ALLOWED, logits(params), -np.inf)
    before = np.take_along_axis(found, (begins - 1 + np.arange(t))[..., None], axis=1)
    mask = drawn.mask[:, 0]
    assert mask.sum() > 60
    np.testing.assert_array_equal(before.argmax(-1)[mask], drawn.tokens[:, 0][mask])
    logprobs = jax.nn.log_softmax(before, axis=-1).max(-1)
    np.testing.assert_allclose(logprobs[mask], drawn.logprobs[:, 0][mask], atol=1e-4)


def test_the_automaton_reads_what_is_drawn(tiny, draw):
    params = tiny.chain_params(5.0)
    outcomes = []
    for step in range(8):
        drawn = draw(params, step)
        for at in np.ndindex(drawn.ended.shape):
            tokens = drawn.tokens[at][drawn.mask[at]]
            found = Outcome(bool(drawn.format[at]), int(drawn.answer[at]), int(drawn.effort[at]))
            assert found == run(tiny.TABLES, tokens)
            assert found == read([tiny.PIECES[i] for i in tokens], tiny.LABELS)
            assert drawn.ended[at] == (tokens[-1] == tiny.END)
            assert tiny.END not in tokens[:-1]
            assert drawn.ended[at] or drawn.mask[at].all()
            assert drawn.ended[at] or (not found.format and found.answer == -1)
            outcomes.append((found, bool(drawn.ended[at])))
    good = [found for found, _ in outcomes if found.format]
    assert len(good) > 20
    assert {found.answer for found in good} == {0, 1, 2}
    assert sum(found.answer >= 0 and not found.format for found, _ in outcomes) > 2
    assert sum(not ended for _, ended in outcomes) > 10
    assert any(not ended and found.effort for found, ended in outcomes)


def test_a_completion_may_end_at_the_limit(tiny, draw):
    """End-of-turn as the last token that fits is an end, not a cut."""
    params = tiny.chain_params(3.0)
    lengths = []
    for step in range(10):
        drawn = draw(params, step)
        whole = drawn.mask.all(-1)
        np.testing.assert_array_equal(drawn.ended[whole], drawn.tokens[whole][:, -1] == tiny.END)
        lengths += [*drawn.ended[whole]]
    assert 0 < np.mean(lengths) < 1


@pytest.fixture(scope="module")
def counted(tiny):
    """`counted(params)`: tokens decoded, and a rollout of two prompts in groups of two."""
    calls = []

    class Counting(Qwen25VL):
        def decode(self, x, positions, cache):
            jax.debug.callback(calls.append, cache.index)
            return super().decode(x, positions, cache)

    prompts = take_rows(tiny.prompts(), [4, 5])
    keys = tiny.keys(0, np.int32(0), prompts.fact, 2)
    config = tiny.sample_config(group=2)
    model = Counting(tiny.CONFIG)
    program = tiny.jit(
        lambda params: sample(model, params, prompts, tiny.GRAMMAR, tiny.ALLOWED, keys, config)
    )

    def run(params):
        calls.clear()
        drawn = jax.device_get(program(params))
        jax.effects_barrier()
        return len(calls), drawn

    return run


def test_the_loop_stops_when_all_have_ended(tiny, counted):
    """Nothing is decoded after the last token."""
    steps, drawn = counted(tiny.chain_params(0.0, end=4.0))
    assert steps + 1 == drawn.mask.sum(-1).max() < tiny.LENGTH
    assert drawn.ended.all()
    assert (drawn.mask.sum(-1) < steps + 1).any()
    steps, drawn = counted(tiny.chain_params(0.0, end=-1e9))
    assert steps + 1 == tiny.LENGTH
    assert not drawn.ended.any()
    assert drawn.mask.all()


def test_a_smaller_batch_and_group_draw_the_same_samples(tiny, draw, counted):
    whole = take_rows(draw(tiny.params()), [4, 5])
    _, drawn = counted(tiny.params())
    assert_same_draw(drawn, jax.tree.map(lambda x: x[:, :2], whole))


def test_place_and_neighbours_do_not_matter(tiny, draw):
    params, prompts = tiny.params(), tiny.prompts()
    before = draw(params)
    order = np.random.default_rng(0).permutation(tiny.PROMPTS)
    assert_same_draw(draw(params, prompts=take_rows(prompts, order)), take_rows(before, order))
    mixed = [0, 5, 2, 5, 5, 5, 1, 5]
    assert_same_draw(draw(params, prompts=take_rows(prompts, mixed)), take_rows(before, mixed))


def test_prompts_that_share_rows_of_images_draw_the_same_samples(tiny, draw):
    shared = draw(tiny.params(), prompts=tiny.prompts(sharing=2))
    assert_same_draw(shared, draw(tiny.params()))


def test_noise_depends_on_seed_step_fact_sample_and_position(tiny, draw):
    # All ids are as likely here, so that equal noise is equal tokens.
    params, prompts = tiny.chain_params(0.0, end=-1e9), tiny.prompts()
    before = draw(params)
    assert_same_draw(draw(params), before)
    rows = before.tokens.reshape(-1, tiny.LENGTH)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert len(np.unique(rows.T, axis=0)) == tiny.LENGTH
    others = [
        draw(params, step=1),
        draw(params, seed=1),
        draw(params, prompts=prompts._replace(fact=prompts.fact + 50)),
    ]
    for number, other in enumerate(others):
        for seen in [before, *others[:number]]:
            changed = (other.tokens != seen.tokens).any((1, 2))
            assert changed.all()


def test_keys_are_all_different(tiny):
    fact = np.arange(50, dtype=np.int32)
    data = [jax.random.key_data(tiny.keys(0, np.int32(step), fact, 8)) for step in range(4)]
    assert len(np.unique(np.reshape(data, (-1, 2)), axis=0)) == 4 * 50 * 8


@pytest.mark.parametrize(
    "wrong",
    [{"group": 0}, {"length": 0}, *({"temperature": bad} for bad in (-1.0, np.nan, np.inf))],
    ids=str,
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SampleConfig(**{"group": 2, "length": 4, "temperature": 1.0, "ends": (1,)} | wrong)


SHORTEST = 12  # tokens of the tiny vocabulary's well-formed answer, end-of-turn among them


# Each is compiled apart: daily each length, and both ways of drawing.
@pytest.mark.parametrize(
    ("temperature", "length"),
    [
        (1.0, SHORTEST),
        (0.0, SHORTEST + 1),
        (1.0, 16),
        pytest.param(1.0, SHORTEST + 1, marks=pytest.mark.soak),
        pytest.param(0.0, SHORTEST, marks=pytest.mark.soak),
        pytest.param(0.0, 16, marks=pytest.mark.soak),
    ],
)
def test_a_guided_answer_is_readable_whatever_the_model(tiny, draw, temperature, length):
    assert tiny.TABLES.steps_distance[0] == SHORTEST
    guided = draw(tiny.params(), temperature=temperature, guided=True, length=length)
    assert guided.ended.all()
    assert guided.format.all()
    assert (guided.answer >= 0).all()
    # Even with all the room that there is.
    free = draw(tiny.params(), temperature=temperature)
    assert free.format.mean() < 0.1
    for row, number in np.ndindex(guided.ended.shape):
        tokens = guided.tokens[row, number][guided.mask[row, number]]
        outcome = read([tiny.PIECES[i] for i in tokens], tiny.LABELS)
        assert outcome == Outcome(True, guided.answer[row, number], guided.effort[row, number])
    if length > SHORTEST and temperature:
        assert guided.mask.sum(-1).max() > SHORTEST


def test_without_a_limit_in_reach_guidance_changes_no_good_answer(tiny, draw):
    """A model that answers well by itself draws the same, at the same probabilities but for those
    of the tokens that would have spoilt the answer."""
    params = tiny.chain_params(40.0)
    free, guided = draw(params), draw(params, guided=True)
    assert free.format.all()
    np.testing.assert_array_equal(free.tokens, guided.tokens)
    assert (guided.logprobs >= free.logprobs - 1e-6)[free.mask].all()
