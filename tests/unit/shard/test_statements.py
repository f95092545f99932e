"""What a statement is called in metrics and spans: by what it does, and never by its text."""

import pytest

from shard import embedding_queue, heartbeat, purge, store
from shard.statements import summary


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (embedding_queue._NEXT, "SELECT memories"),
        (embedding_queue._EMBED, "UPDATE memories"),
        (heartbeat._BEAT, "INSERT heartbeats"),
        (purge._EMPTY_EXPIRED, "UPDATE memories"),
        (store._STORE, "INSERT memories"),
        ("SELECT 1 FROM owned_slots LEFT JOIN LATERAL (SELECT * FROM memories) AS found ON true", "SELECT memories"),
        ("SELECT state FROM owned_slots WHERE slot = $1 FOR UPDATE", "SELECT owned_slots"),
        ("SELECT set_config('statement_timeout', $1, false)", "SELECT"),
    ],
)
def test_statements_are_named_by_what_they_do(statement: str, expected: str) -> None:
    assert summary(statement) == expected
