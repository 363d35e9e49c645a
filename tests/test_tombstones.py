"""Tombstones whose key is damaged refuse to judge."""

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.storage.tombstones import Tombstones

FORGOTTEN = {"id": "zoe-7", "messages": [{"id": "q", "role": "user", "content": "My PIN is 4921."}]}


@pytest.mark.parametrize("data", [b"", b"0" * 64])
def test_a_damaged_key_lets_nothing_in(tmp_path, data):
    tombstones = Tombstones(tmp_path / "forgotten.jsonl")
    tombstones.add([FORGOTTEN])
    assert Tombstones(tmp_path / "forgotten.jsonl").names("zoe-7")
    (key,) = (tmp_path / "conversations").glob("*.key")
    key.chmod(0o644)
    key.write_bytes(data)
    with pytest.raises(UserError, match=r"key is damaged: remove it, then `dvc pull"):
        Tombstones(tmp_path / "forgotten.jsonl")
