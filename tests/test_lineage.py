"""Artefacts: the same work once, whole or not there, every input accounted for."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax import lineage
from internjax.errors import Corrupt, Missing, UserError
from internjax.lineage import Artefact, hash_path, load_artefact, produce, sweep, verify_chain


@dataclass(frozen=True)
class Cleaning:
    min_chars: int = 10
    languages: tuple[str, ...] = ("en", "zh")


def write(name: str, text: str):
    def make(folder: Path) -> dict:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        return {"chars": np.float32(len(text)), "bits": float("nan")}

    return make


def never(folder: Path) -> dict:
    raise AssertionError("made again although nothing changed")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("one", encoding="utf-8")
    (folder / "sub" / "书.txt").write_text("二", encoding="utf-8")
    return folder


def make_two(store: Path, source: Path) -> tuple[Artefact, Artefact]:
    clean = produce(
        store, "clean", config=Cleaning(), inputs={"raw": source}, make=write("x/a.jsonl", "A")
    )
    tuned = produce(
        store,
        "tune",
        config={"steps": 3},
        inputs={"data": clean, "part": clean.path / "x"},
        make=write("w.bin", "W"),
    )
    return clean, tuned


def test_card_tells_everything(tmp_path, source):
    clean, tuned = make_two(tmp_path / "store", source)
    card = json.loads((tuned.path / "card.json").read_text(encoding="utf-8"))
    assert card == tuned.card
    assert tuned.path == tmp_path / "store" / tuned.key
    assert card["inputs"]["data"]["sha256"] == hash_path(clean.path) == clean.sha256
    assert card["inputs"]["part"]["sha256"] == hash_path(clean.path / "x")
    assert card["inputs"]["part"]["member"] == "x"
    assert card["outputs"] == {"w.bin": hash_path(tuned.path / "w.bin")}
    assert clean.card["config"] == {"min_chars": 10, "languages": ["en", "zh"]}
    assert clean.card["inputs"]["raw"] == {
        "sha256": hash_path(source),
        "key": None,
        "member": "",
        "path": "../documents",
    }
    assert tuned.metrics == {"chars": 1.0, "bits": None}
    assert {"internjax", "python", "jax", "platform"} <= card["versions"].keys()


def test_same_work_is_done_once(tmp_path, source, caplog):
    clean, _ = make_two(tmp_path / "store", source)
    with caplog.at_level(logging.INFO):
        again = produce(
            tmp_path / "store", "clean", config=Cleaning(), inputs={"raw": source}, make=never
        )
    assert again.reused and not clean.reused
    assert again.card == clean.card
    assert "skipped clean" in caplog.text


@pytest.mark.parametrize("change", ["kind", "config", "input", "name of input", "code"])
def test_any_change_is_other_work(tmp_path, source, change):
    store = tmp_path / "store"
    clean, _ = make_two(store, source)
    if change == "input":
        (source / "a.txt").write_text("two", encoding="utf-8")
    other = produce(
        store,
        "clean" + "ed" * (change == "kind"),
        config=Cleaning(min_chars=11 if change == "config" else 10),
        inputs={"RAW" if change == "name of input" else "raw": source},
        make=write("a", "B"),
        code_version="2" if change == "code" else "1",
    )
    assert other.key != clean.key and not other.reused


def test_moving_the_source_is_no_change(tmp_path, source):
    store = tmp_path / "store"
    clean, _ = make_two(store, source)
    moved = source.rename(tmp_path / "elsewhere")
    os.utime(moved / "a.txt", (1, 1))
    again = produce(store, "clean", config=Cleaning(), inputs={"raw": moved}, make=never)
    assert again.key == clean.key


def test_key_is_known_before(tmp_path, source):
    store = tmp_path / "store"
    key = lineage.artefact_key(store, "clean", config=Cleaning(), inputs={"raw": source})
    assert make_two(store, source)[0].key == key


def test_failure_leaves_nothing(tmp_path):
    def fail(folder: Path) -> dict:
        (folder / "half").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce(tmp_path, "x", config={}, inputs={}, make=fail)
    assert list(tmp_path.iterdir()) == []


def test_the_card_is_not_for_makers(tmp_path):
    with pytest.raises(AssertionError, match="that name is ours"):
        produce(tmp_path, "x", config={}, inputs={}, make=write("card.json", "{}"))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line(tmp_path):
    def fill(folder: Path) -> dict:
        with open("/dev/full", "w", encoding="utf-8") as full:
            full.write("x")
        return {}

    with pytest.raises(UserError, match="no space left in"):
        produce(tmp_path, "tune", config={}, inputs={}, make=fill)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from internjax.lineage import produce
import internjax.lineage as lineage

def make(folder):
    (folder / "a").write_text("A" * 100_000)
    (folder / "b").write_text("B")
    return {}

def pause(*_, **__):
    print("here", flush=True)
    time.sleep(60)

where = sys.argv[2]
if where == "make":
    def make(folder):
        (folder / "a").write_text("A")
        pause()
elif where == "before card":
    lineage._pretty = pause
elif where == "before rename":
    lineage._publish = pause
produce(Path(sys.argv[1]), "kind", config={"x": 1}, inputs={}, make=make)
pause()
"""


@pytest.mark.parametrize("where", ["make", "before card", "before rename", "after"])
def test_kill_at_any_moment_leaves_whole_or_nothing(tmp_path, where):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), where], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"here\n"
    assert sweep(tmp_path) == []  # it is alive: its folder is not ours to remove
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    whole = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    made = []

    def make(folder: Path) -> dict:
        made.append(folder)
        (folder / "a").write_text("A" * 100_000)
        (folder / "b").write_text("B")
        return {}

    artefact = produce(tmp_path, "kind", config={"x": 1}, inputs={}, make=make, verify=True)
    assert len(whole) == (where == "after")
    assert bool(made) == (where != "after")
    assert artefact.card["outputs"].keys() == {"a", "b"}
    assert len(sweep(tmp_path)) == (where != "after")
    assert [path.name for path in tmp_path.iterdir()] == [artefact.key]


def test_two_processes_at_once_agree(tmp_path):
    code = KILLED.replace('print("here", flush=True)\n    time.sleep(60)', "pass")
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "after"]) for _ in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    [path] = tmp_path.iterdir()
    load_artefact(path, verify=True)


def test_damage_is_found_and_made_again(tmp_path, source, caplog):
    store = tmp_path / "store"
    clean, _ = make_two(store, source)
    (clean.path / "x" / "a.jsonl").write_text("tampered", encoding="utf-8")
    with pytest.raises(Corrupt, match="was changed after it was made"):
        load_artefact(clean.path, verify=True)
    again = produce(
        store,
        "clean",
        config=Cleaning(),
        inputs={"raw": source},
        make=write("x/a.jsonl", "A"),
        verify=True,
    )
    assert not again.reused and "again" in caplog.text
    load_artefact(again.path, verify=True)
    assert {path.name[0] for path in store.iterdir()}.isdisjoint(".")


@pytest.mark.parametrize("damage", ["file gone", "card cut", "card gone"])
def test_what_is_not_whole_is_made_again(tmp_path, damage):
    first = produce(tmp_path, "x", config={}, inputs={}, make=write("a", "A"))
    if damage == "file gone":
        (first.path / "a").unlink()
    elif damage == "card cut":
        (first.path / "card.json").write_text('{"kind": "x', encoding="utf-8")
    else:
        (first.path / "card.json").unlink()
    with pytest.raises((Missing, Corrupt)):
        load_artefact(first.path)
    again = produce(tmp_path, "x", config={}, inputs={}, make=write("a", "A"))
    assert not again.reused
    assert load_artefact(again.path, verify=True).card["outputs"] == first.card["outputs"]


def test_reuse_false_replaces(tmp_path):
    produce(tmp_path, "x", config={}, inputs={}, make=write("a", "A"))
    again = produce(tmp_path, "x", config={}, inputs={}, make=write("a", "B"), reuse=False)
    assert (again.path / "a").read_text(encoding="utf-8") == "B"
    assert len(list(tmp_path.iterdir())) == 1


def test_chain_holds(tmp_path, source):
    clean, tuned = make_two(tmp_path / "store", source)
    verify_chain([clean.card, tuned.card])


def test_chain_breaks_on_a_stranger_and_on_another_content(tmp_path, source):
    clean, tuned = make_two(tmp_path / "store", source)
    with pytest.raises(Corrupt, match="which no earlier card made"):
        verify_chain([tuned.card, clean.card])
    other = clean.card | {"outputs": {"x/a.jsonl": "0" * 64}}
    with pytest.raises(Corrupt, match="hashes differ"):
        verify_chain([other, tuned.card])
    with pytest.raises(Corrupt, match="was edited"):
        verify_chain([clean.card | {"config": {"min_chars": 0}}])


def test_an_artefact_given_as_a_path_is_no_source(tmp_path, source):
    store = tmp_path / "store"
    clean, _ = make_two(store, source)
    smuggled = produce(store, "y", config={}, inputs={"in": clean.path}, make=write("b", "B"))
    assert smuggled.card["inputs"]["in"]["key"] == clean.key
    with pytest.raises(Corrupt, match="which no earlier card made"):
        verify_chain([smuggled.card])


def test_sweep_leaves_other_machines_alone(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours = tmp_path / f".tmp-{ended.pid}-00@{lineage.socket.gethostname()}"
    theirs = tmp_path / f".tmp-{ended.pid}-00@another-host"
    ours.mkdir()
    theirs.mkdir()
    assert sweep(tmp_path) == [ours]
    assert theirs.is_dir() and not ours.exists()


def test_hash_of_a_file_is_its_sha256sum(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert hash_path(path) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    )


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("ab", min_size=1, max_size=2), st.binary(max_size=4), min_size=1))
def test_hash_of_a_folder_tells_names_and_bytes(tmp_path_factory, files):
    def fill(order):
        folder = tmp_path_factory.mktemp("h")
        for name in order:
            (folder / name).write_bytes(files[name])
        return folder

    one, two = fill(sorted(files)), fill(sorted(files, reverse=True))
    assert hash_path(one) == hash_path(two)
    (two / "card.json").write_text("{}", encoding="utf-8")
    assert hash_path(one) == hash_path(two)
    first = min(files)
    (two / first).write_bytes(files[first] + b"!")
    assert hash_path(one) != hash_path(two)
    (two / first).unlink()
    (two / (first + "c")).write_bytes(files[first])
    assert hash_path(one) != hash_path(two)


def test_hash_refuses_what_is_not_there(tmp_path):
    with pytest.raises(Missing, match="does not exist"):
        hash_path(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="link to a folder or to nothing"):
        hash_path(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": float("inf")}}, "config/a/b is inf"),
        ({"a": [1, {2}]}, "config/a/1 is a set"),
        ({"a": {1: 2}}, "config/a has the key 1"),
    ],
)
def test_config_must_be_json(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        produce(tmp_path, "x", config=value, inputs={}, make=never)


def test_import_is_light():
    code = "import sys, internjax.lineage; print('jax' in sys.modules, 'numpy' in sys.modules)"
    started = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert output.split() == ["False", "False"], f"after {time.perf_counter() - started:.2f} s"
