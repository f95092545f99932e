"""A cancellation that somebody on the way swallows, as `common.cancellation` tells."""

import asyncio


class Swallowed:
    """Called instead of what is asked of Redis: the first time it waits until it is cancelled, and says all is well."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()

    async def __call__(self, *_: object) -> object:
        if not self.has_begun.is_set():
            self.has_begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return True
        return True
