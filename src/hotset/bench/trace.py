"""Traces in the format of Mooncake (Qin et al., FAST 2025): arrival, lengths, hashes of blocks.

A line is a request: `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one id for
each 512 tokens of the prompt; equal ids are equal blocks after equal beginnings. The text itself
is not published: tokens are drawn from a generator seeded by the block's id, so that prompts share
just the beginnings that those of the trace shared.
"""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hotset.bench.workload import Session, Spec, Turn, Work, token_range
from hotset.errors import ConfigError
from hotset.foreign_text import parse_json

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]

    @property
    def conversation(self) -> tuple[int, ...]:
        """What requests of one conversation have in common: all share the first block's id."""
        return self.hash_ids[:2]


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a trace file, by time.

    Raises:
        ConfigError: it cannot be read, or a line is not as expected; says which.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"trace {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    requests = [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not requests:
        raise ConfigError(f"trace {path} has no requests")
    return sorted(requests, key=lambda request: request.arrival_s)


def _parse(line: str, where: str) -> TraceRequest:
    expected = "expected an object with timestamp, input_length, output_length and hash_ids"
    try:
        fields: dict[str, Any] = parse_json(line)
        ids = tuple(int(i) for i in fields["hash_ids"])
        request = TraceRequest(
            arrival_s=float(fields["timestamp"]) / 1e3,
            input_tokens=int(fields["input_length"]),
            output_tokens=max(1, int(fields["output_length"])),
            hash_ids=ids,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: {expected}, one a line") from error
    blocks = -(-request.input_tokens // BLOCK_TOKENS)
    if request.input_tokens < 1 or len(ids) != blocks or not request.arrival_s >= 0:
        raise ConfigError(
            f"{where}: {request.input_tokens} input tokens at {request.arrival_s} s with "
            f"{len(ids)} hash_ids; {expected}, one id for each {BLOCK_TOKENS} tokens"
        )
    return request


def trace_work(spec: Spec, vocab_size: int, *, max_context: int | None) -> Work:
    """The requests of a trace, each at its time; those too long for the model are left out.

    `time_scale` multiplies the times, `length_scale` all lengths. `max_sessions` picks that
    number of conversations at random, with all their requests; the time before the first is cut
    off.

    Raises:
        ConfigError: the trace cannot be read, or nothing is left of it.
    """
    assert spec.trace is not None
    requests = read_trace(spec.trace)
    conversations = list(dict.fromkeys(request.conversation for request in requests))
    if spec.max_sessions is not None and spec.max_sessions < len(conversations):
        chosen = set(random.Random(spec.seed).sample(conversations, spec.max_sessions))
        requests = [request for request in requests if request.conversation in chosen]
    block = max(1, round(BLOCK_TOKENS * spec.length_scale))
    token_ids = token_range(vocab_size)
    start_s = requests[0].arrival_s
    turns_of: dict[tuple[int, ...], int] = {}
    seen: set[int] = set()
    sessions: list[Session] = []
    num_skipped = kv_tokens = 0
    for request in requests:
        last = request.input_tokens - (len(request.hash_ids) - 1) * BLOCK_TOKENS
        length = (len(request.hash_ids) - 1) * block + max(1, round(last * spec.length_scale))
        output = max(1, round(request.output_tokens * spec.length_scale))
        if max_context is not None and length + output > max_context:
            num_skipped += 1
            continue
        number = turns_of.get(request.conversation, 0)
        turns_of[request.conversation] = number + 1
        # A block is the same one only where it is whole in both prompts.
        whole = request.hash_ids[: length // block]
        known = next((i for i, h in enumerate(whole) if h not in seen), len(whole)) * block
        seen.update(whole)
        kv_tokens += length + output - known
        make = partial(_block_tokens, request.hash_ids, length, block, token_ids, spec.seed)
        turn = Turn(make, length, output, known_tokens=min(known, length - 1))
        arrival_s = (request.arrival_s - start_s) * spec.time_scale
        sessions.append(Session((turn,), arrival_s, first_turn=number))
    if not sessions:
        raise ConfigError(
            f"all {num_skipped} requests of trace {spec.trace} are longer than the "
            f"{max_context} tokens served here; give length_scale below {spec.length_scale:g}"
        )
    skipped = f", {num_skipped} too long and left out" if num_skipped else ""
    return Work(
        f"trace: {len(sessions)} requests of {len(turns_of)} conversations over "
        f"{sessions[-1].arrival_s:.0f} s{skipped}",
        tuple(sessions),
        kv_tokens,
        is_open_loop=True,
        num_skipped=num_skipped,
    )


def _block_tokens(
    hash_ids: tuple[int, ...], length: int, block: int, token_ids: tuple[int, int], seed: int
) -> list[int]:
    tokens: list[int] = []
    for hash_id in hash_ids:
        rng = random.Random(f"{seed}/{hash_id}")
        tokens += rng.choices(range(*token_ids), k=min(block, length - len(tokens)))
    return tokens
