"""What `explain` says, and what is refused."""

import pytest
import torch
from made_cases import nflows_case, zuko_case
from torch import nn

from tarflow_fast import made, native

zuko = pytest.importorskip("zuko")


def test_bad_input():
    for bad in (3, None, "flow", torch.zeros(2), object()):
        for function in (made.accelerate, made.restore, made.explain):
            with pytest.raises(TypeError, match=rf"{function.__name__}: flow must be a torch.nn.Module, or hold one"):
                function(bad)
    for bad in (nn.Linear(2, 2), zuko.flows.NICE(4)):
        with pytest.raises(ValueError, match=f"no autoregressive transform in a {type(bad).__name__}"):
            made.accelerate(bad)
        assert made.explain(bad) == [] and made.restore(bad) is bad
    with pytest.raises(ValueError, match="path must be one of auto, cpu, torch, got 'gpu'"):
        made.accelerate(zuko.flows.MAF(3), path="gpu")
    with pytest.raises(ValueError, match="freeze: no transform in this MAF is accelerated"):
        made.freeze(zuko.flows.MAF(3))


def test_paths_and_reasons():
    flow = zuko.flows.MAF(4, transforms=2)
    for each in made.explain(flow):
        assert (each.path, each.reason) == ("library", "not accelerated")
        assert str(each) == f"{each.name} (MaskedAutoregressiveTransform): library, not accelerated"
    assert made.accelerate(flow) is flow
    if native.available():
        assert [(each.path, each.reason) for each in made.explain(flow)] == [("cpu", "")] * 2
        assert str(made.explain(flow)[0]).endswith("(MaskedAutoregressiveTransform): cpu")
    made.accelerate(flow, "torch")
    assert [(each.path, each.reason) for each in made.explain(flow)] == [("torch", "asked for")] * 2
    made.restore(flow)
    assert [each.reason for each in made.explain(flow)] == ["not accelerated"] * 2
    assert [each.name for each in made.explain(flow)] == ["transform.transforms.0", "transform.transforms.1"]


def test_it_says_what_changed_since():
    """A hook, or a part of another kind, which the sweep would not run: the library's own code has to."""
    case = zuko_case(4, hidden_features=(8,))
    made.accelerate(case.module, "torch")
    y = case.noise()
    swept, calls = case.run(y), []
    handle = case.module.hyper[0].register_forward_hook(lambda *_: calls.append(1))
    (explanation,) = made.explain(case.module)
    assert explanation.path == "library" and "hooks" in explanation.reason
    got = case.run(y)
    assert len(calls) >= 4, "the library runs the net once a feature, with the hook"
    torch.testing.assert_close(got[0], swept[0], rtol=1e-5, atol=1e-5)
    handle.remove()
    assert made.explain(case.module)[0].path == "torch"
    case.module.hyper[1] = nn.Softplus()
    assert "activation Softplus" in made.explain(case.module)[0].reason
    case.module.half()
    case.module.hyper[1] = nn.ReLU()
    assert made.explain(case.module)[0].reason == "weights of torch.float16"


def test_batch_norm_runs_by_the_sweep_in_evaluation_mode_alone():
    case = nflows_case("Affine", 4, 8, use_batch_norm=True)
    made.accelerate(case.module)
    assert made.explain(case.module)[0].path != "library"
    case.module.train()
    (explanation,) = made.explain(case.module)
    assert (explanation.path, explanation.reason) == ("library", "batch norm in training mode")
    case.module.eval()
    assert made.explain(case.module)[0].path != "library"


def test_a_flow_of_which_a_part_is_unknown_is_accelerated_but_for_that():
    flow = zuko.flows.MAF(4, transforms=2)
    flow.transform.transforms[1].hyper[1] = nn.Softplus()
    made.accelerate(flow, "torch")
    first, second = made.explain(flow)
    assert first.path == "torch" and second.path == "library" and "Softplus" in second.reason
    flow.transform.transforms[1].hyper[1] = nn.ReLU()
    assert made.explain(flow)[1].path == "torch"


class Own(zuko.flows.MaskedAutoregressiveTransform):
    """Of someone else, who may have changed what the inverse is."""


def test_a_class_of_someone_else_is_left_alone():
    flow = zuko.flows.MAF(4, transforms=1)
    flow.transform.transforms = nn.ModuleList([Own(4)])
    with pytest.raises(ValueError, match="a Own is not known here"):
        made.accelerate(flow)
    (explanation,) = made.explain(flow)
    assert explanation.transform == "Own" and explanation.reason == "a Own is not known here"
    assert type(flow.transform.transforms[0]) is Own


def test_an_object_that_holds_a_flow():
    class Holder:
        def __init__(self, flow):
            self.parts, self.again = {"flow": [flow]}, flow

    flow = zuko.flows.MAF(3, transforms=1)
    holder = made.accelerate(Holder(flow), "torch")
    (explanation,) = made.explain(holder)
    assert explanation.path == "torch" and explanation.name.startswith("parts.flow.0.transform")
    assert made.explain(flow)[0].path == "torch"


def test_accelerated_again_it_looks_anew():
    case = zuko_case(4)
    made.accelerate(case.module, "torch")
    kind = type(case.module)
    made.accelerate(case.module, "torch")
    assert type(case.module) is kind and kind.__bases__[0].__module__ == "zuko.flows.autoregressive"


@pytest.mark.skipif(not native.available(), reason=native.reason())
def test_what_the_engine_cannot_take_is_an_error_where_it_was_asked_for():
    flow = zuko.flows.NCSF(4, transforms=1)
    with pytest.raises(RuntimeError, match=r"path 'cpu' cannot take .*CircularRQSTransform"):
        made.accelerate(flow, "cpu")
    assert made.explain(flow)[0].reason == "not accelerated", "nothing was changed"
