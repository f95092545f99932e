"""The blocking client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Self, TypeVar

import grpc

from memshard import _wire
from memshard._channel import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, channel_options, check_address, check_timeout
from memshard._reading import Reading
from memshard._sessions import Sent
from memshard._tracing import carried
from memshard.errors import from_rpc_error
from memshard.filters import Filter
from memshard.types import (
    UNSET,
    BatchResult,
    DeleteResult,
    Embedding,
    EraseResult,
    GetResult,
    Memory,
    MemoryPage,
    MemoryType,
    Metadata,
    NewMemory,
    ReadLevel,
    SearchMode,
    SearchResult,
    StoreResult,
    Unset,
    UpdateResult,
    VersionPage,
)
from memshard.v1 import memory_pb2 as pb
from memshard.v1.memory_pb2_grpc import MemoryServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Written = TypeVar(
    "_Written",
    pb.StoreMemoryResponse,
    pb.BatchStoreMemoriesResponse,
    pb.UpdateMemoryResponse,
    pb.DeleteMemoryResponse,
    pb.EraseUserResponse,
)


class MemoryClient:
    """A client of memshard that blocks. Safe to share between threads; close it, or use it as a context manager.

    Args:
        address: host:port of the router, or a gRPC target such as dns:///router:50051.
        timeout_s: the deadline of each call in seconds, for calls that do not give their own.
        read: how fresh answers must be, for reads that do not say it themselves.
        max_staleness_s: the bound of BOUNDED_STALENESS in seconds; with SESSION it holds as well.
        credentials: for TLS; without them the connection is not encrypted.

    Reads are of level SESSION unless told otherwise: whatever this client has written of a user, its reads of that
    user see, wherever they are served. `session_tokens` and `join_session` let other clients see it too.

    Every failed call raises a MemshardError. A call that finds the service unavailable is tried once more, after as
    long as the service says.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        read: ReadLevel = ReadLevel.SESSION,
        max_staleness_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.address = check_address(address)
        self._timeout_s = check_timeout(timeout_s)
        self._reading = Reading(read, max_staleness_s)
        options = channel_options(address)
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options)
        self._stub = MemoryServiceStub(self._channel)
        self._closed = False

    def close(self) -> None:
        """Closes the connection; calls under way in other threads raise Cancelled. May be repeated."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def store(  # noqa: PLR0913 - Each argument is a field of the memory.
        self,
        user_id: str,
        content: str,
        *,
        id: str | None = None,
        agent_id: str = "",
        session_id: str = "",
        type: MemoryType = MemoryType.EPISODIC,
        metadata: Metadata | None = None,
        importance: float | None = None,
        embedding: Embedding | None = None,
        embedding_model: str = "",
        expire_time: datetime | None = None,
        timeout_s: float | None = None,
    ) -> StoreResult:
        """Stores one memory.

        An id is made before the first attempt when none is given: pass the id of a failed call again to settle it.
        The same id with the same content is the same success.

        Args:
            user_id: whose memory it is: 1 to 256 bytes.
            content: what to remember: 1 byte to 64 KiB of text.
            id: a UUID, unique within the user.
            metadata: JSON-like, at most 32 KiB.
            importance: 0 to 1; the service takes 0.5 when absent.
            embedding: of the cluster's dimension; made by the service when absent.
            expire_time: with a time zone; past it the memory is in no read.
            timeout_s: the deadline in seconds; the client's when None.

        Raises:
            InvalidArgument: a field is wrong.
            AlreadyExists: the id is taken by other content.
            OutcomeUnknown, DeadlineExceeded: the memory may have been stored.
            MemshardError: anything else; see memshard.errors.
        """
        request = _wire.store_request(
            user_id=user_id,
            content=content,
            id=id,
            agent_id=agent_id,
            session_id=session_id,
            type=type,
            metadata=metadata,
            importance=importance,
            embedding=embedding,
            embedding_model=embedding_model,
            expire_time=expire_time,
        )
        return _wire.store_result(*self._write(self._stub.StoreMemory, request, (user_id,), timeout_s))

    def store_many(self, memories: Iterable[NewMemory], *, timeout_s: float | None = None) -> BatchResult:
        """Stores up to 500 memories of any users, 8 MiB at most, in one call. Each has an outcome of its own.

        A memory that is refused sinks none of the others: look at `failed` of the result. The same memories again,
        with the ids they were made with, are the same success.

        Raises:
            InvalidArgument: there are none or too many, or one holds what cannot be sent; nothing is stored then.
            OutcomeUnknown, DeadlineExceeded: some may have been stored.
            MemshardError: anything else; see memshard.errors.
        """
        request = _wire.batch_request(memories)
        users = [memory.user_id for memory in request.memories]
        answer = self._write(self._stub.BatchStoreMemories, request, users, timeout_s)
        return _wire.batch_result(request, *answer)

    def get(
        self,
        id: str,
        *,
        user_id: str | None = None,
        include_embedding: bool = False,
        read: ReadLevel | None = None,
        max_staleness_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Memory:
        """Fetches one memory by id, of one user or, with no user given, of whoever has it.

        Raises NotFound; Ambiguous when several users have the id and none is given; Unavailable, never NotFound, when
        a shard that might have it did not answer.
        """
        request = _wire.get_request(id=id, user_id=user_id, include_embedding=include_embedding)
        options, sent = self._reading.options(user_id, read, max_staleness_s)
        request.read.CopyFrom(options)
        return _wire.memory((self._read(self._stub.GetMemory, request, sent, timeout_s)).memory)

    def get_with_report(
        self,
        id: str,
        *,
        user_id: str | None = None,
        include_embedding: bool = False,
        read: ReadLevel | None = None,
        max_staleness_s: float | None = None,
        timeout_s: float | None = None,
    ) -> GetResult:
        """The same as `get`, with who served it and at which degradation level."""
        request = _wire.get_request(id=id, user_id=user_id, include_embedding=include_embedding)
        options, sent = self._reading.options(user_id, read, max_staleness_s)
        request.read.CopyFrom(options)
        return _wire.get_result(self._read(self._stub.GetMemory, request, sent, timeout_s))

    def update(  # noqa: PLR0913 - Each argument is a field of the memory.
        self,
        user_id: str,
        id: str,
        *,
        content: str | Unset = UNSET,
        metadata: Metadata | Unset = UNSET,
        importance: float | Unset = UNSET,
        type: MemoryType | Unset = UNSET,
        agent_id: str | Unset = UNSET,
        session_id: str | Unset = UNSET,
        embedding: Embedding | Unset = UNSET,
        expire_time: datetime | Unset | None = UNSET,
        expected_version: int | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> UpdateResult:
        """Changes the fields that are given, and makes a new version. Metadata is replaced as a whole.

        A request id is made before the first attempt when none is given; the same one again, within 24 hours, has the
        one effect and the same answer.

        Args:
            content: new text; unless an embedding is given too, the service makes a new one.
            expire_time: with a time zone; None lets the memory stay.
            expected_version: change nothing unless the memory is at this version.

        Raises:
            InvalidArgument: a field is wrong, or none is given.
            NotFound: there is no such memory, or it is another user's.
            VersionMismatch: the memory is not at `expected_version`.
            OutcomeUnknown, DeadlineExceeded: the memory may have been changed.
            MemshardError: anything else; see memshard.errors.
        """
        request = _wire.update_request(
            user_id=user_id,
            id=id,
            content=content,
            metadata=metadata,
            importance=importance,
            type=type,
            agent_id=agent_id,
            session_id=session_id,
            embedding=embedding,
            expire_time=expire_time,
            expected_version=expected_version,
            request_id=request_id,
        )
        response, _ = self._write(self._stub.UpdateMemory, request, (user_id,), timeout_s)
        return _wire.update_result(response)

    def delete(
        self, user_id: str, id: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> DeleteResult:
        """Deletes one memory. The result is false when there was none, or it is another user's.

        A request id is made before the first attempt when none is given; the same one again, within 24 hours, has the
        same answer.
        """
        request = _wire.delete_request(user_id=user_id, id=id, request_id=request_id)
        response, _ = self._write(self._stub.DeleteMemory, request, (user_id,), timeout_s)
        return _wire.delete_result(response)

    def list_memories(
        self,
        user_id: str,
        *,
        filter: Filter | None = None,
        page_size: int = 100,
        page_token: str = "",
        include_embedding: bool = False,
        read: ReadLevel | None = None,
        max_staleness_s: float | None = None,
        timeout_s: float | None = None,
    ) -> MemoryPage:
        """One page of a user's memories, newest first; `next_page_token` of the last page is empty.

        A page may be shorter than `page_size` (1 to 1,000). Its report says what it leaves out. `filter` (see
        memshard.filters) must stay the same from page to page.
        """
        request = _wire.list_request(
            user_id=user_id,
            filter=filter,
            page_size=page_size,
            page_token=page_token,
            include_embedding=include_embedding,
        )
        options, sent = self._reading.options(user_id, read, max_staleness_s)
        request.read.CopyFrom(options)
        return _wire.list_result(self._read(self._stub.ListMemories, request, sent, timeout_s))

    def iter_memories(
        self,
        user_id: str,
        *,
        filter: Filter | None = None,
        page_size: int = 100,
        include_embedding: bool = False,
        read: ReadLevel | None = None,
        max_staleness_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Memory]:
        """All of a user's memories, newest first, fetched page by page; `timeout_s` is for each page.

        Raises Unavailable rather than leave out what a shard did not answer; `list_memories` gives what there is.
        """
        token = ""
        while True:
            page = _wire.whole_page(
                self.list_memories(
                    user_id,
                    filter=filter,
                    page_size=page_size,
                    page_token=token,
                    include_embedding=include_embedding,
                    read=read,
                    max_staleness_s=max_staleness_s,
                    timeout_s=timeout_s,
                )
            )
            yield from page.memories
            token = page.next_page_token
            if not token:
                return

    def list_versions(
        self,
        user_id: str,
        id: str,
        *,
        page_size: int = 100,
        page_token: str = "",
        timeout_s: float | None = None,
    ) -> VersionPage:
        """One page of the kept versions of a memory, newest first; `next_page_token` of the last page is empty."""
        request = _wire.versions_request(user_id=user_id, id=id, page_size=page_size, page_token=page_token)
        return _wire.versions_result(*self._answer(self._stub.ListMemoryVersions, request, timeout_s))

    def iter_versions(
        self, user_id: str, id: str, *, page_size: int = 100, timeout_s: float | None = None
    ) -> Iterator[Memory]:
        """All kept versions of a memory, newest first, fetched page by page; `timeout_s` is for each page."""
        token = ""
        while True:
            page = self.list_versions(user_id, id, page_size=page_size, page_token=token, timeout_s=timeout_s)
            yield from page.versions
            token = page.next_page_token
            if not token:
                return

    def search(  # noqa: PLR0913 - Each argument is a field of the request.
        self,
        query: str = "",
        *,
        user_id: str | None = None,
        embedding: Embedding | None = None,
        limit: int = 10,
        offset: int = 0,
        filter: Filter | None = None,
        mode: SearchMode = SearchMode.SEMANTIC,
        min_score: float | None = None,
        require_all_shards: bool = False,
        include_embedding: bool = False,
        read: ReadLevel | None = None,
        max_staleness_s: float | None = None,
        timeout_s: float | None = None,
    ) -> SearchResult:
        """The memories nearest to a text or an embedding, best first, of one user or, with None, of all users.

        Shards that failed are named in the report; with `require_all_shards` they make it Unavailable instead.
        `filter` (see memshard.filters) leaves out what does not match it; `mode` says how the query is matched.
        `limit` is 1 to 1,000, and so is `offset` + `limit` at most.
        """
        request = _wire.search_request(
            query=query,
            user_id=user_id,
            embedding=embedding,
            limit=limit,
            offset=offset,
            filter=filter,
            mode=mode,
            min_score=min_score,
            require_all_shards=require_all_shards,
            include_embedding=include_embedding,
        )
        options, sent = self._reading.options(user_id, read, max_staleness_s)
        request.read.CopyFrom(options)
        return _wire.search_result(self._read(self._stub.SearchMemories, request, sent, timeout_s))

    def erase_user(self, user_id: str, *, request_id: str | None = None, timeout_s: float | None = None) -> EraseResult:
        """Erases all that is held of a user: memories, versions, request ids, cache entries. There is no way back.

        A request id is made before the first attempt when none is given; the same one again, within 24 hours, has the
        same answer.
        """
        request = _wire.erase_request(user_id=user_id, request_id=request_id)
        response, _ = self._write(self._stub.EraseUser, request, (user_id,), timeout_s)
        return _wire.erase_result(response)

    def session_tokens(self, user_id: str) -> tuple[bytes, ...]:
        """What another client needs for its reads to see all that this one has written of a user: a few short tokens.

        Pass them to `join_session` there. They are opaque, hold no secret, and do not expire.
        """
        return self._reading.tokens(user_id)

    def join_session(self, user_id: str, tokens: Iterable[bytes]) -> None:
        """From now on this client's reads see what the tokens stand for: those that `session_tokens` gave elsewhere, or
        the `consistency_token` of a receipt. Made-up ones make the next read fail with InvalidArgument."""
        self._reading.join(user_id, tokens)

    def _read(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        sent: Sent,
        timeout_s: float | None,
    ) -> _Response:
        response, trailers = self._answer(method, request, timeout_s)
        self._reading.heard(sent, trailers)
        return response

    def _write(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Written],
        request: _Request,
        users: Iterable[str],
        timeout_s: float | None,
    ) -> tuple[_Written, _wire.Trailers]:
        """The response, and what came behind it. What was written is in the users' sessions then."""
        began = self._reading.moment()
        response, trailers = self._answer(method, request, timeout_s)
        self._reading.wrote(users, response.receipt, trailers, began)
        return response, trailers

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_s: float | None
    ) -> _Response:
        response, _ = self._answer(method, request, timeout_s)
        return response

    def _answer(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_s: float | None
    ) -> tuple[_Response, _wire.Trailers]:
        """The response, and what came behind it."""
        if self._closed:
            raise RuntimeError("the client is closed")
        deadline_s = self._timeout_s if timeout_s is None else check_timeout(timeout_s)
        try:
            response, call = method.with_call(request, timeout=deadline_s, metadata=carried())
            return response, call.trailing_metadata()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
