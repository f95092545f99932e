"""Text to embeddings: one protocol, a model that runs in the process, and a client of an OpenAI-compatible server.

Which model, and how many dimensions, is fixed when the cluster is made; `check` compares at start.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import httpx
import numpy as np
import numpy.typing as npt

from common.breaker import CircuitBreaker, State, speaks_of_callee
from common.breaker_log import logged
from common.breaker_settings import EMBEDDER
from common.config import EmbedderSettings
from common.deadline import Deadline
from common.errors import Unavailable
from common.local_model import LOCAL_DIMENSIONS, local_model_name
from common.retry import RetrySettings
from common.telemetry.registry import EMBEDDING_DURATION

Vectors: TypeAlias = npt.NDArray[np.float32]

# Above this many characters the local model takes over a millisecond, too long for the event loop; it goes to a thread.
_INLINE_CHARACTERS = 1000
# What a look at an embedder asks it for.
_PROBE = "health"
_MAX_HTTP_BATCH = 64
# The reason when a server refuses what it was given, such as a text beyond its model's length, rather than being away.
TEXT_REFUSED = "EMBEDDER_REFUSED"
# Its own policy: one more attempt, as a text that is not embedded now is embedded later. No budget: the breaker keeps a
# server that is down from hearing twice its load.
_RETRY = RetrySettings(attempts=2, base_s=0.1, cap_s=0.5, least_attempt_s=0.05, longest_wait_s=1.0)
# What trickles in is cut off this much later than what is silent, of which httpx says where it was.
_TRICKLE_S = 0.1
# Where nobody waits, the limit of each exchange is enough.
_NO_TIMEOUT_S = 86400.0
_MAX_DIGITS = 6
_NOT_THE_TEXT = frozenset((401, 403, 404, 408, 429))


_DURATIONS = {outcome: EMBEDDING_DURATION.labels(outcome) for outcome in ("ok", "failed")}


class EmbedderMismatchError(Exception):
    """The embedder is not the one that the cluster was made with; the message says what to do."""


class Embedder(Protocol):
    """Turns texts into embeddings. `model` and `dimensions` must be the cluster's."""

    model: str
    dimensions: int

    @property
    def breaker(self) -> CircuitBreaker | None:
        """That of its server, where it has one."""
        ...

    async def embed(self, texts: Sequence[str], timeout_s: float | None = None) -> Vectors:
        """Embeddings of shape (len(texts), dimensions), float32, within `timeout_s` seconds.

        Raises Unavailable: EMBEDDER_UNAVAILABLE, EMBEDDER_REFUSED for the texts, or BREAKER_OPEN.
        """
        ...

    async def probe(self, timeout_s: float) -> None:
        """Embeds one word, whatever the breaker says, and tells it when that went well: enough of them close it, where
        nobody calls. Raises Unavailable."""
        ...

    async def close(self) -> None:
        """Lets go of connections."""
        ...


async def observed(embedding: Awaitable[Vectors]) -> Vectors:
    """The same; how long it took is counted."""
    began = time.perf_counter()
    outcome = "failed"
    try:
        vectors = await embedding
        outcome = "ok"
    finally:
        _DURATIONS[outcome].observe(time.perf_counter() - began)
    return vectors


def create(settings: EmbedderSettings, embedding_model: str, dimensions: int) -> Embedder | None:
    """The embedder that the settings name, checked against the cluster's model; None when callers bring embeddings.

    Raises EmbedderMismatchError.
    """
    embedder: Embedder | None = None
    if settings.embedder == "local":
        embedder = LocalEmbedder(dimensions)
    elif settings.embedder == "http":
        embedder = HttpEmbedder(settings, embedding_model, dimensions)
    if embedder is not None and embedder.model != embedding_model:
        raise EmbedderMismatchError(
            f"this cluster stores embeddings of {_named(embedding_model)}, {dimensions} dimensions, "
            f"but embedder: {settings.embedder} makes those of {_named(embedder.model)}. Set the embedder that the "
            "cluster was made with, or make a new cluster: embeddings of two models cannot be compared"
        )
    return embedder


class LocalEmbedder:
    """WordLlama's static token embeddings, averaged and normalised; its model comes inside the wheel (MIT)."""

    def __init__(self, dimensions: int) -> None:
        if dimensions not in LOCAL_DIMENSIONS:
            sizes = ", ".join(map(str, LOCAL_DIMENSIONS))
            raise EmbedderMismatchError(
                f"the local embedder makes {sizes} dimensions, not {dimensions}; "
                "use embedder: http or none with this cluster"
            )
        try:
            import wordllama  # noqa: PLC0415  # 40 MB that only this embedder needs.
        except ImportError as error:
            raise EmbedderMismatchError(
                "the local embedder is not installed; pip install 'memshard-server[local]', or choose another embedder"
            ) from error
        self.model = local_model_name(dimensions)
        self.dimensions = dimensions
        # Left to itself it looks for its tokenizer in another folder than its wheel puts it, then downloads one.
        self._llama = wordllama.WordLlama.load(
            cache_dir=Path(wordllama.__file__).parent, disable_download=True, trunc_dim=dimensions
        )

    async def embed(self, texts: Sequence[str], timeout_s: float | None = None) -> Vectors:
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return self._embed(list(texts))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.to_thread(self._embed, list(texts))
        except TimeoutError as error:
            raise _unavailable("it took too long") from error

    async def probe(self, timeout_s: float) -> None:
        await self.embed([_PROBE], timeout_s)

    @property
    def breaker(self) -> None:
        """It runs in this process."""

    async def close(self) -> None:
        """Nothing to let go of."""

    def _embed(self, texts: list[str]) -> Vectors:
        # Not normalised by WordLlama, which divides by zero for a text without a known token.
        return _normalised(self._llama.embed(texts, norm=False))


class HttpEmbedder:
    """A server with OpenAI's `POST /embeddings`: {"model", "input": [...]} → {"data": [{"index", "embedding"}]}."""

    def __init__(self, settings: EmbedderSettings, embedding_model: str, dimensions: int) -> None:
        self.model = settings.embedder_model or embedding_model
        self.dimensions = dimensions
        self.breaker = logged("the embedder", EMBEDDER)
        self._exchange_s = settings.embedder_timeout_s + _TRICKLE_S
        key = settings.embedder_api_key
        self._client = httpx.AsyncClient(
            base_url=(settings.embedder_url or "").rstrip("/") + "/",
            timeout=settings.embedder_timeout_s,  # Of each read, which a byte now and then keeps for ever.
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else {},
        )

    async def embed(self, texts: Sequence[str], timeout_s: float | None = None) -> Vectors:
        until = Deadline.after(_NO_TIMEOUT_S if timeout_s is None else timeout_s)
        batches = [texts[start : start + _MAX_HTTP_BATCH] for start in range(0, len(texts), _MAX_HTTP_BATCH)]
        nothing = np.empty((0, self.dimensions), dtype=np.float32)
        return np.concatenate([nothing, *[await self._batch(batch, until) for batch in batches]])

    async def probe(self, timeout_s: float) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._post([_PROBE])
        except TimeoutError as error:
            raise _unavailable("it took too long") from error
        self.breaker.probe_succeeded()
        # Callers' texts say more than a word, as where a server chokes on them: who is at it decides.
        if self.breaker.state is State.HALF_OPEN and not self.breaker.is_tried:
            self.breaker.admit().success(time.monotonic() - began)

    async def close(self) -> None:
        await self._client.aclose()

    async def _batch(self, texts: Sequence[str], until: Deadline) -> Vectors:
        attempt = 1
        while True:
            try:
                return await self._guarded(texts, until)
            except Unavailable as error:
                attempt += 1
                delay_s = _RETRY.delay_before_attempt(attempt, error, until.remaining_s())
                if delay_s is None or error.reason == TEXT_REFUSED:
                    raise
            await asyncio.sleep(delay_s)

    async def _guarded(self, texts: Sequence[str], until: Deadline) -> Vectors:
        permit = self.breaker.admit()
        began = time.monotonic()
        try:
            async with until.bound():
                vectors = await self._post(texts)
        except TimeoutError as error:
            permit.timeout(time.monotonic() - began)
            raise _unavailable("it took too long") from error
        except Unavailable as error:
            if speaks_of_callee(error):
                permit.failure()
            else:
                permit.success(time.monotonic() - began)
            raise
        else:
            permit.success(time.monotonic() - began)
            return vectors
        finally:
            permit.ignore()

    async def _post(self, texts: Sequence[str]) -> Vectors:
        try:
            async with asyncio.timeout(self._exchange_s):
                answer = await self._client.post("embeddings", json={"model": self.model, "input": list(texts)})
            answer.raise_for_status()
            data = sorted(answer.json()["data"], key=lambda item: item["index"])
            if [item["index"] for item in data] != list(range(len(texts))):
                raise _unavailable(f"its answer is not one embedding for each of {len(texts)} texts")
            with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite, and is refused below.
                vectors = np.array([item["embedding"] for item in data], dtype=np.float32)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            refused = 400 <= status < 500 and status not in _NOT_THE_TEXT
            raise _unavailable(
                f"it answered {status}",
                reason=TEXT_REFUSED if refused else None,
                retry_after_s=_retry_after_s(error.response),
            ) from error
        except TimeoutError as error:
            raise _unavailable("it took too long") from error
        except httpx.HTTPError as error:
            raise _unavailable(type(error).__name__) from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise _unavailable("its answer has another shape than OpenAI's") from error
        if vectors.shape != (len(texts), self.dimensions):
            raise _unavailable(f"it gave an array {vectors.shape}, not ({len(texts)}, {self.dimensions})")
        if not np.isfinite(vectors).all():
            raise _unavailable("it gave a NaN or infinite number")
        # Only directions are compared, and numbers of any size fit half precision this way.
        return _normalised(vectors)


def _normalised(vectors: Vectors) -> Vectors:
    """Each row at length 1; a row of zeros stays one. Summed in float64, where no square of a float32 overflows."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    normalised = np.zeros(vectors.shape, dtype=np.float32)
    np.divide(vectors, norms, out=normalised, where=norms > 0, casting="same_kind")
    return normalised


def _named(model: str) -> str:
    return f"the model {model!r}" if model else "no model (callers bring them)"


def _unavailable(why: str, reason: str | None = None, retry_after_s: float | None = None) -> Unavailable:
    return Unavailable(
        f"the embedder did not answer: {why}", reason=reason or "EMBEDDER_UNAVAILABLE", retry_after_s=retry_after_s
    )


def _retry_after_s(answer: httpx.Response) -> float | None:
    """Seconds that a server asks to be left alone for, where it says so in seconds (RFC 9110, section 10.2.3)."""
    header = answer.headers.get("Retry-After", "")
    return float(header) if header.isdecimal() and len(header) < _MAX_DIGITS else None
