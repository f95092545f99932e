"""What can go wrong with an embedded cluster. Each message is for the person at the terminal and says what to do.

LocalClusterError
├── OptionsError            the options contradict each other, or what the cluster was made with
├── DataDirectoryError      the directory cannot be used
├── MissingPartError        a binary or a package is not installed
├── PortInUseError          a port that the person chose is taken
├── AlreadyRunningError     a supervisor holds this data directory
└── StartError              a process did not become ready
    └── StepError           what is done once at the start failed, and nobody expected that
"""


class LocalClusterError(Exception):
    """Anything that stops the embedded cluster from doing what it was told."""


class OptionsError(LocalClusterError):
    """The options contradict each other, or what the cluster was made with."""


class DataDirectoryError(LocalClusterError):
    """The data directory cannot be used."""


class MissingPartError(LocalClusterError):
    """A binary or a package that the embedded cluster needs is not installed."""


class PortInUseError(LocalClusterError):
    """A port that the person chose is taken by something else."""


class AlreadyRunningError(LocalClusterError):
    """A supervisor holds this data directory."""


class StartError(LocalClusterError):
    """A process did not become ready. `log_tail` holds the last lines that it logged."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class StepError(StartError):
    """What is done once at the start failed by what nobody expected. Its text is for who has started the cluster; a log
    has the type and the place."""
