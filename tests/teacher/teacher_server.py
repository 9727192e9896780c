"""An OpenAI-compatible endpoint that misbehaves, for tests: `python teacher_server.py KEY`.

It listens on a free port of the loopback interface, prints the port, and ends when its standard
input does.  `POST /control` sets its mode, a JSON object:

  golds: SHA-256 of a prompt -> [fact id, gold label]
  behaviours: behaviour -> weight.  A fact's n-th request gets one as a function of both.
  lasting: behaviour -> weight of facts that always get it ("" for none).
  reply: {"status", "body", "headers"} for every request, instead of all this.
  usage: false leaves it out of the answers.
  refuse: name of a parameter that is not supported.

`GET /log` gives the requests so far, with `tokens` where an answer was billed.
"""

import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = sys.argv[1] if len(sys.argv) > 1 else ""
STEPS = "\n".join(f"Step {k}: The crop shows 'this', number {k}." for k in range(1, 7))
STATE = {"mode": {}, "log": [], "seen": {}}
LOCK = threading.Lock()


def answer(behaviour, label):
    """The text and the finish reason that a behaviour gives."""
    good = f"<think>\n{STEPS}\n</think>\n<answer>{label}</answer>"
    return {
        "fenced": (f"\n```xml\n{good}\n```\n ", "stop"),
        "wrong": (good.replace(f">{label}<", "></label/that/isnot<"), "stop"),
        "other": (good.replace(f">{label}<", ">/misc/misc/other<"), "stop"),
        "leak": (good.replace("number 3", "and the given label fits"), "stop"),
        "format": (good.replace("Step 4", "Step four"), "stop"),
        "special": (good.replace("number 2", "<|im_end|>"), "stop"),
        "echo": (good.replace("number 5", f"which is {KEY}"), "stop"),
        "length": (good[:150], "length"),
        "filter": ("", "content_filter"),
        "empty": (" \n", "stop"),
    }.get(behaviour, (good, "stop"))


def choose_behaviour(weights, *key):
    """A draw by weight that depends on the key alone."""
    names = sorted(weights)
    point = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") / 2**64
    point *= sum(weights.values())
    for name in names:
        point -= weights[name]
        if point < 0:
            return name
    return names[-1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def send(self, status, body, headers=(), whole=True):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        said = {"Content-Type": "application/json", "Content-Length": len(data), **dict(headers)}
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {said[name]}" for name in said)]
        data = data if whole else data[: len(data) // 2]
        self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        if not whole:
            self.close_connection = True

    def error(self, status, message, code=None, headers=(), **more):
        self.send(status, {"error": {"message": message, "code": code, **more}}, headers)

    def do_GET(self):
        with LOCK:
            self.send(200, STATE["log"])

    def do_POST(self):
        try:
            if self.path == "/control":
                with LOCK:
                    STATE.update(mode=self.body(), log=[], seen={})
                self.send(200, {})
            else:
                self.complete(self.body())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def complete(self, body):
        mode = STATE["mode"]
        *images, text = body["messages"][0]["content"]
        starts = [
            image["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/") for image in images
        ]
        assert starts == [True, True]
        fact, label = mode["golds"][hashlib.sha256(text["text"].encode()).hexdigest()]
        with LOCK:
            number = STATE["seen"][fact] = STATE["seen"].get(fact, 0) + 1
            limits = [name for name in sorted(body) if "max" in name]
            entry = {"fact": fact, "limits": limits, "at": time.monotonic()}
            STATE["log"].append(entry)
        if "reply" in mode:
            reply = mode["reply"]
            self.send(reply["status"], reply["body"], reply.get("headers", {}))
            return
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.error(401, f"Incorrect API key provided: {self.headers['Authorization']}")
            return
        if mode.get("refuse") in body:
            name = mode["refuse"]
            self.error(400, f"Unsupported parameter: {name}", "unsupported_parameter", param=name)
            return
        lasting = choose_behaviour(mode.get("lasting", {"": 1}), "lasting", fact)
        behaviour = entry["behaviour"] = lasting or choose_behaviour(
            mode["behaviours"], fact, number
        )
        self.meet(behaviour, label, entry, len(text["text"]), mode)

    def meet(self, behaviour, label, entry, length, mode):
        time.sleep({"slow": 0.4}.get(behaviour, 0.01 + length % 7 / 200))
        if behaviour == "busy":
            self.error(429, f"Slow down, {KEY}", headers={"Retry-After": "0.05"})
            return
        if behaviour == "broken":
            self.error(500, f"Out of order, {KEY}", headers={"retry-after-ms": "100"})
            return
        if behaviour == "blocked":
            self.error(400, "The response was filtered", "content_filter")
            return
        if behaviour == "unfit":
            self.error(400, f"Invalid image, {KEY}", "invalid_image")
            return
        text, finish = answer(behaviour, label)
        message = {"role": "assistant", "content": text}
        if behaviour == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "teacher",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        }
        tokens = {"prompt_tokens": 700 + length // 4, "completion_tokens": 40 + len(text) // 4}
        if mode.get("usage", True):
            reply["usage"] = {**tokens, "total_tokens": sum(tokens.values())}
        # Billed from here on, whether or not it arrives, or somebody still listens.
        entry.update(text=text, tokens=[*tokens.values()])
        time.sleep(2.0 * (behaviour == "late"))
        self.send(200, reply, whole=behaviour != "cut")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        # A client that was killed; anything else shows as a request without an answer.
        pass


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)
