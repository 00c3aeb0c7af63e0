"""Each instruction alone, with results that the PTX ISA names or that can be computed by hand."""

import math

import numpy as np
import pytest
from ptx.faults import Diverged, Misaligned, OutOfBounds, Race, Undefined, Unsupported
from snippet import execute, f32, u32

INF, NAN = math.inf, math.nan
TABLE = [  # instruction, %r1, %r2, %r3 -> %r0
    ("add.s32", u32(7), u32(-9), None, u32(-2)),
    ("add.s32", u32(0x7FFFFFFF), u32(1), None, u32(0x80000000)),
    ("sub.s32", u32(3), u32(5), None, u32(-2)),
    ("mul.lo.s32", u32(-3), u32(5), None, u32(-15)),
    ("mul.hi.s32", u32(-3), u32(5), None, u32(-1)),
    ("mul.hi.u32", u32(0xFFFFFFFF), u32(0xFFFFFFFF), None, u32(0xFFFFFFFE)),
    ("mul24.lo.u32", u32(0x01000003), u32(5), None, u32(15)),
    ("mul24.lo.s32", u32(0x00FFFFFF), u32(5), None, u32(-5)),
    ("mad.lo.s32", u32(-3), u32(5), u32(100), u32(85)),
    ("div.s32", u32(-7), u32(2), None, u32(-3)),
    ("div.s32", u32(7), u32(-2), None, u32(-3)),
    ("div.u32", u32(-7), u32(2), None, u32(0x7FFFFFFC)),
    ("rem.s32", u32(-7), u32(2), None, u32(-1)),
    ("rem.s32", u32(7), u32(-2), None, u32(1)),
    ("min.s32", u32(-7), u32(2), None, u32(-7)),
    ("min.u32", u32(-7), u32(2), None, u32(2)),
    ("max.s32", u32(-7), u32(2), None, u32(2)),
    ("neg.s32", u32(5), None, None, u32(-5)),
    ("abs.s32", u32(-5), None, None, u32(5)),
    ("and.b32", u32(12), u32(10), None, u32(8)),
    ("or.b32", u32(12), u32(10), None, u32(14)),
    ("xor.b32", u32(12), u32(10), None, u32(6)),
    ("not.b32", u32(0), None, None, u32(-1)),
    ("shl.b32", u32(3), u32(4), None, u32(48)),
    ("shl.b32", u32(3), u32(32), None, u32(0)),
    ("shr.u32", u32(-16), u32(2), None, u32(0x3FFFFFFC)),
    ("shr.s32", u32(-16), u32(2), None, u32(-4)),
    ("shr.s32", u32(-16), u32(99), None, u32(-1)),
    ("bfe.u32", u32(0xABCD1234), u32(8), u32(8), u32(0x12)),
    ("bfe.s32", u32(0x0000F200), u32(8), u32(8), u32(-14)),
    ("bfe.s32", u32(4), u32(2), u32(1), u32(-1)),
    ("bfe.u32", u32(-1), u32(0), u32(32), u32(-1)),
    ("bfe.u32", u32(-1), u32(4), u32(0), u32(0)),
    ("bfe.s32", u32(0x80000000), u32(28), u32(8), u32(-8)),
    ("prmt.b32", u32(0x33221100), u32(0x77665544), u32(0x7410), u32(0x77441100)),
    ("prmt.b32", u32(0x33228000), u32(0), u32(0x9999), u32(0xFFFFFFFF)),
    ("add.f32", f32(1e8), f32(1), None, f32(1e8)),
    ("sub.f32", f32(1), f32(0.25), None, f32(0.75)),
    ("mul.f32", f32(3), f32(-0.5), None, f32(-1.5)),
    ("add.ftz.f32", u32(1), f32(0), None, f32(0)),
    ("add.f32", u32(1), f32(0), None, u32(1)),
    ("fma.rn.f32", f32(1 + 2**-23), f32(1 - 2**-23), f32(-1), f32(-(2**-46))),
    # The exact result is a hair above a tie: rounding through float64 would go down to the even number.
    ("fma.rn.f32", f32(1 + 2**-12), f32(1 + 2**-12), f32(2**-60), f32(1 + 2**-11 + 2**-23)),
    ("neg.f32", f32(0), None, None, f32(-0.0)),
    ("abs.ftz.f32", f32(-3), None, None, f32(3)),
    ("min.f32", f32(NAN), f32(2), None, f32(2)),
    ("max.f32", f32(-1), f32(2), None, f32(2)),
    ("div.full.f32", f32(1), f32(3), None, f32(1 / 3)),
    ("ex2.approx.ftz.f32", f32(-3), None, None, f32(0.125)),
    ("ex2.approx.ftz.f32", f32(-INF), None, None, f32(0)),
    ("lg2.approx.f32", f32(8), None, None, f32(3)),
    ("rcp.approx.ftz.f32", f32(4), None, None, f32(0.25)),
    ("sqrt.approx.ftz.f32", f32(9), None, None, f32(3)),
    ("rsqrt.approx.ftz.f32", f32(16), None, None, f32(0.25)),
    ("cvt.rn.f32.s32", u32(-7), None, None, f32(-7)),
    ("cvt.rzi.s32.f32", f32(-7.9), None, None, u32(-7)),
    ("cvt.rzi.s32.f32", f32(3e10), None, None, u32(0x7FFFFFFF)),
    ("cvt.rn.bf16x2.f32", f32(1), f32(-2), None, u32(0x3F80C000)),
    ("cvt.rn.bf16x2.f32", u32(0x3F808000), u32(0x3F818000), None, u32(0x3F803F82)),  # both ties, to even
    ("cvt.rn.bf16x2.f32", f32(NAN), f32(3.4e38), None, u32(0x7FFF7F80)),
    ("cvt.rn.f16x2.f32", f32(1), f32(65520), None, u32(0x3C007C00)),
    ("fma.rn.bf16x2", u32(0x3F804000), u32(0x40404040), u32(0x3F80BF80), u32(0x408040A0)),
    ("sub.rn.f16x2", u32(0x3C004000), u32(0x40003C00), None, u32(0xBC003C00)),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[0])
def test_value(case):
    name, *inputs, expected = case
    given = {f"%r{i}": x for i, x in enumerate(inputs, 1) if x is not None}
    got, bad = execute(f"{name} %r0, {', '.join(given)};", given)["%r0"]
    assert bad is None and (got == expected).all(), f"{got[0]:#x}, expected {expected[0]:#x}"


@pytest.mark.parametrize("text, expected", [
    ("mov.b32 %r0, -1;", -1), ("mov.b32 %r0, 0f3F800000;", 0x3F800000), ("mov.b32 %r0, %ntid.x;", 32),
    ("mov.b32 %r1, 0x12345678; mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r0, {%rs2, %rs1};", 0x56781234),
    ("mov.b32 %r1, 0x12345678; mov.b32 {_, %rs2}, %r1; cvt.u32.u16 %r0, %rs2;", 0x1234),
    ("mov.b32 %r1, 200; cvt.s8.s32 %rs1, %r1; cvt.s32.s16 %r0, %rs1;", 200 - 256),
    ("mov.b16 %rs1, 0x4049; cvt.f32.bf16 %r0, %rs1;", 0x40490000),
    ("mov.b16 %rs1, 0x3C00; cvt.f32.f16 %r0, %rs1;", 0x3F800000),
    ("mov.b32 %r1, -2; mul.wide.s32 %rd2, %r1, 3; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r0, %rd2;", -1),
    ("mov.b32 %r1, -2; mul.wide.u32 %rd2, %r1, 3; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r0, %rd2;", 2),
    ("mov.b32 %r1, -2; mad.wide.s32 %rd2, %r1, 3, 6; cvt.u32.u64 %r0, %rd2;", 0),
    ("mov.b32 %r1, 0f7FC00000; setp.ltu.f32 %p1, %r1, %r1; selp.b32 %r0, 1, 2, %p1;", 1),
    ("mov.b32 %r1, 0f7FC00000; setp.lt.f32 %p1, %r1, %r1; selp.b32 %r0, 1, 2, %p1;", 2),
    ("mov.b32 %r1, 0f7FC00000; setp.ne.f32 %p1, %r1, %r1; selp.b32 %r0, 1, 2, %p1;", 2),
    ("mov.b32 %r1, -1; setp.lt.u32 %p1, %r1, 1; selp.b32 %r0, 1, 2, %p1;", 2),
    ("mov.b32 %r1, -1; setp.lt.s32 %p1, %r1, 1; not.pred %p2, %p1; @!%p2 mov.b32 %r0, 5;", 5),
    ("mov.b32 %r1, 12; mov.b32 %r2, 10; mov.b32 %r3, 1; lop3.b32 %r0, %r1, %r2, %r3, 0xEA;", 9),
    ("shfl.sync.bfly.b32 %r0, %r9, 0, 31, -1;", 4),
])  # fmt: skip
def test_sequence(text, expected):
    got, bad = execute(text, {"%r9": u32(4)})["%r0"]
    assert bad is None and (got == u32(expected)).all(), hex(got[0])


@pytest.mark.parametrize("mode, by, control, source", [
    ("bfly", 5, 31, lambda i: i ^ 5), ("idx", 7, 31, lambda i: 7), ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
    ("down", 3, 31, lambda i: i + 3 if i + 3 < 32 else i), ("idx", 1, 0x1C1F, lambda i: i // 4 * 4 + 1),
])  # fmt: skip
def test_shuffle(mode, by, control, source):
    values = np.arange(64, dtype=np.uint32) * 10
    got, _ = execute(f"shfl.sync.{mode}.b32 %r0, %r1, {by}, {control}, -1;", {"%r1": values}, threads=64)["%r0"]
    assert got.tolist() == [10 * (i // 32 * 32 + source(i % 32)) for i in range(64)]


@pytest.mark.parametrize("name, least", [("min.s32", min), ("max.s32", max)])
def test_reduction(name, least):
    values = [(7 * i) % 64 - 40 for i in range(64)]
    got, bad = execute(f"redux.sync.{name} %r0, %r1, -1;", {"%r1": u32(*values)}, threads=64)["%r0"]
    expected = [least(values[:32])] * 32 + [least(values[32:])] * 32
    assert bad is None and got.view(np.int32).tolist() == expected


def halves_of(matrix, kind):
    bits = (
        matrix.astype(np.float16).view(np.uint16) if kind == "f16" else (matrix.view(np.uint32) >> 16).astype(np.uint16)
    )
    return bits


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_matrix_product(kind):
    """Small integers, so that every type holds them. The layout is written out as the ISA has it, by elements."""
    draw = np.random.default_rng(0)
    A, B, C = (draw.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = halves_of(A, kind), halves_of(B, kind)
    registers = {f"%r{i}": np.zeros(32, np.uint32) for i in range(1, 11)}
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(8):
            row, column = g + (8 if i in (2, 3, 6, 7) else 0), 2 * t + (i & 1) + (8 if i >= 4 else 0)
            registers[f"%r{1 + i // 2}"][lane] |= np.uint32(a[row, column]) << np.uint32(16 * (i & 1))
        for i in range(4):
            row = 2 * t + (i & 1) + (8 if i >= 2 else 0)
            registers[f"%r{5 + i // 2}"][lane] |= np.uint32(b[row, g]) << np.uint32(16 * (i & 1))
        for i in range(4):
            registers[f"%r{7 + i}"][lane] = C[g + (8 if i >= 2 else 0), 2 * t + (i & 1)].view(np.uint32)
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r11, %r12, %r13, %r14}}, {{%r1, %r2, %r3, %r4}}, "
    )
    after = execute(text + "{%r5, %r6}, {%r7, %r8, %r9, %r10};", registers)
    D = A @ B + C
    for lane in range(32):
        for i in range(4):
            got = after[f"%r{11 + i}"][0][lane : lane + 1].view(np.float32)
            assert got == D[lane // 4 + (8 if i >= 2 else 0), 2 * (lane % 4) + (i & 1)]


FILL = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2;
st.shared.b32 [%r4], %r9; bar.sync 0; shl.b32 %r5, %r1, 4; add.s32 %r5, %r3, %r5;"""


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrix_load(trans):
    """32 threads store 8 rows of 8 numbers of 16 bits, number 8 row + column."""
    pairs = np.arange(32, dtype=np.uint32)
    body = (
        FILL
        + "mov.b32 %r7, global_smem; and.b32 %r8, %r1, 7; shl.b32 %r8, %r8, 4; add.s32 %r8, %r7, %r8; "
        + f"ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r0}}, [%r8];"
    )
    got, _ = execute(body, {"%r9": (2 * pairs) | ((2 * pairs + 1) << np.uint32(16))}, shared=128)["%r0"]
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        pair = (8 * row + column, 8 * row + column + 1) if not trans else (8 * column + row, 8 * (column + 1) + row)
        assert (got[lane] & 0xFFFF, got[lane] >> 16) == pair


def test_branches_meet_again():
    """Threads add what their branch gives, some go round a loop as often as their number says, and all meet."""
    body = """mov.u32 %r1, %tid.x; mov.b32 %r0, 0; mov.b32 %r2, 0; setp.lt.u32 %p1, %r1, 10; @%p1 bra $few;
        add.s32 %r0, %r0, 1000; bra.uni $meet;
    $few: add.s32 %r0, %r0, 1; add.s32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %r1; @%p2 bra $few;
    $meet: add.s32 %r0, %r0, 5; shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;"""
    got, _ = execute(body)["%r0"]
    assert got.tolist() == [max(i, 1) + 5 if i < 10 else 1005 for i in range(32)]


COPY = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd2, %r2; add.s64 %rd3, %rd1, %rd2;
mov.b32 %r3, global_smem; add.s32 %r4, %r3, %r2; cp.async.cg.shared.global [ %r4 + 0 ], [ %rd3 + 0 ], 0x10, %r9;
cp.async.commit_group; cp.async.commit_group;"""


def test_copies_arrive_when_they_are_waited_for():
    buffer = np.arange(512, dtype=np.uint32).view(np.uint8)
    sizes = np.where(np.arange(32) < 20, 16, 0).astype(np.uint32)
    body = COPY + "cp.async.wait_group {}; ld.shared.v4.b32 {{%r10, %r11, %r12, %r0}}, [%r4];"
    got, bad = execute(body.format(1), {"%r9": sizes}, shared=512, buffer=buffer)["%r0"]
    assert bad is None and got.tolist() == [4 * i + 3 if i < 20 else 0 for i in range(32)]
    with pytest.raises(Race, match="no wait_group has waited for"):
        execute(body.format(2), {"%r9": sizes}, shared=512, buffer=buffer)


def test_atomics_take_turns():
    buffer = np.zeros(64, np.uint8)
    got, _ = execute("atom.global.gpu.acq_rel.add.u32 %r0, [ %rd1 + 4 ], %r9;", {"%r9": u32(2)}, buffer=buffer)["%r0"]
    assert got.tolist() == list(range(0, 64, 2)) and buffer.view(np.uint32)[:2].tolist() == [0, 64]


def test_an_undefined_value_spreads_until_it_matters():
    after = execute("@%p1 mov.b32 %r0, 1; add.s32 %r2, %r0, 1;", {"%p1": np.arange(32) < 4})
    assert after["%r2"][1].tolist() == [i >= 4 for i in range(32)]
    # A predicate that decides alone, and the operand that a selp does not take, change nothing.
    assert execute("mov.pred %p1, 0; and.pred %p2, %p1, %p3; or.pred %p4, %p2, %p1;")["%p4"][1] is None
    assert execute("mov.pred %p1, -1; selp.b32 %r0, 4, %r5, %p1;")["%r0"][1] is None


@pytest.mark.parametrize("kind, text, what", [
    (Undefined, "setp.eq.b32 %p1, %r5, 0; @%p1 mov.b32 %r0, 1;", "predicate"),
    (Undefined, "@%p5 bra $end; mov.b32 %r0, 1; $end: mov.b32 %r1, 1;", "predicate"),
    (Undefined, "st.global.b32 [%rd1], %r5;", "stores an undefined value"),
    (Undefined, "ld.global.b32 %r0, [%rd5];", "undefined address"),
    (Undefined, "mov.b32 %r1, global_smem; ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd1], %r2;", "stores an undef"),
    (OutOfBounds, "ld.global.b32 %r0, [%rd1+16];", r"4 bytes of buffer, which has 16 bytes, at 16; PTX line \d+"),
    (OutOfBounds, "ld.global.b32 %r0, [%rd1+-4];", "at -4"),
    (OutOfBounds, "mov.b64 %rd2, 64; ld.global.b32 %r0, [%rd2];", "of no buffer"),
    (OutOfBounds, "mov.b32 %r1, global_smem; ld.shared.b32 %r2, [%r1+128];", "128 bytes of shared memory, at 128"),
    (Misaligned, "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd1+4];", "16 bytes of buffer"),
    (Misaligned, "mov.b32 %r1, global_smem; ld.shared.b32 %r2, [%r1+2];", "4 bytes of shared memory"),
    (Race, "mov.u32 %r1, %tid.x; st.global.b32 [%rd1], %r1;", "two threads store different values"),
    (Race, "mov.u32 %r1, %tid.x; mov.b32 %r2, global_smem; st.shared.b32 [%r2], %r1;", "two threads store different"),
    (Diverged, "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 3; @%p1 shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;", "some"),
    (Diverged, "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 3; @%p1 bra $a; bar.sync 0; bra.uni $b; "
               "$a: bar.sync 0; $b: mov.b32 %r2, 1;", "wait at different barriers"),
])  # fmt: skip
def test_fault(kind, text, what):
    with pytest.raises(kind, match=what):
        execute(text, shared=128)


UNKNOWN = [
    "tex.1d.v4.f32.s32 %r0, %r1;",
    "add.rz.f32 %r0, %r1, %r2;",
    "add.sat.s32 %r0, %r1, %r2;",
    "cvt.rz.f32.f64 %r0, %rd2;",
    "ld.local.b32 %r0, [%r1];",
    "red.global.add.u32 [%rd1], %r1;",
    "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r0}, {%r1}, {%r2}, {%r3};",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_it_does_not_know_it_does_not_guess(text):
    with pytest.raises(Unsupported):
        execute(text)
