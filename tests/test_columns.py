"""Columns of hashes, against what Python's own containers say."""

from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tuning.common import columns

TOP = 2**64 - 1
# Equal keys, neighbours, both ends, and hashes that differ only behind the first bits.
some_keys = st.lists(
    st.integers(0, 5) | st.integers(TOP - 5, TOP) | st.integers(0, TOP) | st.integers(0, 3).map(lambda n: 2**63 + n),
    max_size=60,
).map(lambda keys: np.array(keys, np.uint64))


def rows_by_key(keys):
    rows = defaultdict(list)
    for row, key in enumerate(keys.tolist()):
        rows[key].append(row)
    return {key: held for key, held in sorted(rows.items()) if len(held) > 1}


def check_groups(keys):
    rows, starts, sizes = columns.equal_groups(keys)
    expected = rows_by_key(keys)
    found = [rows[start : start + size].tolist() for start, size in zip(starts, sizes, strict=True)]
    assert found == list(expected.values())
    pairs = {(held[0], later) for held in expected.values() for later in held[1:]}
    assert set(map(tuple, columns.equal_pairs(keys).T.tolist())) == pairs


@given(some_keys)
def test_equal_keys_are_found_by_key_and_in_order(keys):
    check_groups(keys)


def test_equal_keys_are_found_over_many_ranges():
    random = np.random.default_rng(0)
    for count in (1 << columns._RANGE, (5 << columns._RANGE) + 3):
        keys = random.integers(0, TOP, count, np.uint64, endpoint=True)
        keys[random.integers(0, count, 1000)] = keys[random.integers(0, count, 1000)]
        check_groups(keys)
    check_groups(np.full(3 << columns._RANGE, TOP, np.uint64))


@given(some_keys, some_keys)
@settings(max_examples=200)
def test_keys_are_found_among_sorted_ones(some, keys):
    ranked = np.unique(some)
    places = {key: place for place, key in enumerate(ranked.tolist())}
    assert columns.find(ranked, keys).tolist() == [places.get(key, -1) for key in keys.tolist()]
    for side in ("left", "right"):
        assert (columns.search(ranked, keys, side) == np.searchsorted(ranked, keys, side)).all()


def test_many_keys_are_found_in_their_own_order():
    random = np.random.default_rng(1)
    ranked = np.unique(random.integers(0, TOP, 1000, np.uint64))
    keys = random.permutation(np.concatenate([np.tile(ranked, 100), random.integers(0, TOP, 50_000, np.uint64)]))
    found = columns.find(ranked, keys)
    assert (ranked[found[found >= 0]] == keys[found >= 0]).all()
    assert ((found >= 0) == np.isin(keys, ranked)).all()


@given(st.lists(st.integers(0, 2), max_size=20))
def test_stretches_are_of_equal_neighbours(values):
    begins, ends = columns.stretches(np.array(values, int))
    assert [
        value for begin, end in zip(begins, ends, strict=True) for value in [values[begin]] * (end - begin)
    ] == values
    assert all(values[begin - 1] != values[begin] for begin in begins[1:])
