"""A server on a Ray cluster of this machine, driven as its test asks; prints one JSON object.

python -m tests.ray_serving MODEL_FOLDER
"""

import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import ray
from ray import serve

from internjax.experiments.serve_ray import application


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def streamed(client: httpx2.Client) -> list[str]:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "stream": True, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        return [line for line in answer.iter_lines() if line.startswith("data: ")]


def replica_pids() -> set[int]:
    """Processes of the replicas, which Ray names in their command lines."""
    found = set()
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/cmdline") as file:
                if name.isdigit() and "ServeReplica" in file.read():
                    found.add(int(name))
        except OSError:
            continue  # not a process, or it has just ended
    return found


def drive(client: httpx2.Client) -> dict:
    """Asks, kills a replica, asks until Ray has another one."""
    found = {"models": client.get("/v1/models").json()["data"][0]["id"]}
    found["no_key"] = client.get("/v1/models", headers={"authorization": ""}).status_code
    with ThreadPoolExecutor() as pool:
        found["streams"] = list(pool.map(lambda _: streamed(client)[-1], range(8)))
    session = client.post("/v1/chat/interactive", json={"session_id": 1, "prompt": "x"})
    found["session"] = (session.status_code, session.json()["error"]["code"])
    before = replica_pids()
    os.kill(min(before), signal.SIGKILL)
    deadline = time.monotonic() + 90
    while len(replica_pids() - {min(before)}) < len(before) and time.monotonic() < deadline:
        time.sleep(0.5)
    while client.get("/v1/models").status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.5)
    found["replicas"] = (len(before), len(replica_pids()))
    found["after"] = streamed(client)[-1]
    return found


def main(folder: str) -> None:
    port = free_port()
    given = {"model": folder, "serve.replicas": 2, "serve.name": "tiny", "serve.api_key": "secret"}
    given |= {"serve.engine.slots": 4, "serve.engine.context": 512, "cpus": 0.5}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(given), route_prefix="/")
    headers = {"authorization": "Bearer secret"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
        print(json.dumps(drive(client)), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
