"""What --json prints: plain documents of what the SDK returns, and their text."""

import base64
import json
import sys
from datetime import UTC, datetime
from typing import Any

from cli.terminal import must_escape
from memshard import (
    DeleteResult,
    EraseResult,
    Memory,
    ReadReport,
    SearchResult,
    StoreResult,
    UpdateResult,
    WriteReceipt,
)


def memory_document(memory: Memory) -> dict[str, Any]:
    """A memory, keyed as in the wire contract, so that `memshard import` takes it; the embedding if there is one."""
    document: dict[str, Any] = {
        "id": memory.id,
        "user_id": memory.user_id,
        "agent_id": memory.agent_id,
        "session_id": memory.session_id,
        "type": memory.type.name,
        "content": memory.content,
        "metadata": memory.metadata,
        "importance": memory.importance,
        "embedding_model": memory.embedding_model,
        "embedding_state": memory.embedding_state.name,
        "create_time": _time(memory.create_time),
        "update_time": _time(memory.update_time),
        "expire_time": _time(memory.expire_time),
        "version": memory.version,
    }
    if memory.embedding:
        document["embedding"] = list(memory.embedding)
    return document


def store_document(result: StoreResult | UpdateResult) -> dict[str, Any]:
    """A stored or changed memory and its receipt."""
    return {"memory": memory_document(result.memory), "receipt": _receipt(result.receipt)}


def delete_document(user_id: str, memory_id: str, result: DeleteResult) -> dict[str, Any]:
    """What a delete did, and its receipt."""
    return {"id": memory_id, "user_id": user_id, "deleted": result.deleted, "receipt": _receipt(result.receipt)}


def erase_document(user_id: str, result: EraseResult) -> dict[str, Any]:
    """How much was erased, and the receipt."""
    return {
        "user_id": user_id,
        "memories_erased": result.memories_erased,
        "versions_erased": result.versions_erased,
        "receipt": _receipt(result.receipt),
    }


def search_document(result: SearchResult) -> dict[str, Any]:
    """The matches, what their scores mean, and what is missing."""
    return {
        "results": [{"score": match.score, "memory": memory_document(match.memory)} for match in result.results],
        "score_kind": result.score_kind.name,
        "report": _report(result.report),
    }


def json_text(document: Any) -> str:
    """The document as JSON in readable lines. What could command a terminal is escaped, as JSON allows."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    text = json.dumps(document, ensure_ascii=ascii_only, indent=2)
    # json.dumps escapes what lies below the space. What is left can only stand within strings.
    return "".join(json.dumps(char)[1:-1] if char >= "\x7f" and must_escape(char) else char for char in text)


def _receipt(receipt: WriteReceipt) -> dict[str, Any]:
    return {
        "consistency_token": base64.b64encode(receipt.consistency_token).decode("ascii"),
        "durability": receipt.durability.name,
        "degradation_level": receipt.degradation_level.name,
    }


def _report(report: ReadReport) -> dict[str, Any]:
    return {
        "partial": report.partial,
        "served_by": list(report.served_by),
        "shards": {
            "total": report.shards.total,
            "succeeded": report.shards.succeeded,
            "failed": [
                {
                    "shard_id": failure.shard_id,
                    "code": failure.error.code.name,
                    "reason": failure.error.reason,
                    "message": failure.error.message,
                }
                for failure in report.shards.failed
            ],
        },
        "degradation_level": report.degradation_level.name,
    }


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
