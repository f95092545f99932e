"""Chroma's server and mem0 on pgvector, for whoever has installed them: `pip install -e '.[bench]'`."""

# ruff: noqa: PLC0415  # What may not be installed is imported where it is needed.

import asyncio
from collections.abc import Sequence
from typing import Any

from loadtest.bench.contender import Endpoint, Row, Watch
from loadtest.bench.workload import K, Vector

COLLECTION = "memories"


class Chroma:
    """Chroma's own server through its client for asyncio, one collection with the user as metadata."""

    def __init__(self) -> None:
        self.watch = Watch()

    async def open(self, endpoint: Endpoint, callers: int, dimensions: int) -> None:
        import chromadb

        client = await chromadb.AsyncHttpClient(host=endpoint["host"], port=endpoint["port"])
        self._collection: Any = await client.get_or_create_collection(
            COLLECTION, metadata={"hnsw:space": "cosine"}, embedding_function=None
        )

    async def close(self) -> None:
        """Its client has nothing to close."""

    async def search(self, caller: int, user: str, query: Vector) -> list[str]:
        found = await self._collection.query(
            query_embeddings=[query], n_results=K, where={"user": user}, include=["documents", "distances"]
        )
        ids: list[str] = found["ids"][0]
        return ids

    async def store(self, caller: int, row: Row) -> None:
        await self.bulk(caller, [row])

    async def get(self, caller: int, user: str, memory_id: str) -> Any:
        return await self._collection.get(ids=[memory_id], where={"user": user}, include=["documents", "metadatas"])

    get_again = get

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        for first in range(0, len(rows), 500):
            part = rows[first : first + 500]
            await self._collection.add(
                ids=[row.id for row in part],
                embeddings=[row.embedding for row in part],
                documents=[row.content for row in part],
                metadatas=[{"user": row.user} for row in part],
            )


class Mem0:
    """mem0's pgvector store, as mem0 itself calls it when nothing is to be inferred. It blocks, so in threads."""

    def __init__(self) -> None:
        self.watch = Watch()

    async def open(self, endpoint: Endpoint, callers: int, dimensions: int) -> None:
        from mem0.vector_stores.pgvector import PGVector
        from psycopg.errors import UniqueViolation

        def store() -> Any:
            return PGVector(
                dbname=endpoint["database"],
                collection_name="mem0",
                embedding_model_dims=dimensions,
                user=endpoint["user"],
                password=endpoint["password"],
                host=endpoint["host"],
                port=endpoint["port"],
                diskann=False,
                hnsw=True,
                minconn=1,
                maxconn=callers,
            )

        try:
            self._store: Any = await asyncio.to_thread(store)
        except UniqueViolation:
            # Two callers who make its table at the same time: one of them finds it the second time.
            self._store = await asyncio.to_thread(store)

    async def close(self) -> None:
        """Its pool ends with the process."""

    async def search(self, caller: int, user: str, query: Vector) -> list[str]:
        found = await asyncio.to_thread(
            self._store.search, query="", vectors=query.tolist(), top_k=K, filters={"user_id": user}
        )
        return [str(one.id) for one in found]

    async def store(self, caller: int, row: Row) -> None:
        await self.bulk(caller, [row])

    async def get(self, caller: int, user: str, memory_id: str) -> Any:
        return await asyncio.to_thread(self._store.get, memory_id)

    get_again = get

    async def bulk(self, caller: int, rows: Sequence[Row]) -> None:
        await asyncio.to_thread(
            self._store.insert,
            vectors=[row.embedding.tolist() for row in rows],
            payloads=[{"user_id": row.user, "data": row.content} for row in rows],
            ids=[row.id for row in rows],
        )
