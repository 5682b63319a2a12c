"""Does a server stay well under mixed load? Memory, counters and the cache, over time.

    .venv/bin/python benchmarks/soak.py [MODEL] [minutes=30] [workers=8] [serve.KEY=VALUE ...]

Starts `internjax serve MODEL` (`tiny`: a random model made here; the default is
smollm2-135m-instruct) and asks it over HTTP, until the time is over, for everything at once: whole
and streamed answers, short and long prompts, streams that are dropped after a few tokens, grammars,
tools, log-probabilities, bodies that are no request. `seconds=120` is the short form. A line every
`every` seconds shows what the server's processes hold in memory and what /metrics counts.

It passes (exit code 0) when no answer was 5xx or later than 60 s, what was asked for came (streams
end, grammars parse), legal requests were not refused, memory is flat (after a third of the time as
warm-up, both the trend and the last third's median above the second's allow at most 2% + 8 MiB),
and afterwards nothing is in flight, no block of the cache is held, and the server ends by itself on
SIGTERM.
"""

import asyncio
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

LATEST_SECONDS = 60
LEAST_CONTEXT = 1024  # tools are told in a prompt of 700 bytes
WARM_UP = 1 / 3  # of the time; what compiles and fills caches is not judged
SHOWN = ("in_flight", "waiting", "blocks", "recompil", "preempted", "restarts")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}
SCHEMA |= {"required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
ILLEGAL = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"model":"soak"}',
    b'{"model":"other","prompt":"x"}',
    b'{"model":"soak","prompt":"x","max_tokens":-1}',
    b'{"model":"soak","prompt":"x","temperature":"hot"}',
    b'{"model":"soak","prompt":[-1,99999999]}',
    b'{"model":"soak","prompt":"x","unknown_field":1}',
    b'{"model":"soak","messages":[{"role":"robot","content":"x"}]}',
    b'{"model":"soak","prompt":"' + b"word " * 60_000 + b'"}',
    b"[" * 5000,
)


class Wrong(Exception):
    """An answer that is not what was asked for."""


@dataclass
class Soak:
    """One run.

    Fields:
      context: tokens that a request may have, prompt and answer.
      samples: (seconds, MiB of the server's processes); seen: answers by case and status.
    """

    client: httpx2.AsyncClient
    pid: int
    context: int
    samples: list[tuple[float, float]] = field(default_factory=list)
    seen: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


# What is asked for ---------------------------------------------------------------------------


async def post(soak: Soak, case: str, path: str, body: dict | bytes, legal: bool = True) -> dict:
    """Asks, books the status, and returns the answer of a request that should succeed."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = await soak.client.post(path, content=content, headers=headers)
    soak.seen[case, answer.status_code] += 1
    fine = (200,) if legal else range(400, 500)
    if answer.status_code not in fine and answer.status_code != 429:
        raise Wrong(f"status {answer.status_code}: {answer.text[:200]}")
    return answer.json()


async def stream(soak: Soak, case: str, path: str, body: dict, leave_after: int = 0) -> None:
    """Reads a stream to its end, or leaves it after a few events."""
    events = []
    async with soak.client.stream("POST", path, json=body | {"stream": True}) as answer:
        soak.seen[case, answer.status_code] += 1
        if answer.status_code == 429:
            return
        if answer.status_code != 200:
            raise Wrong(f"status {answer.status_code}: {(await answer.aread())[:200]}")
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if leave_after and len(events) >= leave_after:
                    return
    if events[-1:] != ["[DONE]"] or any(json.loads(e).get("error") for e in events[:-1]):
        raise Wrong(f"a stream of {len(events)} events ended with {events[-2:]}")


def text(rng: random.Random, tokens: int) -> str:
    """About so many tokens: never more, for the tiny model's are bytes."""
    words = ["the", "model", "a", "river", "of", "numbers", "says", "why", "not", "stone", "light"]
    return " ".join(rng.choice(words) for _ in range(tokens))[:tokens]


def chat(rng: random.Random, words: int, **fields) -> dict:
    messages = [{"role": "user", "content": text(rng, words)}]
    return {"model": "soak", "messages": messages, "max_tokens": rng.randint(1, 48)} | fields


async def one(soak: Soak, rng: random.Random, case: str) -> None:
    """Does one case."""
    chats, raw = "/v1/chat/completions", "/v1/completions"
    sampling = {"temperature": rng.choice([0, 0.7, 1.3]), "seed": rng.randint(0, 99)}
    long = soak.context // 2
    match case:
        case "chat":
            await post(soak, case, chats, chat(rng, 20, **sampling))
        case "stream":
            await stream(soak, case, chats, chat(rng, 40, **sampling))
        case "leave":
            body = chat(rng, 10, max_tokens=min(200, long), ignore_eos=True)
            await stream(soak, case, chats, body, leave_after=rng.randint(1, 9))
        case "long":
            body = {"model": "soak", "prompt": text(rng, long), "max_tokens": 16}
            await stream(soak, case, raw, body | sampling)
        case "logprobs":
            body = {"model": "soak", "prompt": text(rng, 30), "max_tokens": 4, "logprobs": 2}
            await post(soak, case, raw, body | {"echo": True, "n": 2} | sampling)
        case "grammar":
            form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
            answer = await post(
                soak, case, chats, chat(rng, 8, response_format=form, max_tokens=48)
            )
            for choice in answer.get("choices", ()):
                if choice["finish_reason"] == "stop":
                    json.loads(choice["message"]["content"])
        case "tools":
            body = chat(rng, 8, tools=[TOOL], tool_choice="required", max_tokens=64)
            answer = await post(soak, case, chats, body)
            for choice in answer.get("choices", ()):
                for call in choice["message"].get("tool_calls") or ():
                    json.loads(call["function"]["arguments"])
        case "illegal":
            await post(soak, case, rng.choice([chats, raw]), rng.choice(ILLEGAL), legal=False)


CASES = {"chat": 4, "stream": 4, "leave": 4, "long": 2, "logprobs": 1}
CASES |= {"grammar": 2, "tools": 1, "illegal": 2}


async def work(soak: Soak, seed: int, until: float) -> None:
    """Asks for one thing after another until the time is over."""
    rng = random.Random(seed)
    while time.monotonic() < until:
        (case,) = rng.choices(list(CASES), CASES.values())
        try:
            async with asyncio.timeout(LATEST_SECONDS):
                await one(soak, rng, case)
        except (Wrong, TimeoutError, httpx2.TransportError, ValueError) as error:
            soak.wrong.append(f"{case}: {type(error).__name__}: {error}")


async def warm_up(soak: Soak) -> None:
    """Does everything at once a few times: what threads and caches keep for good, they take now.

    A thread that has once read the longest body keeps memory for the next one (tens of MiB).
    """
    longest = max(ILLEGAL, key=len)
    for _ in range(3):
        big = [post(soak, "illegal", "/v1/completions", longest, legal=False) for _ in range(16)]
        await asyncio.gather(*big, *(one(soak, random.Random(c), c) for c in CASES))


# What is watched -----------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all below it."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(c) for task in tasks for c in task.read_text().split()]
    return [pid, *(p for child in children for p in family(child))]


def resident_mib(pid: int) -> float:
    """Memory that a process and all below it hold."""
    page = os.sysconf("SC_PAGE_SIZE")
    pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in family(pid)]
    return sum(pages) * page / 2**20


async def metrics(soak: Soak) -> dict[str, float]:
    """The server's numbers, those of all replicas and labels added up."""
    found: dict[str, float] = {}
    for line in (await soak.client.get("/metrics", timeout=30)).text.splitlines():
        sample = re.match(r"internjax_(\w+?)(?:_total)?(?:\{.*\})? (\S+)$", line)
        if sample:
            found[sample[1]] = found.get(sample[1], 0.0) + float(sample[2])
    return found


async def watch(soak: Soak, start: float, every: float) -> None:
    """Prints a line from time to time, until cancelled."""
    before = 0
    while True:
        await asyncio.sleep(every)
        now = time.monotonic() - start
        soak.samples.append((now, resident_mib(soak.pid)))
        asked, numbers = sum(soak.seen.values()), await metrics(soak)
        shown = {n: v for n, v in numbers.items() if any(word in n for word in SHOWN)}
        print(
            f"{now:6.0f} s  {soak.samples[-1][1]:8.1f} MiB  {asked:7d} requests"
            f"  {(asked - before) / every:5.1f}/s  {len(soak.wrong)} wrong  "
            + " ".join(f"{n}={v:g}" for n, v in shown.items()),
            flush=True,
        )
        before = asked


async def idle(soak: Soak) -> dict[str, float]:
    """Waits until nothing is in flight, at most 20 s; returns the numbers then."""
    for _ in range(100):
        numbers = await metrics(soak)
        if not numbers["in_flight"]:
            break
        await asyncio.sleep(0.2)
    return numbers


def growth(samples: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Returns MiB after the warm-up, MiB at the end, and the slope between in MiB per hour."""
    last = samples[-1][0]
    warm = [s for s in samples if s[0] > WARM_UP * last]
    middle = [m for t, m in warm if t <= 2 * WARM_UP * last]
    end = [m for t, m in warm if t > 2 * WARM_UP * last]
    pairs = itertools.combinations(warm, 2)  # Theil and Sen's slope: peaks do not tilt it
    slope = statistics.median((m - n) / (t - s) for (s, n), (t, m) in pairs)
    return statistics.median(middle), statistics.median(end), slope * 3600


def verdict(soak: Soak, numbers: dict[str, float]) -> list[str]:
    """Lists what is wrong after a run."""
    first, last, slope = growth(soak.samples)
    print(f"\nmemory: {first:.1f} MiB after the warm-up, {last:.1f} at the end", end="")
    print(f" ({last - first:+.1f}; slope {slope:+.1f} MiB per hour)")
    for case in CASES:
        counts = {s: n for (c, s), n in sorted(soak.seen.items()) if c == case}
        print(f"  {case:9s}", *(f"{n} x {status}" for status, n in counts.items()))
    faults = [f"{n} x {what}" for what, n in Counter(soak.wrong).most_common(10)]
    allowed = 0.02 * first + 8
    trend = slope / 3600 * (1 - WARM_UP) * soak.samples[-1][0]
    if last - first > allowed or trend > allowed:
        faults.append(f"memory grew by {max(last - first, trend):.1f} MiB")
    if numbers["in_flight"]:
        faults.append(f"{numbers['in_flight']:g} requests are in flight though nobody asks")
    held = {n: v for n, v in numbers.items() if "blocks" in n and "held" in n and v}
    if held:
        faults.append(f"blocks are held though nobody asks: {held}")
    return faults


# The run -------------------------------------------------------------------------------------


def tiny_folder(folder: str) -> str:
    """Writes a random model with a byte tokenizer."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from internjax.models.native import save_native
    from tests.fakes import byte_tokenizer, tiny_model

    path = Path(folder) / "smollm2-tiny"
    cfg, params = tiny_model(max_context=1024)
    save_native(path, cfg, params, byte_tokenizer())
    return str(path)


async def soaked(url: str, pid: int, seconds: float, workers: int, every: float) -> list[str]:
    """Loads a server for so long; returns what is wrong with it."""
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.2)
        (card,) = (await client.get("/v1/models")).json()["data"]
        soak = Soak(client, pid, card["max_model_len"])
        if soak.context < LEAST_CONTEXT:
            raise SystemExit(f"context={soak.context}: the load needs {LEAST_CONTEXT}")
        await warm_up(soak)
        start = time.monotonic()
        watching = asyncio.create_task(watch(soak, start, every))
        await asyncio.gather(*(work(soak, i, start + seconds) for i in range(workers)))
        watching.cancel()
        return verdict(soak, await idle(soak))


def served_and_soaked(
    command: list[str], log: Path, seconds: float, workers: int, every: float
) -> list[str]:
    """Starts a server, soaks it and stops it; returns what is wrong."""
    with log.open("w") as told:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
    try:
        url = re.search(r"(http://\S+)/v1", server.stdout.readline())
        if not url:
            return ["the server did not start"]
        faults = asyncio.run(soaked(url[1], server.pid, seconds, workers, every))
        server.send_signal(signal.SIGTERM)
        if (code := server.wait(60)) != 0:
            faults.append(f"the server ended with exit code {code}")
        return faults
    finally:
        server.kill()
        server.wait()


def main(argv: list[str]) -> int:
    given = dict(a.split("=", 1) for a in argv if "=" in a)
    names = [a for a in argv if "=" not in a]
    serve = [f"{k}={v}" for k, v in given.items() if k.startswith("serve.") or k == "dtype"]
    own = {k: float(v) for k, v in given.items() if k in ("minutes", "seconds", "workers", "every")}
    if len(names) > 1 or len(serve) + len(own) != len(given):
        print(__doc__, file=sys.stderr)
        return 2
    seconds = own.get("seconds", 60 * own.get("minutes", 30))
    every, workers = own.get("every", seconds / 30), int(own.get("workers", 8))
    with tempfile.TemporaryDirectory() as folder:
        model = names[0] if names else "smollm2-135m-instruct"
        path = tiny_folder(folder) if model == "tiny" else model
        command = [sys.executable, "-m", "internjax.cli", "serve", path, "serve.port=0"]
        command += ["serve.name=soak", "serve.warmup=true", *serve]
        print(" ".join(command[3:]), flush=True)
        log = Path(folder) / "log"
        faults = served_and_soaked(command, log, seconds, workers, every)
        if faults:  # what the server told, without the line of each request
            told = [line for line in log.read_text().splitlines() if not line.startswith("{")]
            print("\n".join(told[-30:]), file=sys.stderr)
    print("\n".join(f"FAULT {fault}" for fault in faults) or "PASSED", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
