"""A server of `/v1/completions` that answers at once: to find out what a client can take.

It has no model. A step writes one event to each open stream, as an engine does, and steps follow
one another without a pause, or `--step-ms` apart. Token ids are made from the prompt, so that a
client can be checked; the first token of a prompt may ask for a fault.

    python benchmarks/instant_server.py --port 8100 --processes 4
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import ssl

import uvloop

MODEL = "instant"
VOCAB = 32_000
# First tokens of a prompt that ask for a fault.
BREAKS_OFF, REFUSED, FAILS, TELLS_NO_USAGE, CLOSES = 1, 2, 3, 4, 5


def answer_ids(prompt: list[int], count: int) -> list[int]:
    """The tokens of an answer: they depend on every token of the prompt."""
    first = sum((i + 1) * token for i, token in enumerate(prompt))
    return [1000 + (first + k) % (VOCAB - 2000) for k in range(count)]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(choice: str) -> bytes:
    text = (
        '{"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,'
        f'"model":"{MODEL}","choices":[{{"index":0,"text":"{choice}],"usage":null}}'
    )
    return _chunk(f"data: {text}\n\n".encode())


class _Stream:
    """One answer under way."""

    def __init__(self, transport: asyncio.Transport, body: dict, keeps: bool) -> None:
        prompt, count = body["prompt"], body["max_tokens"]
        self.transport = transport
        self._keeps = keeps
        self._fault = prompt[0]
        self._gives_ids = body.get("return_token_ids", False)
        self._ids = answer_ids(prompt, count)
        self._prompt_tokens = len(prompt)
        self._next = 0
        ending = b"" if keeps else b"Connection: close\r\n"
        transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n%b\r\n" % ending
        )

    def step(self) -> bool:
        """Write the next event; whether there are more."""
        if self.transport.is_closing():
            return False
        k, self._next = self._next, self._next + 1
        if k == 3 and self._fault == BREAKS_OFF:
            self.transport.abort()
            return False
        if k == 3 and self._fault == FAILS:
            self._end(_chunk(b'data: {"error": {"message": "the engine\\nhas failed"}}\n\n'))
            return False
        if k < len(self._ids):
            ids = f',"token_ids":[{self._ids[k]}]' if self._gives_ids else ""
            reason = '"length"' if k == len(self._ids) - 1 else "null"
            self.transport.write(_event(f' word","logprobs":null,"finish_reason":{reason}{ids}}}'))
            return True
        usage = json.dumps(
            {"prompt_tokens": self._prompt_tokens, "completion_tokens": len(self._ids)}
        )
        last = (
            b""
            if self._fault == TELLS_NO_USAGE
            else _chunk(f'data: {{"choices":[],"usage":{usage}}}\n\n'.encode())
        )
        self._end(last)
        return False

    def _end(self, last: bytes) -> None:
        self.transport.write(last + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        if not self._keeps:
            self.transport.close()


class _Server:
    def __init__(self, step_s: float, gives_ids: bool, tiers: list[dict]) -> None:
        self.gives_ids = gives_ids
        self.tiers = tiers
        self._step_s = step_s
        self._streams: list[_Stream] = []
        self._loop = asyncio.get_running_loop()

    def add(self, stream: _Stream) -> None:
        self._streams.append(stream)
        if len(self._streams) == 1:
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        self._streams = [stream for stream in self._streams if stream.step()]
        if self._streams:
            self._loop.call_later(self._step_s, self._step)


class _Connection(asyncio.Protocol):
    def __init__(self, server: _Server) -> None:
        self._server = server
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, rest = self._buffer.split(b"\r\n\r\n", 1)
            size = 0
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    size = int(line[15:])
            if len(rest) < size:
                return
            body, self._buffer = rest[:size], rest[size:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        path = head.split(b" ", 2)[1].decode()
        if path == "/v1/models":
            return self._json(200, {"data": [{"id": MODEL}]})
        if path == "/status.json":
            tiers = self._server.tiers
            shown = tiers.pop(0) if len(tiers) > 1 else (tiers or [None])[0]
            found = {"engine": {"tiers": [shown]}} if shown else {"error": "no such page"}
            return self._json(200 if shown else 404, found)
        asked = json.loads(body)
        fault = asked["prompt"][0]
        if asked.get("return_token_ids") and not self._server.gives_ids:
            return self._json(400, {"error": {"message": "return_token_ids is not known"}})
        if fault == REFUSED:
            return self._json(400, {"error": {"message": "the prompt is\ntoo long"}})
        if not asked.get("stream"):
            choice = {"index": 0, "text": "x", "finish_reason": "length"}
            if asked.get("return_token_ids"):
                choice["token_ids"] = answer_ids(asked["prompt"], asked["max_tokens"])
            return self._json(200, {"choices": [choice]})
        self._server.add(_Stream(self._transport, asked, keeps=fault != CLOSES))

    def _json(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self._transport.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(content), content)
        )


async def _serve(listener: socket.socket, options: argparse.Namespace) -> None:
    tiers = json.loads(options.host_tiers)
    server = _Server(options.step_ms / 1e3, not options.no_ids, tiers)
    loop = asyncio.get_running_loop()
    tls = None
    if options.certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options.certificate)
    running = await loop.create_server(lambda: _Connection(server), sock=listener, ssl=tls)
    await running.serve_forever()


def _process(port: int, options: argparse.Namespace) -> None:
    uvloop.run(_serve(_listen(port), options))


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    return listener


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes one that is free, and says it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--no-ids", action="store_true", help="refuse return_token_ids")
    parser.add_argument("--host-tiers", default="[]", help="what /status.json shows, one by one")
    parser.add_argument("--certificate", help="a .pem file with its key: serve https")
    options = parser.parse_args()
    first = _listen(options.port)
    port = first.getsockname()[1]
    for _ in range(options.processes - 1):
        multiprocessing.get_context("spawn").Process(
            target=_process, args=(port, options), daemon=True
        ).start()
    print(port, flush=True)
    uvloop.run(_serve(first, options))


if __name__ == "__main__":
    main()
