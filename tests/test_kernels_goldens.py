"""What reads compiled kernels: reports, golden rows, predicted times; planted losses are found."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from internjax import cli
from internjax.errors import UserError
from internjax.experiments import bench_kernels
from internjax.kernels.case import Case
from internjax.plan.kernel_time import BF16_FLOPS, SUSTAINED, loaded_bytes, predict, turn_of
from internjax.plan.kernels import CALL, report
from internjax.plan.topology import gpu_named
from tests.kernel_goldens import complaints, record, unmet

PTX = """
.visible .entry flash_mosaic_gpu_kernel(
.maxntid 384, 1, 1
	setmaxnreg.inc.sync.aligned.u32 240;
$L__BB0_1:
	mul.f32 	%r3, %r1, %r2;
	mov.b32 	%r4, %r3;
	{ .reg .pred p; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2; }
	@%p1 bra 	$L__BB0_3;
	add.f32 	%r3, %r1, %r2;
	add.f32 	%r3, %r1, %r2;
	bra.uni 	$L__BB0_3;
$L__BB0_3:
	ex2.approx.ftz.f32 %r5, %r6;
	@%p2 bra 	$L__BB0_1;
	setmaxnreg.dec.sync.aligned.u32 24;
	cp.async.bulk.tensor.5d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd2];
	cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%rd2], [%r1];
"""
PTXAS = """ptxas info    : Compiling entry function 'flash_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
"""


def flash():
    return report("flash", PTX, PTXAS, "Resources(smem_scratch_bytes=149504, tmem", 2048)


def answer() -> dict:
    kernel = {**vars(flash()), "notes": [], "spill_bytes": 0}
    return {"kernels": [kernel], "temp_bytes": 100, "seconds": 1.0}


def test_a_report_is_read():
    kernel = flash()
    assert (kernel.registers, kernel.spill_bytes, kernel.smem_bytes) == (168, 12, 149504)
    assert (kernel.threads, kernel.blocks, kernel.exchanged) == (384, 2048, (24, 240))
    assert kernel.wgmma == {"m64n128k16.f32.bf16.bf16": 1}
    assert (kernel.tma_loads, kernel.tma_stores) == (1, 1)
    assert "serialized" in kernel.notes[0]
    with pytest.raises(ValueError, match="nothing like"):
        report("flash", PTX, "", "", 1)


def test_a_kernel_is_known_by_its_hash():
    line = '"mosaic_gpu_v2", metadata={op_name="jit(f)/while/flash/mpmd_map"}, backend_config={ker'
    line += r'nel_hash = "\11a\"b", module = "ML"}'
    assert CALL.findall(line) == [("flash", r"\11a\"b")]


def test_a_golden_row_holds_and_losses_are_found():
    golden = record(answer())
    assert complaints(record(answer()), golden) == []
    assert complaints(record(answer()), None) == ["no golden: set it with --write"]
    planted = {
        "registers": (190, "flash: registers 168 -> 190"),
        "smem_bytes": (170_000, "flash: smem_bytes 149,504 -> 170,000"),
        "spill_bytes": (4, "flash: spill_bytes 0 -> 4"),
        "tma_loads": (0, "flash: tma_loads 1 -> 0"),
    }
    for fact, (value, _) in planted.items():
        worse = copy.deepcopy(answer())
        worse["kernels"][0][fact] = value
        (said,) = complaints(record(worse), golden)
        assert said.replace(":", "").startswith(f"flash {fact}")
    worse = answer() | {"kernels": []}
    assert complaints(record(worse), golden) == ["flash: gone"]
    better = copy.deepcopy(answer())
    better["kernels"][0] |= {"registers": 100, "tma_loads": 3}
    assert complaints(record(better), golden) == []


def test_what_a_row_must_have():
    needs = ("wgmma", "tma")
    assert unmet(answer(), needs, "") == []
    planted = [
        ({"wgmma": {}}, "no wgmma in the code"),
        ({"tma_loads": 0}, "no tma in the code"),
        ({"spill_bytes": 8}, "flash: 8 bytes spilled: mend it, or say why"),
        ({"exchanged": (40, 240)}, "flash: setmaxnreg (40, 240) would wait for ever"),
        ({"notes": ["C7510 serialized"]}, "flash: C7510 serialized"),
    ]
    for change, said in planted:
        worse = copy.deepcopy(answer())
        worse["kernels"][0] |= change
        assert unmet(worse, needs, "") == [said]
    worse["kernels"][0] |= {"notes": [], "spill_bytes": 8}
    assert unmet(worse, needs, "half of the registers are sums") == []


def test_a_turn_of_the_loop_is_counted_by_hand():
    turn = turn_of(PTX)
    assert turn.flops == 2 * 64 * 128 * 16
    assert turn.tensor_cycles == turn.flops / BF16_FLOPS == 64
    assert (turn.instructions, turn.special) == (2, 1)  # mul, ex2; not what is jumped over
    assert turn_of("$L__BB0_1:\n\tadd.f32 %r1, %r2, %r3;\n\t@%p1 bra $L__BB0_1;") is None


def test_loads_to_registers_are_under_way_too():
    """Two vectors of 16 bytes and a number, of a thread; no more than its registers hold."""
    loads = "\tld.global.v4.b32 {%r1}, [%rd1];\n" * 2
    loads += "\tld.global.nc.L1::no_allocate.u16 %rs1, [%rd1];\n"
    kernel = replace(flash(), ptx=loads, smem_bytes=0)
    assert loaded_bytes(kernel) == 34
    assert loaded_bytes(replace(kernel, ptx=loads * 99)) == 4 * kernel.registers
    assert loaded_bytes(replace(kernel, ptx="")) == 16


def test_predictions_add_up():
    gpu = gpu_named("h100")
    found = predict(flash(), gpu)
    assert found.blocks_per_sm == 1 and found.limit == "one warpgroup's way"
    assert found.tensor_share == 2 * 64 / (64 + 8 + 200)
    case = Case(lambda: 0, lambda key: (), lambda: 0, flops=1e12, num_bytes=1e6)
    row = bench_kernels.predicted(case, [flash()], gpu)
    seconds = 1e12 / (found.tensor_share * SUSTAINED * 989e12)
    assert row["microseconds"] == pytest.approx(seconds * 1e6)
    assert row["percent"] == pytest.approx(100 * found.tensor_share * SUSTAINED)
    assert row["of"] == "peak FLOP/s"


def test_errors_are_shares_of_the_reference():
    a = (np.array([3.0, 4.0]), np.array([0.0]))
    assert bench_kernels.error(a, a) == 0
    assert bench_kernels.error((np.array([3.0, 4.5]), a[1]), a) == pytest.approx(0.1)
    assert bench_kernels.error((np.array([np.nan, 4.0]), a[1]), a) == np.inf


def test_rows_are_written_in_columns():
    rows = [{"case": "a", "percent": 71.25, "ok": True}, {"case": "long", "percent": None}]
    assert list(bench_kernels.lines(rows)) == [
        "case  percent   ok",
        "a        71.2  yes",
        "long        -    -",
    ]


def test_without_a_gpu_the_self_test_says_so(capsys):
    assert cli.run(["bench", "kernels", "selftest=true"]) == 2
    said = capsys.readouterr().err
    assert "selftest=true needs an sm_90 GPU" in said and "this is 'cpu'" in said


def test_rows_that_nobody_knows():
    with pytest.raises(UserError, match=r"no row has that in its name; rows: .*attention 128"):
        bench_kernels.chosen("nothing like this")
