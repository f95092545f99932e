"""One budget of time for a request, spent across hops."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment, on the event loop's clock, when the caller stops waiting."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """A deadline `seconds` from now."""
        return cls(asyncio.get_running_loop().time() + seconds)

    @classmethod
    def of(cls, context: "grpc.aio.ServicerContext[bytes, bytes]", default_s: float) -> "Deadline":
        """The deadline that came with a call, or `default_s` from now when it came without."""
        remaining = context.time_remaining()
        return cls.after(default_s if remaining is None else remaining)

    def remaining_s(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self.at - asyncio.get_running_loop().time())

    def less(self, margin_s: float) -> "Deadline":
        """The same deadline, `margin_s` earlier: what the next hop may use."""
        return Deadline(self.at - margin_s)

    def bound(self) -> asyncio.Timeout:
        """`async with deadline.bound():` raises TimeoutError when the time is up."""
        return asyncio.timeout_at(self.at)
