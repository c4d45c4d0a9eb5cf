"""A real HTTP server that answers as a scripted judge model, and counts what it is asked."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    missing_bytes: int = 0  # announced, never sent


def completion(
    text: str | None,
    *,
    finish: str = "stop",
    usage: tuple[int, int] | None = (50, 1),
    tokens: list[tuple[str, dict[str, float]]] | None = None,
    refusal: str | None = None,
    delay: float = 0.0,
) -> Answer:
    """A whole, valid chat completion. `tokens` gives (token, {alternative: log-probability}) per step."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": refusal},
        "finish_reason": finish,
    }
    if tokens is not None:
        choice["logprobs"] = {
            "content": [
                {
                    "token": token,
                    "logprob": alternatives.get(token, -1.0),
                    "top_logprobs": [{"token": t, "logprob": p} for t, p in alternatives.items()],
                }
                for token, alternatives in tokens
            ]
        }
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "choices": [choice]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return Answer(body=json.dumps(body).encode(), delay=delay)


def failure(status: int, text: str = "no", **headers: str) -> Answer:
    body = json.dumps({"error": {"message": text}}).encode()
    return Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def asks_for_coherence(prompt: str) -> bool:
    return "How coherent is the ANSWER" in prompt


class JudgeServer:
    """`script(prompt)` says how to answer; `requests` holds each call, `most_at_once` the peak."""

    def __init__(self, script: Callable[[str], Answer]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answered: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["content-length"]))
                if not sent:  # the client has left
                    self.close_connection = True
                    return
                body = json.loads(sent)
                prompt = body["messages"][0]["content"]
                with outer._lock:
                    outer.requests.append({**body, "path": self.path, "key": self.headers["authorization"]})
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    answer = script(prompt)
                    time.sleep(answer.delay)
                finally:
                    with outer._lock:
                        outer._now -= 1
                try:
                    self.send_response(answer.status)
                    self.send_header("content-type", "application/json")
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(answer.body) + answer.missing_bytes))
                    self.end_headers()
                    self.wfile.write(answer.body)
                    self.wfile.flush()
                except OSError:  # the client has left
                    self.close_connection = True
                    return
                with outer._lock:
                    outer.answered.append(prompt)
                if answer.missing_bytes:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
