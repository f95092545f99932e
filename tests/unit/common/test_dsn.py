"""PostgreSQL URLs are taken apart, and what is shown of them holds no secret."""

import pytest

from common.dsn import hosts, location


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://agent:secret@db/memshard", [("db", 5432)]),
        ("postgresql://agent:secret@db:5433/memshard", [("db", 5433)]),
        ("postgresql://a:s@one:1,two:2/d?target_session_attrs=read-write", [("one", 1), ("two", 2)]),
        ("postgresql://one,two:2/d", [("one", 5432), ("two", 2)]),
        ("postgresql://a:s@[::1]:1,[fe80::2]/d", [("::1", 1), ("fe80::2", 5432)]),
        ("postgresql://a:s@%2Fvar%2Frun:5432/d", [("/var/run", 5432)]),
        ("postgresql:///d?host=/tmp", []),
        ("postgresql://a:s@/d", []),
    ],
)
def test_the_servers_of_a_url(url: str, expected: list[tuple[str, int]]) -> None:
    assert hosts(url) == expected


@pytest.mark.parametrize(
    "spec", ["one:1,two:x", "one:0", "one:65536", "one:1:2", "[::1", "::1", "one:-1", "one:999999"]
)
def test_what_cannot_be_taken_apart_is_refused_without_being_quoted(spec: str) -> None:
    with pytest.raises(ValueError, match=r"host|IPv6") as refused:
        hosts(f"postgresql://agent:hunter2@{spec}/d")
    assert "hunter2" not in str(refused.value)


def test_a_location_has_all_servers_and_no_password() -> None:
    shown = location("postgresql://agent:secret@one:1,two/memshard?sslmode=require")
    assert shown == "one:1,two:5432/memshard"
