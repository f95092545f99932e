"""Structured logs on standard output: one JSON object a line, or coloured lines for eyes.

What users store never goes in here: events carry names, counts, times and reasons, never content, embeddings, DSNs or
tokens. An unexpected exception is logged by type and place only, since its text may quote a value (`describe_bug`);
also when it is a library that logs it.
"""

import logging
import re
import sys
import traceback
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from common import tracing

Logger = FilteringBoundLogger

# What a library says of an exception, up to where it may go on with what it had in hands. asyncio says "Exception in
# callback f(<the arguments>)", and in lines of their own what tasks and futures hold.
_SAID = re.compile(r"""[^\n:(<{'"]*""")


def configure(
    service: str, log_format: Literal["json", "console"], level: str, *, stream: TextIO | None = None
) -> None:
    """Sets up logging for this process, by default on standard output; `service` is in every line. Libraries may speak
    from `warning` up.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_trace,
        _without_values,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer() if log_format == "json" else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout if stream is None else stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    # `force`, because wordllama sets up the root logger when it is imported.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("memshard").setLevel(level.upper())
    structlog.contextvars.bind_contextvars(service=service)


def _add_trace(_: object, __: str, event: EventDict) -> EventDict:
    """Which call a line is about, wherever it is answered: the id that all services' lines about it have."""
    if trace_id := tracing.current().trace_id:
        event["trace_id"] = trace_id
    return event


def _without_values(_: object, __: str, event: EventDict) -> EventDict:
    """An exception by type and place, whoever logs it and for whichever format: its text may quote a value, as may the
    local variables that console lines would have.
    """
    record = event.get("_record")
    raised = event.pop("exc_info", None)
    if isinstance(record, logging.LogRecord) and (raised or record.name == "asyncio"):
        # Without the arguments: most often one of them is the exception.
        said = _SAID.match(str(record.msg))
        event["event"] = said[0].rstrip() if said is not None else ""
    error = raised
    if isinstance(raised, tuple):
        error = raised[1]
    elif raised is True:
        error = sys.exception()
    if isinstance(error, BaseException):
        event.update(describe_bug(error))
    return event


def get_logger(name: str) -> Logger:
    """A logger whose lines say which part spoke."""
    logger: Logger = structlog.get_logger(f"memshard.{name}")
    return logger


def describe_bug(error: BaseException) -> dict[str, str]:
    """An unexpected exception as log fields: its type and the places it came through, not its text.

    Of a group, the first exception that is not a group itself.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": f"{type(error).__module__}.{type(error).__qualname__}",
        "at": " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)),
    }
