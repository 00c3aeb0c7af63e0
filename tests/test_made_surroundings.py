"""What else is going on where a transform is inverted: another default device, transforms of torch.func, tracing."""

import time
import warnings

import pytest
import torch
from compare import same_bits
from made_cases import PATHS, zuko_case
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from tarflow_fast import made
from tarflow_fast.made.schedule import _generations

every = pytest.mark.parametrize("path", PATHS)


@every
def test_another_default_device(path):
    """New tensors would then not be on the CPU, where the engine reads its memory."""
    case = zuko_case(4, 2)
    y, context = case.noise(), case.contexts()
    expected = case.run(y, context)
    with torch.device("meta"):
        case.accelerate(path)
        got = case.run(y, context)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_steps_of_many_features_are_found_in_time():
    """The work grows with the square of their number. By its third power this takes a minute or so."""
    D = 3072
    began = time.perf_counter()
    steps = _generations(torch.ones(D, D, dtype=torch.bool).tril(-1))
    assert torch.equal(steps, torch.arange(D)) and time.perf_counter() - began < 10


@every
@pytest.mark.parametrize("name", ["noise", "context", "weights"])
@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual"])
def test_transforms_of_torch_func_are_the_librarys_affair(path, name, transform):
    """Of what they follow, memory holds nothing, or not the tangents, which would be lost without a word."""
    case = zuko_case(4, 2)
    weight = case.module.hyper[0].weight.detach()
    given = {"noise": case.noise(), "context": case.contexts(), "weights": weight}

    def run(value):
        now = {**given, name: value}
        flow = Inverse(case.module)
        return torch.func.functional_call(
            flow, {"module.hyper.0.weight": now["weights"]}, (now["noise"], now["context"])
        )

    def answer():
        value, tangent = given[name], torch.ones_like(given[name])
        with torch.no_grad():
            if transform == "vmap":
                return torch.func.vmap(run)(torch.stack([value, value + 0.1, value - 0.1]))
            if transform == "jvp":
                return torch.func.jvp(run, (value,), (tangent,))[1]
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(run(forward_ad.make_dual(value, tangent))).tangent

    expected = answer()
    case.accelerate(path)
    assert same_bits(answer(), expected)


class Inverse(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, y, context):
        with torch.no_grad():
            return self.module(context).inv(y)


@every
def test_a_trace_holds_for_other_noise(path):
    case = zuko_case(4, 2)
    case.accelerate(path)
    flow, y, context = Inverse(case.module), case.noise(), case.contexts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit.trace is deprecated
        traced = torch.jit.trace(flow, (y, context), check_trace=False)
    torch.testing.assert_close(traced(y + 1, context), flow(y + 1, context), rtol=1e-4, atol=1e-4)


@every
def test_fake_tensors_are_the_librarys_affair(path):
    case = zuko_case(4)
    case.accelerate(path)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        assert case.module().inv(mode.from_tensor(torch.zeros(5, 4))).shape == (5, 4)


@every
def test_a_transform_without_memory_is_left_to_the_library(path):
    case = zuko_case(4)
    with pytest.raises(ValueError, match="weights on the meta device"):
        made.accelerate(case.module.to("meta"), path)
