"""A loopback endpoint with faults, in the OpenAI format; it counts every request it gets.

Runs in a thread (`serving`) or as a process of its own, which is also what the tests use as a fake
`vllm`. Faults are drawn by the hash of prompt and attempt, so they do not depend on timing.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "drop", "slow", "malformed")


@dataclass
class Behaviour:
    """What the endpoint does. refuse: (status, body) of every answer. faults: share of requests."""

    faults: float = 0.0
    refuse: tuple[int, str] | None = None
    retry_after: str = "0.01"
    usage: bool = True
    seconds: float = 0.0
    newer_limit: bool = False
    slow_seconds: float = 1.0
    requests: Counter[str] = field(default_factory=Counter)  # by prompt
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # of faults
    allowed: int | None = None  # answers, after which requests are held
    answered: int = 0
    under_way: int = 0
    most_under_way: int = 0
    charged_tokens: list[tuple[int, int]] = field(default_factory=list)
    guard: threading.Condition = field(default_factory=threading.Condition)

    def allow(self, count: int | None) -> None:
        """Let so many answers go in all."""
        with self.guard:
            self.allowed = count
            self.guard.notify_all()

    def wait_for_turn(self) -> None:
        with self.guard:
            self.guard.wait_for(lambda: self.allowed is None or self.answered < self.allowed)
            self.answered += 1
            self.guard.notify_all()

    def wait_until_held(self) -> None:
        """Until all allowed answers have gone."""
        with self.guard:
            held = self.guard.wait_for(lambda: self.answered == self.allowed, timeout=60)
        assert held, "the client asks for no more"


def prompt_of(body: dict[str, Any]) -> str:
    if "prompt" in body:
        return json.dumps(body["prompt"])
    return str(body["messages"][-1]["content"])


def answer_to(prompt: str) -> str:
    """What the endpoint says; a test knows it."""
    return "word" + hashlib.sha256(prompt.encode()).hexdigest()[:6]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, b"{}")

    def do_POST(self) -> None:
        does = self.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = prompt_of(body)
        with does.guard:
            does.requests[prompt] += 1
            number = does.requests[prompt]
            does.bodies.append(body)
            does.authorization.append(self.headers.get("Authorization"))
            does.times.append(time.monotonic())
            does.under_way += 1
            does.most_under_way = max(does.most_under_way, does.under_way)
        try:
            self._answer(does, body, prompt, number)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with does.guard:
                does.under_way -= 1

    def _answer(self, does: Behaviour, body: dict[str, Any], prompt: str, number: int) -> None:
        does.wait_for_turn()
        time.sleep(does.seconds)
        if does.newer_limit and "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            self._send(400, json.dumps({"error": {"message": text}}).encode())
            return
        if does.refuse is not None:
            status, text = does.refuse
            self._send(status, text.encode(), retry_after=does.retry_after)
            return
        digest = hashlib.sha256(f"{prompt}|{number}".encode()).digest()
        if int.from_bytes(digest[:4], "big") / 2**32 < does.faults:
            kind = FAULTS[digest[5] % len(FAULTS)]
            does.kinds[kind] += 1
            self._fail(kind, does)
            return
        usage = {
            "prompt_tokens": len(prompt) + 5,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        with does.guard:
            does.charged_tokens.append((len(prompt) + 5, 3))
        self._complete(body, answer_to(prompt), usage if does.usage else None)

    def _fail(self, kind: str, does: Behaviour) -> None:
        if kind in ("429", "500"):
            self._send(int(kind), b'{"error": {"code": "busy"}}', retry_after=does.retry_after)
        elif kind == "drop":
            self.close_connection = True
            self.connection.close()
        elif kind == "malformed":
            self._send(200, b'{"choices": [{"mess')
        else:  # slow: headers at once, the body never in time
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.flush()
            time.sleep(does.slow_seconds)
            self.close_connection = True

    def _complete(self, body: dict[str, Any], text: str, usage: dict[str, Any] | None) -> None:
        is_chat = "messages" in body
        if not body.get("stream"):
            choice = {"message": {"content": text}} if is_chat else {"text": text}
            self._send(200, json.dumps({"choices": [choice], "usage": usage}).encode())
            return
        pieces = [text[:2], text[2:]]
        lines = [
            {"choices": [{"delta": {"content": p}} if is_chat else {"text": p}]} for p in pieces
        ]
        events = [*map(json.dumps, lines), json.dumps({"choices": [], "usage": usage}), "[DONE]"]
        self._send(200, "".join(f"data: {event}\n\n" for event in events).encode())

    def _send(self, status: int, body: bytes, *, retry_after: str | None = None) -> None:
        self.send_response(status)
        if retry_after is not None and status in (429, 503):
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the endpoint's."""


def make_server(behaviour: Behaviour, port: int = 0) -> Server:
    return Server(("127.0.0.1", port), type("Bound", (Handler,), {"behaviour": behaviour}))


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The base address of an endpoint that behaves so."""
    server = make_server(behaviour)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":  # as `vllm serve MODEL --port N ..`
    import sys

    make_server(Behaviour(), int(sys.argv[sys.argv.index("--port") + 1])).serve_forever()
