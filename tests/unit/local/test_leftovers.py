import os
import subprocess
import sys
from pathlib import Path

import pytest

from local import leftovers
from local.leftovers import MARK, Kind, Seen, classify

ROOT = Path("/data/one")
SHARD = ("python", "-P", "-m", "shard", "--config", "/data/one/config/shard-0.yaml")


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        (Seen("postgres", "/data/one/postgres/postgres-shard-0", ("/x/postgres", "-D", "…"), None), Kind.POSTMASTER),
        (Seen("postgres", "/data/one/postgres/postgres-shard-0", ("postgres: checkpointer",), None), Kind.BACKEND),
        (Seen("initdb", "/data/one/postgres/postgres-shard-0.new", ("/x/initdb",), None), Kind.POSTMASTER),
        (
            Seen("pg_basebackup", "/data/one/postgres/postgres-shard-0-1.new", ("/x/pg_basebackup",), None),
            Kind.POSTMASTER,
        ),
        (Seen("pg_rewind", "/data/one/postgres/postgres-shard-0-1", ("/x/pg_rewind",), None), Kind.POSTMASTER),
        (Seen("redis-server", "/data/one/redis", ("redis-server 127.0.0.1:1",), None), Kind.REDIS),
        (Seen("python3.11", "/data/one/run", SHARD, "/data/one"), Kind.SERVICE),
        # Others, however alike.
        (Seen("postgres", "/data/two/postgres/postgres-shard-0", ("/x/postgres",), None), None),
        (Seen("postgres", "/data/one-more/postgres/a", ("/x/postgres",), None), None),
        (Seen("redis-server", "/data/two/redis", ("redis-server",), None), None),
        (Seen("python3.11", "/data/one/run", SHARD, "/data/two"), None),
        (Seen("python3.11", "/data/one/run", SHARD, None), None),
        (Seen("bash", "/data/one/postgres/postgres-shard-0", ("bash",), None), None),
        (Seen("psql", "/data/one/postgres/postgres-shard-0", ("psql",), None), None),
        # A shell or an editor that was started from a service and kept its environment.
        (Seen("bash", "/data/one/run", ("bash", "-c", "ls"), "/data/one"), None),
    ],
)
def test_only_processes_of_this_directory_are_ours(seen: Seen, kind: Kind | None) -> None:
    assert classify(seen, ROOT) is kind


async def test_a_service_is_found_by_its_mark_and_ended(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    wait = "import sys; print(flush=True); sys.stdin.read()"
    ours, theirs = (
        subprocess.Popen(
            [sys.executable, "-c", wait, "--config", str(root / "config" / "shard-0.yaml")],
            env={**os.environ, MARK: mark},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for mark in (str(root), str(root.parent))
    )
    with ours, theirs:
        for process in (ours, theirs):
            assert process.stdout is not None
            process.stdout.readline()  # It runs.
        assert [found.process.pid for found in leftovers.find(root)] == [ours.pid]
        assert await leftovers.end_all(root) == 1
        assert ours.wait(5) == -15
        assert theirs.poll() is None
        assert theirs.stdin is not None
        theirs.stdin.close()
