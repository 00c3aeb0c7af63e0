"""What the native engine refuses, what it costs, and how it copes with signals, forks and threads."""

import copy
import signal
import sys
import threading
import time

import pytest
import torch
from compare import same_bits
from engine_cases import given, run, run_python, small_case

from tarflow_fast import TarFlow, native
from tarflow_fast.engines.cpu import PARTS, Engine
from tarflow_fast.engines.cpu_native import Plan, Sizes, Workspace, run_pass
from tarflow_fast.engines.weights import inspect

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
BIG = Sizes(1024, 12, 768, 8, 64, 3072, 0, 1, 0)


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(precision, value):
    case = small_case(num_layers=2)
    for name, parameter in case.block.named_parameters():
        block = copy.deepcopy(case.block)
        block.get_parameter(name).data.view(-1)[parameter.numel() * 2 // 3] = value
        with pytest.raises(ValueError, match=f"weights must be finite, got NaN or infinity in {name}$"):
            run(case._replace(block=block), precision)


def test_nothing_is_written_when_weights_are_refused():
    case = small_case()
    z = case.z.clone()
    case.block.proj_out.bias.data[0] = torch.nan
    with pytest.raises(ValueError):
        run(case)
    assert same_bits(case.z, z)


@pytest.mark.parametrize(
    "field, value",
    [
        ("tokens", 2**31), ("tokens", 0), ("token_size", -1), ("channels", 2**40), ("layers", 2**20), ("head_size", 0),
        ("head_size", 100), ("hidden", 2**62), ("classes", -1), ("classes", 2**31), ("precision", 3), ("precision", -1),
        ("transform", 2), ("transform", -1),
    ],
)  # fmt: skip
def test_sizes_out_of_range(field, value):
    sizes = Sizes(*BIG.key())
    setattr(sizes, field, value)
    assert Plan.bytes_of(sizes) == Workspace.bytes_of(sizes, 1) == -1
    for make in (lambda: Plan(sizes), lambda: Workspace(sizes, 1)):
        with pytest.raises(ValueError, match="sizes of this block overflow"):
            make()


def test_bytes_that_overflow():
    sizes = Sizes(2**30, 2**20, 2**30, 60000, 128, 2**30, 0, 1, 0)
    assert Plan.bytes_of(sizes) == -1 and Workspace.bytes_of(sizes, 1) == -1
    assert Workspace.bytes_of(BIG, 2**30) == -1 or Workspace.bytes_of(BIG, 2**30) > 2**50
    for rows, window, threads in (
        (0, 1, 1),
        (-1, 1, 1),
        (2**31, 1, 1),
        (1, 0, 1),
        (1, 1025, 1),
        (1, 1, 0),
        (1, 1, 5000),
    ):
        assert Workspace.bytes_of(BIG, rows, window, threads) == -1


def test_a_closed_plan_or_workspace_is_refused():
    case = small_case()
    weights = inspect(case.block)
    sizes = Sizes.of(weights, case.block.transform, "fp32")
    plan, space = Plan(sizes).pack(weights), Workspace(sizes, 3, window=21)
    for closed, name in ((space, "workspace"), (plan, "plan")):
        closed.close()
        closed.close()
        with pytest.raises(ValueError, match=f"this {name} is closed"):
            run_pass(plan, space, case.z[:3], 0)
    with pytest.raises(ValueError, match="this plan is closed"):
        plan.pack(weights)


def test_a_pass_that_does_not_fit_is_refused():
    case = small_case()
    weights = inspect(case.block)
    sizes, other = Sizes.of(weights, case.block.transform, "fp32"), Sizes.of(weights, case.block.transform, "bf16")
    plan, space = Plan(sizes).pack(weights), Workspace(sizes, 3, window=4)
    z = case.z
    for tokens, position in ((z[:4, :4], 0), (z[:3, :5], 0), (z[:3, :4], 18), (z[:3, :4], -1)):
        with pytest.raises(ValueError, match="do not fit a workspace of 3 rows of 4 and 21 tokens"):
            run_pass(plan, space, tokens, position)
    with pytest.raises(ValueError, match="different sizes"):
        run_pass(plan, Workspace(other, 3, window=4), z[:3, :4], 0)


def test_the_clock_counts_every_part_and_changes_nothing():
    case, engine = small_case(num_tokens=30), Engine("fp32")
    expected = engine.invert(*given(case))[0]
    engine.clock = torch.zeros(native.threads(), len(PARTS), dtype=torch.float64)
    start = time.perf_counter()
    assert same_bits(engine.invert(*given(case))[0], expected)
    elapsed = time.perf_counter() - start
    worked = engine.clock.sum(dim=1)
    assert (engine.clock[0, :-1] > 0).all() and worked.max() < elapsed and worked.max() > elapsed / 20
    engine.clock = torch.zeros(native.threads() + 1, len(PARTS), dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"^block_inverse: clock must be \(\d+, 9\) of torch.float64, got \(\d+, 9\) of"
    ):
        engine.invert(*given(case))


# ---- threads, signals, forks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads_each", [1, 2])
def test_two_threads_invert_at_once(threads_each, threads):
    threads(threads_each)
    cases = [small_case(seed, num_tokens=12) for seed in range(4)]
    expected, wrong = [run(case)[0] for case in cases], []

    def work(numbers):
        for _ in range(6):
            wrong.extend(k for k in numbers if not same_bits(run(cases[k])[0], expected[k]))

    workers = [threading.Thread(target=work, args=([k, k + 1],)) for k in (0, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


INTERRUPTED = """
import os, signal, threading, time, torch
torch.set_num_threads(2)
from tarflow_fast.block import MetaBlock
from tarflow_fast.transforms import Guidance
from tarflow_fast.engines.cpu import Engine
block, engine = MetaBlock(12, {C}, {T}, num_layers={L}).eval(), Engine("fp32")
z = torch.randn({B}, {T}, 12)
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
waited = []
for delay in (0.5, 0.8, 0.3):
    timer = threading.Timer(delay, interrupt)
    try:
        timer.start()
        while True:
            engine.invert(block.bijection, z, None, Guidance())
    except KeyboardInterrupt:
        waited.append(time.monotonic() - sent[-1])
    timer.join()
print(min(waited), max(waited))
"""


@pytest.mark.parametrize(
    "C, T, L, B", [(768, 64, 2, 24), (128, 512, 4, 16), (768, 8, 1, 1024)]
)  # the threads share columns in the first case and rows in the second; the third case is inverted in groups
def test_ctrl_c_is_answered_within_a_fifth_of_a_second(C, T, L, B):
    done = run_python(INTERRUPTED.format(C=C, T=T, L=L, B=B))
    assert done.returncode == 0, done.stderr
    fastest, slowest = map(float, done.stdout.split())
    assert fastest < 0.2 and slowest < 1.0, "the slowest may take longer, because the machine may be busy otherwise"


FORKED = """
import os, sys, torch
torch.set_num_threads(2)
from tarflow_fast.block import MetaBlock
from tarflow_fast.transforms import Guidance
from tarflow_fast.engines.cpu import Engine
from tarflow_fast.engines.cpu_native import Workspace
from tarflow_fast.ops import affine
torch.manual_seed(0)
block = MetaBlock(12, 128, 16, num_layers=2).eval()
torch.nn.init.normal_(block.proj_out.weight, std=0.02)
z, engine = torch.randn(8, 16, 12), Engine("fp32")
expected = engine.invert(block.bijection, z, None, Guidance())[0]
x, ab = torch.randn(8, 512, 12), torch.randn(8, 512, 24)
shifted = affine(x, ab, backend="cpu")[0].numpy().tobytes()
child = os.fork()
if child == 0:
    if affine(x, ab, backend="cpu")[0].numpy().tobytes() != shifted:  # torch.equal itself would wait for its pool
        os._exit(5)
    try:
        engine.invert(block.bijection, z, None, Guidance())
        os._exit(2)
    except RuntimeError as error:
        if "was made before a fork" not in str(error):
            os._exit(3)
    os._exit(0 if torch.equal(Engine("fp32").invert(block.bijection, z, None, Guidance())[0], expected) else 4)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@linux
def test_a_forked_child_refuses_what_it_inherited_and_works_by_itself():
    done = run_python(FORKED, timeout=60)
    assert done.stdout.strip() == "0", (done.stdout, done.stderr)


@linux
def test_threads_sleep_after_the_call(threads):
    """No thread of the engine spins after a call. OpenMP's own workers may spin for some milliseconds."""
    threads(2)
    run(small_case())
    time.sleep(0.3)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05


def test_more_threads_than_cores_still_finish(threads):
    case = small_case()
    threads(2)
    expected = run(case)[0]
    threads(16)
    assert same_bits(run(case)[0], expected)


def test_progress_counts_every_token_once():
    model = TarFlow(1, 8, 2, 64, 2, 1)
    seen = []
    from tarflow_fast.transforms import Guidance

    for block in model.blocks:
        block.invert(torch.randn(3, 16, 4), None, Guidance(), on_token=lambda: seen.append(1))
    assert len(seen) == 2 * 15
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
