"""How busy a container is, from the files of a control group."""

from pathlib import Path

import psutil
import pytest

from common.machine import Machine


class Group:
    """A control group's files, and a clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.path / name.replace("__", ".")).write_text(text)

    def machine(self) -> Machine:
        return Machine(self.path, lambda: self.now)


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


def test_what_a_container_may_use_is_what_counts(group: Group) -> None:
    group.write(cpu__max="150000 100000\n", cpu__stat="usage_usec 1000000\nuser_usec 1\n")
    group.write(memory__max="1000\n", memory__current="900\n", memory__stat="anon 1\ninactive_file 300\n")
    machine = group.machine()
    assert (machine.look().cpu, machine.look().memory) == (0.0, 0.6)
    group.now += 2
    group.write(cpu__stat="usage_usec 2500000\n")
    # A second and a half of the three that one and a half cores have in two seconds.
    assert machine.look().cpu == pytest.approx(0.5)
    group.now += 1
    group.write(cpu__stat="usage_usec 9000000\n")
    assert machine.look().cpu == 1.0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"cpu__max": "max 100000\n", "cpu__stat": "usage_usec 1\n", "memory__max": "max\n", "memory__current": "1"},
        {"cpu__max": "what\n", "memory__max": "is\n", "memory__current": "this"},
        {"cpu__max": "100000 100000\n", "cpu__stat": "nothing\n", "memory__max": "5\n", "memory__current": "1\n"},
    ],
)
def test_without_limits_it_is_the_machine_itself(group: Group, files: dict[str, str]) -> None:
    group.write(**files)
    machine = group.machine()
    machine.look()
    group.now += 1
    busy = machine.look()
    assert 0.0 <= busy.cpu <= 1.0
    # Far from what those files could be read as.
    assert busy.memory == pytest.approx(psutil.virtual_memory().percent / 100, abs=0.2)
