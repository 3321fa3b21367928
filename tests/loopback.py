"""A real HTTP server on the loopback interface that gives scripted answers and faults."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Server(ThreadingHTTPServer):
    """Gives its scripted answers in turn, and then what `answer` makes of a request's JSON.

    An answer is (content, status, headers), or a function of the handler that does something else.

    Attributes:
        requests: (path, headers, body) of every request so far.
    """

    request_queue_size = 128  # several processes connect at once; of 5, the default, a busy machine drops some

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests = deque(), []
        self.answer = lambda request: ({}, 200, {})
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def bodies(self):
        return [json.loads(body) for _, _, body in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept open, as real endpoints do
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.script.popleft() if self.server.script else self.server.answer(json.loads(body))
        if callable(answer):
            answer(self)
            self.close_connection = True
        else:
            self.reply(*answer)

    def reply(self, content, status, headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def transformers_serving(folder):
    """`transformers serve` of a model's folder; gives the URL of its interface."""
    command = Path(sys.executable).with_name("transformers")
    if not command.exists():
        pytest.skip("this version of transformers has no command")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [command, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log, url = folder.parent / "serve.log", f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(started, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            if server.poll() is not None:
                text = log.read_text()
                if "No such command" in text or "Missing dependencies" in text:
                    pytest.skip(text.strip().splitlines()[-1])
                pytest.fail(text)
            with suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/health", timeout=60):
                break
            time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
        yield f"{url}/v1"
    finally:
        server.terminate()
        server.wait()


def ok(content):
    return content, 200, {}


def error(status, message="", headers=(), **named):
    return {"error": {"message": message, **named}}, status, dict(headers)


def completion(content, status=200, headers=()):
    """An answer that holds a chat completion."""
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}, status, dict(headers)


def reset(handler):
    """Ends the connection with a TCP reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def cut_short(handler):
    """Promises more bytes than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def silent(handler):
    """Takes the request and says nothing."""
    time.sleep(0.6)


def trickle(handler):
    """Sends a byte at a time, each within the time-out."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass  # the client has had enough
