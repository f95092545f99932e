"""LoCoMo's conversations as memories: each conversation is a user, each turn a memory. Pure."""

import re
from collections.abc import Iterator
from typing import Any

from cli.records import BadRecord, Parsed, Record, derived_id


def from_conversations(conversations: list[Any]) -> Iterator[Parsed]:
    """The turns of LoCoMo's conversations, in the order they were spoken, with a BadRecord for each that is none.

    A conversation's `sample_id` is the user. A turn's content is "Speaker: text", with the caption of a shared image
    appended; its metadata hold speaker, session (its number), session_date, dia_id and image_caption, as far as known.
    """
    for number, item in enumerate(conversations, 1):
        source = f"conversation {number}"
        if not isinstance(item, dict):
            yield BadRecord(source, "", "is not an object")
            continue
        user_id, conversation = item.get("sample_id"), item.get("conversation")
        if not isinstance(conversation, dict):
            yield BadRecord(source, "conversation", "is missing: this is neither LoCoMo nor JSON Lines")
        elif not isinstance(user_id, str) or not user_id:
            yield BadRecord(source, "sample_id", "is missing")
        else:
            for session, turns in _sessions(conversation):
                date = conversation.get(f"session_{session}_date_time")
                for position, turn in enumerate(turns, 1):
                    yield _record(user_id, session, date, position, turn)


def count_turns(conversations: list[Any]) -> int:
    """How many turns there are: the length of what from_conversations gives, if nothing is wrong."""
    return sum(
        len(turns)
        for item in conversations
        if isinstance(item, dict) and isinstance(item.get("conversation"), dict)
        for _, turns in _sessions(item["conversation"])
    )


def _sessions(conversation: dict[str, Any]) -> list[tuple[int, list[Any]]]:
    """The numbered sessions in order. A date without a session, as LoCoMo has them, is not one."""
    found = ((re.fullmatch(r"session_(\d+)", key), turns) for key, turns in conversation.items())
    return sorted(
        ((int(match[1]), turns) for match, turns in found if match and isinstance(turns, list)),
        key=lambda session: session[0],
    )


def _record(user_id: str, session: int, date: Any, position: int, turn: Any) -> Parsed:
    turn_id = turn.get("dia_id") if isinstance(turn, dict) else None
    place = turn_id if isinstance(turn_id, str) and turn_id else f"session {session}, turn {position}"
    source = f"{user_id} {place}"
    if not isinstance(turn, dict):
        return BadRecord(source, "", "is not an object")
    speaker, text, caption = (_string(turn.get(key)) for key in ("speaker", "text", "blip_caption"))
    if not text and not caption:
        return BadRecord(source, "text", "is missing, and there is no image caption")
    said = " ".join(filter(None, (text, f"[image: {caption}]" if caption else "")))
    metadata = {
        "speaker": speaker,
        "session": session,
        "session_date": _string(date),
        "dia_id": _string(turn_id),
        "image_caption": caption,
    }
    return Record(
        source=source,
        id=derived_id(user_id, "locomo", place),
        user_id=user_id,
        content=f"{speaker}: {said}" if speaker else said,
        session_id=f"session_{session}",
        metadata={key: value for key, value in metadata.items() if value != ""},
    )


def _string(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""
