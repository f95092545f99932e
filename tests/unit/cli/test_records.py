"""Import formats: what is read, what is refused and where, and ids that are the same each time."""

import io
import json
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.records import MAX_LINE_BYTES, BadRecord, Parsed, Record, derived_id
from cli.sources import count_records, read_records
from memshard import MemoryType

_CONVERSATIONS: list[Any] = [
    {
        "sample_id": "talk-1",
        "conversation": {
            "speaker_a": "Ada",
            "speaker_b": "Ben",
            "session_10": [{"speaker": "Ben", "dia_id": "D10:1", "text": "Tenth."}],
            "session_2_date_time": "noon on 2 May, 2023",
            "session_2": [
                {"speaker": "Ada", "dia_id": "D2:1", "text": "I planted beans."},
                {"speaker": "Ben", "dia_id": "D2:2", "text": "Look!", "blip_caption": "a photo of a bean"},
                {"speaker": "Ben", "dia_id": "D2:3", "text": "", "blip_caption": "a pod"},
                {"speaker": "Ben", "dia_id": "D2:4"},
                {"speaker": "Ada", "text": "No id."},
            ],
            "session_3_date_time": "a date without a session",
        },
        "qa": [{"question": "What did Ada plant?"}],
    }
]


def _read(text: str | bytes, default_user: str | None = None) -> list[Parsed]:
    data = text.encode() if isinstance(text, str) else text
    return list(read_records(io.BytesIO(data), default_user))


def _one(document: Any) -> Parsed:
    (parsed,) = _read(json.dumps(document), "u")
    return parsed


def test_all_fields_of_a_line_are_read_in_both_spellings() -> None:
    snake = {
        "id": "0190e0a4-0000-7000-8000-000000000000",
        "user_id": "ada",
        "agent_id": "a",
        "session_id": "s",
        "type": "SEMANTIC",
        "content": "beans",
        "metadata": {"k": [1, 2.5, None]},
        "importance": 0.25,
        "embedding": [1, 2.5],
        "embedding_model": "m",
        "expire_time": "2031-01-01T00:00:00Z",
        "create_time": "2030-01-01T00:00:00Z",
        "version": 3,
    }
    camel = {
        "id": snake["id"],
        "userId": "ada",
        "agentId": "a",
        "sessionId": "s",
        "type": "MEMORY_TYPE_SEMANTIC",
        "content": "beans",
        "metadata": snake["metadata"],
        "importance": 0.25,
        "embedding": [1, 2.5],
        "embeddingModel": "m",
        "expireTime": "2031-01-01T00:00:00+00:00",
    }
    expected = Record(
        source="line 1",
        id="0190e0a4-0000-7000-8000-000000000000",
        user_id="ada",
        content="beans",
        agent_id="a",
        session_id="s",
        type=MemoryType.SEMANTIC,
        metadata={"k": [1, 2.5, None]},
        importance=0.25,
        embedding=[1, 2.5],
        embedding_model="m",
        expire_time=datetime(2031, 1, 1, tzinfo=UTC),
    )
    assert _one(snake) == _one(camel) == expected


def test_lines_are_counted_from_one_and_empty_ones_are_no_records() -> None:
    parsed = _read('\ufeff{"content": "a"}\r\n\n   \n{"content": "b"}', "u")
    assert [record.source for record in parsed] == ["line 1", "line 4"]


def test_user_of_the_line_goes_before_the_default() -> None:
    first, second, third = _read('{"content":"a","user_id":"ada"}\n{"content":"a"}\n{"content":"a","userId":""}', "ben")
    assert [record.user_id for record in (first, second, third) if isinstance(record, Record)] == ["ada", "ben", "ben"]


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"user_id": "u"}, "content"),
        ({"content": ""}, "content"),
        ({"content": 5}, "content"),
        ({"content": "\ud800"}, "content"),
        ({"content": "a", "user_id": 5}, "user_id"),
        ({"content": "a", "type": "DREAM"}, "type"),
        ({"content": "a", "type": True}, "type"),
        ({"content": "a", "type": 9}, "type"),
        ({"content": "a", "metadata": [1]}, "metadata"),
        ({"content": "a", "importance": "high"}, "importance"),
        ({"content": "a", "importance": 10**400}, "importance"),
        ({"content": "a", "embedding": [1, "2"]}, "embedding"),
        ({"content": "a", "expire_time": "tomorrow"}, "expire_time"),
        ({"content": "a", "expireTime": "2031-01-01T00:00:00"}, "expire_time"),
        ({"content": "a", "contnet": "b"}, "contnet"),
        ({"content": "a", "user_id": "u", "userId": "v"}, "userId"),
        (["an array in a line"], ""),
        ("text", ""),
    ],
)
def test_wrong_field_is_named_with_its_line(document: Any, field: str) -> None:
    _, bad, after = _read('{"content":"before"}\n' + json.dumps(document) + '\n{"content":"after"}', "u")
    assert isinstance(bad, BadRecord)
    assert (bad.source, bad.field) == ("line 2", field)
    assert isinstance(after, Record)


@pytest.mark.parametrize(
    "line",
    [
        b"{not json}",
        b'{"content": NaN}',
        b'{"content": "\xff"}',
        b'{"content": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"importance": ' + b"9" * 5_000 + b"}",
        b'{"content": "' + b"x" * 2 * MAX_LINE_BYTES + b'"}',
    ],
    ids=["not json", "NaN", "not utf-8", "too deep", "too large a number", "too long"],
)
def test_line_that_is_no_json_is_one_bad_record(line: bytes) -> None:
    bad, after = _read(b"\n" + line + b'\n{"content":"after"}', "u")
    assert isinstance(bad, BadRecord)
    assert bad.source == "line 2"
    assert isinstance(after, Record)
    assert after.source == "line 3"


def test_line_without_a_user_is_refused_when_there_is_no_default() -> None:
    (bad,) = _read('{"content":"a"}')
    assert isinstance(bad, BadRecord)
    assert bad.field == "user_id"


def test_ids_are_the_same_each_time_and_differ_by_user_content_and_occurrence() -> None:
    text = '{"content":"a"}\n{"content":"a"}\n{"content":"b"}\n{"content":"a","user_id":"v"}\n'
    text += '{"content":"a","type":"SEMANTIC"}'
    ids = [record.id for record in _read(text, "u") if isinstance(record, Record)]
    assert ids == [record.id for record in _read(text, "u") if isinstance(record, Record)]
    assert len(set(ids)) == 5
    assert {uuid.UUID(one).version for one in ids} == {5}


def test_derived_ids_never_change() -> None:
    """Were they to, an import that is repeated with a newer version would store everything twice."""
    assert derived_id("ada", "locomo", "D1:1") == "a1d364f2-7d7a-5828-b0d1-08042e489181"
    (record,) = _read('{"content":"a","metadata":{"z":1,"b":[null]}}', "u")
    assert isinstance(record, Record)
    assert record.id == "f9b085bd-e6b7-5fe8-a45c-6d29143a8fab"


def test_id_does_not_depend_on_how_the_line_is_written() -> None:
    spellings = (
        '{"content":"a","importance":null,"metadata":{"x":1,"y":2},"expire_time":"2031-01-01T05:30:00+05:30"}',
        '{"metadata": {"y":2,"x":1}, "type": "EPISODIC", "content": "\\u0061", "expireTime": "2031-01-01T00:00:00Z"}',
    )
    assert len({record.id for text in spellings for record in _read(text, "u") if isinstance(record, Record)}) == 1


def test_identity_parts_are_kept_apart() -> None:
    assert derived_id("a", "b", "c") != derived_id("a", "b,c") != derived_id("a,b", "c")


def test_turns_become_memories_in_the_order_they_were_spoken() -> None:
    parsed = _read(json.dumps(_CONVERSATIONS))
    assert [item.source for item in parsed] == [
        "talk-1 D2:1",
        "talk-1 D2:2",
        "talk-1 D2:3",
        "talk-1 D2:4",
        "talk-1 session 2, turn 5",
        "talk-1 D10:1",
    ]
    planted, look, pod, empty, no_id, tenth = parsed
    assert planted == Record(
        source="talk-1 D2:1",
        id=derived_id("talk-1", "locomo", "D2:1"),
        user_id="talk-1",
        content="Ada: I planted beans.",
        session_id="session_2",
        metadata={"speaker": "Ada", "session": 2, "session_date": "noon on 2 May, 2023", "dia_id": "D2:1"},
    )
    assert isinstance(look, Record)
    assert look.content == "Ben: Look! [image: a photo of a bean]"
    assert look.metadata is not None
    assert look.metadata["image_caption"] == "a photo of a bean"
    assert isinstance(pod, Record)
    assert pod.content == "Ben: [image: a pod]"
    assert isinstance(empty, BadRecord)
    assert isinstance(no_id, Record)
    assert isinstance(tenth, Record)
    assert tenth.metadata == {"speaker": "Ben", "session": 10, "dia_id": "D10:1"}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[", ""),
        ("[1]", ""),
        ('[{"content": "a"}]', "conversation"),
        ('[{"conversation": {}}]', "sample_id"),
    ],
)
def test_array_that_is_not_locomo_is_refused(text: str, field: str) -> None:
    (bad,) = _read("\n  " + text)
    assert isinstance(bad, BadRecord)
    assert bad.field == field


def test_conversations_may_lack_most_of_their_parts() -> None:
    odd = [
        {"sample_id": "x", "conversation": {"session_1": None, "session_2": [None, {"text": "Hi."}], "session_x": [1]}}
    ]
    bad, hi = _read(json.dumps(odd))
    assert isinstance(bad, BadRecord)
    assert isinstance(hi, Record)
    assert hi.content == "Hi."


@given(st.binary(max_size=300))
def test_no_input_breaks_the_reader(data: bytes) -> None:
    for parsed in _read(data, "u"):
        assert isinstance(parsed, Record | BadRecord)


def test_count_is_that_of_the_records() -> None:
    assert count_records(io.BytesIO(json.dumps(_CONVERSATIONS, indent=1).encode())) == 6
    assert count_records(io.BytesIO(b'{"content":"a"}\n{"content":"b"}')) == 2
    assert count_records(io.BytesIO(b'{"content":"a"}\n{"content":"b"}\n')) == 2
    assert count_records(io.BytesIO(b"")) == 0


def test_only_what_is_needed_is_read_ahead() -> None:
    class Pipe(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            taken.append(line)
            return line

    taken: list[bytes] = []
    records = read_records(Pipe(b'{"content":"a"}\n{"content":"b"}\n'), "u")
    assert isinstance(next(records), Record)
    assert taken == [b'{"content":"a"}\n']
