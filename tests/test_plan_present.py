"""A plan as a record, and how it is shown: terminal, JSON, html."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from internjax.mesh import MeshConfig
from internjax.models.internlm import config
from internjax.plan.compile import Compiled
from internjax.plan.estimate import Constants, Machine
from internjax.plan.memory import Work
from internjax.plan.present import curve_rows, mesh_words, terminal, write_plan
from internjax.plan.record import Plan, make_plan
from internjax.plan.topology import gpu_named
from tests.test_plan_hlo import MESH, PROGRAM

GIB = 2**30


@pytest.fixture
def plan() -> Plan:
    memory = {"argument": 60 * GIB, "output": 0, "alias": 0, "temp": 20 * GIB, "peak": 80 * GIB}
    return make_plan(
        Compiled(PROGRAM, memory, 12.0, "key"),
        {"parameters": 20 * GIB, "optimizer": 40 * GIB},
        7_737_708_544,
        config("internlm2-7b"),
        MeshConfig(data=16, tensor=2, zero=1),
        MESH,
        Work(64, 2048, micro_batches=4),
        Machine(gpu_named("h100"), 8, Constants(overlap=0.5)),
    )


def test_the_record_says_whether_it_fits_and_what_would_help(plan):
    assert plan.gpus == 32 and not plan.fits
    assert plan.spare_bytes == pytest.approx(84942979072 * 0.92 - 80 * GIB)
    assert "mesh.zero=3" in dict(plan.remedies)
    assert all(saved + plan.spare_bytes >= 0 for _, saved in plan.remedies)
    none, half, full = (e.step_seconds for e in plan.estimates)
    assert none >= half >= full and half == pytest.approx((none + full) / 2)
    assert 0 < plan.async_share < 1
    rows = {(row["kind"], row["axes"]) for row in plan.collectives}
    assert ("all-gather", "fsdp") in rows and ("all-reduce", "data+fsdp+tensor") in rows


def test_terminal_json_and_page_say_the_same(plan, tmp_path):
    curve = [("weak", [replace(plan, gpus=8), plan])]
    money = {"tokens": 2e12, "dollars": 2.0}
    console = Console(record=True, width=160, file=(tmp_path / "out").open("w"))
    console.print(terminal(plan, Constants(), curve, **money))
    console.file.close()
    shown = console.export_text()
    for words in ("DOES NOT FIT", "all-gather", "mesh.zero=3", "estimated", "weak", "100.0%"):
        assert words in shown, words
    json_path, html_path = write_plan(tmp_path, plan, Constants(), curve, **money)
    record = json.loads(json_path.read_text(encoding="utf-8"))
    assert record["plan"]["memory"]["peak"] == 80 * GIB and len(record["curves"]["weak"]) == 2
    page = html_path.read_text(encoding="utf-8")
    assert "DOES NOT FIT" in page and "<svg" in page and "src=" not in page


def test_efficiency_is_against_the_first_of_the_curve(plan):
    slower = replace(
        plan,
        estimates=tuple(
            replace(e, tokens_per_second_gpu=e.tokens_per_second_gpu / 2) for e in plan.estimates
        ),
    )
    rows = curve_rows([("weak", [plan, slower])])
    assert rows[0][-3:] == ["100.0%"] * 3 and rows[1][-3:] == ["50.0%"] * 3


def test_meshes_in_words():
    assert (
        mesh_words(vars(MeshConfig(data=8, zero=3, zero_group=4))) == "data=8 zero=3 zero_group=4"
    )
    assert mesh_words(vars(MeshConfig())) == "one device"
    assert mesh_words(vars(MeshConfig(pipe=2))) == "pipe=2 schedule=1f1b"
