"""A web server for the person at this machine: one page, and actions that it asks for. Called by extras/serve.py.

It listens to 127.0.0.1 alone. But any page that is open in a browser here can send requests to it, and a stranger's
name can be made to lead here. So Host has to be ours, the Origin of a POST too, and a body has to be JSON that says so,
which a foreign page may not send. Sizes, waiting and connections have bounds, one action runs at a time, the paths are
those of two dictionaries, and an answer never repeats what was sent.
"""

import base64
import hashlib
import io
import json
import re
import socketserver
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from engine.process import UserError, is_out_of_memory

PATIENCE = 10.0  # seconds in which a whole request has to come, and each line of an answer to go
LARGEST_BODY = 8 << 20  # bytes
MOST_CONNECTIONS = 16
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
           "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin", "Connection": "close"}


class Refusal(Exception):
    """A status, and one line for the client."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


class BeforeDeadline(io.RawIOBase):
    """What comes from a socket, until a deadline for all of it: a byte now and then does not put it off."""

    def __init__(self, connection, seconds):
        self.connection, self.deadline = connection, time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        self.connection.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One connection with one request (HTTP/1.0), in a thread of its own."""

    disable_nagle_algorithm = True
    begun = False  # has an answer of many lines begun?

    def setup(self):
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(BeforeDeadline(self.connection, PATIENCE))

    def do_GET(self):
        try:
            content = self.read_body() if self.command == "POST" else None
            self.check_sender()
            known = self.server.pages if content is None else self.server.actions
            if self.path not in known:
                raise Refusal(404, "there is no such page")
            if content is None:
                self.answer(200, *known[self.path])
            else:
                self.act(known[self.path], content)
        except Refusal as refusal:
            self.say(refusal.status, str(refusal))
        except UserError as error:
            self.say(400, " ".join(str(error).split())[:300])
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                self.say(500, "something went wrong: the terminal of this server says what")
                raise  # Server.handle_error prints it there
            self.say(503, "not enough memory: ask for less")

    do_POST = do_GET

    def read_body(self):
        """The bytes after the headers. They are read before anything is refused, or the answer might be lost."""
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "a request needs its Content-Length")
        if int(lengths[0]) > LARGEST_BODY:
            raise Refusal(413, f"more than {LARGEST_BODY >> 20} MB")
        try:
            content = self.rfile.read(int(lengths[0]))
        except TimeoutError:
            raise Refusal(408, "the request took too long to come") from None
        if len(content) < int(lengths[0]):
            raise ConnectionAbortedError
        return content

    def check_sender(self):
        """Refusal if this may come from another page than ours, or is not said to be JSON."""
        hosts = self.headers.get_all("Host")
        if hosts is None or len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise Refusal(403, "this server is for this machine alone")
        if self.command == "POST":
            if (self.headers.get_all("Origin") != [f"http://{hosts[0]}"]
                    or self.headers.get_all("Sec-Fetch-Site", ["same-origin"]) != ["same-origin"]):
                raise Refusal(403, "only this server's own page may ask for this")
            if self.headers.get_all("Content-Type") != ["application/json"]:
                raise Refusal(415, "a request must be application/json")

    def act(self, action, content):
        """Only one at a time, the reading of its JSON too: so memory is bounded."""
        if not self.server.busy.acquire(blocking=False):
            raise Refusal(429, "another picture is being drawn: wait until it is done")
        self.server.worker = threading.current_thread()
        try:
            try:
                wishes = json.loads(content)
            except (ValueError, RecursionError):
                raise UserError("the request is not JSON") from None
            action(wishes, self.send_line)
        finally:
            self.server.busy.release()

    def send_line(self, line):
        """One line of the answer. It fails, and that ends the action, when the client has gone or takes nothing."""
        if self.server.stopping:
            raise ConnectionAbortedError
        if not self.begun:
            self.begin(200, "application/x-ndjson", {})
            self.begun = True
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def say(self, status, line):
        """{"error": line}: the answer or, if that has begun, its last line."""
        content = json.dumps({"error": line}).encode() + b"\n"
        if self.begun:
            self.wfile.write(content)
        else:
            self.answer(status, "application/json", content)

    def answer(self, status, kind, content):
        self.begin(status, kind, {"Content-Length": str(len(content))})
        self.wfile.write(content)

    def begin(self, status, kind, more):
        self.connection.settimeout(PATIENCE)
        self.send_response(status)
        for name, value in (HEADERS | self.server.policy | {"Content-Type": kind} | more).items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code, message=None, explain=None):
        self.say(code, HTTPStatus(code).phrase)  # the parent's is a page that repeats what was sent

    def version_string(self):
        return "VQ-LCMD"

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingTCPServer):
    """What http.server.ThreadingHTTPServer is, without its look-up of this machine's name. port 0: any free one.

    page: HTML (str) with one <style> and one <script>, and nothing from elsewhere. model: what GET /model says, as
    JSON. actions: {path of a POST: function(JSON, send_line)}, whose answer is lines of JSON.
    """

    daemon_threads = allow_reuse_address = True

    def __init__(self, port, page, model, actions):
        self.pages = {"/": ("text/html; charset=utf-8", page.encode()),
                      "/model": ("application/json", json.dumps(model).encode())}
        self.actions, self.stopping, self.worker = actions, False, None
        self.busy, self.places = threading.Lock(), threading.BoundedSemaphore(MOST_CONNECTIONS)
        rules = ["default-src 'none'", "img-src data:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'",
                 "frame-ancestors 'none'"]
        for kind in ("script", "style"):
            inline = re.search(f"<{kind}>(.*?)</{kind}>", page, re.S)[1].encode()
            rules.append(f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(inline).digest()).decode()}'")
        self.policy = {"Content-Security-Policy": "; ".join(rules)}
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        self.hosts = {name + (f":{self.port}" if self.port != 80 else "") for name in ("127.0.0.1", "localhost")}

    def process_request(self, request, client_address):
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # a client that went away is no error
            super().handle_error(request, client_address)

    def server_close(self):
        """An action that runs ends at its next line, none begins, and its thread comes to an end.

        For a daemon thread that is in PyTorch, if only to free a tensor, when Python ends makes it abort.
        """
        self.stopping = True
        super().server_close()
        self.busy.acquire()
        if self.worker is not None:
            self.worker.join()
