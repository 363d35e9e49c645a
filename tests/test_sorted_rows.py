"""Rows that are too many to hold come out as those that are few: in order, equal ones as they came, and again."""

import random
import tempfile
from operator import itemgetter

import numpy
import pytest

from fine_tuning.data_preparation import sorted_rows
from fine_tuning.data_preparation.dataset_builder import DatasetBuilder
from fine_tuning.data_preparation.sorted_rows import SortedRows
from tests.test_dataset_builder import random_conversations


def hold(monkeypatch, rows, block):
    monkeypatch.setattr(sorted_rows, "HELD", rows)
    monkeypatch.setattr(sorted_rows, "BLOCK", block)


@pytest.mark.parametrize(("held", "block"), [(1000, 100), (7, 3), (1, 1)])
def test_rows_come_out_in_order_and_as_often_as_they_are_wanted(held, block, monkeypatch):
    hold(monkeypatch, held, block)
    draw = random.Random(0)
    given = [(f"id{draw.randrange(40)}", number, None, 0.5, True, "é\ud800") for number in range(100)]
    with tempfile.TemporaryFile() as scratch:
        whole, by_id = SortedRows(scratch), SortedRows(scratch, itemgetter(0))
        for row in given[::-1]:
            whole.add(row)
            by_id.add(row)
        for _ in range(2):
            # taken in turns, as both read from one file
            pairs = list(zip(whole, by_id, strict=True))
            assert [row for row, _ in pairs] == sorted(given)
            assert [row for _, row in pairs] == sorted(given[::-1], key=itemgetter(0))
        whole.add(("", 0))
        assert list(whole) == [("", 0), *sorted(given)]


def test_ids_out_of_a_table_are_texts_however_many_there_are(monkeypatch):
    plain = random_conversations(60)
    tabled = [c | {"id": numpy.str_(c["id"]), "source": numpy.str_(c.get("source") or "chat")} for c in plain]
    whole = DatasetBuilder().build_dataset([c | {"source": c.get("source") or "chat"} for c in plain])
    hold(monkeypatch, 7, 3)
    built = DatasetBuilder().build_dataset(tabled)
    assert built == whole
    assert {type(row["id"]) for rows in built.values() for row in rows} == {str}


def test_a_build_that_is_too_large_to_hold_is_the_same(monkeypatch):
    conversations = random_conversations(60)
    clusters = {f"c{number:03}": f"c{number // 4 * 4:03}" for number in range(60)}
    dealt = {f"c{number:03}": ("test", "train", "none")[number % 3] for number in range(20, 40)} | {"gone": "test"}
    whole = DatasetBuilder().build(conversations, clusters, dealt)
    assert "bridges_splits" in whole.left_out.values() and all(whole.splits.values())
    for rows, block in ((7, 3), (1, 1)):
        hold(monkeypatch, rows, block)
        assert DatasetBuilder().build(conversations, clusters, dealt) == whole
