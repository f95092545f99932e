import os
import stat
from pathlib import Path

import pytest

from local import logs, services
from local.errors import DataDirectoryError
from local.layout import Layout, default_data_dir, write_atomically
from local.leftovers import MARK


def test_the_default_directory_is_chosen_in_the_environment_first() -> None:
    assert default_data_dir({"MEMSHARD_DATA_DIR": "/a/b", "XDG_DATA_HOME": "/x"}) == Path("/a/b")


def test_root_keeps_its_cluster_in_var_lib_others_in_their_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir({}) == Path("/var/lib/memshard")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_data_dir({"XDG_DATA_HOME": "/x"}) == Path("/x/memshard")
    assert default_data_dir({}) == Path("~/.local/share/memshard").expanduser()


def test_a_directory_of_somebody_elses_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    before = tmp_path.stat().st_mode
    with pytest.raises(DataDirectoryError, match=r"thesis\.tex"):
        Layout.of(tmp_path).claim()
    assert tmp_path.stat().st_mode == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_new_directory_is_claimed_again_and_again(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path / "new" / "er")
    layout.claim()
    layout.lock.touch()
    layout.claim()
    assert stat.S_IMODE(layout.logs.stat().st_mode) == 0o700


def test_files_are_private_and_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_atomically(file, "long text", durable=True)
    write_atomically(file, "short", durable=False)
    assert file.read_text() == "short"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_log_that_has_grown_is_put_aside_while_it_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "shard-0.log"
    descriptor = logs.open_for(path)
    os.write(descriptor, b"one\n" * 10)
    logs.bound(path, max_bytes=100)
    assert path.stat().st_size == 40
    logs.bound(path, max_bytes=30)
    os.write(descriptor, b"two\n")
    os.close(descriptor)
    assert path.read_text() == "two\n"
    assert (tmp_path / "shard-0.log.1").read_text() == "one\n" * 10
    assert logs.tail(path, 5) == "two"
    assert logs.tail(tmp_path / "none.log", 5) == ""


def test_a_service_gets_the_environment_without_what_would_override_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSHARD_ROUTER_PORT", "1")
    monkeypatch.setenv("memshard_router_host", "0.0.0.0")
    monkeypatch.setenv("MEMSHARD_ROUTER_EMBEDDER_API_KEY", "key")
    given = services.environment("router", {"port": 2, "host": "127.0.0.1"}, Path("/data/one"))
    assert "MEMSHARD_ROUTER_PORT" not in given
    assert "memshard_router_host" not in given
    assert given["MEMSHARD_ROUTER_EMBEDDER_API_KEY"] == "key"
    assert given[MARK] == "/data/one"
