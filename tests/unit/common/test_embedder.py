"""Embedders: the model in the process, and the client of a server, which is a real one on this machine."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from common import embedder
from common.breaker import State
from common.catalog import Cluster, PlacementStrategy, Precision
from common.config import RouterSettings
from common.embedder import Embedder, EmbedderMismatchError, HttpEmbedder, LocalEmbedder
from common.errors import Unavailable
from common.local_model import LOCAL_DIMENSIONS, local_model_name
from tests.support.embedding_server import DIMENSIONS, EmbeddingServer
from tests.support.eventually import eventually

_KEY = "hunter2"
_DIMENSIONS = 3


def _cluster(model: str = "model-a", dimensions: int = _DIMENSIONS) -> Cluster:
    return Cluster("cluster", model, dimensions, Precision.HALF, PlacementStrategy.USER_BASED, "english", b"k" * 32)


def _settings(**changes: Any) -> RouterSettings:
    return RouterSettings(catalog_dsn=SecretStr("postgresql://nowhere"), **changes)


# The local model.


@pytest.fixture(scope="module")
def local() -> LocalEmbedder:
    return LocalEmbedder(64)


@pytest.mark.parametrize("dimensions", LOCAL_DIMENSIONS)
async def test_local_embeddings_have_the_clusters_dimensions_and_length_one(dimensions: int) -> None:
    model = LocalEmbedder(dimensions)
    vectors = await model.embed(["a cat on the mat", "Grüße aus Köln", "x"])
    assert vectors.shape == (3, dimensions)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (model.model, model.dimensions) == (local_model_name(dimensions), dimensions)


async def test_text_without_a_word_is_all_zeros(local: LocalEmbedder) -> None:
    """Left to the caller to refuse; never NaN, which would be near to everything or to nothing."""
    vectors = await local.embed(["", "a cat"])
    assert not vectors[0].any()
    assert vectors[1].any()


async def test_no_texts_have_no_embeddings(local: LocalEmbedder) -> None:
    assert (await local.embed([])).shape == (0, 64)


async def test_similar_texts_are_nearer_than_unrelated_ones(local: LocalEmbedder) -> None:
    question, near, far = await local.embed(
        ["What does the user like to drink?", "The user drinks coffee every morning.", "The server runs on port 8080."]
    )
    assert question @ near > question @ far + 0.1


async def test_embedding_does_not_depend_on_its_company_or_length_of_the_batch(local: LocalEmbedder) -> None:
    alone = await local.embed(["a cat on the mat"])
    among = await local.embed(["a cat on the mat", "something much longer " * 100])
    assert np.allclose(alone[0], among[0], atol=1e-6)


@pytest.mark.parametrize("dimensions", [1, 32, 65, 1024])
def test_dimensions_that_the_local_model_lacks_are_refused_with_a_way_out(dimensions: int) -> None:
    with pytest.raises(EmbedderMismatchError, match=rf"64, 128, 256 dimensions, not {dimensions}; use embedder: http"):
        LocalEmbedder(dimensions)


# The client of a server.

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


@contextmanager
def _server(answer: Answer, headers: list[str | None] | None = None) -> Iterator[str]:
    """A server whose POST /v1/embeddings gives `answer(request)`; notes the Authorization headers that it sees."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # The base class wants it so.
            if headers is not None:
                headers.append(self.headers["Authorization"])
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body = answer(request) if self.path == "/v1/embeddings" else (404, b"")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def _given(vectors: Sequence[Sequence[Any]], order: Sequence[int] | None = None) -> tuple[int, bytes]:
    """An OpenAI-like answer, its items in this order."""
    items = [{"object": "embedding", "index": i, "embedding": vectors[i]} for i in order or range(len(vectors))]
    return 200, json.dumps({"object": "list", "data": items}).encode()


def _model(cluster: Cluster) -> tuple[str, int]:
    return cluster.embedding_model, cluster.dimensions


async def _embed(url: str, texts: Sequence[str], **changes: Any) -> embedder.Vectors:
    model = HttpEmbedder(_settings(embedder="http", embedder_url=url, **changes), *_model(_cluster()))
    try:
        return await model.embed(texts)
    finally:
        await model.close()


async def test_server_is_asked_for_the_clusters_model() -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(request)
        return _given([[0, 1, 0]])

    with _server(answer) as url:
        for base in (url, url + "/"):
            assert (await _embed(base, ["hello"])).tolist() == [[0, 1, 0]]
    assert asked == [{"model": "model-a", "input": ["hello"]}] * 2


async def test_answer_is_put_in_order_by_its_indexes() -> None:
    with _server(lambda _: _given([[0, 0, 1], [0, 1, 0], [1, 0, 0]], order=[2, 0, 1])) as url:
        vectors = await _embed(url, ["a", "b", "c"])
    assert vectors.tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert vectors.dtype == np.float32


async def test_many_texts_go_in_batches_of_64_and_come_back_in_order() -> None:
    sizes: list[int] = []

    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        sizes.append(len(request["input"]))
        return _given([[int(text), 0, 1] for text in request["input"]])

    with _server(answer) as url:
        vectors = await _embed(url, [str(i) for i in range(150)])
    assert sizes == [64, 64, 22]
    # The length is taken off; which text it was is left in the direction.
    assert (vectors[:, 0] / vectors[:, 2]).round().tolist() == list(range(150))


async def test_an_embedding_of_any_length_fits_half_precision() -> None:
    with _server(lambda _: _given([[3e38, 3e38, 0], [0, 1e-30, 0], [0, 0, 0]])) as url:
        vectors = await _embed(url, ["huge", "tiny", "nothing"])
    assert vectors.tolist() == pytest.approx(np.array([[0.5**0.5, 0.5**0.5, 0], [0, 1, 0], [0, 0, 0]]))


async def test_no_texts_are_no_call() -> None:
    with _server(lambda _: (500, b"")) as url:
        assert (await _embed(url, [])).shape == (0, _DIMENSIONS)


_ONE = [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param((500, b"{}"), id="an error"),
        pytest.param((401, b"{}"), id="not authorised"),
        pytest.param((302, b""), id="a redirect"),
        pytest.param((200, b"<html>"), id="not JSON"),
        pytest.param((200, b"\xff\xfe"), id="not text"),
        pytest.param((200, b""), id="nothing"),
        pytest.param((200, b"[" * 100_000), id="nested beyond measure"),
        pytest.param((200, b"[]"), id="a list"),
        pytest.param((200, b"null"), id="null"),
        pytest.param((200, b'{"data": null}'), id="no data"),
        pytest.param((200, b'{"data": [1, 2]}'), id="items of another kind"),
        pytest.param((200, b'{"data": [{"embedding": [1, 2, 3]}, {"embedding": [1, 2, 3]}]}'), id="no indexes"),
        pytest.param(_given([_ONE]), id="too few"),
        pytest.param(_given([_ONE, _ONE, _ONE]), id="too many"),
        pytest.param(_given([_ONE, _ONE], order=[1, 1]), id="one twice"),
        pytest.param(_given([_ONE, _ONE, _ONE], order=[1, 2]), id="indexes from one"),
        pytest.param(_given([[1.0, 2.0], [1.0, 2.0]]), id="too short"),
        pytest.param(_given([_ONE, [1.0, 2.0]]), id="of two lengths"),
        pytest.param(_given([_ONE, [1.0, [2.0], 3.0]]), id="nested"),
        pytest.param(_given([_ONE, [1.0, "two", 3.0]]), id="words"),
        pytest.param(_given([_ONE, [1.0, None, 3.0]]), id="nulls"),
        pytest.param(_given([_ONE, [1.0, float("nan"), 3.0]]), id="NaN"),
        pytest.param(_given([_ONE, [1.0, 1e300, 3.0]]), id="beyond float32"),
        pytest.param(_given([_ONE, [1.0, 10**400, 3.0]]), id="beyond float64"),
    ],
)
async def test_server_that_answers_wrongly_is_unavailable(answer: tuple[int, bytes]) -> None:
    headers: list[str | None] = []
    with _server(lambda _: answer, headers) as url, pytest.raises(Unavailable) as caught:
        await _embed(url, ["first", "second"], embedder_api_key=SecretStr(_KEY))
    assert caught.value.reason == "EMBEDDER_UNAVAILABLE"
    assert caught.value.retryable
    assert headers == [f"Bearer {_KEY}"] * 2
    assert _KEY not in caught.value.message
    assert "first" not in caught.value.message


async def test_server_that_is_not_there_is_unavailable() -> None:
    with _server(lambda _: _given([_ONE])) as url:
        pass
    with pytest.raises(Unavailable, match="ConnectError"):
        await _embed(url, ["a"])


async def test_server_that_hangs_is_unavailable_after_the_timeout() -> None:
    released = threading.Event()

    def hang(_: dict[str, Any]) -> tuple[int, bytes]:
        released.wait(30)
        return 500, b""

    with _server(hang) as url:
        try:
            with pytest.raises(Unavailable, match="ReadTimeout"):
                await _embed(url, ["a"], embedder_timeout_s=0.1)
        finally:
            released.set()


async def test_a_server_that_answers_a_byte_at_a_time_is_unavailable_after_the_timeout() -> None:
    with EmbeddingServer() as server:
        server.drip_s = 0.02  # Each byte in good time, and the answer in ten seconds.
        settings = _settings(embedder="http", embedder_url=server.url, embedder_timeout_s=0.1)
        model = HttpEmbedder(settings, "words", DIMENSIONS)
        async with asyncio.timeout(5):
            failed = await asyncio.gather(*(model.embed(["a"]) for _ in range(5)), return_exceptions=True)
        await model.close()
    assert [getattr(error, "reason", error) for error in failed] == ["EMBEDDER_UNAVAILABLE"] * 5
    # Two attempts each.
    assert model.breaker.state is State.OPEN


async def test_a_failure_that_passes_is_not_seen() -> None:
    answers = [(503, b""), _given([_ONE])]
    with _server(lambda _: answers.pop(0)) as url:
        assert len(await _embed(url, ["a"])) == 1
    assert not answers


async def test_a_text_that_is_refused_is_not_sent_again() -> None:
    headers: list[str | None] = []
    with _server(lambda _: (400, b""), headers) as url, pytest.raises(Unavailable) as caught:
        await _embed(url, ["a"])
    assert caught.value.reason == embedder.TEXT_REFUSED
    assert len(headers) == 1


async def test_a_server_that_keeps_failing_is_left_alone() -> None:
    headers: list[str | None] = []
    with _server(lambda _: (503, b""), headers) as url:
        model = HttpEmbedder(_settings(embedder="http", embedder_url=url), *_model(_cluster()))
        for _ in range(8):
            with pytest.raises(Unavailable):
                await model.embed(["a"])
        await model.close()
    assert model.breaker.state is State.OPEN
    # Two attempts each, until ten have failed in a row.
    assert len(headers) == 10


@asynccontextmanager
async def _given_up(server: EmbeddingServer) -> AsyncIterator[HttpEmbedder]:
    """A client that has found the server down, which is up again."""
    model = HttpEmbedder(_settings(embedder="http", embedder_url=server.url), "words", DIMENSIONS)
    server.down = True
    await asyncio.gather(*(model.embed(["a"]) for _ in range(10)), return_exceptions=True)
    assert model.breaker.state is State.OPEN
    server.down = False
    yield model
    await model.close()


async def test_looks_that_go_well_close_the_breaker_though_nobody_embeds() -> None:
    with EmbeddingServer() as server:
        async with _given_up(server) as model:
            states = []
            for _ in range(model.breaker.settings.probes):
                await model.probe(5)
                states.append(model.breaker.state)
    assert states == [State.HALF_OPEN, State.HALF_OPEN, State.CLOSED]


async def test_looks_close_no_breaker_of_a_server_that_hangs_at_a_text() -> None:
    with EmbeddingServer() as server:
        async with _given_up(server) as model:
            server.hangs_at = "poison"
            await model.probe(5)
            embedding = asyncio.create_task(model.embed(["poison"], 1.0))
            await eventually(lambda: "poison" in server.texts)
            for _ in range(5):
                await model.probe(5)
                assert model.breaker.state is State.HALF_OPEN
            with pytest.raises(Unavailable, match="too long"):
                await embedding
            assert model.breaker.state is State.OPEN


async def test_who_cannot_wait_hears_that_it_takes_too_long() -> None:
    released = threading.Event()

    def hang(_: dict[str, Any]) -> tuple[int, bytes]:
        released.wait(30)
        return 500, b""

    with _server(hang) as url:
        model = HttpEmbedder(_settings(embedder="http", embedder_url=url), *_model(_cluster()))
        try:
            with pytest.raises(Unavailable, match="too long"):
                await model.embed(["a"], 0.1)
        finally:
            released.set()
            await model.close()


async def test_key_is_sent_only_when_there_is_one() -> None:
    headers: list[str | None] = []
    with _server(lambda _: _given([_ONE]), headers) as url:
        await _embed(url, ["a"])
        await _embed(url, ["a"], embedder_api_key=SecretStr(_KEY))
    assert headers == [None, f"Bearer {_KEY}"]


# Which embedder a router has.


async def _created(settings: RouterSettings, cluster: Cluster) -> Embedder | None:
    made = embedder.create(settings, *_model(cluster))
    if made is not None:
        await made.close()
    return made


async def test_embedder_is_the_one_that_the_settings_name() -> None:
    local_cluster = _cluster(local_model_name(64), 64)
    http = _settings(embedder="http", embedder_url="http://127.0.0.1:1/v1")
    assert isinstance(await _created(_settings(embedder="local"), local_cluster), LocalEmbedder)
    assert isinstance(await _created(http, _cluster()), HttpEmbedder)
    assert await _created(_settings(embedder="none"), _cluster("")) is None
    assert await _created(_settings(embedder="none"), _cluster()) is None


@pytest.mark.parametrize(
    ("cluster", "settings", "parts"),
    [
        (
            _cluster("model-a", 64),
            {"embedder": "local"},
            [
                "of the model 'model-a', 64 dimensions",
                f"embedder: local makes those of the model '{local_model_name(64)}'",
            ],
        ),
        (_cluster("", 64), {"embedder": "local"}, ["of no model (callers bring them)", "Set the embedder"]),
        (_cluster(local_model_name(64), 63), {"embedder": "local"}, ["not 63"]),
        (
            _cluster("model-a"),
            {"embedder": "http", "embedder_url": "http://127.0.0.1:1", "embedder_model": "model-b"},
            ["of the model 'model-a'", "embedder: http makes those of the model 'model-b'"],
        ),
    ],
)
def test_embedder_of_another_model_is_refused_at_start(
    cluster: Cluster, settings: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(EmbedderMismatchError) as caught:
        embedder.create(_settings(**settings), *_model(cluster))
    assert [part for part in parts if part not in str(caught.value)] == []
