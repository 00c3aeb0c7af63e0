"""The native engine with tokens in any order gives the bits of the same tokens laid out in that order."""

import copy
import ctypes

import pytest
import torch
from compare import same_bits
from engine_cases import run, small_case

from tarflow_fast import native
from tarflow_fast.engines.cpu_native import (
    BAD_SIZE,
    PRECISIONS,
    SPLITS,
    InversionArguments,
    Plan,
    Sizes,
    Workspace,
    run_pass,
)
from tarflow_fast.engines.weights import inspect
from tarflow_fast.transforms import Guidance

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")

T = 21
SHUFFLED = torch.randperm(T, generator=torch.Generator().manual_seed(1))
ORDERS = {"shuffled": SHUFFLED, "reversed": torch.arange(T - 1, -1, -1), "rotated": (torch.arange(T) + 5) % T}
OUTSIDE = (-1, T, 2**31 - 1, -(2**31))


def in_order(case, places):
    """The case laid out anew: its block sees the tokens as they lie, in the order that `places` gives."""
    block = copy.deepcopy(case.block)
    block.pos_embed.data = block.pos_embed.data[places].clone()
    return case._replace(block=block, z=case.z[:, places].contiguous())


class Inversion:
    """One inversion that calls tf_invert itself. The results are filled with 7 before it."""

    def __init__(self, case, precision, order, split="auto"):
        B, guidance = case.z.size(0), case.guidance
        weights, share = inspect(case.block), 2 if guidance.active else 1
        self.sizes = Sizes.of(weights, case.block.transform, precision)
        self.plan, self.workspace = Plan(self.sizes).pack(weights), Workspace(self.sizes, B * share)
        self.z, self.x = case.z.contiguous(), torch.full_like(case.z, 7.0)
        self.log_det, self.labels, self.order = torch.full((B,), 7.0, dtype=torch.float64), case.y, order
        self.strength = torch.full((B,), float(guidance.weight)) if guidance.active else None
        self.temper = torch.tensor([1.0, 1.0 / guidance.attn_temp]).repeat(B) if guidance.active else None
        tensors = (self.z, self.x, self.log_det, self.labels, self.temper, self.strength, self.order, None)
        self.job = InversionArguments(
            *map(native.pointer, tensors), batch=B, guided_parts=3, annealed=guidance.annealed, split=SPLITS[split]
        )
        self.stage = ctypes.c_int64(0)

    def run(self):
        """The status of the first call that fails, or 0 if every call succeeds."""
        handles, status = (self.plan.handle, self.workspace.handle), 0
        job = ctypes.byref(self.job), ctypes.byref(self.stage)
        while status == 0 and self.stage.value < (T - 1) * (self.sizes.layers + 2):
            status = self.plan.library.tf_invert(*handles, *job, 1e9, native.threads())
        return status


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_is_the_tokens_laid_out_in_it(name, guided, precision, threads):
    places = ORDERS[name]
    for number, B, nvp, split in ((1, 5, True, "auto"), (2, 1, True, "columns"), (2, 6, False, "rows")):
        threads(number)
        case = small_case(B=B, flip=False, nvp=nvp)
        if not guided:
            case = case._replace(guidance=Guidance())
        x, log_det = run(in_order(case, places), precision)
        inversion = Inversion(case, precision, places.int(), split)
        assert inversion.run() == 0
        assert same_bits(inversion.x[:, places], x)
        assert same_bits(inversion.log_det.float(), log_det)
        assert not same_bits(inversion.x, run(case, precision)[0]), "the order must matter in this test"


def test_no_order_is_that_of_the_tokens_and_flip_is_its_reverse():
    for flip in (False, True):
        case = small_case(flip=flip)
        inversion = Inversion(case, "fp32", ORDERS["reversed"].int() if flip else None)
        assert inversion.run() == 0
        x, log_det = run(case)
        assert same_bits(inversion.x, x) and same_bits(inversion.log_det.float(), log_det)


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("guided", [False, True])
def test_a_pass_takes_the_positions_of_its_order(guided, precision):
    case, cuts = small_case(B=2, flip=False), [(0, 4), (4, 5), (5, T)]
    R = 4 if guided else 2
    for places in ORDERS.values():
        laid_out, results = in_order(case, places), []
        for each, order in ((case, places.int()), (laid_out, None)):
            weights = inspect(each.block)
            sizes = Sizes.of(weights, each.block.transform, precision)
            plan, space = Plan(sizes).pack(weights), Workspace(sizes, R, window=T)
            options = {"labels": case.y, "guided": guided, "order": order}
            parts = [run_pass(plan, space, laid_out.z[:, a:b], a, **options) for a, b in cuts]
            results.append(torch.cat(parts, dim=1))
        assert same_bits(*results)


@pytest.mark.every_isa
@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("at", [0, 11, T - 1])
def test_a_place_outside_is_refused_before_anything_is_written(value, at):
    order = SHUFFLED.int()
    order[at] = value
    inversion = Inversion(small_case(flip=False), "fp32", order)
    assert inversion.run() == BAD_SIZE
    assert (inversion.x == 7).all() and (inversion.log_det == 7).all() and inversion.stage.value == 0
    order[at] = SHUFFLED[at]
    assert inversion.run() == 0


def test_an_order_that_does_not_fit_a_pass_is_refused():
    inversion = Inversion(small_case(flip=False), "fp32", None)
    tokens = inversion.z[:, :1]
    for value in OUTSIDE:
        order = torch.arange(T, dtype=torch.int32)
        order[-1] = value
        with pytest.raises(ValueError, match=rf"^run_pass: order must hold places from 0 to 20, got .*{value}"):
            run_pass(inversion.plan, inversion.workspace, tokens, 0, order=order)
    for order in (torch.arange(T), torch.arange(T - 1, dtype=torch.int32)):
        with pytest.raises(
            ValueError, match=r"^run_pass: order must be \(21,\) of torch.int32 on cpu, got \(2\d,\) of"
        ):
            run_pass(inversion.plan, inversion.workspace, tokens, 0, order=order)
