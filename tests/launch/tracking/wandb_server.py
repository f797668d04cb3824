"""What the installed W&B client asks of a server, answered on loopback; it can die and come back.

Read off client 0.31: UpsertBucket makes a run, file_stream takes its rows, CreateRunFiles gives
addresses for its files, NotifyScriptableRunAlert sends an alert.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STREAM = re.compile(r"/files/[^/]+/[^/]+/([^/]+)/file_stream")


class WandbServer:
    """rows: run -> line number -> row, as streamed; alerts: what was sent; asked: all requests."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.alerts: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        # Below the ephemeral ports: a client that dials a dead one of those can meet itself there.
        self.port = random.SystemRandom().randrange(20_000, 30_000)
        self.is_hanging = False
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; after a death, on the same port."""
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def die(self) -> None:
        """Refuse all connections from now on."""
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()

    def come_back(self) -> None:
        """Answer again, on the same port."""
        if self.is_hanging:
            self.is_hanging = False
        else:
            self.start()

    def hang(self) -> None:
        """Take requests, and answer none: what a cut link looks like from this side."""
        self.is_hanging = True

    def num_rows(self) -> int:
        """Of all runs."""
        return sum(len(lines) for lines in self.rows.values())

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else ""
        self.asked.append(name)
        if name == "UpsertBucket":
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {
                "id": variables["name"],
                "name": variables["name"],
                "displayName": "run",
                "description": "",
                "config": variables.get("config") or "{}",
                "sweepName": None,
                "project": project,
                "historyLineCount": 0,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/file/{f}"} for f in variables["files"]]
            made = {"runID": variables["run"], "uploadHeaders": [], "files": files}
            return {"createRunFiles": made}
        return {"viewer": None, "serverInfo": None, "serverFeatures": []}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        history = files.get("wandb-history.jsonl")
        if history is not None:
            for i, line in enumerate(history["content"]):
                self.rows[run][history["offset"] + i] = json.loads(line)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self._body()
        state, found = (
            self.server_state,
            re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path),
        )
        if self.path == "/graphql":
            asked = json.loads(body)
            self._answer({"data": state.graphql(asked["query"], asked.get("variables") or {})})
            return
        if found is not None:
            state.stream(found.group(1), json.loads(body).get("files") or {})
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({})

    def _body(self) -> bytes:
        while self.server_state.is_hanging:
            time.sleep(0.1)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server_state.bodies.append(body)
        return body

    def _answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
