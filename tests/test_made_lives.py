"""What happens to accelerated transforms: weights that change, copies, files, gradients; nothing else changes."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from compare import same_bits
from made_cases import PATHS, check_exact, loosen, nflows_case, normflows_case, torchflows_case, zuko_case

from tarflow_fast import made


def torchflows():
    pytest.importorskip("torchflows")
    from torchflows.bijections.finite.autoregressive.transformers.linear.affine import Affine

    return torchflows_case(Affine, (6,), (2,), conditioner={"n_hidden": 20})


CASES = {
    "zuko": lambda: zuko_case(6, 2, order=torch.randperm(6), hidden_features=(20, 20)),
    "nflows": lambda: nflows_case("Affine", 6, 20, 2, use_batch_norm=True),
    "normflows": lambda: normflows_case("PiecewiseRationalQuadratic", 6, 20, 2, tails="linear", permute_mask=True),
    "torchflows": torchflows,
}
every = pytest.mark.parametrize("path", PATHS)
library = pytest.mark.parametrize("name", CASES)


def assert_right(case):
    """The accelerated transform gives what the library gives, with the weights as they are."""
    y, context = case.noise(), case.contexts()
    y, context = (each.to(next(case.module.parameters()).dtype) for each in (y, context))
    assert {each.path for each in made.explain(case.module)} != {"library"}
    library = made.restore(copy.deepcopy(case.module))
    x, log_det = case.run(y, context)
    expected = case._replace(module=library).run(y, context)
    torch.testing.assert_close(x, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_det, expected[1], rtol=1e-4, atol=1e-4)


@every
@library
def test_weights_are_read_at_each_call(path, name):
    case = CASES[name]()
    case.accelerate(path)
    y, context = case.noise(), case.contexts()
    seen = [case.run(y, context)[0]]

    def changed():
        assert_right(case)
        seen.append(case.run(y, context)[0])
        assert not torch.equal(seen[-1], seen[-2])

    optimizer = torch.optim.Adam(case.module.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the library's own code gives the gradient
        case.invert(case.module, y, context)[0].square().sum().backward()
    optimizer.step()
    changed()
    for parameter in case.module.parameters():
        parameter.data.copy_(parameter.data + 0.1 * torch.randn_like(parameter))
    changed()
    for parameter in case.module.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    changed()
    other = CASES[name]()  # of other masks where they are drawn, as those of zuko and normflows here are
    case.module.load_state_dict(other.module.state_dict())
    changed()
    got, expected = case.run(y, context), other.run(y, context)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    case.module.double()
    assert_right(case)
    assert case.run(y.double(), context.double())[0].dtype is torch.float64
    loosen(case.module.float())
    check_exact(case, path)


@library
def test_masks_that_were_loaded_decide(name):
    """They are buffers in the file, so that a transform of one order may get those of another."""
    first, other = CASES[name](), CASES[name]()
    masks = [[m for n, m in each.module.named_buffers() if n.endswith("mask")] for each in (first, other)]
    differ = any(not torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert differ == (name in ("zuko", "normflows"))
    first.accelerate("torch")
    y, context = first.noise(), first.contexts()
    first.run(y, context)
    first.module.load_state_dict(other.module.state_dict())
    torch.testing.assert_close(first.run(y, context)[0], other.run(y, context)[0], rtol=1e-4, atol=1e-4)


@every
@library
def test_copies_are_accelerated_and_files_are_not(path, name):
    case = CASES[name]()
    kind, keys = type(case.module), list(case.module.state_dict())
    case.accelerate(path)
    assert list(case.module.state_dict()) == keys and isinstance(case.module, kind)
    twin = copy.deepcopy(case.module)
    assert [e.path for e in made.explain(twin)] == [e.path for e in made.explain(case.module)] == [path]
    y, context = case.noise(), case.contexts()
    got = case.run(y, context)[0]
    assert same_bits(case._replace(module=twin).run(y, context)[0], got)
    next(twin.parameters()).data.add_(1.0)
    assert same_bits(case.run(y, context)[0], got), "a copy has weights of its own"
    file = io.BytesIO()
    torch.save(case.module, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(case.module)), torch.load(file, weights_only=False)):
        assert type(loaded) is kind and list(loaded.state_dict()) == keys
        (explanation,) = made.explain(loaded)
        assert (explanation.path, explanation.reason) == ("library", "not accelerated")
        torch.testing.assert_close(case._replace(module=loaded).run(y, context)[0], got, rtol=1e-4, atol=1e-4)


@library
def test_restore_gives_the_library_back_bit_for_bit(name):
    case = CASES[name]()
    y, context = case.noise(), case.contexts()
    kind, before = type(case.module), case.run(y, context)
    case.accelerate("torch")
    assert type(case.module) is not kind and type(case.module).__qualname__ == kind.__qualname__
    made.restore(case.module)
    assert type(case.module) is kind
    assert all(map(same_bits, case.run(y, context), before))


@every
@library
def test_a_gradient_is_the_librarys_own(path, name):
    case = CASES[name]()
    y, context = case.noise(), case.contexts()

    def gradients():
        case.module.zero_grad()
        leaf = y.clone().requires_grad_()
        x, log_det = case.invert(case.module, leaf, context)
        (x.sum() + log_det.sum()).backward()
        weights = [each.grad.clone() for each in case.module.parameters() if each.grad is not None]
        assert weights and any(each.any() for each in weights)
        return [leaf.grad, *weights]

    expected = gradients()
    case.accelerate(path)
    with pytest.warns(UserWarning, match=r"inverted by its own code: a gradient is asked for \(torch.no_grad"):
        got = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is said once
        gradients()
    for ours, theirs in zip(got, expected, strict=True):
        assert same_bits(ours, theirs)


@every
@library
def test_density_and_training_are_untouched(path, name):
    case = CASES[name]()
    y, context = case.noise(), case.contexts()
    x = case.run(y, context)[0]

    def density(module):
        module.zero_grad()
        if name == "zuko":
            z, log_det = module(context).call_and_ladj(x)
        else:
            z, log_det = module.forward(x, context)
        (z.square().sum() - log_det.sum()).backward()
        return [z, log_det, *(each.grad for each in module.parameters() if each.grad is not None)]

    expected = density(copy.deepcopy(case.module))
    case.accelerate(path)
    assert all(map(same_bits, density(case.module), expected))


@every
@library
def test_frozen_weights_are_kept_and_changes_are_noticed(path, name):
    case = CASES[name]()
    case.accelerate(path)
    y, context = case.noise(), case.contexts()
    expected = case.run(y, context)
    assert made.freeze(case.module) is case.module
    for _ in range(3):
        assert all(map(same_bits, case.run(y, context), expected))
    if path == "cpu":
        with torch.no_grad():
            next(case.module.parameters()).add_(1.0)
        with pytest.raises(RuntimeError, match="changed after freeze"):
            case.run(y, context)
    made.unfreeze(case.module)
    assert_right(case)


@every
def test_zukos_transform_of_a_context_can_be_copied_and_stored(path):
    """What the flow makes of a context holds the flow, so that a file of it holds the weights."""
    case = CASES["zuko"]()
    case.accelerate(path)
    y, context = case.noise(), case.contexts()
    transform = case.module(context)
    with torch.no_grad():
        expected = transform.inv(y)
        assert same_bits(copy.deepcopy(transform).inv(y), expected)
        loaded = pickle.loads(pickle.dumps(transform))
        assert type(loaded).__module__ == "zuko.transforms"
        torch.testing.assert_close(loaded.inv(y), expected, rtol=1e-4, atol=1e-4)


@every
def test_masks_that_lie_at_an_odd_place_in_memory(path):
    case = CASES["zuko"]()
    for layer in case.module.modules():
        if hasattr(layer, "mask"):
            flat = torch.cat([torch.zeros(1, dtype=torch.bool), layer.mask.flatten()])
            layer.mask = flat[1:].view_as(layer.mask)
    case.accelerate(path)
    assert_right(case)
