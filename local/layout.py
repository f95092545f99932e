"""Where everything of one embedded cluster lies, below one data directory."""

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from local.errors import DataDirectoryError

_PRIVATE = 0o700
# Root's PostgreSQL runs as another user, which has to pass through these directories but not to look around in them.
_PASSABLE = 0o711 if os.geteuid() == 0 else _PRIVATE

_NEW = ".new"

# What a directory may hold before its cluster.json is written: made by an `up` that was killed, or by mkfs.
_BEFORE_RECORD = {"cluster.json.new", "supervisor.lock", "logs", "lost+found"}


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below a data directory. `root` is absolute, without symbolic links."""

    root: Path

    @classmethod
    def of(cls, directory: Path | None, environment: Mapping[str, str] = os.environ) -> "Layout":
        """The layout of `directory`, or of the default one."""
        return cls((directory or default_data_dir(environment)).expanduser().resolve())

    def require_own(self) -> None:
        """Raises DataDirectoryError when another user made the cluster here: even root would leave its files behind."""
        try:
            owner = self.record.stat().st_uid
        except OSError:
            return  # There is none, or it cannot be seen, which those who read it tell better.
        if owner != os.geteuid():
            try:
                name = pwd.getpwuid(owner).pw_name
            except KeyError:
                name = str(owner)
            raise DataDirectoryError(f"the cluster in {self.root} was made by the user {name}: run it as them")

    @property
    def record(self) -> Path:
        """What is kept about the cluster; its presence says that there is one."""
        return self.root / "cluster.json"

    @property
    def secrets(self) -> Path:
        """The passwords."""
        return self.root / "secrets.json"

    @property
    def next_secrets(self) -> Path:
        """The passwords that are being changed to."""
        return self.root / "secrets.json.next"

    @property
    def state(self) -> Path:
        """What runs, as the supervisor last wrote it."""
        return self.root / "state.json"

    @property
    def lock(self) -> Path:
        """The file that a running supervisor holds a lock on."""
        return self.root / "supervisor.lock"

    @property
    def admin_token(self) -> Path:
        """What a call of the admin service has to bring."""
        return self.root / "admin-token"

    @property
    def metrics_targets(self) -> Path:
        """Where the services have their metrics, in a file that Prometheus reads again when it changes."""
        return self.root / "metrics-targets.json"

    @property
    def config(self) -> Path:
        """Settings files of the services."""
        return self.root / "config"

    @property
    def logs(self) -> Path:
        """One log per process."""
        return self.root / "logs"

    @property
    def postgres(self) -> Path:
        """The PostgreSQL data directories, one per server."""
        return self.root / "postgres"

    @property
    def redis(self) -> Path:
        """Redis's working directory; nothing is stored in it."""
        return self.root / "redis"

    @property
    def run(self) -> Path:
        """The services' working directory: empty, so that nothing in it can be imported by mistake."""
        return self.root / "run"

    def pgdata(self, name: str) -> Path:
        """Data directory of the PostgreSQL server `name`."""
        return self.postgres / name

    def log(self, name: str) -> Path:
        """Log of the process `name`."""
        return self.logs / f"{name}.log"

    def settings(self, name: str) -> Path:
        """Settings file of the service `name`."""
        return self.config / f"{name}.yaml"

    def exists(self) -> bool:
        """Whether there is a cluster here, finished or not."""
        return self.record.exists()

    def claim(self) -> None:
        """Makes the directory and its logs/, if there is a cluster in it or it is free for one.

        Raises DataDirectoryError.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if not self.exists():
                strange = {entry.name for entry in self.root.iterdir()} - _BEFORE_RECORD
                if strange:
                    raise DataDirectoryError(
                        f"{self.root} holds other files ({min(strange)}, …) and no cluster; choose an empty --data-dir"
                    )
            self.root.chmod(_PASSABLE)
            _make(self.logs, _PRIVATE)
        except OSError as error:
            raise DataDirectoryError(
                f"{error.filename or self.root}: {error.strerror}; choose another --data-dir"
            ) from error

    def make_directories(self) -> None:
        """Makes the directories below the root."""
        for private in (self.config, self.redis, self.run):
            _make(private, _PRIVATE)
        _make(self.postgres, _PASSABLE)


def default_data_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """`$MEMSHARD_DATA_DIR`, else /var/lib/memshard for root, else the user's own data directory (XDG)."""
    if chosen := environment.get("MEMSHARD_DATA_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/memshard")
    return Path(environment.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "memshard"


def write_atomically(path: Path, text: str, *, durable: bool) -> None:
    """Replaces `path` (mode 0600) as a whole: a reader, or a crash, sees the old text or the new one.

    `durable` also survives the loss of power.
    """
    new = path.with_name(path.name + _NEW)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(descriptor)
    os.replace(new, path)
    if durable:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes renames in `directory` survive the loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(directory: Path, mode: int) -> None:
    directory.mkdir(exist_ok=True)
    directory.chmod(mode)
