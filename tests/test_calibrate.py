"""The plan of solver 'auto': when it is used, what it changes, and that `calibrate` chooses by what it measured."""

import json
import shutil
import statistics

import pytest
import torch
from compare import same_bits

from tarflow_fast import TarFlow, native
from tarflow_fast.cli import main
from tarflow_fast.flows import SHIPPED, open_flow
from tarflow_fast.solvers import calibrate as measuring
from tarflow_fast.solvers.plan import PLAN, SEQUENTIAL, Choice, SolverPlan, Way, machine

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")


def ways(*windows):
    return tuple(map(Way, windows))


EVERYWHERE = tuple(
    Choice(precision, guidance, B, ways(8, 0, 8, 4))
    for precision in ("fp32", "bf16") for guidance in (0.0, 2.0) for B in (1, 8)
)  # fmt: skip


@pytest.fixture
def digits():
    return open_flow("digits")[0]


def here(choices=EVERYWHERE, tolerance=1e-3):
    return SolverPlan(machine(), tolerance, choices)


def draw(flow, n=4, **arguments):
    x, report = flow.sample(n, torch.arange(n), seed=1, return_report=True, **arguments)
    return x, report.passes


def test_auto_takes_the_windows_of_the_plan(digits):
    exact, sequential = draw(digits)
    assert sequential == dict.fromkeys(range(4), 15)
    digits.solver_plan = here()
    x, passes = draw(digits)
    assert passes[1] == 15 and passes[0] < 15 and passes[2] < 15  # block 1 stays sequential
    assert 0 < (x - exact).abs().max() < 0.05
    by_name, _ = draw(digits, solver="sequential")
    assert same_bits(by_name, exact)


@pytest.mark.parametrize(
    "arguments, n",
    [
        ({"tolerance": 1e-4}, 4),  # narrower than measured
        ({"tolerance": 0.0}, 4),
        ({"guidance": 3.0}, 4),  # stronger than measured
        ({"precision": "int8"}, 4),  # not measured
        ({"solver": "sequential"}, 4),
    ],
)
def test_auto_is_sequential_where_it_cannot_know_better(digits, arguments, n):
    digits.solver_plan = here()
    x, passes = draw(digits, n, **arguments)
    assert passes == dict.fromkeys(range(4), 15)
    digits.solver_plan = None
    assert same_bits(x, draw(digits, n, **arguments)[0])


def test_auto_is_sequential_for_gradients_and_for_other_engines(digits):
    digits.solver_plan = here()
    z = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x, _ = digits.inverse(z, differentiable=True)
    assert x.requires_grad and same_bits(x, digits.inverse(z, differentiable=True, solver="sequential")[0])
    digits.backend = "torch"
    assert draw(digits)[1] == dict.fromkeys(range(4), 15)


def test_windows_are_those_of_the_measured_sizes_on_both_sides():
    plan = here((
        Choice("fp32", 0.0, 2, ways(16, 0)), Choice("fp32", 0.0, 8, ways(8, 8)), Choice("fp32", 0.0, 32, ways(0, 8)),
    ))  # fmt: skip
    found = {B: [plan.way_for(k, B, "fp32", 0.0, 1e-3).window for k in (0, 1)] for B in (1, 2, 4, 8, 9, 32, 33)}
    assert found == {1: [0, 0], 2: [16, 0], 4: [8, 0], 8: [8, 8], 9: [0, 8], 32: [0, 8], 33: [0, 0]}
    assert plan.way_for(0, 2, "fp32", 0.0, 0.1) == Way(16)  # a wider tolerance needs no more passes
    assert plan.way_for(0, 2, "fp32", 1.0, 1e-3) == SEQUENTIAL
    guided = here((Choice("fp32", 1.0, 2, ways(8, 8)), Choice("fp32", 3.0, 2, ways(4, 4))))
    assert [guided.way_for(0, 2, "fp32", g, 1e-3).window for g in (0.0, 0.5, 2.0, 3.5)] == [0, 8, 4, 0]


def test_the_plan_of_another_machine_is_not_used_and_that_is_said_once(digits, fresh_warnings):
    digits.solver_plan = SolverPlan(machine() | {"threads": 4096}, 1e-3, EVERYWHERE)
    with pytest.warns(
        RuntimeWarning, match=r"'auto' is sequential here, because .* 4096 threads\), and this is .*calibrate"
    ):
        _, passes = draw(digits)
    assert passes == dict.fromkeys(range(4), 15)


def test_a_plan_lies_beside_the_weights(tmp_path, digits):
    digits.save_pretrained(tmp_path)
    assert TarFlow.from_pretrained(tmp_path).solver_plan is None
    plan = here()
    assert plan.save(tmp_path) == tmp_path / PLAN
    assert TarFlow.from_pretrained(tmp_path).solver_plan == plan
    whole = (tmp_path / PLAN).read_text()
    for text in (
        whole[:40],
        "[]",
        whole.replace("ways", "way"),
        whole.replace("null", '"fp8"', 1),
        whole.replace("0.001", "-1"),
    ):
        (tmp_path / PLAN).write_text(text)
        with pytest.raises(ValueError, match=rf"^from_pretrained: .*{PLAN}"):
            TarFlow.from_pretrained(tmp_path)
    facts = json.loads(whole)
    facts["choices"][0]["ways"].append([4, None])
    for text in (json.dumps(facts), whole.replace("null", '"fp8"', 1)):
        (tmp_path / PLAN).write_text(text)
        with pytest.raises(ValueError, match=r"must be a plan for 4 blocks: calibrate the flow again$"):
            TarFlow.from_pretrained(tmp_path)


def test_calibrate_chooses_by_what_it_measured(digits, monkeypatch):
    """With a clock that makes windows cheap, they are chosen; the rows say what the choice was made of."""
    found = digits.calibrate(4, batch_sizes=(1, 4), precisions=("fp32",), guidance=1.0)
    assert digits.solver_plan is found.plan and found.plan.machine == machine()
    assert [(choice.B, choice.guidance) for choice in found.plan.choices] == [(1, 1.0), (4, 1.0)]
    for choice in found.plan.choices:
        for block in range(4):
            rows = {
                Way(row["window"], row["draft"]): row
                for row in found.rows if row["B"] == choice.B and row["block"] == block
            }  # fmt: skip
            assert {*ways(0, 4, 8, 15), Way(8, "bf16"), Way(8, "int8")} == set(rows)
            assert rows[SEQUENTIAL]["passes"] == 15
            assert rows[Way(15)]["passes"] <= 15 and rows[Way(8, "bf16")]["passes"] < rows[Way(8)]["passes"]
            best = min(rows.values(), key=lambda row: row["ms"])
            gains = best["ms"] < measuring.GAIN * rows[SEQUENTIAL]["ms"]
            assert choice.ways[block] == (Way(best["window"], best["draft"]) if gains else SEQUENTIAL)
            assert [row["chosen"] for row in rows.values()].count(True) == 1
    assert str(found).count("\n") == len(found.rows)

    times = {0: [1.0, 1.0, 9.0], 4: [0.95, 0.95, 0.1], 8: [0.8, 0.8, 3.0]}
    fake = {Way(window): (15, seconds) for window, seconds in times.items()}
    assert measuring._fastest(fake) == Way(8)
    del fake[Way(8)]
    assert statistics.median(times[4]) < 1 and measuring._fastest(fake) == SEQUENTIAL  # within the noise


def test_the_command_stores_the_plan(tmp_path, capsys):
    folder = tmp_path / "flow"
    shutil.copytree(SHIPPED["digits"], folder)
    flags = ["--n", "2", "--batch_sizes", "2", "--precisions", "fp32"]
    assert main(["calibrate", str(folder), *flags, "--dry_run"]) == 0
    assert not (folder / PLAN).exists()
    assert main(["calibrate", str(folder), *flags]) == 0
    out = capsys.readouterr().out
    assert "sequential" in out and "windows 8" in out and out.rstrip().endswith(PLAN)
    assert json.loads((folder / PLAN).read_text())["choices"][0]["B"] == 2
    assert open_flow(folder)[0].solver_plan.choices[0].precision == "fp32"


def test_bad_input_is_refused(tmp_path, capsys, digits):
    for arguments, kind, message in (
        ({"n": 0}, ValueError, "calibrate: n must be"),
        ({"batch_sizes": [32]}, ValueError, "calibrate: batch_sizes must be at most n = 16, got 32"),
        ({"batch_sizes": [1.5]}, TypeError, "calibrate: batch_sizes must be"),
        ({"tolerance": 0}, ValueError, "calibrate: tolerance must be finite and > 0, got 0"),
        ({"precisions": ["fp8"]}, ValueError, "calibrate: precision must be"),
        ({"guidance": -1.0}, ValueError, "calibrate: guidance must be"),
    ):
        with pytest.raises(kind, match="^" + message):
            digits.calibrate(**arguments)
    file = tmp_path / "flow.pth"
    file.write_bytes(b"")
    for name, message in ((file, "must be a folder"), (tmp_path / "none", "must be a shipped flow")):
        assert main(["calibrate", str(name)]) == 2
        assert message in capsys.readouterr().err
