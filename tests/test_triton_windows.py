"""The inverse by windows on the GPU path: the promise, the answer of the other engines, and what the host learns when.

The judge of the promise is the reference in float64, as in tests/test_windows.py.
"""

import pytest
import torch
from compare import same_bits
from test_windows import GUIDED, draw
from tokens import draw_rows, random_tokens_flow

from tarflow_fast.engines.call import Call
from tarflow_fast.engines.table import open_passes
from tarflow_fast.engines.triton_windows import LateCount, WindowWorkspace, passes_until_none_is_left
from tarflow_fast.engines.weights import inspect
from tarflow_fast.ops.registry import triton_missing, triton_refuses
from tarflow_fast.solvers import Solving, invert
from tarflow_fast.transforms import Guidance

SIZES = {"num_tokens": 10, "channels": 16, "head_size": 16, "num_classes": 3}
ORDERS = [[3, 7, 0, 9, 5, 1, 8, 2, 6, 4], [4, 6, 2, 8, 1, 5, 9, 0, 7, 3]]


@pytest.fixture
def where(device):
    if why_not := triton_refuses(device, torch.float32) or triton_missing():
        pytest.skip(why_not)
    return device


def flow(where, scale=0.05, **config):
    model = random_tokens_flow(scale=scale, **SIZES | config).to(where)
    model.backend = "triton"
    return model


CASES = {  # the flow, guidance, window, tolerance
    "affine": ({}, {}, 4, 2e-3),
    "guided": ({"orders": ORDERS}, GUIDED, 4, 2e-3),
    "shift": ({"nvp": False, "layers_per_block": 2, "num_blocks": 1}, {}, 100, 1e-2),
    "one-token": ({"num_blocks": 1}, GUIDED, 1, 1e-3),
    "exact": ({"num_blocks": 1}, {}, 3, 0.0),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES)
def test_every_token_returned_satisfies_its_equation(case, where):
    config, guidance, window, tolerance = CASES[case]
    model, y = flow(where, **config), torch.tensor([0, 1, -1], device=where)
    arguments = {"solver": "windows", "tolerance": tolerance, "window": window, "return_report": True}
    stages, report = draw(model, 3, y, **guidance, **arguments)
    model.backend = "torch"
    exact, _ = draw(model, 3, y, **guidance)
    plain, _ = draw(model, 3, y, **guidance, **arguments)
    judge = random_tokens_flow(scale=0.05, **SIZES | config)
    found = residuals_of(judge, stages, y, guidance)
    rounding = 4 * residuals_of(judge, exact, y, guidance).max() + 1e-6
    assert found.max() <= tolerance + rounding
    torch.testing.assert_close(
        report.residual.cpu().T.flip(0).double(), found.amax(dim=2), rtol=0, atol=float(rounding)
    )
    T, few = model.num_tokens, window not in (1, 3)
    assert all(passes < T - 1 if few else passes == T - 1 for passes in report.passes.values()) or tolerance == 0
    for number, part in report.parts:
        assert part.accepted.sum(dim=0).tolist() == [T - 1] * 3 and (part.accepted[0] > 0).all(), number
        assert part.single == (part.passes if window == 1 else 0) and part.work == 3 * part.passes * min(window, T - 1)
    # Rows of PyTorch's wait for each other, and so accept other values. Both are within the tolerance of the equations.
    for ours, theirs in zip(stages, plain, strict=True):
        assert (ours - theirs).abs().max() <= 4 * tolerance + 1e-5


def residuals_of(judge, stages, y, guidance):
    from tarflow_fast.verify.equations import residuals

    return residuals(judge, [stage.cpu() for stage in stages], y.cpu(), **guidance)


@pytest.mark.interpreter
def test_the_passes_are_those_of_the_native_engine(where):
    """Both move each row on by itself, so they accept the same tokens in the same passes."""
    from tarflow_fast import native

    if not native.available():
        pytest.skip(native.reason())
    model = flow(where)
    z, y, reports = draw_rows(4, 10, 3).to(where), torch.tensor([0, 1, -1, 2], device=where), []
    for backend, there in (("triton", where), ("cpu", "cpu")):
        model.to(there).backend = backend
        x, log_det, report = model.inverse(
            z.to(there), y.to(there), solver="windows", tolerance=5e-3, window=5, return_report=True
        )
        reports.append((x.cpu(), log_det.cpu(), report))
    (x, log_det, ours), (right, right_log_det, theirs) = reports
    torch.testing.assert_close(x, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, right_log_det, rtol=1e-5, atol=1e-4)
    for k in (0, 1):
        assert ours.of(k)[0].accepted.tolist() == theirs.of(k)[0].accepted.tolist()
    assert ours.fallbacks == theirs.fallbacks
    torch.testing.assert_close(ours.residual.cpu(), theirs.residual, rtol=0, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy
def test_a_token_that_is_not_finite_touches_none_before_it_and_no_other_row(where):
    model = flow(where, num_blocks=1)
    z, y = draw_rows(3, 10, 3).to(where), torch.tensor([0, 1, 2], device=where)
    arguments = {"solver": "windows", "tolerance": 1e-5, "window": 6, "nonfinite": "ignore", "return_report": True}
    clean, _, _ = model.inverse(z, y, **arguments)
    spoiled = z.clone()
    spoiled[1, 7] = torch.inf
    x, _, report = model.inverse(spoiled, y, **arguments)
    assert same_bits(x[[0, 2]], clean[[0, 2]]) and (report.residual[[0, 2]] <= 1e-5).all()
    # In row 1 the tokens before the bad one are found, in whatever window it stood beside them.
    assert (
        model.blocks[0].order.identity
        and (x[1, :7] - clean[1, :7]).abs().max() < 1e-4
        and not x[1, 7:].isfinite().any()
    )
    assert report.residual[1].isnan().all()


@pytest.mark.interpreter
def test_windows_that_gain_nothing_end_in_the_sequential_answer(where):
    model, y = flow(where, scale=0.7, nvp=False, num_blocks=1), torch.tensor([0, 1], device=where)
    z = draw_rows(2, 10, 3).to(where)
    right, _ = model.inverse(z, y)
    x, _, report = model.inverse(z, y, solver="windows", tolerance=1e-6, window=3, return_report=True)
    assert (report.of(0)[0].fallbacks > 0).all() and report.passes == {0: 9}
    assert (x - right).abs().max() < 1e-4


@pytest.mark.interpreter
def test_parts_of_a_batch_have_the_bits_of_the_whole(where):
    """Five rows are solved two at a time, within the memory asked for. The last part has one place without a row.

    All queries fit one small tile, since the interpreter's products have other bits elsewhere in a larger one.
    """
    model = flow(where, num_blocks=1, num_tokens=7)
    block, y = model.blocks[0], torch.tensor([0, 1, 2, -1, 1], device=where)
    z, found = draw_rows(5, 7, 3).to(where), []
    limit = WindowWorkspace(inspect(block), 2, False, torch.float32, 3, 1e-3, batch=5, device="meta").nbytes
    for memory in (None, limit):
        solving, ticks = Solving("inverse", "windows", 1e-3, 3), []
        with Call("triton", memory_limit=memory, solving=solving) as call, torch.no_grad():
            found.append(invert(block.bijection, z, y, Guidance(), call, lambda ticks=ticks: ticks.append(1)))
        found[-1] += (solving.report.residual[:, 0],)
        assert len(ticks) == 6 and len(solving.report.parts) == (1 if memory is None else 3)
    assert all(map(same_bits, *found))


@pytest.mark.interpreter
def test_what_needs_no_pass(where):
    model = flow(where, num_tokens=1)
    z = draw_rows(3, 1, 3).to(where)
    x, log_det, report = model.inverse(z, solver="windows", return_report=True)
    assert same_bits(x, z) and (log_det == 0).all() and report.passes == {0: 0, 1: 0}


@pytest.mark.interpreter
def test_passes_of_one_solver_refuse_the_other(where):
    block, z = flow(where).blocks[0], draw_rows(2, 10, 3).to(where)
    with Call("triton") as call:
        passes = open_passes(block.bijection, z, None, Guidance(), call)
        with pytest.raises(RuntimeError, match=r"^steps: these passes were not opened"):
            passes.steps(slice(0, 2), 2, 4)
    with Call("triton", solving=Solving("inverse", "windows", 1e-3, 4)) as call:
        steps = open_passes(block.bijection, z, None, Guidance(), call).steps(slice(0, 2), 2, 4)
        with pytest.raises(ValueError, match=r"^solve: window and tolerance must be \(4, 0.001\), as prepared, got"):
            steps.solve(z, 5, 1e-3, None)
        with pytest.raises(ValueError, match=r"^solve: draft must be None"):
            steps.solve(z, 4, 1e-3, None, z)


@pytest.mark.interpreter
def test_the_plan_of_the_native_engine_and_its_drafts_are_not_for_this_path(where):
    """A plan says what pays on a CPU, and 'auto' here stays sequential. A draft asked for by name is refused."""
    model, z = flow(where, num_blocks=1, num_tokens=3), draw_rows(2, 3, 3).to(where)

    class Plan:
        def way_for(self, *_):
            raise AssertionError("the plan was asked")

    model.solver_plan = Plan()
    _, _, report = model.inverse(z, return_report=True)
    assert report.passes == {0: 2} and report.of(0)[0].single == 2
    with pytest.raises(RuntimeError, match=r"^inverse: draft='bf16' needs the native CPU engine"):
        model.inverse(z, solver="windows", draft="bf16")


@pytest.mark.interpreter
def test_the_host_never_synchronises_inside_a_block(where):
    """On a GPU only: the pass is one graph, and PyTorch raises where the host would wait for the device."""
    if where.type != "cuda":
        pytest.skip("there is no GPU")
    block, z = flow(where).blocks[0], draw_rows(4, 10, 3).to(where)
    with Call("triton", solving=Solving("inverse", "windows", 1e-3, 4)) as call, torch.no_grad():
        passes = open_passes(block.bijection, z, None, Guidance(), call)
        assert passes.workspace.graph is not None
        steps = passes.steps(slice(0, 4), 4, 4)
        first, _, _ = steps.solve(z, 4, 1e-3, None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again, _, _ = steps.solve(z, 4, 1e-3, None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same_bits(first, again)


# ---- what the host learns, and when ---------------------------------------------------------------------------------


class Late:
    """Mail in which a count arrives only after `delay` questions, and never before the next pass runs."""

    def __init__(self, counts, log):
        self.counts, self.log, self.device = counts, log, 0

    def run(self):
        self.log.append(("run", self.device))

    def send(self, number):
        assert number == self.device
        self.device += 1
        self.log.append(("send", number))

    def read(self, number):
        assert number < self.device
        self.log.append(("read", number))
        return self.counts[number] if number < len(self.counts) else 0


def test_the_host_reads_of_a_pass_while_the_next_one_runs():
    log, told = [], []
    mail = Late([9, 5, 5, 0], log)
    assert passes_until_none_is_left(mail.run, mail, 20, 12, told.append) == 4
    assert told == [3, 4, 0, 5]
    assert mail.device == 5  # one pass too many, which changes nothing
    for number in range(4):
        assert log.index(("read", number)) == log.index(("send", number + 1)) + 1
        assert log.index(("read", number)) < (log.index(("run", number + 2)) if number < 3 else len(log))


def test_no_more_passes_than_are_ever_needed():
    log = []
    mail = Late([2, 1, 0], log)
    assert passes_until_none_is_left(mail.run, mail, 3, 3, None) == 3 and mail.device == 3
    assert passes_until_none_is_left(mail.run, mail, 0, 0, None) == 0 and mail.device == 3
    mail = Late([2, 1, 1], log)
    with pytest.raises(RuntimeError, match=r"^block_inverse: 1 tokens are left after 3 passes"):
        passes_until_none_is_left(mail.run, mail, 3, 3, None)


def test_a_count_is_read_when_it_has_arrived_and_not_before():
    """The event of a copy is asked until it says so. Meanwhile the next count is on its way to the other slot."""
    left = torch.tensor([7], dtype=torch.int32)
    mail, asked = LateCount(left), []

    class Event:
        def __init__(self, slot):
            self.slot = slot

        def record(self):
            self.value = mail._slots[self.slot].clone()
            mail._slots[self.slot] = -1  # what a copy that is under way shows

        def query(self):
            asked.append(self.slot)
            if len(asked) < 150:
                return False
            mail._slots[self.slot] = self.value
            return True

    mail._events = [Event(0), Event(1)]
    mail.send(0)
    left.fill_(3)
    mail.send(1)
    assert mail.read(0) == 7 and asked == [0] * 150
    left.fill_(0)
    mail.send(2)
    assert mail.read(1) == 3 and mail.read(2) == 0
