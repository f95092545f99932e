"""Storing: one memory, or a batch whose items know nothing of each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from google.rpc import status_pb2

from common.deadline import Deadline
from common.errors import InvalidArgument, MemshardError
from common.rpc import add_trailer, received_bytes
from common.status import to_status
from memshard.internal.v1 import shard_pb2
from memshard.v1 import memory_pb2 as pb
from router import validate
from router.digest import digest_of
from router.parts import Parts
from router.place import home_slot
from router.scatter import Sending
from router.shards import CLAIM, STORE, STORE_BATCH
from router.tokens import Commits

# Which items of the request were stored before and have been deleted since, by number: a repeated store is a success,
# and whoever takes it for a new one should be able to see that the memory is not there.
DELETED_TRAILER = "memshard-deleted"


async def store(parts: Parts, request: pb.StoreMemoryRequest, deadline: Deadline) -> pb.StoreMemoryResponse:
    """Validates, embeds, places, claims if need be, and has the owner of the slot store it."""
    memory = request.memory
    validate.new_memory(memory, parts.cluster)
    digest = digest_of(memory)
    if not memory.embedding:
        memory.embedding.extend(await parts.embedding.of_memory(memory, deadline))
    item = _Item(parts.placement.new_slot(memory), memory, digest)
    began = parts.locations.moment()
    claims: Commits = ()
    if parts.placement.claims:
        (error,), claims = await _claim(parts, [item], deadline)
        if error is not None:
            raise error
    try:
        shard, answer = await parts.dispatch.to_owner(
            item.slot, STORE, shard_pb2.StoreRequest(memory=memory, digest=digest), deadline
        )
    finally:
        parts.remembered.wrote([memory.user_id])
    if await parts.locations.add(memory.id, item.slot, since=began):
        await parts.invalidations.tell([memory.id])
    if answer.deleted:
        add_trailer(DELETED_TRAILER, "0")
    receipt = parts.tokens.receipt(*claims, (shard.shard_id, answer.commit))
    return pb.StoreMemoryResponse(memory=answer.memory, receipt=receipt)


async def store_batch(
    parts: Parts, request: pb.BatchStoreMemoriesRequest, deadline: Deadline
) -> pb.BatchStoreMemoriesResponse:
    """The same for each item; what is wrong with one is its own outcome."""
    validate.batch(request, received_bytes())
    batch = _Batch(request, parts)
    await batch.embed(deadline)
    began = parts.locations.moment()
    claims: Commits = ()
    if parts.placement.claims:
        outcomes, claims = await _claim(parts, batch.items(), deadline)
        batch.refuse(outcomes)
    items = batch.items()
    try:
        sent = await parts.scatter.send(_STORING, items, deadline)
    finally:
        parts.remembered.wrote({item.memory.user_id for item in items})
    if sent.marked:
        numbers = batch.numbers()
        add_trailer(DELETED_TRAILER, ",".join(str(numbers[n]) for n in sorted(sent.marked)))
    batch.refuse(sent.outcomes)
    others = await parts.locations.add_many([(item.memory.id, item.slot) for item in batch.items()], since=began)
    if others:
        await parts.invalidations.tell(others)
    commits = [(shard.shard_id, answer.commit) for shard, answer in sent.answers]
    # Without a memory stored, there is nothing that a claim is needed for.
    return batch.answer(parts.tokens.receipt(*(claims if commits else ()), *commits))


@dataclass(frozen=True, slots=True)
class _Item:
    """A memory to store. It is the request's own until it is sent: a copy of each would cost more than all else that
    is done with it here.
    """

    slot: int
    memory: pb.Memory
    digest: bytes


class _Batch:
    """A batch on its way: its items, without those that have failed already."""

    def __init__(self, request: pb.BatchStoreMemoriesRequest, parts: Parts) -> None:
        self._parts = parts
        self._items: dict[int, _Item] = {}
        self._errors: dict[int, MemshardError] = {}
        for number, memory in enumerate(request.memories):
            try:
                validate.new_memory(memory, parts.cluster, f"memories[{number}]")
            except InvalidArgument as error:
                self._errors[number] = error
                continue
            self._items[number] = _Item(parts.placement.new_slot(memory), memory, digest_of(memory))

    async def embed(self, deadline: Deadline) -> None:
        """Embeds those that come as text, all at once."""
        numbers = [number for number, item in self._items.items() if not item.memory.embedding]
        if not numbers:
            return
        memories = [self._items[number].memory for number in numbers]
        try:
            vectors = await self._parts.embedding.of_memories(memories, [f"memories[{n}]" for n in numbers], deadline)
        except InvalidArgument:
            # There is no embedder; each item hears it with its own field.
            vectors = [
                InvalidArgument.field(
                    f"memories[{number}].embedding",
                    "EMBEDDING_REQUIRED",
                    "is required: this cluster was made without an embedder",
                )
                for number in numbers
            ]
        for number, vector in zip(numbers, vectors, strict=True):
            if isinstance(vector, InvalidArgument):
                self._fail(number, vector)
            else:
                self._items[number].memory.embedding.extend(vector)

    def items(self) -> list[_Item]:
        """The items that have not failed, in order."""
        return list(self._items.values())

    def numbers(self) -> list[int]:
        """Where the request has each of `items()`."""
        return list(self._items)

    def refuse(self, outcomes: Sequence[MemshardError | None]) -> None:
        """Takes out what failed, given what became of each of `items()`."""
        for number, error in zip(list(self._items), outcomes, strict=True):
            if error is not None:
                self._fail(number, error)

    def answer(self, receipt: pb.WriteReceipt) -> pb.BatchStoreMemoriesResponse:
        """What became of each item of the request, in order."""
        answer = pb.BatchStoreMemoriesResponse(receipt=receipt)
        for number in sorted(self._items.keys() | self._errors.keys()):
            if number in self._errors:
                answer.results.add(error=to_status(self._errors[number]))
            else:
                answer.results.add(id=self._items[number].memory.id)
        return answer

    def _fail(self, number: int, error: MemshardError) -> None:
        del self._items[number]
        self._errors[number] = _renamed(error, number)


def _renamed(error: MemshardError, number: int) -> MemshardError:
    """What a shard says of `memory`, the one it was given, as this batch's `memories[number]`."""
    if not any(violation.field.startswith("memory.") for violation in error.violations):
        return error
    (violation, *_) = error.violations
    field = f"memories[{number}].{violation.field.removeprefix('memory.')}"
    return InvalidArgument.field(field, error.reason, violation.description)


async def _claim(
    parts: Parts, items: Sequence[_Item], deadline: Deadline
) -> tuple[tuple[MemshardError | None, ...], Commits]:
    """Takes the items' ids, each in its home slot; what became of each, and where the claims are in the shards' logs.

    A memory whose claim is lost is lost to whoever asks for it by id: its receipt must not promise more.
    """
    claims = [
        shard_pb2.ClaimItem(
            home_slot=home_slot(item.memory.user_id, item.memory.id),
            user_id=item.memory.user_id,
            id=item.memory.id,
            digest=item.digest,
            memory_slot=item.slot,
            expire_time=item.memory.expire_time if item.memory.HasField("expire_time") else None,
        )
        for item in items
    ]
    sent = await parts.scatter.send(_CLAIMING, claims, deadline)
    return sent.outcomes, tuple((shard.shard_id, answer.commit) for shard, answer in sent.answers)


def _store_request(items: Sequence[_Item]) -> shard_pb2.StoreBatchRequest:
    request = shard_pb2.StoreBatchRequest()
    for item in items:
        request.items.add(slot=item.slot, memory=item.memory, digest=item.digest)
    return request


def _errors(
    outcomes: Sequence[shard_pb2.StoreOutcome] | Sequence[shard_pb2.ClaimOutcome],
) -> list[status_pb2.Status | None]:
    return [outcome.error if outcome.HasField("error") else None for outcome in outcomes]


_STORING: Sending[_Item, shard_pb2.StoreBatchRequest, shard_pb2.StoreBatchResponse] = Sending(
    rpc=STORE_BATCH,
    slot_of=lambda item: item.slot,
    request_of=_store_request,
    errors_of=lambda answer: _errors(answer.outcomes),
    marks_of=lambda answer: [outcome.deleted for outcome in answer.outcomes],
)
_CLAIMING: Sending[shard_pb2.ClaimItem, shard_pb2.ClaimRequest, shard_pb2.ClaimResponse] = Sending(
    rpc=CLAIM,
    slot_of=lambda item: item.home_slot,
    request_of=lambda items: shard_pb2.ClaimRequest(items=items),
    errors_of=lambda answer: _errors(answer.outcomes),
)
