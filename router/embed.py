"""Embeddings for what comes as text: at once, or, for a memory whose embedder is away, later."""

from collections.abc import Sequence

from common import logs, tracing
from common.deadline import Deadline
from common.embedder import Embedder, observed
from common.errors import InvalidArgument, Unavailable
from memshard.v1 import memory_pb2 as pb
from router.embeddings import EmbeddingCache, Text

_log = logs.get_logger("embed")

Vector = Sequence[float]

# An embedding that follows: the shard makes it when the embedder is back.
LATER: Vector = ()


class Embedding:
    """The cluster's embedder, if it has one, as the steps of a request use it, and what it has made before."""

    def __init__(self, embedder: Embedder | None, cache: EmbeddingCache | None = None) -> None:
        self._embedder = embedder
        self._cache = cache

    async def of_query(self, text: str, deadline: Deadline) -> Vector:
        """The embedding of a search's text.

        Half of the time that is left is the embedder's; in the other half words must be found instead. Raises
        InvalidArgument when there is no embedder or it knows nothing of the text, Unavailable.
        """
        (vector,) = await self._embed([Text(text)], "embedding", deadline)
        if not any(vector):
            raise _nothing_known("query")
        return vector

    async def of_memories(
        self, memories: Sequence[pb.Memory], fields: Sequence[str], deadline: Deadline
    ) -> list[Vector | InvalidArgument]:
        """The embedding of each memory's content, LATER for all while the embedder is away, or why there is none.

        LATER too for what the embedder refuses: whether it is the text or the server that is to be mended, only people
        can tell, and the text is safe meanwhile. A shard goes on trying (`shard/embedding_queue.py`).

        `fields` is where the request has each memory. Half of the time that is left is the embedder's; the text must be
        stored in the other half. Raises InvalidArgument when there is no embedder.
        """
        try:
            texts = [Text(memory.content, memory.user_id) for memory in memories]
            vectors = await self._embed(texts, f"{fields[0]}.embedding", deadline)
        except Unavailable as error:
            _log.warning("stored without an embedding, which will follow", reason=error.reason, memories=len(memories))
            return [LATER] * len(memories)
        return [
            vector if any(vector) else _nothing_known(f"{field}.content")
            for vector, field in zip(vectors, fields, strict=True)
        ]

    async def of_memory(self, memory: pb.Memory, deadline: Deadline) -> Vector:
        """The same for the one memory of a request. Raises InvalidArgument."""
        (vector,) = await self.of_memories([memory], ["memory"], deadline)
        if isinstance(vector, InvalidArgument):
            raise vector
        return vector

    async def _embed(self, texts: Sequence[Text], field: str, deadline: Deadline) -> list[Vector]:
        if self._embedder is None:
            raise InvalidArgument.field(
                field, "EMBEDDING_REQUIRED", "is required: this cluster was made without an embedder"
            )
        until = deadline.less(deadline.remaining_s() / 2)
        with tracing.span("embed", {"memshard.texts": len(texts)}) as span:
            if self._cache is None:
                return await self._made(self._embedder, texts, until)
            era, known = self._cache.era, await self._cache.find(texts)
            unknown = [text for text, vector in zip(texts, known, strict=True) if vector is None]
            span.set("memshard.cache.hit", not unknown)
            made = await self._made(self._embedder, unknown, until) if unknown else []
            self._cache.keep_soon(unknown, made, era)
            following = iter(made)
            return [next(following) if vector is None else vector for vector in known]

    async def _made(self, embedder: Embedder, texts: Sequence[Text], until: Deadline) -> list[Vector]:
        embedding = embedder.embed([text.text for text in texts], until.remaining_s())
        vectors: list[Vector] = (await observed(embedding)).tolist()
        return vectors


def _nothing_known(field: str) -> InvalidArgument:
    return InvalidArgument.field(field, "UNEMBEDDABLE_TEXT", "has nothing that the embedding model knows")
