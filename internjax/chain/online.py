"""The deployed model, met as a client meets it: load by concurrent streams, then real questions."""

import statistics
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from internjax.agents.loop import connect
from internjax.errors import UserError

QUESTIONS = (
    "What do bees make?",
    "Name three colors.",
    "Why is the sky blue?",
    "How many days has a week?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is water made of?",
    "Which animal says meow?",
    "What is a triangle?",
    "Tell me a fact about the Moon.",
    "How do birds fly?",
    "What is bread made from?",
    "Name a planet.",
    "What is the opposite of hot?",
    "Who writes books?",
    "What grows in a garden?",
)


@dataclass(frozen=True)
class LoadConfig:
    """How the server is tried.

    Fields:
      streams: concurrent streams; max_tokens: of each answer.
      least_in_flight: streams that must have run at once; least_speedup: throughput of all streams
        over that of one.
    """

    streams: int = 16
    max_tokens: int = 48
    least_in_flight: int = 8
    least_speedup: float = 1.5


@dataclass(frozen=True)
class Stream:
    """One streamed answer: tokens, seconds to the first piece and to the end."""

    tokens: int
    first_seconds: float
    seconds: float


def stream_once(client: Any, model: str, question: str, max_tokens: int) -> Stream:
    """Streams one answer of exactly `max_tokens` tokens and times it."""
    begin, first, usage = time.perf_counter(), None, None
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for chunk in chunks:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begin
        usage = chunk.usage or usage
    if usage is None:
        raise UserError("the server ended a stream without usage: it was cut off.")
    seconds = time.perf_counter() - begin
    return Stream(usage.completion_tokens, first or seconds, seconds)


def try_load(url: str, model: str, cfg: LoadConfig) -> dict[str, Any]:
    """Runs one stream alone, then all at once; returns rates, latencies and what was in flight."""
    client = connect(url)
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(cfg.streams)]
    stream_once(client, model, questions[0], 4)  # compiles what is not compiled yet
    alone = [stream_once(client, model, q, cfg.max_tokens) for q in questions[:2]]
    barrier = threading.Barrier(cfg.streams)

    def one(question: str) -> Stream:
        barrier.wait()
        return stream_once(client, model, question, cfg.max_tokens)

    begin = time.perf_counter()
    with ThreadPoolExecutor(cfg.streams) as pool:
        together = list(pool.map(one, questions))
    seconds = time.perf_counter() - begin
    single = sum(s.tokens for s in alone) / sum(s.seconds for s in alone)
    many = sum(s.tokens for s in together) / seconds
    return {
        "streams": cfg.streams,
        "max_in_flight": counters(url)["max_in_flight"],
        "tokens_per_second_one": single,
        "tokens_per_second_all": many,
        "speedup": many / single,
        "first_token_seconds": [s.first_seconds for s in together],
        "answer_seconds": [s.seconds for s in together],
        "first_token_seconds_median": statistics.median(s.first_seconds for s in together),
    }


def check_load(metrics: dict[str, Any], cfg: LoadConfig) -> str:
    """Returns what falls short, in words; "" when nothing does."""
    short = []
    if metrics["max_in_flight"] < cfg.least_in_flight:
        short.append(
            f"{metrics['max_in_flight']:.0f} streams in flight, {cfg.least_in_flight} asked"
        )
    if metrics["speedup"] < cfg.least_speedup:
        short.append(
            f"{cfg.streams} streams give {metrics['speedup']:.1f} times the throughput of one,"
            f" {cfg.least_speedup} asked"
        )
    return "; ".join(short)


def counters(url: str) -> dict[str, float]:
    """Reads the server's counters."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name.removeprefix("internjax_"): float(value) for name, value in pairs}


def sample_answers(url: str, model: str, questions: Sequence[str]) -> list[tuple[str, str]]:
    """Asks plain questions; returns (question, answer) for people to read."""
    client = connect(url)
    answers = []
    for question in questions:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=40,
            temperature=0,
        )
        answers.append((question, reply.choices[0].message.content or ""))
    return answers
