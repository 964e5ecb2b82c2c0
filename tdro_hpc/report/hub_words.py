"""What the hub says in, words without secrets out. Neither a token nor the address of an upload leaves this file.

An address that the hub gives for an upload holds a signature, which is as good as a token while it lasts.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

HIDDEN = "<hidden>"
_TOKEN_SHAPED = re.compile(r"\bhf_[\w.\-]{16,}|\beyJ[\w\-]+\.[\w\-]+\.[\w\-]+|(?<=Bearer )\S+", re.IGNORECASE)
_QUERY_OF_ADDRESS = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]+")
_LOGIN_IN_ADDRESS = re.compile(r"(https?://)[^\s/@]+@")
_STATUS_OF_XET = re.compile(r"HTTP status [a-z ]+\((\d{3}) ")  # xet tells every failure as a ConnectionError
_USED_UP = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)")  # such as "api";r=0;t=55: no request left for 55 s
_PASSING_STATUS = (408, 412, 425, 429)  # 412: somebody else has made a commit since we looked
_LOUD = ("huggingface_hub", "httpx2", "httpx", "httpcore2", "httpcore")


@dataclass(frozen=True)
class Problem:
    """What a request to the hub failed with."""

    status: int  # of the answer; 0 = there was none
    words: str  # without secrets
    passes: bool  # worth another try
    wait_seconds: float | None = None  # that the hub asks for


def scrub(text: str) -> str:
    """The text without the token in use, whatever is shaped like a token, and what addresses have after their `?`."""
    token = token_in_use()
    if token:
        text = text.replace(token, HIDDEN)
    text = _TOKEN_SHAPED.sub(HIDDEN, text)
    return _LOGIN_IN_ADDRESS.sub(rf"\1{HIDDEN}@", _QUERY_OF_ADDRESS.sub(rf"\1?{HIDDEN}", text))


def token_in_use() -> str:
    """The token of the environment or of the hub's own login; empty when there is none or it cannot be renewed."""
    from huggingface_hub import get_token

    with suppress(Exception):  # asking for it may ask a server, which says so itself when a request needs the token
        return get_token() or ""
    return ""


def problem_of(error: BaseException) -> Problem:
    """What an exception of huggingface_hub means."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    transport_error = HfHubHTTPError.__bases__[0]  # of the HTTP client, which is another one in each huggingface_hub
    cause = _first_of(error, (transport_error, ConnectionError, TimeoutError)) or error
    if isinstance(cause, LocalTokenNotFoundError):
        return Problem(401, "there is no token on this machine", passes=False)
    if isinstance(cause, OfflineModeIsEnabled):
        return Problem(0, "HF_HUB_OFFLINE is set, which forbids every request", passes=False)
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        words = scrub(cause.server_message or "").replace("\n", " ").rstrip(".")
        passes = status in _PASSING_STATUS or status >= 500
        return Problem(status, words, passes, _asked_wait(dict(cause.response.headers)))
    words = scrub(f"{type(cause).__name__}: {cause}")
    if isinstance(cause, (transport_error, ConnectionError, TimeoutError)):
        found = _STATUS_OF_XET.search(str(cause))
        status = int(found.group(1)) if found else 0
        return Problem(status, words, passes=not status or status in _PASSING_STATUS or status >= 500)
    # A proxy on the way may answer in its own words; nothing of ours is JSON that cannot be read.
    return Problem(0, words, passes=isinstance(error, json.JSONDecodeError))


def _first_of(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The first exception of these kinds among an exception and its causes: the hub wraps those of uploads."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, kinds):
        seen = seen.__cause__
    return seen


def _asked_wait(headers: dict[str, str]) -> float | None:
    """Seconds that an answer asks to wait, by a rate limit that is used up or by Retry-After."""
    by_name = {name.lower(): value.strip() for name, value in headers.items()}
    used_up = _USED_UP.search(by_name.get("ratelimit", ""))
    if used_up:
        return float(used_up.group(1))
    asked = by_name.get("retry-after", "")
    return float(asked) if asked.isdigit() else None  # it may also be a date, which the hub does not send


class _Forward(logging.Handler):
    """Hands the words of other packages on, without secrets and without tracebacks."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record of another package as ours."""
        self.logger.log(record.levelno, "%s", scrub(record.getMessage()))


@contextmanager
def hub_speaks_through(logger: logging.Logger) -> Iterator[None]:
    """Inside the block what the hub's packages log goes through `logger`, scrubbed, and they draw no progress bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    had_bars = not are_progress_bars_disabled()
    # By the hub's own function: when that file is imported it puts a handler in place, which has to be there by now.
    others = [hub_logging.get_logger(name) for name in _LOUD]
    before = [(other, other.handlers, other.propagate) for other in others]
    disable_progress_bars()
    for other in others:
        other.handlers, other.propagate = [_Forward(logger)], False
    try:
        yield
    finally:
        for other, handlers, propagate in before:
            other.handlers, other.propagate = handlers, propagate
        if had_bars:
            enable_progress_bars()
