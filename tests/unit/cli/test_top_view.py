"""What `memshard top` makes of what routers say: added up, 80 columns wide, and as high as the terminal at most."""

import io
from typing import Any

import pytest
from rich.console import Console

from cli.cluster_health_view import stats_document
from cli.cluster_top_view import document_of, rendered
from local.errors import LocalClusterError
from local.router_admin import RouterAdmin
from memshard.admin.v1 import cluster_pb2 as pb
from memshard.v1 import memory_pb2

ROUTERS = [RouterAdmin(f"router-{number}", "127.0.0.1:1", "token") for number in range(2)]


def stats(shards: int = 2, **of_first_replica: Any) -> pb.GetStatsResponse:
    answer = pb.GetStatsResponse(epoch=7, uptime_s=60, requests_per_s=100.5)
    answer.levels.add(level=memory_pb2.DEGRADATION_LEVEL_NORMAL)
    for number in range(shards):
        shard_id = f"shard-{number}"
        answer.shards.add(shard_id=shard_id, status="active", slots=16384 // shards)
        answer.levels.add(shard_id=shard_id, level=memory_pb2.DEGRADATION_LEVEL_NORMAL)
        answer.servers.add(server=shard_id, shard_id=shard_id, serving=True, calls_per_s=50, p50_ms=1.25, p99_ms=123.4)
        replica_id = f"{shard_id}-replica-1"
        given: dict[str, Any] = {"serving": True, "lag_ms": 450, "calls_per_s": 12345.6, "p50_ms": 0.9, "p99_ms": 61234}
        answer.servers.add(
            server=f"{shard_id}/{replica_id}",
            shard_id=shard_id,
            replica_id=replica_id,
            **given | (of_first_replica if number == 0 else {}),
        )
    return answer


def hot(user: str = "0123456789abcdef", calls: float = 30.0) -> pb.GetHotUsersResponse:
    answer = pb.GetHotUsersResponse(half_life_s=300)
    answer.users.add(user=user, operation="SearchMemories", calls=calls, share=0.6, shard_id="shard-1")
    return answer


def document(*answers: pb.GetStatsResponse | LocalClusterError, users: pb.GetHotUsersResponse | None = None) -> Any:
    routers = ROUTERS[: len(answers)]
    hots = [(router, users or hot()) for router in routers]
    return document_of(list(zip(routers, answers, strict=True)), hots, 1_750_000_000.0)


def lines(shown: Any, height: int | None = None) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(rendered(shown, height))
    return out.getvalue().splitlines()


def test_everything_fits_into_80_columns_without_being_cut() -> None:
    first, *rest = lines(document(stats()))
    assert first == "memshard  100 requests/s  level normal  epoch 7  15:06:40 UTC"
    assert all(len(line) <= 80 for line in (first, *rest))
    assert [line.split() for line in rest[1:6]] == [
        ["server", "state", "slots", "lag", "ms", "calls/s", "err/s", "p50", "ms", "p99", "ms"],
        ["shard-0", "normal", "8192", "50.0", "0.0", "1.2", "123"],
        ["replica-1", "serving", "450", "12345.6", "0.0", "0.9", "61234"],
        ["shard-1", "normal", "8192", "50.0", "0.0", "1.2", "123"],
        ["replica-1", "serving", "450", "12345.6", "0.0", "0.9", "61234"],
    ]
    assert "All breakers are closed." in rest
    assert rest[-1].split() == ["0123456789abcdef", "SearchMemories", "shard-1", "60%"]


def test_rates_of_several_routers_are_added_and_states_are_the_worst() -> None:
    worse = stats(serving=False)
    worse.levels[0].level = memory_pb2.DEGRADATION_LEVEL_REDUCED
    worse.servers[0].p99_ms = 900
    found = document(stats(), worse)
    assert (found["level"], found["requests_per_s"]) == ("reduced", 201)
    primary, replica = found["shards"][0]["servers"]
    assert (primary["calls_per_s"], primary["p99_ms"]) == (100, 900)
    assert replica["serving"] is False
    (user,) = found["hot_users"]
    assert (user["calls"], round(user["share"], 2)) == (60, 0.6)


def test_an_open_breaker_and_a_router_that_is_away_are_said() -> None:
    broken = stats()
    broken.breakers.add(callee="shard-1", kind="store", state=pb.BREAKER_STATE_OPEN)
    broken.breakers.add(callee="Redis", kind="all", state=pb.BREAKER_STATE_CLOSED)
    shown = lines(document(broken, LocalClusterError("router-1 does not answer")))
    assert "breaker open  shard-1: store calls of router-0" in shown
    assert "router-1: router-1 does not answer" in shown
    assert not any("Redis" in line for line in shown)


def failing(answer: pb.GetStatsResponse, shard_id: str, *kinds: str) -> pb.GetStatsResponse:
    """With the primary of a shard that answers none of these calls."""
    for kind in kinds:
        answer.breakers.add(callee=shard_id, kind=kind, state=pb.BREAKER_STATE_OPEN)
    for server in answer.servers:
        if server.server == shard_id:
            server.serving, server.errors_per_s, server.p50_ms, server.p99_ms = False, 1.5, 0, 0
    for level in answer.levels:
        if level.shard_id == shard_id:
            level.level = memory_pb2.DEGRADATION_LEVEL_READONLY
    return answer


def test_a_primary_that_fails_comes_first_with_its_breakers_in_a_line_and_its_level() -> None:
    all_kinds = ("store", "retrieve", "search")
    found = document(failing(stats(3), "shard-2", *all_kinds), failing(stats(3), "shard-2", *all_kinds))
    shown = lines(found)
    assert shown[3].split() == ["shard-2", "failing", "5461", "100.0", "3.0", "-", "-"]
    assert shown[4].split()[:2] == ["replica-1", "serving"]
    assert "breaker open  shard-2: store, retrieve, search calls of router-0, router-1" in shown
    assert "level readonly  shard-2" in shown
    # What one router alone has found is said of that one.
    found = document(failing(stats(3), "shard-2", *all_kinds), failing(stats(3), "shard-2", "store"))
    shown = lines(found)
    assert "breaker open  shard-2: store, retrieve, search calls of router-0" in shown
    assert "breaker open  shard-2: store calls of router-1" in shown


def test_a_replica_whose_breaker_is_open_brings_its_shard_to_the_top() -> None:
    broken = stats(3)
    broken.breakers.add(callee="shard-1/shard-1-replica-1", kind="search", state=pb.BREAKER_STATE_HALF_OPEN)
    shown = lines(document(broken))
    assert shown[3].split()[0] == "shard-1"
    assert "breaker half-open  shard-1/shard-1-replica-1: search calls of router-0" in shown


@pytest.mark.parametrize("shards", [3, 64])
def test_whatever_is_wrong_fits_the_terminal(shards: int) -> None:
    broken = moving(stats(shards), 9)
    for number in range(shards):
        failing(broken, f"shard-{number}", "store", "search")
    away = LocalClusterError("nobody answers at " + "x" * 100)
    for height in (24, 30, 60):
        shown = lines(document(broken, away), height)
        assert len(shown) <= height
        assert all(len(line) <= 80 for line in shown)
        assert any(line.startswith("router-1: nobody answers") for line in shown)
        assert sum(line.startswith("breaker open") for line in shown) == min(shards, 5)
        assert next(line.split()[0] for line in shown if "failing" in line) == "shard-0"


def test_hot_users_give_way_to_servers_where_a_terminal_is_too_low_for_both() -> None:
    found = document(stats(4))
    assert any("0123456789abcdef" in line for line in lines(found, 24))
    shown = lines(found, 14)
    assert len(shown) <= 14
    assert not any("0123456789abcdef" in line for line in shown)
    assert sum("replica-1" in line for line in shown) >= 3


def test_a_large_cluster_fits_the_terminal_with_its_troubles_first() -> None:
    large = stats(64)
    large.servers[-1].serving = False
    shown = lines(document(large), height=24)
    assert len(shown) <= 24
    assert shown[3].split()[0] == "shard-63"
    assert shown[4].split()[:2] == ["replica-1", "away"]
    assert any("more" in line for line in shown)


def test_a_user_cannot_command_the_terminal() -> None:
    shown = lines(document(stats(), users=hot("\x1b[2J" + "x" * 100)))
    assert all("\x1b" not in line and len(line) <= 80 for line in shown)


def moving(answer: pb.GetStatsResponse, count: int, *, age_s: float = 1.0, **of_each: Any) -> pb.GetStatsResponse:
    answer.moves_age_s = age_s
    for number in range(count):
        given: dict[str, Any] = {"source": "shard-0", "target": "shard-2", "step": "copying"} | of_each
        seen = answer.moves.add(stopped=number == 0)
        seen.move.CopyFrom(pb.Move(move_id=number + 7, first_slot=1024, last_slot=2047, **given))
    return answer


def test_each_move_that_is_not_over_has_a_line_and_one_that_nobody_drives_says_so() -> None:
    shown = lines(document(moving(stats(), 2)))
    assert "move 7  1,024 slots  shard-0 → shard-2  stopped at copying" in shown
    assert "move 8  1,024 slots  shard-0 → shard-2  copying" in shown
    assert "No slots are being moved." in lines(document(moving(stats(), 0)))
    assert "Whether slots are being moved is not known." in lines(document(stats()))


def test_moves_are_told_by_the_router_that_heard_of_them_last() -> None:
    found = document(moving(stats(), 2, age_s=9), moving(stats(), 1, age_s=2))
    assert [(move["move_id"], move["step"], move["stopped"]) for move in found["moves"]] == [(7, "copying", True)]
    assert document(moving(stats(), 1), stats())["moves"] == found["moves"]


def test_long_names_and_many_moves_take_no_more_room_than_there_is() -> None:
    many = moving(stats(64), 9, source="a" * 63, target="b" * 63, step="rolling_back")
    shown = lines(document(many), height=24)
    assert len(shown) <= 24
    assert all(len(line) <= 80 for line in shown)
    assert "move 7  1,024 slots  aaaaaaaaaaaaa… → bbbbbbbbbbbbb…  stopped at rolling-back" in shown
    assert "… and 6 more moves that are not over" in shown


def test_stats_have_what_the_entrance_refused_and_moves_as_numbers() -> None:
    told, silent = moving(stats(), 1), stats()
    told.entrance.shed = 5_000_000_000
    for answer in (told, silent):
        answer.hedges.SetInParent()
        answer.cache.SetInParent()
    first, second = stats_document(list(zip(ROUTERS, (told, silent), strict=True)))["routers"]
    assert first["entrance"] == {"shed": 5_000_000_000}
    assert first["moves"][0]["move_id"] == 7
    # A router from before either.
    assert (second["entrance"], second["moves"]) == ({"shed": 0}, None)
