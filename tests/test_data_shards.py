"""Token shards: what was written is read, what is damaged is refused, half is never whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.data.files import PARTIAL
from internjax.data.shards import TokenShards, write_shards
from internjax.data.store import open_store
from internjax.errors import Corrupt, Missing, UserError

HASH = "a" * 64
ROOT = Path(__file__).resolve().parent.parent


def rows(lists: list[list[int]]) -> list:
    return [(f"d{i}", np.array(ids, dtype=np.uint32), 10 * i) for i, ids in enumerate(lists)]


def write(path: Path, lists: list[list[int]], **options) -> dict:
    return write_shards(path, rows(lists), **{"tokenizer_hash": HASH, "vocab_size": 300} | options)


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.lists(st.integers(0, 299), max_size=9), max_size=12),
    st.integers(1, 20),
    st.sampled_from([300, 65536, 65537]),
)
def test_what_was_written_is_read(tmp_path_factory, lists, shard_tokens: int, vocab_size: int):
    path = tmp_path_factory.mktemp("shards") / "s"
    write(path, lists, shard_tokens=shard_tokens, vocab_size=vocab_size)
    shards = TokenShards(path, tokenizer_hash=HASH, verify=True)
    assert [ids.tolist() for ids in shards] == lists
    assert shards.num_tokens == sum(map(len, lists)) == shards.lengths().sum()
    assert shards.num_bytes == sum(10 * i for i in range(len(lists)))
    assert [d["id"] for d in shards.documents()] == [f"d{i}" for i in range(len(lists))]
    assert shards.header["dtype"] == ("<u2" if vocab_size <= 65536 else "<u4")
    if lists:
        assert shards[-1].tolist() == lists[-1]
    with pytest.raises(IndexError):
        shards[len(lists)]


def test_documents_cannot_be_changed_and_ids_must_fit(tmp_path: Path):
    write(tmp_path / "s", [[1, 2]])
    with pytest.raises(ValueError, match="read-only"):
        TokenShards(tmp_path / "s")[0][0] = 7
    with pytest.raises(UserError, match=r"d1: a token id lies outside 0\.\.299"):
        write(tmp_path / "t", [[1], [300]])
    assert not (tmp_path / "t").exists()


def test_the_same_rows_give_the_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        write(tmp_path / name, [[1, 2], [3]])
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_another_tokenizer_is_refused(tmp_path: Path):
    write(tmp_path / "s", [[1]])
    with pytest.raises(UserError, match=r"made with tokenizer aaaaaaaaaaaa, .* bbbbbbbbbbbb"):
        TokenShards(tmp_path / "s", tokenizer_hash="b" * 64)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tokens-00000.bin", lambda b: b[:-1], "its header says 10"),
        ("tokens-00000.bin", lambda b: b + b"\0", "has 11 bytes"),
        ("tokens-00000.bin", None, "is missing"),
        ("tokens-00000.bin", lambda b: b"\x09" + b[1:], "SHA-256"),
        ("tokens-00000.idx", lambda b: b[:8], "has 8 bytes"),
        ("tokens-00000.idx", lambda b: b[:8] + b"\xff" * 8 + b[16:], "offsets do not rise"),
        ("header.json", lambda b: b[:20], "is damaged"),
        ("header.json", lambda b: b"{}", "not a header"),
        ("header.json", lambda b: b.replace(b'"version": 1', b'"version": 9'), "version 9"),
    ],
)
def test_damage_is_refused(tmp_path: Path, name: str, change, words: str):
    write(tmp_path / "s", [[1, 2, 3], [4, 5]])
    file = tmp_path / "s" / name
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    with pytest.raises((Corrupt, UserError), match=words):
        TokenShards(tmp_path / "s", verify=True)


def test_no_shards_there(tmp_path: Path):
    with pytest.raises(Missing, match="holds no token shards"):
        TokenShards(tmp_path)


# One interpreter, forked for every step: importing NumPy forty times would cost a minute.
KILL = """
import json, os, signal, sys
import numpy as np
from pathlib import Path
from internjax.data.shards import write_shards

def deadly(call):
    def wrapped(*a, **k):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*a, **k)
    return wrapped

def write(path, value):
    rows = [(f"d{value}", np.full(100, value, dtype=np.uint32), 5)] * 3
    write_shards(path, rows, tokenizer_hash="n" * 64, vocab_size=300)

codes = []
for step in range(60):
    path = Path(sys.argv[1]) / str(step) / "s"
    if sys.argv[2] == "old":
        write(path, 1)
    child = os.fork()
    if not child:
        left = step
        for name in ("fsync", "replace", "rename", "open"):
            setattr(os, name, deadly(getattr(os, name)))
        write(path, 2)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if codes[-1] == 0:
        break
print(json.dumps(codes))
"""


@pytest.mark.parametrize("before", ["old", "none"])
def test_a_kill_at_any_step_leaves_old_or_new_or_nothing(tmp_path: Path, before: str):
    """SIGKILL before each system call that makes files durable or gives them names."""
    out = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), before],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    ).stdout
    codes = json.loads(out)
    assert len(codes) > 10 and codes[-1] == 0 and set(codes[:-1]) == {-signal.SIGKILL}
    seen = set()
    for step in range(len(codes)):
        path = tmp_path / str(step) / "s"
        # verify=True raises if this is half a folder
        seen.add(int(TokenShards(path, verify=True)[0][0]) if path.exists() else "nothing")
        write(path, [[7]])  # the next writer is not disturbed, and clears what was left
        assert TokenShards(path, verify=True)[0].tolist() == [7]
        assert not list(path.parent.glob(f"{PARTIAL}*"))
    assert seen >= ({1, 2} if before == "old" else {"nothing", 2})


# --- masks, and files behind an address -----------------------------------------------------------


def test_negative_ids_are_read_as_ids_that_are_not_learned(tmp_path: Path):
    """Id 0 has no negative, so it is never learned: InternEvo's rule."""
    rows = [("a", np.array([5, -7, 0]), 1), ("b", np.array([-299]), 1)]
    header = write_shards(
        tmp_path / "s", rows, tokenizer_hash=HASH, vocab_size=300, masked=True, shard_tokens=2
    )
    assert header["version"] == 2, "an older reader must not take it for shards without a mask"
    shards = TokenShards(tmp_path / "s", verify=True)
    assert shards.masked and [ids.tolist() for ids in shards] == [[5, 7, 0], [299]]
    assert shards.read_mask(0, 4).tolist() == [1, 0, 0, 0]
    with pytest.raises(UserError, match=r"b: a token id lies outside -299\.\.299"):
        write_shards(
            tmp_path / "t", [("b", np.array([-300]), 1)], tokenizer_hash=HASH, vocab_size=300,
            masked=True,
        )  # fmt: skip
    write(tmp_path / "plain", [[1, 2]])
    assert TokenShards(tmp_path / "plain").read_mask(0, 2).tolist() == [1, 1]
    file = tmp_path / "s" / "tokens-00000.mask"
    file.write_bytes(b"\0\0\0")
    with pytest.raises(Corrupt, match="SHA-256"):
        TokenShards(tmp_path / "s", verify=True)
    file.write_bytes(b"\0")
    with pytest.raises(Corrupt, match=r"mask has 1 bytes, its header says 3"):
        TokenShards(tmp_path / "s")


def test_the_stream_runs_across_shards(tmp_path: Path):
    write(tmp_path / "s", [[1, 2], [], [3, 4, 5], [6]], shard_tokens=2)
    shards = TokenShards(tmp_path / "s")
    assert len(shards.header["shards"]) == 3
    for start in range(7):
        for stop in range(start, 7):
            assert shards.read(start, stop).tolist() == [1, 2, 3, 4, 5, 6][start:stop]
    assert shards.offsets.tolist() == [0, 2, 2, 5, 6]


def in_memory(folder: Path) -> str:
    """Copies a folder into TensorStore's memory; returns its address."""
    store = open_store(f"memory://bucket/{folder.name}")
    for file in folder.iterdir():
        store.write(file.name, file.read_bytes()).result()
    return f"memory://bucket/{folder.name}"


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_an_address_reads_as_the_folder_does(tmp_path: Path, scheme: str):
    lists = [[1, 2], [], [3, 4, 5], [6]]
    write(tmp_path / f"s-{scheme}", lists, shard_tokens=2)
    folder = tmp_path / f"s-{scheme}"
    address = f"file://{folder}" if scheme == "file" else in_memory(folder)
    shards = TokenShards(address + "/", tokenizer_hash=HASH, verify=True)
    assert [ids.tolist() for ids in shards] == lists
    assert shards.read(1, 6).tolist() == [2, 3, 4, 5, 6]
    assert [d["id"] for d in shards.documents()] == ["d0", "d1", "d2", "d3"]


@pytest.mark.parametrize("scheme", ["file", "memory"])
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tokens-00000.bin", lambda b: b[:-1], "is shorter than|has"),
        ("tokens-00000.bin", lambda b: b + b"\0", "has 11 bytes, its header says 10"),
        ("tokens-00000.idx", lambda b: b[:8], "shorter than its header says"),
        ("tokens-00000.bin", None, "tokens-00000.bin is missing"),
        ("header.json", None, "header.json is missing"),
    ],
)
def test_damage_behind_an_address_is_refused(tmp_path: Path, scheme, name, change, words):
    folder = tmp_path / f"d{abs(hash((scheme, name, words)))}"
    write(folder, [[1, 2, 3], [4, 5]])
    file = folder / name
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    with pytest.raises((Corrupt, Missing), match=words):
        TokenShards(f"file://{folder}" if scheme == "file" else in_memory(folder))


def test_addresses_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match=r"ftp:// is not read; legal are a plain path and file://"):
        TokenShards("ftp://host/folder")
    with pytest.raises(UserError, match=r"s3://b/folder is no address: Invalid S3 bucket name"):
        TokenShards("s3://b/folder")


# --- a real S3 server -----------------------------------------------------------------------------


@pytest.fixture
def s3_server(monkeypatch):
    """Moto's S3 server, which needs an environment of its own: `pip install "moto[server]"`."""
    program = os.environ.get("INTERNJAX_MOTO_SERVER")
    if not program:
        pytest.skip("INTERNJAX_MOTO_SERVER names no moto_server program")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        assert server.poll() is None, f"{program} ended at once"
        try:
            urllib.request.urlopen(f"{address}/moto-api/", timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    yield address
    server.terminate()
    server.wait()


def test_shards_in_a_bucket(tmp_path: Path, s3_server: str):
    lists = [[1, 2], [], [3, 4, 5], [6]]
    write(tmp_path / "s", lists, shard_tokens=2)
    put = urllib.request.Request(f"{s3_server}/corpus", method="PUT")
    urllib.request.urlopen(put, timeout=10).close()
    store = open_store("s3://corpus/tokens/s")
    for file in (tmp_path / "s").iterdir():
        store.write(file.name, file.read_bytes()).result()
    shards = TokenShards("s3://corpus/tokens/s", tokenizer_hash=HASH, verify=True)
    assert [ids.tolist() for ids in shards] == lists
    assert shards.read(1, 6).tolist() == [2, 3, 4, 5, 6]
    with pytest.raises(Missing, match=r"s3://corpus/tokens/none/header.json is missing"):
        TokenShards("s3://corpus/tokens/none")
