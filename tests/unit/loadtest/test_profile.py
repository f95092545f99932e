"""Profiles: those that come with memshard are right, and what is wrong with one is said by name."""

from pathlib import Path

import pytest

from loadtest.profile import PROFILES, Operation, ProfileError, load, parse


@pytest.mark.parametrize("file", sorted(PROFILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_profile_that_comes_with_memshard_is_found_by_its_name(file: Path) -> None:
    assert load(file.stem) == load(str(file))
    assert load(file.stem).name == file.stem


def test_the_agents_are_twenty_who_search_four_times_of_five() -> None:
    agents = load("agents")
    assert agents.concurrency == 20
    # Latency counts from when a call was due, which only a rate has.
    assert agents.rate
    assert (agents.data.users, agents.data.memories, agents.data.dimensions) == (100, 500, 1536)
    assert agents.limits.levels == "normal"
    assert agents.operations == {Operation.SEARCH: 80, Operation.STORE: 20}
    assert agents.duration_s == 60


def test_zipf_reads_can_reach_their_cache_hit_ratio() -> None:
    """Each memory's first read is a miss: whoever asks too slowly cannot get there, nor do strong reads at any rate."""
    zipf = load("zipf-reads")
    assert zipf.read != "strong"
    assert zipf.rate is not None
    assert (zipf.data.users * zipf.data.memories, zipf.data.zipf, zipf.duration_s) == (50_000, 1.0, 300)
    ranks = range(1, 50_001)
    whole, reads = sum(1 / rank for rank in ranks), zipf.rate * zipf.duration_s
    misses = sum(1 - (1 - 1 / rank / whole) ** reads for rank in ranks)
    assert zipf.limits.cache_hit_ratio == 0.85
    assert 1 - misses / reads >= zipf.limits.cache_hit_ratio + 0.015


def test_smoke_has_every_operation() -> None:
    assert load("smoke").operations.keys() == set(Operation)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"operations": {"search": 1}}, "concurrency"),
        ({"operations": {}, "concurrency": 1}, "operations"),
        ({"operations": {"serch": 1}, "concurrency": 1}, "operations.serch"),
        ({"operations": {"search": 0}, "concurrency": 1}, "operations.search"),
        ({"operations": {"search": 1}, "concurrency": 1, "processes": 2}, "processes"),
        ({"operations": {"search": 1}, "rate": -1}, "rate"),
        ({"operations": {"search": 1}, "rate": float("inf")}, "rate"),
        ({"operations": {"search": 1}, "concurrency": 4, "warmup": 1}, "warmup"),
        ({"operations": {"search": 1}, "concurrency": 4, "data": {"zipf": 0}}, "data.zipf"),
        ({"operations": {"search": 1}, "concurrency": 4, "limits": {"p99_ms": {"store": 5}}}, "store"),
        ({"operations": {"search": 1}, "concurrency": 4, "limits": {"cache_hit_ratio": 0.5}}, "read: strong"),
        ({"operations": {"search": 1}, "concurrency": 4, "limits": {"levels": "reduced"}}, "limits.levels"),
    ],
)
def test_what_is_wrong_is_named(document: dict[str, object], named: str) -> None:
    with pytest.raises(ProfileError, match=named):
        parse(document, "profile.yaml")


def test_a_profile_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"agents, smoke, zipf-reads"):
        load(str(tmp_path / "nothing"))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(text)
    with pytest.raises(ProfileError):
        load(str(file))
