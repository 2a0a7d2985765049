"""Logging: a fixed message and key/value fields, as text or as one JSON document a line."""

from __future__ import annotations

import logging
import sys
import time

import structlog

_REPEAT_S = 10.0


class _AcceptFailures(logging.Handler):
    """Thins out trio's messages: ten a second while the API's socket cannot accept a client.

    That is so while the agent is out of descriptors.  The messages once filled its log.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said_at = -_REPEAT_S

    def emit(self, record: logging.LogRecord) -> None:
        """Log the failure in our own form, at most once in `_REPEAT_S` seconds."""
        if time.monotonic() - self._said_at < _REPEAT_S:
            return
        self._said_at = time.monotonic()
        reason = str(record.exc_info[1]) if record.exc_info else record.getMessage()
        structlog.get_logger().error("clients have to wait", reason=reason)


def configure_logs(level: str, style: str) -> None:
    """Set up structlog; called once, at start.  Logs go to standard error.

    Args:
        level: the least severe level that is logged: debug, info, warning or error.
        style: ``text`` or ``json``.
    """
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if style == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=32)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    accepting = logging.getLogger("trio.serve_listeners")
    accepting.handlers = [_AcceptFailures()]
    accepting.propagate = False
