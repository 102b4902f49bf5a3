from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.graphs import buckets


@given(most=st.integers(1, 1024))
def test_every_number_of_slots_has_a_bucket_not_much_larger(most: int) -> None:
    sizes = buckets(most)
    assert sizes[-1] == most
    assert sizes[0] == 1
    assert all(a < b for a, b in pairwise(sizes))
    for n in range(1, most + 1):
        size = next(s for s in sizes if s >= n)
        assert size <= n + max(3, n // 3)
    assert len(sizes) <= 32
