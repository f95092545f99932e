"""MemoryService: each method validates, places, calls and replies; the work is in the modules named by these steps."""

import uuid
from collections.abc import Sequence

from common.catalog import Cluster
from common.deadline import Deadline
from common.embedder import Embedder
from common.errors import InvalidArgument, NotFound, Unimplemented
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router import validate
from router.digest import digest_of
from router.dispatch import Dispatch
from router.fanout import Fanout, Gathered
from router.locate import Locator
from router.location import LocationCache
from router.merge import merge
from router.place import user_slot
from router.shards import DELETE, GET, LIST, SEARCH, STORE
from router.tokens import Tokens

_ONE_SHARD = pb.ShardSummary(total=1, succeeded=1)


class MemoryServicer:
    """The router's side of memshard.v1.MemoryService."""

    def __init__(
        self,
        cluster: Cluster,
        embedder: Embedder | None,
        dispatch: Dispatch,
        fanout: Fanout,
        locations: LocationCache,
    ) -> None:
        self._cluster = cluster
        self._embedder = embedder
        self._dispatch = dispatch
        self._fanout = fanout
        self._locations = locations
        self._locator = Locator(locations, dispatch, fanout)
        self._tokens = Tokens(cluster.token_key)

    async def StoreMemory(self, request: pb.StoreMemoryRequest, deadline: Deadline) -> pb.StoreMemoryResponse:
        memory = validate.new_memory(request.memory, self._cluster)
        digest = digest_of(memory)
        if not memory.embedding:
            memory.embedding.extend(await self._embed(memory.content, "memory.content", "memory.embedding"))
        slot = user_slot(memory.user_id)
        shard, answer = await self._dispatch.to_owner(
            slot, STORE, shard_pb2.StoreRequest(memory=memory, digest=digest), deadline
        )
        await self._locations.add(memory.id, slot)
        return pb.StoreMemoryResponse(memory=answer.memory, receipt=self._tokens.receipt(shard.shard_id, answer.commit))

    async def GetMemory(self, request: pb.GetMemoryRequest, deadline: Deadline) -> pb.GetMemoryResponse:
        memory_id = validate.memory_id(request.id, "id")
        user_id = validate.optional_user_id(request.user_id, "user_id")
        self._check_read(request.read)
        if not user_id:
            located = await self._locator.get(memory_id, deadline, include_embedding=request.include_embedding)
            return pb.GetMemoryResponse(memory=located.memory, report=_report(located.shards))
        question = shard_pb2.GetRequest(id=memory_id, user_id=user_id, include_embedding=request.include_embedding)
        _, answer = await self._dispatch.to_owner(user_slot(user_id), GET, question, deadline)
        if not answer.found:
            raise NotFound(f"this user has no memory {memory_id}")
        return pb.GetMemoryResponse(memory=answer.found[0].memory, report=_report(_ONE_SHARD))

    async def DeleteMemory(self, request: pb.DeleteMemoryRequest, deadline: Deadline) -> pb.DeleteMemoryResponse:
        memory_id = validate.memory_id(request.id, "id")
        user_id = validate.user_id(request.user_id, "user_id")
        # Made here when the caller gave none, so that a retry inside the cluster still has one effect and one answer.
        request_id = validate.request_id(request.request_id) or str(uuid.uuid4())
        shard, answer = await self._dispatch.to_owner(
            user_slot(user_id),
            DELETE,
            shard_pb2.DeleteRequest(id=memory_id, user_id=user_id, request_id=request_id),
            deadline,
        )
        if answer.deleted:
            await self._locations.forget(memory_id)
        return pb.DeleteMemoryResponse(
            deleted=answer.deleted, receipt=self._tokens.receipt(shard.shard_id, answer.commit)
        )

    async def ListMemories(self, request: pb.ListMemoriesRequest, deadline: Deadline) -> pb.ListMemoriesResponse:
        user_id = validate.user_id(request.user_id, "user_id")
        page_size = validate.page_size(request.page_size)
        _refuse_filter(request)
        self._check_read(request.read)
        after = self._tokens.page_start(request)
        question = shard_pb2.ListRequest(
            user_id=user_id, page_size=page_size, after=after, include_embedding=request.include_embedding
        )
        _, answer = await self._dispatch.to_owner(user_slot(user_id), LIST, question, deadline)
        return pb.ListMemoriesResponse(
            memories=answer.memories,
            next_page_token=self._tokens.next_page(request, answer.next) if answer.HasField("next") else "",
            report=_report(_ONE_SHARD),
        )

    async def SearchMemories(self, request: pb.SearchMemoriesRequest, deadline: Deadline) -> pb.SearchMemoriesResponse:
        user_id = validate.optional_user_id(request.user_id, "user_id")
        window = validate.window(request.limit, request.offset)
        min_score = validate.min_score(request)
        self._check_read(request.read)
        _refuse_filter(request)
        _require_semantic(request.mode)
        question = shard_pb2.SearchRequest(
            user_id=user_id,
            embedding=await self._query_embedding(request),
            k=window.k,
            min_score=min_score,
            include_embedding=request.include_embedding,
        )
        if user_id:
            _, answer = await self._dispatch.to_owner(user_slot(user_id), SEARCH, question, deadline)
            answers, summary = [answer.results], _ONE_SHARD
        else:
            gathered: Gathered[shard_pb2.SearchResponse] = await self._fanout.ask_all(SEARCH, question, deadline)
            gathered.require_all() if request.require_all_shards else gathered.require_any()
            answers, summary = [answer.results for _, answer in gathered.answers], gathered.summary()
        return pb.SearchMemoriesResponse(
            results=merge(answers, window), score_kind=pb.SCORE_KIND_COSINE, report=_report(summary)
        )

    def _check_read(self, options: pb.ReadOptions) -> None:
        """Every read is served by the primary so far, which is as fresh as any level asks for."""
        validate.read_options(options)
        self._tokens.check_consistency(options)

    async def _query_embedding(self, request: pb.SearchMemoriesRequest) -> Sequence[float]:
        text = validate.query_text(request.query)
        if request.embedding:
            validate.embedding(request.embedding, self._cluster, "embedding")
            return request.embedding
        if not text:
            raise InvalidArgument.field("query", "EMPTY_QUERY", "give a query, an embedding, or both")
        return await self._embed(text, "query", "embedding")

    async def _embed(self, text: str, text_field: str, embedding_field: str) -> list[float]:
        """The embedding of `text`. Raises InvalidArgument without an embedder, or when it knows no word of it."""
        if self._embedder is None:
            raise InvalidArgument.field(
                embedding_field, "EMBEDDING_REQUIRED", "is required: this cluster was made without an embedder"
            )
        vector: list[float] = (await self._embedder.embed([text]))[0].tolist()
        if not any(vector):
            raise InvalidArgument.field(text_field, "UNEMBEDDABLE_TEXT", "has nothing that the embedding model knows")
        return vector


def _report(shards: pb.ShardSummary) -> pb.ReadReport:
    return pb.ReadReport(served_by=["primary"], shards=shards, degradation_level=pb.DEGRADATION_LEVEL_NORMAL)


def _refuse_filter(request: pb.ListMemoriesRequest | pb.SearchMemoriesRequest) -> None:
    if request.HasField("filter"):
        raise Unimplemented("filters are not offered yet", reason="FILTER_NOT_IMPLEMENTED")


def _require_semantic(mode: pb.SearchMode.ValueType) -> None:
    if mode not in pb.SearchMode.values():
        raise InvalidArgument.field("mode", "INVALID_ENUM", f"{mode} is no search mode")
    if mode not in (pb.SEARCH_MODE_UNSPECIFIED, pb.SEARCH_MODE_SEMANTIC):
        raise Unimplemented("only semantic search is offered yet", reason="MODE_NOT_IMPLEMENTED")
