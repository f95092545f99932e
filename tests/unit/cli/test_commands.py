"""The commands as they are typed, against a service in this process: output, exit codes, warnings."""

import json
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from google.protobuf import duration_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from typer.testing import CliRunner, Result

from cli.conditions import parse_condition
from cli.main import app
from cli.options import parse_expiry
from memshard import Filter
from memshard.filters import field
from memshard.v1 import memory_pb2 as pb
from tests.unit.cli.service import MemoryService, refuse
from tests.unit.sdk.server import info, status

Run = Callable[..., Result]


@pytest.fixture
def service() -> MemoryService:
    return MemoryService()


@pytest.fixture
def address(service: MemoryService) -> Iterator[str]:
    with service.running() as address:
        yield address


@pytest.fixture
def run(address: str) -> Run:
    def invoke(*args: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner(env={"MEMSHARD_ADDRESS": address}).invoke(app, args, input=stdin)

    return invoke


def test_add_stores_all_that_its_options_say(run: Run, service: MemoryService) -> None:
    result = run(
        *("add", "--user", "ada", "likes beans", "--agent", "a", "--session", "s", "--type", "Semantic"),
        *("--metadata", '{"k": [1]}', "--importance", "0.25", "--expires", "2031-01-31T12:00:00Z"),
    )
    assert result.exit_code == 0, result.output
    ((_, memory_id),) = service.stored
    assert result.stdout == f"Stored {memory_id}\n"
    memory = service.stored["ada", memory_id]
    assert uuid.UUID(memory_id).version == 7
    assert (memory.content, memory.agent_id, memory.session_id) == ("likes beans", "a", "s")
    assert (memory.type, memory.importance) == (pb.MEMORY_TYPE_SEMANTIC, 0.25)
    assert MessageToDict(memory.metadata) == {"k": [1]}
    assert memory.expire_time.ToJsonString() == "2031-01-31T12:00:00Z"


def test_add_prints_the_memory_and_its_receipt_as_json(run: Run) -> None:
    document = json.loads(run("add", "--user", "ada", "likes beans", "--json").stdout)
    assert document["memory"]["content"] == "likes beans"
    assert document["memory"]["create_time"] == "2030-01-02T03:04:05.500000Z"
    assert document["receipt"] == {
        "consistency_token": "AQI=",
        "durability": "LOCAL",
        "degradation_level": "UNSPECIFIED",
    }


@pytest.mark.parametrize("text", [["-"], []])
def test_add_reads_standard_input_without_its_last_line_break(
    run: Run, service: MemoryService, text: list[str]
) -> None:
    assert run("add", "--user", "ada", *text, stdin="two\nlines 茶\n").exit_code == 0
    assert [memory.content for memory in service.stored.values()] == ["two\nlines 茶"]


@pytest.mark.parametrize("stdin", ["", b"\xff", "x" * (1024 * 1024 + 1)])
def test_add_refuses_bad_standard_input(run: Run, service: MemoryService, stdin: str | bytes) -> None:
    result = run("add", "--user", "ada", "-", stdin=stdin)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "content: " in result.stderr
    assert not service.stored


@pytest.mark.parametrize(
    "args",
    [
        ("add", "text"),
        ("add", "--user", "", "text"),
        ("add", "--user", "ada", "text", "--metadata", "[1]"),
        ("add", "--user", "ada", "text", "--metadata", "{"),
        ("add", "--user", "ada", "text", "--importance", "2"),
        ("add", "--user", "ada", "text", "--type", "dream"),
        ("add", "--user", "ada", "text", "--expires", "soon"),
        ("add", "--user", "ada", "text", "--timeout", "0"),
        ("search", "text", "--user", ""),
        ("search", "text", "--limit", "0"),
        ("list", "--user", "ada", "--limit", "1", "--all"),
        ("get",),
        ("delete", "some-id"),
        ("update", "some-id", "--user", "ada"),
        ("update", "some-id", "--content", "x"),
        ("update", "some-id", "--user", "ada", "--importance", "2"),
        ("update", "some-id", "--user", "ada", "--content", "x", "--expected-version", "0"),
        ("update", "some-id", "--user", "ada", "--expires", "soon"),
        ("versions", "some-id"),
        ("erase",),
        ("erase", "--user", "ada"),
        ("erase", "--user", "", "--yes"),
        ("search", "text", "--mode", "hybrid"),
        ("search", "text", "--filter", "metadata.topic"),
        ("list", "--user", "ada", "--filter", "=tea"),
        ("search", "text", "--read", "fresh"),
        ("search", "text", "--read", "bounded"),
        ("list", "--user", "ada", "--max-staleness", "1"),
        ("get", "some-id", "--read", "bounded", "--max-staleness", "0"),
        ("import", "/no/such/file"),
        ("import", "/"),
        ("no-such-command",),
    ],
)
def test_usage_errors_exit_with_2(run: Run, args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_refusal_is_one_line_that_names_field_and_reason(run: Run) -> None:
    result = run("add", "--user", "ada", "bad")
    assert result.exit_code == 1
    assert result.stderr == "Error: memory.content: is bad [BAD_CONTENT]\n"


def test_unknown_fate_says_how_to_settle_it(run: Run, service: MemoryService) -> None:
    def lose(request: Message, context: grpc.ServicerContext) -> None:
        refuse(context, grpc.StatusCode.UNAVAILABLE, "the commit's fate is unknown", info("OUTCOME_UNKNOWN"))

    service.fail_store = lose
    memory_id = "0190e0a4-1234-7000-8000-123456789abc"
    result = run("add", "--user", "ada", "x", "--id", memory_id)
    assert result.exit_code == 1
    assert f"--id {memory_id}" in result.stderr


def test_unreachable_service_says_how_to_start_one() -> None:
    for args in (["get", "some-id"], ["import", "-"]):
        result = CliRunner().invoke(app, [*args, "--address", "127.0.0.1:1"], input='{"content":"a","user_id":"u"}')
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "`memshard up`" in result.stderr
        assert result.stdout == ""


def test_get_shows_a_memory_or_says_there_is_none(run: Run, service: MemoryService) -> None:
    memory_id = json.loads(run("add", "--user", "ada", "likes beans", "--json").stdout)["memory"]["id"]
    shown = run("get", memory_id)
    assert shown.exit_code == 0
    assert memory_id in shown.stdout
    assert "likes beans" in shown.stdout
    assert json.loads(run("get", memory_id, "--json").stdout)["user_id"] == "ada"
    other = run("get", memory_id, "--user", "ben")
    assert (other.exit_code, other.stderr) == (1, "Error: no such memory [MEMORY_NOT_FOUND]\n")


def test_search_shows_scores_ids_and_users(run: Run) -> None:
    for user in ("ada", "ben"):
        run("add", "--user", user, f"{user} likes [bold]beans[/bold]")
    result = run("search", "beans")
    assert result.exit_code == 0
    assert result.stderr == ""
    for word in ("Score (cosine)", "0.8750", "user ada", "user ben", "[bold]beans[/bold]"):
        assert word in result.stdout
    document = json.loads(run("search", "beans", "--user", "ada", "--json").stdout)
    assert [match["memory"]["user_id"] for match in document["results"]] == ["ada"]
    assert document["score_kind"] == "COSINE"
    assert document["report"]["partial"] is False


def test_search_warns_when_shards_are_missing(run: Run, service: MemoryService) -> None:
    failure = status(grpc.StatusCode.UNAVAILABLE, "no\x1b route", info("UNAVAILABLE"))
    service.report.shards.succeeded = 1
    service.report.shards.failed.add(shard_id="shard-2", status=failure)
    result = run("search", "beans")
    assert result.exit_code == 0
    assert "1 of 2 shards did not answer (shard-2: no\\x1b route [UNAVAILABLE])" in result.stderr
    assert result.stdout == "Nothing found on the shards that answered.\n"
    as_json = run("search", "beans", "--json")
    assert json.loads(as_json.stdout)["report"]["shards"]["failed"][0]["shard_id"] == "shard-2"
    assert "Warning" in as_json.stderr


def test_list_goes_through_the_pages_and_says_when_there_is_more(run: Run) -> None:
    for number in range(8):
        run("add", "--user", "ada", f"memory-{number}")
    some = run("list", "--user", "ada", "--limit", "4")
    assert some.stdout.count("memory-") == 4
    assert "--all" in some.stderr
    every = run("list", "--user", "ada", "--all")
    assert every.stdout.count("memory-") == 8
    assert every.stdout.count("Stored (UTC)") == 1
    assert every.stderr == ""
    documents = json.loads(run("list", "--user", "ada", "--all", "--json").stdout)
    assert [document["content"] for document in documents] == [f"memory-{number}" for number in range(8)]


def test_list_of_nobody_is_empty(run: Run) -> None:
    assert run("list", "--user", "nobody").stdout == "nobody has no memories.\n"
    assert json.loads(run("list", "--user", "nobody", "--json").stdout) == []


def test_delete_says_whether_there_was_something(run: Run) -> None:
    memory_id = json.loads(run("add", "--user", "ada", "x", "--json").stdout)["memory"]["id"]
    assert run("delete", memory_id, "--user", "ada").stdout == f"Deleted {memory_id}\n"
    assert "Nothing to delete" in run("delete", memory_id, "--user", "ada").stdout
    assert json.loads(run("delete", memory_id, "--user", "ada", "--json").stdout)["deleted"] is False


def test_update_changes_what_is_named_and_nothing_else(run: Run, service: MemoryService) -> None:
    result = run(
        *("update", "some-id", "--user", "ada", "--content", "likes peas", "--metadata", "{}", "--importance", "0"),
        *("--type", "semantic", "--agent", "", "--session", "s", "--expires", "never", "--expected-version", "1"),
        *("--request-id", "mine"),
    )
    assert (result.exit_code, result.stdout) == (0, "Updated some-id to version 2\n")
    (request,) = service.requests
    assert isinstance(request, pb.UpdateMemoryRequest)
    assert MessageToDict(request, preserving_proto_field_name=True) == {
        "memory": {
            "id": "some-id",
            "user_id": "ada",
            "content": "likes peas",
            "metadata": {},
            "importance": 0.0,
            "type": "MEMORY_TYPE_SEMANTIC",
            "session_id": "s",
        },
        "update_mask": "content,metadata,importance,type,agentId,sessionId,expireTime",
        "expected_version": "1",
        "request_id": "mine",
    }
    document = json.loads(run("update", "some-id", "--user", "ada", "--expires", "2031-01-31", "--json").stdout)
    assert document["memory"]["expire_time"] == "2031-01-31T00:00:00Z"
    assert document["memory"]["version"] == 2


def test_update_of_another_version_says_so(run: Run) -> None:
    result = run("update", "some-id", "--user", "ada", "--content", "x", "--expected-version", "9")
    assert (result.exit_code, result.stderr) == (1, "Error: the memory is at version 1 [VERSION_MISMATCH]\n")


def test_versions_go_through_the_pages(run: Run) -> None:
    result = run("versions", "some-id", "--user", "ada")
    assert re.findall(r"text-(\d)", result.stdout) == ["5", "4", "3", "2", "1"]
    assert result.stdout.count("Since (UTC)") == 1
    documents = json.loads(run("versions", "some-id", "--user", "ada", "--json").stdout)
    assert [document["version"] for document in documents] == [5, 4, 3, 2, 1]
    assert run("versions", "none", "--user", "ada").stdout == "ada has no versions of a memory none\n"
    assert json.loads(run("versions", "none", "--user", "ada", "--json").stdout) == []


def test_erase_asks_first(run: Run, service: MemoryService, monkeypatch: pytest.MonkeyPatch) -> None:
    run("add", "--user", "ada", "x")
    run("add", "--user", "ben", "x")
    monkeypatch.setattr("cli.changes._at_a_terminal", lambda: True)
    refused = run("erase", "--user", "ada", stdin="n\n")
    assert refused.exit_code == 1
    assert "Erase every memory of ada, for good?" in refused.stderr
    assert len(service.stored) == 2
    assert run("erase", "--user", "ada", stdin="y\n").stdout.endswith("Erased ada: memories 1, earlier versions 1\n")
    assert [user for user, _ in service.stored] == ["ben"]


def test_erase_without_a_terminal_wants_the_word(run: Run, service: MemoryService) -> None:
    run("add", "--user", "ada", "x")
    assert "--yes" in run("erase", "--user", "ada", stdin="y\n").stderr
    assert len(service.stored) == 1
    document = json.loads(run("erase", "--user", "ada", "--yes", "--json").stdout)
    assert (document["user_id"], document["memories_erased"], document["versions_erased"]) == ("ada", 1, 1)
    assert not service.stored


def test_search_and_list_pass_mode_and_filter_on(run: Run, service: MemoryService) -> None:
    conditions = ("--filter", "metadata.topic=tea", "--filter", "importance >= 0.5")
    wanted = ((field("metadata.topic") == "tea") & (field("importance") >= 0.5)).message()
    assert run("search", "beans", "--mode", "keyword", *conditions).exit_code == 0
    listed = run("list", "--user", "ada", *conditions)
    assert listed.stdout == "ada has no memories that meet the filter.\n"
    search, listing = service.requests
    assert isinstance(search, pb.SearchMemoriesRequest)
    assert isinstance(listing, pb.ListMemoriesRequest)
    assert (search.mode, search.filter) == (pb.SEARCH_MODE_KEYWORD, wanted)
    assert listing.filter == wanted


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Each command is a client of its own, and shows what the one before it has stored.
        ((), pb.ReadOptions(level=pb.READ_LEVEL_STRONG)),
        (("--read", "strong"), pb.ReadOptions(level=pb.READ_LEVEL_STRONG)),
        (("--read", "session"), pb.ReadOptions(level=pb.READ_LEVEL_SESSION)),
        (("--read", "Eventual"), pb.ReadOptions(level=pb.READ_LEVEL_EVENTUAL)),
        (
            ("--read", "bounded", "--max-staleness", "2"),
            pb.ReadOptions(level=pb.READ_LEVEL_BOUNDED_STALENESS, max_staleness=duration_pb2.Duration(seconds=2)),
        ),
    ],
)
def test_reads_are_as_fresh_as_they_are_told(
    run: Run, service: MemoryService, options: tuple[str, ...], expected: pb.ReadOptions
) -> None:
    for command in (("get", "some-id"), ("search", "tea"), ("list", "--user", "ada")):
        run(*command, *options)
    reads: list[Any] = service.requests
    assert [request.read for request in reads] == [expected] * 3


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("metadata.topic=tea", field("metadata.topic") == "tea"),
        (" metadata.topic = green tea ", field("metadata.topic") == "green tea"),
        ("metadata.n!=5", field("metadata.n") != 5),
        ('metadata.n="5"', field("metadata.n") == "5"),
        ("metadata.n<-1.5e3", field("metadata.n") < -1500.0),
        ("metadata.yes=true", field("metadata.yes") == True),  # noqa: E712 - A condition, not a question.
        ("metadata.none=null", field("metadata.none") == None),  # noqa: E711
        ("metadata.list=[1]", field("metadata.list") == "[1]"),
        ("metadata.n=NaN", field("metadata.n") == "NaN"),
        ("metadata.empty=", field("metadata.empty") == ""),
        ("metadata.tags~red=blue", field("metadata.tags").contains("red=blue")),
        ("agent_id=7", field("agent_id") == "7"),
        ('agent_id="7"', field("agent_id") == "7"),
        ("type=semantic", field("type") == "SEMANTIC"),
        ("importance<=1", field("importance") <= 1),
        ("create_time>2030-01-31", field("create_time") > datetime(2030, 1, 31, tzinfo=UTC)),
        (
            "expire_time<2030-01-31T12:00:00+01:00",
            field("expire_time") < datetime(2030, 1, 31, 11, tzinfo=UTC),
        ),
    ],
)
def test_condition_is_what_it_reads_as(text: str, condition: Filter) -> None:
    assert parse_condition(text) == condition


@pytest.mark.parametrize("text", ["", "topic", "=tea", "~", "create_time>yesterday", f"metadata.n={2**60}", "a=\ud800"])
def test_condition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_condition(text)


def test_import_stores_nothing_twice(run: Run, service: MemoryService, tmp_path: Path) -> None:
    file = tmp_path / "memories.jsonl"
    file.write_text("".join(json.dumps({"content": f"memory {number}"}) + "\n" for number in range(50)))
    for _ in range(2):
        result = run("import", str(file), "--user", "ada")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("50 memories are stored.")
    assert len(service.stored) == 50
    listed = json.loads(run("list", "--user", "ada", "--all", "--json").stdout)
    again = "\n".join(json.dumps(document) for document in listed)
    assert run("import", "-", stdin=again).exit_code == 0
    assert len(service.stored) == 50


def test_import_tells_what_went_wrong_where_and_stores_the_rest(run: Run, service: MemoryService) -> None:
    lines = ['{"content":"good"}', "oops", '{"content":"bad"}', '{"id":"i","content":"1"}', '{"id":"i","content":"2"}']
    result = run("import", "-", "--user", "ada", "--concurrency", "1", stdin="\n".join(lines))
    assert result.exit_code == 1
    assert len(service.stored) == 2
    assert "line 2: is not JSON" in result.stderr
    assert "line 3: content: is bad [BAD_CONTENT]" in result.stderr
    assert "line 5: id: ada has a memory i with other content [ID_TAKEN]" in result.stderr
    assert result.stdout.startswith(
        "2 memories are stored. Not stored: 1 in conflict with what is stored, 2 not valid."
    )


def test_import_sums_up_in_json(run: Run) -> None:
    result = run("import", "-", "--user", "ada", "--json", stdin='{"content":"good"}\n{"content":"bad"}')
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert {key: document[key] for key in ("stored", "conflicts", "invalid", "failed", "complete")} == {
        "stored": 1,
        "conflicts": 0,
        "invalid": 1,
        "failed": 0,
        "complete": True,
    }
    assert document["problems"] == [
        {"source": "line 2", "field": "content", "reason": "BAD_CONTENT", "message": "is bad"}
    ]


def test_interrupted_import_ends_cleanly_while_it_waits_for_more(address: str, service: MemoryService) -> None:
    arrived = threading.Event()
    service.fail_store = lambda request, context: arrived.set()
    with subprocess.Popen(
        [sys.executable, "-c", "from cli.main import app; app()", "import", "-", "--user", "u", "--address", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b'{"content":"a"}\n')
        process.stdin.flush()
        assert arrived.wait(20)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        said = process.stderr.read().decode()
    assert said.startswith("Interrupted. ")
    assert said.count("\n") == 1


def test_expiry_is_a_span_or_a_time() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert parse_expiry("90s", now) == now + timedelta(seconds=90)
    assert parse_expiry("2w", now) == now + timedelta(weeks=2)
    assert parse_expiry("2031-01-31") == datetime(2031, 1, 31, tzinfo=UTC)
    for wrong in ("", "7", "d", "-1d", "9" * 20 + "w"):
        with pytest.raises(typer.BadParameter):
            parse_expiry(wrong, now)


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in ("add", "get", "search", "list", "delete", "import", "update", "versions", "erase"):
        assert name in result.stdout
