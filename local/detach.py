"""`memshard up --detach`: the supervisor as a session of its own, followed through a pipe until it is ready."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from local import logs
from local.errors import LocalClusterError, StartError
from local.layout import Layout
from local.record import Options
from local.up import Observer, Ready, Request

_TAIL_LINES = 15


class PipeObserver:
    """Tells whoever waits at the other end of the pipe, for as long as somebody does."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def progress(self, name: str) -> None:
        """The process or step `name` is ready."""
        self._tell(progress=name)

    def ready(self, ready: Ready) -> None:
        """The cluster is ready, and on its own from now on."""
        self._tell(ready=asdict(ready))
        self.close()

    def stopping(self) -> None:
        """The end has begun."""

    def failed(self, error: LocalClusterError) -> None:
        """It did not become ready."""
        self._tell(failed=str(error), log_tail=getattr(error, "log_tail", ""))

    def close(self) -> None:
        """Says that nothing more comes."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _tell(self, **event: Any) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._descriptor, json.dumps(event).encode() + b"\n")


def launch(request: Request, observer: Observer) -> None:
    """Starts the supervisor in the background and returns when it is ready. Raises LocalClusterError."""
    layout = Layout.of(request.data_dir)
    layout.claim()
    read_end, write_end = os.pipe()
    log = logs.open_for(layout.log("supervisor"))
    try:
        process = subprocess.Popen(  # noqa: S603  # Our own module.
            [sys.executable, "-P", "-m", "local", encode(request), str(write_end)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            pass_fds=(write_end,),
            start_new_session=True,
        )
    finally:
        os.close(write_end)
        os.close(log)
    try:
        _follow(read_end, layout, observer)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    # It goes on without us; Popen would warn that nobody waited for it.
    process.returncode = 0


def encode(request: Request) -> str:
    """A request as one argument."""
    return json.dumps(
        {
            "data_dir": str(Layout.of(request.data_dir).root),
            "options": asdict(request.options),
            "port": request.port,
            "routers": request.routers,
            "hung_after_s": request.hung_after_s,
        }
    )


def decode(text: str) -> Request:
    """The request from its argument."""
    given = json.loads(text)
    return Request(
        Path(given["data_dir"]), Options(**given["options"]), given["port"], given["routers"], given["hung_after_s"]
    )


def _follow(read_end: int, layout: Layout, observer: Observer) -> None:
    for event in _events(read_end):
        if name := event.get("progress"):
            observer.progress(name)
        if told := event.get("ready"):
            observer.ready(Ready(**{**told, "addresses": tuple(told["addresses"])}))
            return
        if message := event.get("failed"):
            raise StartError(message, event.get("log_tail", ""))
    log = layout.log("supervisor")
    raise StartError(f"the supervisor ended before the cluster was ready. Its log: {log}", logs.tail(log, _TAIL_LINES))


def _events(read_end: int) -> Iterator[dict[str, Any]]:
    with open(read_end, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
