"""Keeps what clients send from starting lines of its own in the log."""

from __future__ import annotations

import logging

from bentoml_detectron.errors import escaped

_FORMATTER = logging.Formatter()


class Escape(logging.Filter):
    """Escapes what cannot be printed, line ends among it: BentoML logs a path as it is, after ``%0a`` was decoded."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Changes the record; passes all."""
        message = record.getMessage()
        if not message.isprintable():
            record.msg, record.args = escaped(message), None
        if record.exc_info and not record.exc_text:
            record.exc_text = _FORMATTER.formatException(record.exc_info)
        if record.exc_text and not record.exc_text.startswith("  "):
            # No line of a traceback, whose message may be a client's, can be taken for a record's first.
            record.exc_text = "\n".join(f"  {escaped(line)}" for line in record.exc_text.split("\n"))
        return True


def install() -> None:
    """Has BentoML's log escape what clients sent; in a worker, the root logger and the server's share its handlers."""
    for handler in logging.getLogger("bentoml").handlers:
        if not any(isinstance(each, Escape) for each in handler.filters):
            handler.addFilter(Escape())
