"""A transform whose parts are changed between two calls: the second call is that of the changed transform."""

import pytest
import torch
from compare import same_bits
from made_cases import PATHS, nflows_case, zuko_case
from torch import nn

from tarflow_fast import made

every = pytest.mark.parametrize("path", PATHS)


def zuko_activation():
    case = zuko_case(6, 2, hidden_features=(20, 20))
    return case, lambda: setattr(case.module.hyper, "1", nn.Tanh())


def zuko_slope():
    case = zuko_case(6, hidden_features=(20,), activation=nn.LeakyReLU)
    return case, lambda: setattr(case.module.hyper[1], "negative_slope", 0.7)


def nflows_activation():
    case = nflows_case("Affine", 6, 20, num_blocks=1, use_residual_blocks=False)
    return case, lambda: setattr(case.module.autoregressive_net.blocks[0], "activation", torch.tanh)


def nflows_bound():
    case = nflows_case("PiecewiseRationalQuadratic", 6, 20, num_bins=4, tails="linear", tail_bound=2.0)
    return case, lambda: setattr(case.module, "tail_bound", 4.0)


CHANGES = {each.__name__: each for each in (zuko_activation, zuko_slope, nflows_activation, nflows_bound)}


@every
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_tensor_is_read_at_each_call(path, name):
    case, change = CHANGES[name]()
    case.accelerate(path)
    y, context = case.noise(), case.contexts()
    before = case.run(y, context)
    change()
    got = case.run(y, context)
    assert [each.path for each in made.explain(case.module)] == [path]
    made.restore(case.module)
    expected = case.run(y, context)
    for ours, theirs, old in zip(got, expected, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, old, rtol=1e-3, atol=1e-3)


@every
def test_an_activation_without_a_hash_is_unknown(path):
    class Unhashable:
        __hash__ = None

        def __call__(self, v):
            return v.relu()

    case = nflows_case("Affine", 6, 20, num_blocks=1, use_residual_blocks=False)
    case.accelerate(path)
    case.module.autoregressive_net.blocks[0].activation = Unhashable()
    (explanation,) = made.explain(case.module)
    assert explanation.path == "library" and "activation" in explanation.reason
    case.run(case.noise())


@every
def test_an_activation_before_a_residual_block_is_left_to_zuko(path):
    """zuko builds no such net, but a user can insert one into its `nn.Sequential`."""
    case = zuko_case(6, hidden_features=(8, 8), residual=True)
    case.module.hyper.insert(1, nn.ReLU())
    with pytest.raises(ValueError, match="residual block of another form"):
        made.accelerate(case.module, path)


WRONG = {
    "a layer in float64": lambda hyper: hyper[2].double(),
    "a smaller weight": lambda hyper: setattr(hyper[2], "weight", nn.Parameter(torch.zeros(1, 1))),
    "a shorter bias": lambda hyper: setattr(hyper[2], "bias", nn.Parameter(torch.zeros(3))),
    "a weight with fewer columns": lambda hyper: setattr(hyper[2], "weight", nn.Parameter(torch.zeros(64, 3))),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_engine_reads_no_weight_of_another_type_or_shape(name):
    """It would read past their ends. The library says what is wrong, or broadcasts them."""
    case, answers = zuko_case(6), []
    made.accelerate(case.module)
    y = case.noise()
    case.run(y)
    WRONG[name](case.module.hyper)
    for _ in range(2):
        try:
            answers.append(case.run(y))
        except Exception as error:
            answers.append(str(error))
        made.restore(case.module)
    got, expected = answers
    assert got == expected if isinstance(expected, str) else all(map(same_bits, got, expected))
