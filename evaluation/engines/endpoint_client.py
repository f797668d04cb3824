"""One request to an OpenAI-compatible endpoint, and what its answer or its failure means."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from evaluation.engines.endpoint_store import Reply

MAX_BODY_BYTES = 16 * 2**20
MAX_REASON = 300  # characters of an endpoint's own words
# Codes and types of errors that no waiting mends, although some come with status 429.
QUOTA_WORDS = ("insufficient_quota", "billing_hard_limit_reached", "quota_exceeded")
RETRIED = frozenset({408, 409, 425, 429})  # and all from 500 on
HOPELESS = frozenset({401, 402, 403, 404})  # the same for every request


@dataclass(eq=False)
class AttemptFailed(Exception):
    """One attempt without an answer.

    status: None where no answer came. is_retryable: whether the same request may succeed later.
    is_hopeless: no request will succeed. is_free: the endpoint answered with an error, which is not
    charged. retry_after_seconds: the wait that the endpoint asks for.
    """

    reason: str
    status: int | None = None
    is_retryable: bool = True
    is_hopeless: bool = False
    is_free: bool = False
    retry_after_seconds: float | None = None

    def __str__(self) -> str:
        """The reason, behind the status."""
        return self.reason if self.status is None else f"HTTP {self.status}: {self.reason}"


class EndpointClient:
    """Sends requests to one endpoint; used by many threads. The key is in memory only."""

    def __init__(
        self, base_url: str, *, key: str | None, timeout_seconds: float, connections: int
    ) -> None:
        """Connect to nothing yet.

        Args:
            base_url: up to /v1.
            key: sent as a bearer token, or None.
            timeout_seconds: of one attempt, to the last byte.
            connections: that may be open at once.
        """
        self._timeout_seconds = timeout_seconds
        self._settings: dict[str, Any] = {
            "base_url": base_url.rstrip("/") + "/",
            "headers": {} if key is None else {"Authorization": f"Bearer {key}"},
            "timeout": httpx2.Timeout(timeout_seconds),
            "limits": httpx2.Limits(max_connections=connections),
            "follow_redirects": False,  # the key goes nowhere else
        }
        self._client: httpx2.Client | None = None

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connections stay open meanwhile, for all threads."""
        with httpx2.Client(**self._settings) as self._client:
            yield
        self._client = None

    def send(self, path: str, body: Mapping[str, Any], *, is_streamed: bool = False) -> Reply:
        """One attempt.

        Args:
            path: chat/completions or completions.
            body: the request; streaming is added here.
            is_streamed: stream the answer, and note when its first text came.

        Raises:
            AttemptFailed: no usable answer.
        """
        assert self._client is not None, "within connected()"
        started = time.monotonic()
        sent = dict(body)
        if is_streamed:
            sent |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._client.stream("POST", path, json=sent) as response:
                if response.status_code != 200:
                    raise _refused(response, b"".join(self._chunks(response, started)))
                read = self._read_streamed if is_streamed else self._read_whole
                return read(response, started)
        except httpx2.TransportError as error:
            raise AttemptFailed(f"{type(error).__name__}: {error}"[:MAX_REASON]) from error
        except (httpx2.DecodingError, httpx2.InvalidURL) as error:
            raise AttemptFailed(f"{type(error).__name__}: {error}"[:MAX_REASON]) from error

    def _chunks(self, response: httpx2.Response, started: float) -> Iterator[bytes]:
        """The body, which has to end in time: a read's own timeout begins anew with each byte."""
        size = 0
        for chunk in response.iter_bytes():
            size += len(chunk)
            if time.monotonic() - started > self._timeout_seconds:
                raise AttemptFailed(f"no end of the answer after {self._timeout_seconds:g} s")
            if size > MAX_BODY_BYTES:
                raise AttemptFailed(f"an answer of over {MAX_BODY_BYTES} bytes", is_retryable=False)
            yield chunk

    def _read_whole(self, response: httpx2.Response, started: float) -> Reply:
        fields = _json(b"".join(self._chunks(response, started)))
        seconds = time.monotonic() - started
        text = _text(fields)
        if text is None:
            raise AttemptFailed(f"an answer without a choice: {json.dumps(fields)[:MAX_REASON]}")
        return Reply(text=text, total_seconds=seconds, **_usage(fields))

    def _read_streamed(self, response: httpx2.Response, started: float) -> Reply:
        """Server-sent events: text by and by, the counts at the end, and a line that says so."""
        text, usage, first, is_ended = "", _usage({}), None, False
        for line in _lines(self._chunks(response, started)):
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                is_ended = True
                break
            fields = _json(data)
            piece = _text(fields, is_piece=True) or ""
            if piece and first is None:
                first = time.monotonic() - started
            text += piece
            usage = _usage(fields) if fields.get("usage") else usage
        if not is_ended:
            raise AttemptFailed("the stream broke off")
        seconds = time.monotonic() - started
        return Reply(text=text, first_token_seconds=first, total_seconds=seconds, **usage)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines as they become whole."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _json(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.get("error"):
        words = data[:MAX_REASON].decode("utf-8", errors="replace")
        raise AttemptFailed(f"an answer that is no completion: {words!r}")
    return fields


def _text(fields: Mapping[str, Any], *, is_piece: bool = False) -> str | None:
    """The text of the first choice; "" where the model said nothing, None without a choice."""
    choices = fields.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return None
    if "text" in choice:
        return str(choice["text"] or "")
    turn = choice.get("delta" if is_piece else "message")
    return str(turn.get("content") or "") if isinstance(turn, dict) else None


def _usage(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Token counts by name; None where the endpoint does not tell."""
    usage = fields.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    return {
        "prompt_tokens": _count(usage.get("prompt_tokens")),
        "cached_tokens": _count(details.get("cached_tokens")),
        "completion_tokens": _count(usage.get("completion_tokens")),
    }


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _refused(response: httpx2.Response, body: bytes) -> AttemptFailed:
    """What an error status means for this request and for all others."""
    status = response.status_code
    words = body[:MAX_REASON].decode("utf-8", errors="replace").strip()
    is_quota = any(word in words for word in QUOTA_WORDS)
    is_hopeless = status in HOPELESS or is_quota or status < 400
    return AttemptFailed(
        words or response.reason_phrase,
        status=status,
        is_retryable=not is_hopeless and (status in RETRIED or status >= 500),
        is_hopeless=is_hopeless,
        is_free=status < 500,
        retry_after_seconds=_retry_after(response.headers.get("retry-after")),
    )


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, given as a number or as a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
