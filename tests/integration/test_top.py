"""`memshard top` as people see it, on a terminal of 80 columns, and as scripts do."""

import asyncio
import fcntl
import json
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from memshard.v1 import memory_pb2 as pb
from tests.support.cluster import LocalCluster, command
from tests.support.eventually import eventually
from tests.support.wire import memory_service

MEMSHARD = Path(sys.executable).parent / "memshard"


class Screen:
    """A terminal, and the program on it."""

    def __init__(self, master: int, process: asyncio.subprocess.Process) -> None:
        self.master = master
        self.process = process
        self.text = b""
        os.set_blocking(master, False)
        asyncio.get_running_loop().add_reader(master, self._read)

    def _read(self) -> None:
        try:
            self.text += os.read(self.master, 65_536)
        except OSError:
            asyncio.get_running_loop().remove_reader(self.master)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)


@asynccontextmanager
async def on_a_terminal(*arguments: str) -> AsyncIterator[tuple[Screen, int]]:
    """The program, and its side of the terminal, which tells how it has left it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = await asyncio.create_subprocess_exec(
        str(MEMSHARD), *arguments, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    screen = Screen(master, process)
    try:
        yield screen, slave
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("end", ["q", "interrupt"])
async def test_it_refreshes_and_quits_clean(cluster: LocalCluster, end: str) -> None:
    async with on_a_terminal("top", "--interval", "0.2", "--data-dir", str(cluster.data_dir)) as (screen, slave):
        before = termios.tcgetattr(slave)
        await eventually(lambda: screen.text.count(b"requests/s") >= 3, within_s=30)
        shown = (b"shard-0", b"shard-2", b"All breakers are closed.", b"No slots are being moved.")
        await eventually(lambda: all(one in screen.text for one in shown), within_s=30)
        assert termios.tcgetattr(slave) != before or b"\x1b[?1049h" in screen.text
        if end == "q":
            screen.type(b"q")
        else:
            screen.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            assert await screen.process.wait() == 0
        # The screen from before is back, with its cursor, and keys are lines again.
        await eventually(lambda: screen.text.rstrip().endswith(b"\x1b[?25h") or b"\x1b[?1049l" in screen.text)
        assert b"\x1b[?1049l" in screen.text
        assert termios.tcgetattr(slave)[3] & termios.ICANON
        assert b"Traceback" not in screen.text


async def test_scripts_get_a_document(cluster: LocalCluster, user: str) -> None:
    async with memory_service(cluster.address) as api:
        for _ in range(200):
            await api.ListMemories(pb.ListMemoriesRequest(user_id=user))
    code, output = await command("top", "--json", "--data-dir", str(cluster.data_dir))
    assert code == 0
    document = json.loads(output)
    assert document["level"] in {"normal", "reduced", "essential"}
    assert [shard["shard_id"] for shard in document["shards"]] == ["shard-0", "shard-1", "shard-2"]
    assert sum(shard["slots"] for shard in document["shards"]) == 16_384
    assert document["requests_per_s"] > 0
    assert document["moves"] == []
    assert user not in output
    _, named = await command("top", "--json", "--names", "--data-dir", str(cluster.data_dir))
    assert user in named
    code, text = await command("top", "--once", "--data-dir", str(cluster.data_dir))
    assert code == 0
    assert "shard-1" in text


@pytest.mark.timeout(180)
async def test_a_router_that_hangs_is_named_and_hides_nothing_of_the_others() -> None:
    async with LocalCluster(shards=1, routers=2, options=["--hung-after", "0"]) as cluster:
        held = cluster.kill("router-1", signal.SIGSTOP)
        try:
            async with on_a_terminal("top", "--interval", "0.2", "--data-dir", str(cluster.data_dir)) as (screen, _):
                # Their rows are there before it is known that the other does not answer, and again after it.
                await eventually(lambda: b"shard-0" in screen.text, within_s=20)
                assert b"router-1: " in screen.text
                await eventually(lambda: b"router-1 does not answer at 127.0.0.1" in screen.text, within_s=10)
                seen = len(screen.text)
                await eventually(lambda: screen.text.count(b"shard-0", seen) >= 3, within_s=10)
                screen.type(b"q")
                async with asyncio.timeout(10):
                    assert await screen.process.wait() == 0
            began = asyncio.get_running_loop().time()
            code, output = await command("top", "--json", "--data-dir", str(cluster.data_dir))
            assert asyncio.get_running_loop().time() - began < 15
        finally:
            os.kill(held, signal.SIGCONT)
        document = json.loads(output)
        assert code == 1
        assert ["error" in router for router in document["routers"]] == [False, True]
        assert [shard["shard_id"] for shard in document["shards"]] == ["shard-0"]
