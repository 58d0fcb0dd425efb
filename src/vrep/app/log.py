"""Logs: one line an event on standard error, JSON or text; native lines come the same way."""

from __future__ import annotations

import logging
import sys

import structlog

from vrep._core.log import setup as setup_native_log
from vrep.settings import LogConfig

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def setup_logs(config: LogConfig, role: str = "") -> None:
    """Send `structlog` and standard `logging` to standard error."""
    text = config.format == "text" or (config.format == "auto" and sys.stderr.isatty())
    level = _LEVELS[config.level]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if text
        else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    setup_native_log(config.level, json=not text)
    if role:
        structlog.contextvars.bind_contextvars(role=role)


__all__ = ["setup_logs"]
