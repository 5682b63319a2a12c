"""Reading scheduled HLO: loops, matmuls, collectives with their mesh axes, windows."""

import numpy as np
import pytest

from internjax.plan.hlo import (
    Collective,
    Compute,
    Loop,
    Wait,
    axes_of,
    first_group,
    parse_instruction,
    read,
    shapes,
    source_target_pairs,
    type_bytes,
)

MESH = {"data": 2, "fsdp": 8, "tensor": 2}  # 32 devices: four nodes of eight

# Eight rounds of gather -> matmul -> reduce-scatter, then one all-reduce that nothing hides.
PROGRAM = """\
HloModule step, is_scheduled=true, num_partitions=32

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused (p0: bf16[8,512,64], p1: s32[]) -> bf16[512,64] {
  %p0 = bf16[8,512,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,512,64]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,512,64}
  ROOT %flat = bf16[512,64]{1,0} bitcast(%cut)
}

%body (arg: (s32[], bf16[8,512,64], bf16[256,512])) -> (s32[], bf16[8,512,64], bf16[256,512]) {
  %arg = (s32[], bf16[8,512,64]{2,1,0}, bf16[256,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %stack = bf16[8,512,64]{2,1,0} get-tuple-element(%arg), index=1
  %x = bf16[256,512]{1,0} get-tuple-element(%arg), index=2
  %slice = bf16[512,64]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused
  %gather = (bf16[512,64]{1,0}, bf16[512,512]{1,0}) all-gather-start(%slice), channel_id=1, \
replica_groups=[4,8]<=[2,8,2]T(0,2,1), dimensions={1}, use_global_device_ids=true, \
metadata={op_name="x"}, backend_config={"collective_backend_config":{"is_sync":false}}
  %next = ((bf16[8,512,64]{2,1,0}, s32[]), bf16[512,64]{1,0}, u32[]) fusion-start(%stack, %i), \
kind=kLoop, calls=%fused
  %come = bf16[512,64]{1,0} fusion-done(%next)
  %early = (bf16[256,512]{1,0}, s8[64]{0}) custom-call(%x, %x), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %whole = bf16[512,512]{1,0} all-gather-done(%gather)
  %y = bf16[256,512]{1,0} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %scatter = ((f32[256,512]{1,0}), f32[256,64]{1,0}) reduce-scatter-start(%y), channel_id=2, \
replica_groups={{0,2,4,6,8,10,12,14},{1,3,5,7,9,11,13,15}}, dimensions={1}, to_apply=%sum, \
backend_config={"collective_backend_config":{"is_sync":true}}
  %done = f32[256,64]{1,0} reduce-scatter-done(%scatter)
  ROOT %out = (s32[], bf16[8,512,64]{2,1,0}, bf16[256,512]{1,0}) tuple(%i, %stack, %y)
}

%cond (arg: (s32[], bf16[8,512,64], bf16[256,512])) -> pred[] {
  %arg = (s32[], bf16[8,512,64]{2,1,0}, bf16[256,512]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: (s32[], bf16[8,512,64], bf16[256,512])) -> f32[1024] {
  %p = (s32[], bf16[8,512,64]{2,1,0}, bf16[256,512]{1,0}) parameter(0)
  %loop = (s32[], bf16[8,512,64]{2,1,0}, bf16[256,512]{1,0}) while(%p), condition=%cond, \
body=%body, backend_config={"known_trip_count":{"n":"8"}}
  %g = f32[1024]{0} constant({...})
  %sent = f32[1024]{0} collective-permute(%g), channel_id=4, \
source_target_pairs={{0,16},{16,0},{1,17},{17,1}}
  ROOT %r = f32[1024]{0} all-reduce(%sent), channel_id=3, replica_groups={}, to_apply=%sum
}
"""


@pytest.fixture(scope="module")
def program():
    return read(PROGRAM, MESH, gpus_per_node=8)


def test_the_schedule_is_read_in_order(program):
    loop = program.steps[0]
    assert isinstance(loop, Loop) and loop.trips == 8
    assert [type(step) for step in loop.body] == [
        Compute, Collective, Compute, Wait, Compute, Wait, Compute, Collective, Wait,
    ]  # fmt: skip
    assert loop.body[1].key == loop.body[5].key == "gather"  # asynchronous: the wait names it
    assert loop.body[7].key == ""  # XLA made it synchronous
    assert program.warnings == ()


def test_flops_count_dots_and_library_calls_times_trips(program):
    assert program.flops == 8 * (2 * 256 * 512 * 512 + 2 * 256 * 512 * 512)


def test_a_slice_of_a_stack_counts_as_a_slice(program):
    first = program.steps[0].body[0]
    assert first.hbm_bytes == 4 + 2 * 512 * 64 * 2  # the index, the slice read and written
    assert program.steps[0].body[2].hbm_bytes == first.hbm_bytes  # the same on another stream


def test_collectives_by_kind_axes_and_bytes(program):
    table = program.collectives()
    gather = table["all-gather", "fsdp"]
    assert gather["count"] == 8 and gather["payload_bytes"] == 8 * 512 * 512 * 2
    assert gather["wire_bytes"] == gather["async_bytes"] == gather["payload_bytes"] * 7 / 8
    scatter = table["reduce-scatter", "fsdp"]
    assert scatter["payload_bytes"] == 8 * 256 * 512 * 2 and scatter["async_bytes"] == 0
    total = table["all-reduce", "data+fsdp+tensor"]
    assert total["wire_bytes"] == pytest.approx(2 * 4096 * 31 / 32)
    assert table["collective-permute", "data"]["wire_bytes"] == 4096


def test_groups_know_their_nodes(program):
    gather = program.steps[0].body[1]
    assert (gather.size, gather.per_node) == (8, 4)  # every second of 16 devices: two nodes
    permute = program.steps[1]
    assert (permute.size, permute.per_node) == (2, 1)  # 0 -> 16 leaves the node


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups=[16,2]<=[32]", [0, 1]),
        ("replica_groups=[4,8]<=[2,8,2]T(0,2,1)", [0, 2, 4, 6, 8, 10, 12, 14]),
        ("replica_groups=[16,2]<=[2,16]T(1,0)", [0, 16]),
        ("replica_groups={{3,7},{1,5}}", [3, 7]),
        ("replica_groups=mesh['a'=2,'b'=16] {'a'}", [0, 16]),
        ("replica_groups={}", list(range(32))),
    ],
)
def test_replica_groups_in_every_spelling(text, group):
    assert first_group(text, MESH).tolist() == group


def test_axes_are_told_from_members():
    assert axes_of(np.array([0, 16]), MESH) == "data"
    assert axes_of(np.arange(16), MESH) == "fsdp+tensor"
    assert axes_of(np.array([0, 3]), MESH) == "fsdp+tensor?"  # a diagonal: no block of axes
    assert axes_of(np.array([5]), MESH) == ""


def test_instructions_with_odd_types():
    line = "ROOT %t.1 = (bf16[2,3]{1,0:S(5)}, (f32[], u4[8]{0})) custom-call(f32[2]{0} %a, %b), x=1"
    read_line = parse_instruction(line)
    assert (read_line.name, read_line.opcode) == ("t.1", "custom-call")
    assert read_line.operands == ("a", "b")
    assert type_bytes(read_line.type) == 2 * 6 + 4 + 4
    line = "%s = (f32[2], /*index=1*/f32[2]) reduce-scatter(%a.1, /*index=1*/%b.2), dimensions={0}"
    assert parse_instruction(line).operands == ("a.1", "b.2")
    assert parse_instruction("// nothing") is None
    assert shapes("token[]") == []
    assert source_target_pairs("source_target_pairs={{0,1},{1,0}}").tolist() == [[0, 1], [1, 0]]


def test_a_loop_without_a_count_is_reported():
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"8"}}', "")
    program = read(text, MESH)
    assert "no known trip count" in program.warnings[0]
    assert program.steps[0].trips == 1


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read("hello", MESH)
