"""One trace of a call, through all the processes that have a part in it (W3C Trace Context, OpenTelemetry's names).

Each process has its part of a trace: the span of the call that it answers, and what it does for it. Whether that part
is kept is known only when it has ended: a sampled one always, and any other when something in it failed, or it took
long. So spans are noted cheaply here, and become OpenTelemetry's only when they are kept (`common.trace_export`).

Spans have names, counts, times and reasons, as logs do: never content, embeddings, or whose they are.
"""

import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from enum import Enum
from types import TracebackType
from typing import Protocol, Self

import grpc

from common.errors import MemshardError

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"

Value = str | int | float | bool
Later = Callable[[], Value]
"""What takes an effort to find out, and is found out if the span is kept. It has to be the same then."""
Metadata = Iterable[tuple[str, str | bytes]]

# The version, the trace, the span, and the flags (https://www.w3.org/TR/trace-context/#traceparent-header). Versions
# to come may have more.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1

# What others on the way keep with a trace: members of a key and a value each
# (https://www.w3.org/TR/trace-context/#tracestate-header).
_MEMBER = re.compile(r"([a-z0-9][a-z0-9_*/@-]{0,255})=[ -+\--<>-~]{0,255}[!-+\--<>-~]")
_MOST_STATE = 512
_MOST_MEMBERS = 32

# Spans of one process's part of a trace: a search of 64 shards with all its retries has fewer.
MOST_SPANS = 1000

# The errors of a server, by OpenTelemetry's conventions for gRPC, and its refusals for being overloaded.
_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


class Kind(Enum):
    """What a span is of."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


class Recorder(Protocol):
    """Decides which traces to begin, and which to keep."""

    def samples(self, trace_id: int) -> bool:
        """Whether a trace that begins here is one of those that are kept whatever becomes of them."""
        ...

    def keep(self, trace: "Trace") -> bool:
        """Takes this process's part of a trace that has ended, if it is to be kept; whether it is."""
        ...


class Trace:
    """This process's part of a trace. Its first span is the one that ends it, unless others wait for it (`held`)."""

    __slots__ = ("ended", "failed", "held", "id", "recorder", "sampled", "shed", "spans", "state", "wanted")

    def __init__(self, trace_id: int, state: str, recorder: Recorder | None, *, sampled: bool) -> None:
        self.id = trace_id
        self.state = state
        self.sampled = sampled
        self.recorder = recorder
        self.spans: list[Span] = []
        self.ended = False
        self.failed = False
        """Something in it did, and not only for being too much."""
        self.shed = False
        """Something in it failed for being too much."""
        self.held = 0
        """How much of what is done in it has to end before it ends: others wait for that, whoever began it."""
        self.wanted = False
        """A sampled trace leads here (`Span.link`)."""

    def release(self) -> None:
        """Something that it was held for has ended."""
        self.held -= 1
        if not self.ended and self.spans[0].ended_ns:
            self.end(time.time_ns())

    def end(self, now_ns: int) -> bool:
        """Its first span has ended. Whether it is kept, if nothing holds it."""
        if self.recorder is None or self.held:
            return False
        self.ended = True
        for span in self.spans:
            if not span.ended_ns:
                # Whoever still works on it, or has been cancelled and not noticed it yet, is waited for by nobody.
                span.abandon(now_ns)
        is_kept = self.recorder.keep(self)
        if not is_kept:
            # They refer to each other. What nobody keeps is not to be left to the garbage collector, nor whose it was
            # to whoever still has the span.
            self.spans[0].forget()
            self.spans.clear()
        return is_kept


class Span:
    """`with` it: a piece of work. What it is entered in, its children are children of."""

    __slots__ = (
        "_attributes", "_token", "ended_ns", "events", "failed", "is_kept", "kind", "links", "name", "parent_id",
        "shed", "span_id", "started_ns", "trace",
    )  # fmt: skip

    def __init__(
        self, trace: Trace | None, name: str, kind: Kind, parent_id: int, attributes: dict[str, Value | Later]
    ) -> None:
        self.trace = trace
        self.name = name
        self.kind = kind
        self.parent_id = parent_id
        self.span_id = random.getrandbits(64) or 1
        self._attributes = attributes
        self.events: tuple[tuple[str, int, dict[str, Value]], ...] = ()
        self.links: tuple[tuple[int, int], ...] = ()
        self.failed = False
        # It failed for being too much.
        self.shed = False
        self.is_kept = False
        self.started_ns = time.time_ns()
        self.ended_ns = 0

    @property
    def attributes(self) -> dict[str, Value]:
        """All of them."""
        return {name: value() if callable(value) else value for name, value in self._attributes.items()}

    @property
    def trace_id(self) -> str:
        """The trace's id in hexadecimal; nothing where there is no trace."""
        return f"{self.trace.id:032x}" if self.trace is not None else ""

    @property
    def is_recorded(self) -> bool:
        """Whether anybody may ever see it: what takes an effort to find out need not be said otherwise."""
        return self.trace is not None and self.trace.recorder is not None

    @property
    def is_sampled(self) -> bool:
        """Whether its trace is kept whatever becomes of it."""
        return self.trace is not None and self.trace.sampled

    def set(self, name: str, value: Value | Later) -> None:
        """An attribute."""
        if not self.ended_ns:
            self._attributes[name] = value

    def event(self, name: str, attributes: dict[str, Value]) -> None:
        """Something that happened at this moment."""
        # What others wait for goes on after whoever began it has left.
        if not self.ended_ns or (self.trace is not None and self.trace.held):
            self.events += ((name, time.time_ns(), attributes),)

    def link(self, other: "Span") -> None:
        """That another span, of another trace, has something to do with this one. If this one is sampled, the other is
        kept as well."""
        if not self.ended_ns and other.trace is not None:
            self.links += ((other.trace.id, other.span_id),)
            other.trace.wanted |= self.is_sampled

    def hold(self) -> Trace | None:
        """Has its trace end only after `Trace.release`, once for each time: others wait for what is done in it. None
        where nothing is recorded."""
        if not self.is_recorded or self.trace is None:
            return None
        self.trace.held += 1
        return self.trace

    def end(self, error: BaseException | None = None) -> None:
        """Ends it, once, with the error that it ended with."""
        if self.ended_ns:
            return
        if error is not None:
            self._fail(error)
        self.ended_ns = time.time_ns()
        trace = self.trace
        if trace is not None and trace.spans[0] is self:
            self.is_kept = trace.end(self.ended_ns)

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _current.reset(self._token)
        self.end(error)

    def abandon(self, now_ns: int) -> None:
        """Ends it as what nobody waits for any more."""
        self._attributes["memshard.abandoned"] = True
        self.ended_ns = now_ns

    def forget(self) -> None:
        """Drops what it would have said."""
        self._attributes = {}

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, MemshardError):
            self._attributes["error.type"] = error.reason
            self.failed = error.code in _FAULTS
            self.shed = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        elif isinstance(error, Exception):
            self._attributes["error.type"] = type(error).__qualname__
            self.failed = True
        else:
            self._attributes["memshard.cancelled"] = True
        if self.trace is not None:
            self.trace.shed |= self.shed
            self.trace.failed |= self.failed and not self.shed


class _NoSpan(Span):
    """Of what nobody records."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(None, "", Kind.INTERNAL, 0, {})

    def set(self, name: str, value: Value | Later) -> None:
        """Nothing."""

    def event(self, name: str, attributes: dict[str, Value]) -> None:
        """Nothing."""

    def link(self, other: Span) -> None:
        """Nothing."""

    def end(self, error: BaseException | None = None) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


NO_SPAN = _NoSpan()
_NONE: Mapping[str, Value] = {}

_current: ContextVar[Span] = ContextVar("the span that is being worked on", default=NO_SPAN)
_recorder: Recorder | None = None


def record(recorder: Recorder | None) -> None:
    """From now on traces are given to `recorder`; None: to nobody."""
    global _recorder  # noqa: PLW0603  # One for the process, as its logs are.
    _recorder = recorder


def received(method: str, metadata: Metadata, *, begins: bool) -> Span:
    """The span of a call that came in, to be entered. Without a trace around it, it `begins` one, or has none.

    Also while nothing is recorded there is a trace, for its id: lines in the logs of several services that are about
    one call say so, and whoever called may record it.
    """
    parent, states = "", []
    for key, value in metadata:
        if not isinstance(value, str):
            continue
        if key == TRACEPARENT:
            parent = value
        elif key == TRACESTATE:
            states.append(value)
    known = parse(parent)
    if known is None and not begins:
        return NO_SPAN
    if known is not None:
        trace_id, parent_id, sampled = known
        state = parse_state(",".join(states)) if states else ""
    else:
        trace_id, parent_id, state = random.getrandbits(128) or 1, 0, ""
        sampled = _recorder is not None and _recorder.samples(trace_id)
    trace = Trace(trace_id, state, _recorder, sampled=sampled)
    span = Span(trace, method, Kind.SERVER, parent_id, {})
    trace.spans.append(span)
    return span


def span(name: str, attributes: Mapping[str, Value] = _NONE, kind: Kind = Kind.INTERNAL) -> Span:
    """A span within the current one, to be entered. `attributes` are those that it begins with."""
    parent = _current.get()
    trace = parent.trace
    if trace is None or trace.recorder is None or trace.ended or len(trace.spans) >= MOST_SPANS:
        return NO_SPAN
    made = Span(trace, name, kind, parent.span_id, {**attributes})
    trace.spans.append(made)
    return made


def current() -> Span:
    """The span that is being worked on; one that records nothing where there is none."""
    return _current.get()


def outgoing() -> tuple[tuple[str, str], ...] | None:
    """What a call has to carry, so that whoever answers it is part of this trace; None outside of any."""
    here = _current.get()
    trace = here.trace
    if trace is None:
        return None
    parent = (TRACEPARENT, f"00-{trace.id:032x}-{here.span_id:016x}-{'01' if trace.sampled else '00'}")
    return (parent, (TRACESTATE, trace.state)) if trace.state else (parent,)


def parse(traceparent: str) -> tuple[int, int, bool] | None:
    """Trace, span, and whether it is sampled; None for what is no traceparent."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more):
        return None
    ids = int(trace_id, 16), int(span_id, 16)
    return (*ids, bool(int(flags, 16) & _SAMPLED)) if all(ids) else None


def parse_state(tracestate: str) -> str:
    """What of a tracestate travels on: all of it, or nothing of one that is not as the standard says.

    Nobody is told: the text of what a caller sends belongs in no log.
    """
    if len(tracestate) > _MOST_STATE:
        return ""
    members = [member for part in tracestate.split(",") if (member := part.strip(" \t"))]
    keys = {match[1] for member in members if (match := _MEMBER.fullmatch(member))}
    # Each of them with a key of its own.
    return ",".join(members) if len(keys) == len(members) <= _MOST_MEMBERS else ""
