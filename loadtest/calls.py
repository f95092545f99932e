"""The operations of a profile as calls: through the SDK's client, or through the generated stubs alone."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import grpc

from loadtest.profile import Operation, Profile
from loadtest.subjects import Subjects
from loadtest.tally import Said
from memshard import AsyncMemoryClient, DegradationLevel, NewMemory, ReadLevel, SearchMode
from memshard.errors import MemshardError, from_rpc_error
from memshard.v1 import memory_pb2 as pb
from memshard.v1 import memory_pb2_grpc

if TYPE_CHECKING:
    from memshard.v1.memory_pb2_grpc import MemoryServiceAsyncStub

_Q = TypeVar("_Q")
_R = TypeVar("_R")

ClientKind: TypeAlias = Literal["sdk", "stub"]

_READ = {"strong": ReadLevel.STRONG, "session": ReadLevel.SESSION, "eventual": ReadLevel.EVENTUAL}
_STUB_READ = {
    "strong": pb.READ_LEVEL_STRONG,
    "session": pb.READ_LEVEL_SESSION,
    "eventual": pb.READ_LEVEL_EVENTUAL,
}
_STORE_TIMEOUT_S = 60.0


class Calls(ABC):
    """Makes calls. Each returns the answer, of which `said` knows what it says of itself, or raises MemshardError."""

    def __init__(self, profile: Profile, subjects: Subjects) -> None:
        self.profile = profile
        self.subjects = subjects
        self.by_operation: dict[Operation, Callable[[], Awaitable[object]]] = {
            Operation.STORE: self.store,
            Operation.BATCH: self.batch,
            Operation.GET: self.get,
            Operation.LOCATE: self.locate,
            Operation.UPDATE: self.update,
            Operation.DELETE: self.delete,
            Operation.LIST: self.list,
            Operation.VERSIONS: self.versions,
            Operation.SEARCH: self.search,
            Operation.SEARCH_ALL: self.search_all,
            Operation.KEYWORD: self.keyword,
            Operation.ERASE: self.erase,
        }

    @abstractmethod
    async def close(self) -> None: ...
    @abstractmethod
    async def prepare(self, memories: Sequence[NewMemory]) -> None:
        """Stores what is to be there from the start; at most 500 at once."""

    @abstractmethod
    async def store(self) -> object: ...
    @abstractmethod
    async def batch(self) -> object: ...
    @abstractmethod
    async def get(self) -> object: ...
    @abstractmethod
    async def locate(self) -> object: ...
    @abstractmethod
    async def update(self) -> object: ...
    @abstractmethod
    async def delete(self) -> object: ...
    @abstractmethod
    async def list(self) -> object: ...
    @abstractmethod
    async def versions(self) -> object: ...
    @abstractmethod
    async def search(self) -> object: ...
    @abstractmethod
    async def search_all(self) -> object: ...
    @abstractmethod
    async def keyword(self) -> object: ...
    @abstractmethod
    async def erase(self) -> object: ...


class SdkCalls(Calls):
    """As agents call it."""

    def __init__(self, address: str, profile: Profile, subjects: Subjects) -> None:
        super().__init__(profile, subjects)
        self._client = AsyncMemoryClient(address, timeout_s=profile.timeout_s, read=_READ[profile.read])

    async def close(self) -> None:
        await self._client.close()

    async def prepare(self, memories: Sequence[NewMemory]) -> None:
        result = await self._client.store_many(memories, timeout_s=_STORE_TIMEOUT_S)
        for failed in result.failed:
            if failed.error is not None:
                raise failed.error

    async def store(self) -> object:
        new = self.subjects.fresh()
        return await self._client.store(new.user_id, new.content, id=new.id, embedding=new.embedding)

    async def batch(self) -> object:
        return await self._client.store_many([self.subjects.fresh() for _ in range(self.profile.batch)])

    async def get(self) -> object:
        key = self.subjects.key()
        return await self._client.get_with_report(self.subjects.id_of(key), user_id=self.subjects.user_name(key.user))

    async def locate(self) -> object:
        return await self._client.get_with_report(self.subjects.id_of(self.subjects.key()))

    async def update(self) -> object:
        key, embedding = self.subjects.key(), self.subjects.embedding()
        user, memory_id, text = self.subjects.user_name(key.user), self.subjects.id_of(key), self.subjects.content()
        if embedding is None:
            return await self._client.update(user, memory_id, content=text)
        return await self._client.update(user, memory_id, content=text, embedding=embedding)

    async def delete(self) -> object:
        return await self._client.delete(*self.subjects.doomed())

    async def list(self) -> object:
        return await self._client.list_memories(self.subjects.user(), page_size=self.profile.limit)

    async def versions(self) -> object:
        key = self.subjects.key()
        return await self._client.list_versions(self.subjects.user_name(key.user), self.subjects.id_of(key))

    async def search(self) -> object:
        return await self._search(self.subjects.user())

    async def search_all(self) -> object:
        return await self._search(None)

    async def keyword(self) -> object:
        return await self._client.search(
            self.subjects.words(), user_id=self.subjects.user(), limit=self.profile.limit, mode=SearchMode.KEYWORD
        )

    async def erase(self) -> object:
        return await self._client.erase_user(self.subjects.throwaway_user())

    async def _search(self, user: str | None) -> object:
        return await self._client.search(
            self.subjects.query(), user_id=user, embedding=self.subjects.embedding(), limit=self.profile.limit
        )


class StubCalls(Calls):
    """The generated stubs, with none of the client's own work: what the service can do."""

    def __init__(self, address: str, profile: Profile, subjects: Subjects) -> None:
        super().__init__(profile, subjects)
        self._channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 128 * 2**20)]
        )
        self._stub: MemoryServiceAsyncStub = memory_pb2_grpc.MemoryServiceStub(self._channel)
        self._read = pb.ReadOptions(level=_STUB_READ[profile.read])

    async def close(self) -> None:
        await self._channel.close()

    async def prepare(self, memories: Sequence[NewMemory]) -> None:
        request = pb.BatchStoreMemoriesRequest(memories=map(_message, memories))
        answer = await self._call(self._stub.BatchStoreMemories(request, timeout=_STORE_TIMEOUT_S))
        for result in answer.results:
            if result.HasField("error"):
                raise MemshardError(result.error.message)

    async def store(self) -> object:
        request = pb.StoreMemoryRequest(memory=_message(self.subjects.fresh()))
        return await self._call(self._stub.StoreMemory(request, timeout=self.profile.timeout_s))

    async def batch(self) -> object:
        fresh = [_message(self.subjects.fresh()) for _ in range(self.profile.batch)]
        request = pb.BatchStoreMemoriesRequest(memories=fresh)
        return await self._call(self._stub.BatchStoreMemories(request, timeout=self.profile.timeout_s))

    async def get(self) -> object:
        key = self.subjects.key()
        return await self._get(self.subjects.id_of(key), self.subjects.user_name(key.user))

    async def locate(self) -> object:
        return await self._get(self.subjects.id_of(self.subjects.key()), "")

    async def update(self) -> object:
        key = self.subjects.key()
        memory = pb.Memory(
            id=self.subjects.id_of(key),
            user_id=self.subjects.user_name(key.user),
            content=self.subjects.content(),
            embedding=self.subjects.embedding(),
        )
        request = pb.UpdateMemoryRequest(memory=memory)
        request.update_mask.paths.extend(["content", *(["embedding"] if memory.embedding else [])])
        return await self._call(self._stub.UpdateMemory(request, timeout=self.profile.timeout_s))

    async def delete(self) -> object:
        user, memory_id = self.subjects.doomed()
        request = pb.DeleteMemoryRequest(id=memory_id, user_id=user)
        return await self._call(self._stub.DeleteMemory(request, timeout=self.profile.timeout_s))

    async def list(self) -> object:
        request = pb.ListMemoriesRequest(user_id=self.subjects.user(), page_size=self.profile.limit, read=self._read)
        return await self._call(self._stub.ListMemories(request, timeout=self.profile.timeout_s))

    async def versions(self) -> object:
        key = self.subjects.key()
        request = pb.ListMemoryVersionsRequest(id=self.subjects.id_of(key), user_id=self.subjects.user_name(key.user))
        return await self._call(self._stub.ListMemoryVersions(request, timeout=self.profile.timeout_s))

    async def search(self) -> object:
        return await self._search(self.subjects.user())

    async def search_all(self) -> object:
        return await self._search("")

    async def keyword(self) -> object:
        request = pb.SearchMemoriesRequest(
            user_id=self.subjects.user(),
            query=self.subjects.words(),
            limit=self.profile.limit,
            mode=pb.SEARCH_MODE_KEYWORD,
            read=self._read,
        )
        return await self._call(self._stub.SearchMemories(request, timeout=self.profile.timeout_s))

    async def erase(self) -> object:
        request = pb.EraseUserRequest(user_id=self.subjects.throwaway_user())
        return await self._call(self._stub.EraseUser(request, timeout=self.profile.timeout_s))

    async def _get(self, memory_id: str, user: str) -> object:
        request = pb.GetMemoryRequest(id=memory_id, user_id=user, read=self._read)
        return await self._call(self._stub.GetMemory(request, timeout=self.profile.timeout_s))

    async def _search(self, user: str) -> object:
        request = pb.SearchMemoriesRequest(
            user_id=user,
            query=self.subjects.query(),
            embedding=self.subjects.embedding(),
            limit=self.profile.limit,
            read=self._read,
        )
        return await self._call(self._stub.SearchMemories(request, timeout=self.profile.timeout_s))

    async def _call(self, call: "grpc.aio.UnaryUnaryCall[_Q, _R]") -> "_R":
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


def connect(kind: ClientKind, address: str, profile: Profile, subjects: Subjects) -> Calls:
    """What makes the calls of one process. Nothing is sent yet."""
    return (SdkCalls if kind == "sdk" else StubCalls)(address, profile, subjects)


def said(answer: object) -> Said:
    """What an answer says of itself, the client's or the generated one: a read has a report, a write a receipt."""
    report = getattr(answer, "report", None)
    told = report if report is not None else getattr(answer, "receipt", None)
    if told is None:
        return Said()
    cached = None if report is None else list(report.served_by) == ["cache"]
    return Said(DegradationLevel(told.degradation_level).name, cached)


def _message(memory: NewMemory) -> pb.Memory:
    message = pb.Memory(id=memory.id, user_id=memory.user_id, content=memory.content)
    if isinstance(memory.embedding, list):
        message.embedding.extend(memory.embedding)
    return message
