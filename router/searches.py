"""Searching: by meaning or by words, one user or all, on one shard or many."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.deadline import Deadline
from common.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable, Unimplemented
from common.level import Fallback
from common.rpc import add_trailer
from common.topology import CLUSTER
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router import filters, validate
from router.consistency import Consistency
from router.listings import newest
from router.merge import merge
from router.parts import Parts
from router.report import Origin, report
from router.search_cache import KeptResults, SearchKey
from router.shards import SEARCH
from router.stamps import Stamp

# How many of the memories in question have no embedding yet, and so cannot be found by meaning.
UNEMBEDDED_TRAILER = "memshard-unembedded"


@dataclass(frozen=True, slots=True)
class _Query:
    """What is looked for: by an embedding, or else by words; `fallback` when words stand in for an embedding."""

    embedding: Sequence[float] = ()
    words: str = ""
    fallback: bool = False


async def search(
    parts: Parts, request: pb.SearchMemoriesRequest, consistency: Consistency, deadline: Deadline
) -> pb.SearchMemoriesResponse:
    """The results of the window asked for, and which shards they come from."""
    user_id = validate.optional_user_id(request.user_id, "user_id")
    window = validate.window(request.limit, request.offset)
    min_score = validate.min_score(request)
    if request.HasField("filter"):
        filters.check(request.filter)
    query = await _query(parts, request, deadline)
    question = shard_pb2.SearchRequest(
        user_id=user_id,
        embedding=query.embedding,
        words=query.words,
        k=window.k,
        # A score of the one kind is no bound for the other.
        min_score=None if query.fallback else min_score,
        include_embedding=request.include_embedding,
        filter=request.filter if request.HasField("filter") else None,
    )
    slot = parts.placement.user_slot(user_id) if user_id else None
    shared = None
    if slot is not None and not query.fallback and not consistency.strong:
        shared = _Shared.of(parts, question, window, consistency, slot)
        if (kept := shared.kept()) is not None:
            return kept
    # Not before it is known by what name results are remembered: exact ones are as good at every level.
    question.index_suffices = bool(user_id) and _index_suffices(parts, slot)
    if shared is not None:
        found = await shared.look_together(deadline)
    elif slot is not None:
        found = await _ask(parts, slot, question, window, consistency, deadline)
    else:
        found = await _ask_all(parts, request, question, window, consistency, deadline)
    if query.fallback and user_id and found.is_nothing:
        recent = await _most_recent(parts, question, window, consistency, deadline)
        if recent is not None:
            return recent
    if found.unembedded:
        add_trailer(UNEMBEDDED_TRAILER, str(found.unembedded))
    found.response.report.CopyFrom(report(parts.levels, found.origin, fallback=query.fallback))
    return found.response


@dataclass(frozen=True, slots=True)
class _Found:
    """What shards found for a search."""

    response: pb.SearchMemoriesResponse
    """Without a report, which is up to who has asked."""
    origin: Origin
    is_nothing: bool
    """Not in the window only, but anywhere."""
    unembedded: int
    """How many of the memories in question could not be found by meaning."""
    stamp: Stamp | None = None

    @classmethod
    def of(
        cls,
        question: shard_pb2.SearchRequest,
        answers: Sequence[shard_pb2.SearchResponse],
        window: validate.Window,
        origin: Origin,
        stamp: Stamp | None = None,
    ) -> "_Found":
        """What the window has of all that shards answered."""
        response = pb.SearchMemoriesResponse(
            score_kind=pb.SCORE_KIND_TEXT_RANK if question.words else pb.SCORE_KIND_COSINE
        )
        if len(answers) > 1:
            response.results.extend(merge([answer.results for answer in answers], window))
        elif window.offset:
            response.results.extend(answers[0].results[window.offset :])
        else:
            # One shard's answer is in order already, and copied as a whole.
            response.results.MergeFrom(answers[0].results)
        is_nothing = not any(answer.results for answer in answers)
        return cls(response, origin, is_nothing, sum(answer.unembedded for answer in answers), stamp)

    def copied(self) -> "_Found":
        """The same for somebody else."""
        response = pb.SearchMemoriesResponse()
        response.CopyFrom(self.response)
        return replace(self, response=response)


async def _ask(
    parts: Parts,
    slot: int,
    question: shard_pb2.SearchRequest,
    window: validate.Window,
    consistency: Consistency,
    deadline: Deadline,
) -> _Found:
    """What the one shard finds that has all memories in question."""
    asked_at = parts.searches.now()
    answered = await parts.dispatch.read(slot, SEARCH, question, consistency, deadline)
    answer, stamp = answered.answer, None
    if answer.HasField("stamp"):
        stamp = Stamp.of_answer(answered.shard.shard_id, answer.stamp, asked_at)
    return _Found.of(question, [answer], window, answered.origin, stamp)


async def _ask_all(
    parts: Parts,
    request: pb.SearchMemoriesRequest,
    question: shard_pb2.SearchRequest,
    window: validate.Window,
    consistency: Consistency,
    deadline: Deadline,
) -> _Found:
    """What all shards find together."""
    gathered = await parts.fanout.ask_all(SEARCH, question, deadline, consistency)
    if request.require_all_shards:
        gathered.require_all()
    gathered.require_any()
    return _Found.of(question, [answer for _, answer in gathered.answers], window, gathered.origin)


def _index_suffices(parts: Parts, slot: int | None) -> bool:
    """Whether a level has a large user's index answer, though an exact search was possible."""
    shard_id = parts.dispatch.owner(slot).shard_id if slot is not None else CLUSTER
    return parts.levels.effects(shard_id).index_instead_of_exact


@dataclass(frozen=True, slots=True)
class _Shared:
    """A search of one user on one shard, whose results are for all who ask the same and as fresh: those who ask at the
    same time have them of one look, and those who come later of what is remembered."""

    parts: Parts
    key: SearchKey
    question: shard_pb2.SearchRequest
    window: validate.Window
    consistency: Consistency
    slot: int

    @classmethod
    def of(
        cls,
        parts: Parts,
        question: shard_pb2.SearchRequest,
        window: validate.Window,
        consistency: Consistency,
        slot: int,
    ) -> "_Shared":
        """`question` as it is asked at any level. If results are remembered, the shard is to say how fresh they are."""
        key = SearchKey.of(parts.remembered.user(question.user_id), question, window.offset)
        question.stamped = parts.searches.is_on
        return cls(parts, key, question, window, consistency, slot)

    def kept(self) -> pb.SearchMemoriesResponse | None:
        """The answer, if one is remembered that is fresh enough."""
        kept = self.parts.searches.find(self.key, self.consistency, self.parts.watch.topology)
        if kept is None:
            return None
        self.parts.dispatch.admit(self.slot, SEARCH)
        response = pb.SearchMemoriesResponse.FromString(kept.encoded)
        response.report.CopyFrom(report(self.parts.levels, Origin.of_cache(kept.stamp.shard_id)))
        return response

    async def look_together(self, deadline: Deadline) -> _Found:
        """What the shard finds, in the same look for all who ask the same, if the user's searches have not been
        forgotten since it began."""
        searches = self.parts.searches
        key = self.key, self.question.index_suffices, self.consistency.key, searches.forgotten_at(self.key.user)
        found: _Found
        found, is_own = await self.parts.flights.run(key, deadline, lambda: self._look(deadline))
        # Also of who waited for another's look, whose span does not know it.
        self.parts.levels.tell_trace(found.origin.shard_ids)
        if is_own:
            return found
        if self.consistency.max_staleness_ms:
            # It was fresh enough for who came first. This one came later.
            cutovers = self.parts.watch.topology.cutovers
            if found.stamp is None or not found.stamp.satisfies(self.consistency, cutovers, searches.now()):
                return await self._look(deadline)
        return found.copied()

    async def _look(self, deadline: Deadline) -> _Found:
        found = await _ask(self.parts, self.slot, self.question, self.window, self.consistency, deadline)
        # What has no embedding yet gets one without anybody being told, and is found then. And what an index finds may
        # be less than what is found at another level.
        if found.stamp is not None and not found.unembedded and not self.question.index_suffices:
            kept = KeptResults(self.slot, found.response.SerializeToString(), found.stamp)
            self.parts.searches.remember(self.key, kept, found.response)
        return found


async def _most_recent(
    parts: Parts,
    question: shard_pb2.SearchRequest,
    window: validate.Window,
    consistency: Consistency,
    deadline: Deadline,
) -> pb.SearchMemoriesResponse | None:
    """The user's newest memories, where a level allows them to stand in for what neither meaning nor words found.

    None too when they cannot be had, as while a shard is away that may have them: the search has been answered.
    """
    slot = parts.placement.user_slot(question.user_id)
    shard_id = parts.dispatch.owner(slot).shard_id if slot is not None else CLUSTER
    if Fallback.MOST_RECENT not in parts.levels.effects(shard_id).fallbacks:
        return None
    listing = shard_pb2.ListRequest(
        user_id=question.user_id,
        page_size=question.k,
        include_embedding=question.include_embedding,
        filter=question.filter if question.HasField("filter") else None,
    )
    try:
        memories, _, origin = await newest(parts, listing, consistency, deadline)
    except (Unavailable, DeadlineExceeded, ResourceExhausted):
        return None
    return pb.SearchMemoriesResponse(
        results=[pb.ScoredMemory(memory=memory) for memory in memories[window.offset :]],
        score_kind=pb.SCORE_KIND_RECENCY,
        report=report(parts.levels, origin, fallback=True),
    )


async def _query(parts: Parts, request: pb.SearchMemoriesRequest, deadline: Deadline) -> _Query:
    text = validate.query_text(request.query)
    if request.embedding:
        validate.embedding(request.embedding, parts.cluster, "embedding")
    match request.mode:
        case pb.SEARCH_MODE_KEYWORD:
            if not text:
                raise InvalidArgument.field("query", "EMPTY_QUERY", "a keyword search needs words")
            return _Query(words=text)
        case pb.SEARCH_MODE_UNSPECIFIED | pb.SEARCH_MODE_SEMANTIC:
            return await _semantic(parts, request, text, deadline)
        case pb.SEARCH_MODE_HYBRID:
            raise Unimplemented("hybrid search is not offered yet", reason="MODE_NOT_IMPLEMENTED")
        case unknown:
            raise InvalidArgument.field("mode", "INVALID_ENUM", f"{unknown} is no search mode")


async def _semantic(parts: Parts, request: pb.SearchMemoriesRequest, text: str, deadline: Deadline) -> _Query:
    if request.embedding:
        return _Query(embedding=request.embedding)
    if not text:
        raise InvalidArgument.field("query", "EMPTY_QUERY", "give a query, an embedding, or both")
    try:
        return _Query(embedding=await parts.embedding.of_query(text, deadline))
    except Unavailable:
        # Words find something of what was meant, which the answer says; nothing at all would help nobody.
        return _Query(words=text, fallback=True)
