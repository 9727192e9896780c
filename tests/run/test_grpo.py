"""What a batch of facts is sampled with."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from morer1_jax.run.grpo import noise_ids


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_no_two_rows_of_a_batch_share_their_noise(drawn):
    ids = noise_ids(np.asarray(drawn), 10)
    assert len(set(ids.tolist())) == len(drawn)
    # A fact's first row is keyed by the fact alone, wherever it stands.
    assert [ids[drawn.index(fact)] for fact in set(drawn)] == list(set(drawn))
    assert (ids % 10).tolist() == drawn
