"""freeze() keeps packed weights between calls, gives the same bits, and notices when weights change."""

import copy
import io
import os
import pickle
import sys
import threading

import pytest
import torch
from compare import same_bits
from flows import random_flow, random_noise
from torch.nn.utils import prune

from tarflow_fast import native
from tarflow_fast.engines.cpu import Engine
from tarflow_fast.engines.cpu_native import Plan, Sizes, Workspace
from tarflow_fast.info import blocks

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
BLOCKS = 3


def flow(seed=0, **config):
    return random_flow(seed, num_blocks=BLOCKS, num_classes=3, **config)


@pytest.fixture
def packed(monkeypatch):
    """A list that grows by one entry for every plan that is packed."""
    count, pack = [], Plan.pack
    monkeypatch.setattr(Plan, "pack", lambda self, weights: count.append(self.sizes.precision) or pack(self, weights))
    return count


def test_the_bits_are_the_same_and_weights_are_packed_once_for_each_precision(packed, threads):
    model, labels = flow(), torch.tensor([2, -1, 0])
    noise = random_noise(model, 3)

    def images():
        for precision in ("fp32", "bf16", "int8"):
            yield model.reverse(noise, labels, precision=precision)
            yield model.reverse(noise[:1], labels[:1], 0.7, attn_temp=0.5, precision=precision)
            threads(1)
            yield model.sample(5, 1, seed=0, guidance=0.5, batch_size=2, precision=precision)
            threads(2)

    expected = [*images()]
    packed.clear()
    assert not model.frozen and model.freeze() is model and model.frozen and not packed
    for _ in range(2):
        assert all(same_bits(got, right) for got, right in zip(images(), expected, strict=True))
        assert sorted(packed) == [0] * BLOCKS + [1] * BLOCKS + [2] * BLOCKS
    assert not model.unfreeze().frozen
    model.reverse(noise, labels)
    assert len(packed) == 4 * BLOCKS


def optimize(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.log_prob(torch.zeros(1, 1, 8, 8)).sum().backward()
    optimizer.step()


def replace_block(model):
    model.blocks[1] = copy.deepcopy(model.blocks[1])


def assign(model):
    model.load_state_dict(flow(1).state_dict(), assign=True)


def new_parameter(model):
    model.blocks[2].proj_in.bias = torch.nn.Parameter(torch.ones(64))


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def adapt(model):
    """Does what adapters do: puts another module in the place of a Linear, and gives it the same parameters."""
    mlp, other = model.blocks[1].attn_blocks[0].mlp, Doubled(256, 64)
    other.weight, other.bias = mlp.main[2].weight, mlp.main[2].bias
    mlp.main[2] = other


def constant(x):
    return x.new_ones(*x.shape[:2], 64)


CHANGES = {
    "in place": lambda model: model.blocks[0].attn_blocks[0].mlp.main[2].bias.detach().add_(1),
    "a class embedding": lambda model: model.blocks[1].class_embed.detach().neg_(),
    "an optimizer": optimize,
    "load_state_dict": lambda model: model.load_state_dict(flow(1).state_dict()),
    "another dtype": lambda model: model.bfloat16(),
    "other memory": lambda model: setattr(model.blocks[2].pos_embed, "data", model.blocks[2].pos_embed.data + 1),
    "load_state_dict by assignment": assign,
    "a new parameter": new_parameter,
    "no bias": lambda model: setattr(model.blocks[0].attn_blocks[0].attention.qkv, "bias", None),
    "weight norm": lambda model: torch.nn.utils.parametrizations.weight_norm(model.blocks[0].proj_in),
    "pruning": lambda model: prune.l1_unstructured(model.blocks[0].proj_in, "weight", 0.5),
    "an adapter": adapt,
    "a hook": lambda model: model.blocks[0].proj_in.register_forward_hook(lambda module, inputs, output: -output),
    "a forward of its own": lambda model: setattr(model.blocks[0].proj_in, "forward", constant),
    "another block": replace_block,
}
CANNOT_FREEZE = ("weight norm", "pruning", "an adapter", "a hook", "a forward of its own")


@pytest.mark.filterwarnings("ignore:tarflow_fast inverts")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name):
    model, y = flow().freeze(), torch.tensor([0, -1])
    noise = random_noise(model)
    before = model.reverse(noise, y)
    CHANGES[name](model)
    noise = noise.to(model.var.dtype)
    with pytest.raises(RuntimeError, match=r"^reverse: the model was changed after freeze\(\): .*block.*; call freeze"):
        model.reverse(noise, y)
    with pytest.raises(RuntimeError, match=r"^sample: the model was changed after freeze\(\)"):
        model.sample(1)
    assert any("changed after freeze()" in row["inverse_reason"] for row in blocks(model))
    if name in CANNOT_FREEZE:
        with pytest.raises(RuntimeError, match=r"^freeze: the native CPU engine cannot take block \d: "):
            model.freeze()
        assert not model.frozen
    else:
        assert same_bits(model.freeze().reverse(noise, y), model.unfreeze().reverse(noise, y))
    after = model.reverse(noise, y)
    assert name == "another block" or not same_bits(before, after.to(before.dtype))


@pytest.mark.filterwarnings("ignore:tarflow_fast inverts")
def test_a_hook_for_every_module_and_other_parameters_for_a_call_are_noticed():
    model = flow().freeze()
    noise = random_noise(model)
    before = model.reverse(noise)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match=r"freeze\(\): block 2: every module has hooks; call"):
            model.reverse(noise)
    finally:
        hook.remove()
    assert same_bits(model.reverse(noise), before)

    class Reversed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, noise):
            return self.model.reverse(noise)

    other = {"model." + name: parameter for name, parameter in flow(1).named_parameters()}
    with pytest.raises(RuntimeError, match=r"freeze\(\): block 2: .* was replaced"):
        torch.func.functional_call(Reversed(), other, noise)
    assert same_bits(model.reverse(noise), before)


def test_what_changed_is_named():
    model = flow().freeze()
    CHANGES["in place"](model)
    with pytest.raises(RuntimeError, match=r": block 0: attn_blocks\.0\.mlp\.main\.2\.bias was written;"):
        model.sample(1)


def test_what_the_engine_cannot_take_is_refused(monkeypatch):
    model = flow().freeze()
    hook = model.blocks[1].proj_in.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"^freeze: the native CPU engine cannot take block 1: proj_in has hooks$"):
        model.freeze()
    assert not model.frozen
    hook.remove()
    with pytest.raises(RuntimeError, match=r"cannot take block 0: a parameter is torch.float32 on meta"):
        copy.deepcopy(model).to("meta").freeze()
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "it was not built")
    with pytest.raises(RuntimeError, match=r"^freeze: there is no native CPU engine .*: it was not built$"):
        model.freeze()


def test_weights_that_are_not_finite_are_named():
    model = flow()
    model.blocks[BLOCKS - 1].proj_out.weight.data[0, 0] = torch.inf
    model.freeze()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in proj_out\.weight"):
            model.sample(1)


def test_paths_through_pytorch_take_the_modules_as_they_are():
    model = flow().freeze()
    noise = random_noise(model).requires_grad_()
    x = model.reverse(noise, differentiable=True)
    assert torch.autograd.grad(x.sum(), noise)[0].isfinite().all()
    model.backend = "torch"
    CHANGES["in place"](model)
    assert (model.reverse(noise) - x).abs().max() > 0.01


def test_copies_and_pickles_are_not_frozen():
    model = flow()
    model.freeze()
    noise = random_noise(model)
    expected, file = model.reverse(noise), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert not other.frozen and same_bits(other.reverse(noise), expected)
    assert model.frozen


def test_the_memory_limit_counts_every_plan(monkeypatch):
    model = flow()
    noise = random_noise(model, 40)
    expected, block = model.reverse(noise), model.blocks[0]
    model.freeze()
    frozen, taken, run = model._frozen, [], Engine._run
    sizes = Sizes.of(frozen.weights(block), block.transform, "fp32")
    plans, one, all_rows = BLOCKS * Plan.bytes_of(sizes), *(Workspace.bytes_of(sizes, B) for B in (1, 40))
    with pytest.raises(MemoryError, match=rf"one row needs {plans + one:,} bytes \(plans {plans:,}, workspace"):
        model.reverse(noise, memory_limit=plans + one - 1)

    def watch(engine, *arguments):
        taken.append(frozen.held + engine._workspace.bytes)
        return run(engine, *arguments)

    monkeypatch.setattr(Engine, "_run", watch)
    for limit in (plans + one, plans + (one + all_rows) // 2, plans + all_rows):
        taken.clear()
        assert same_bits(model.freeze().reverse(noise, memory_limit=limit), expected)
        frozen = model._frozen
        assert same_bits(model.reverse(noise, memory_limit=limit), expected)
        assert plans < max(taken) <= limit and frozen.held == frozen.bytes_for("fp32") == plans
    assert frozen.bytes_for("bf16") > plans, "plans of other precisions must be kept"


def test_two_threads_share_the_plans(packed):
    model = flow()
    noises = [random_noise(model, 2, seed) for seed in range(4)]
    expected, wrong = [model.reverse(noise) for noise in noises], []
    model.freeze()

    def work(numbers):
        for _ in range(5):
            wrong.extend(k for k in numbers if not same_bits(model.reverse(noises[k]), expected[k]))

    workers = [threading.Thread(target=work, args=([k, k + 1],)) for k in (0, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and len(packed) >= BLOCKS  # both workers may be first, and then both pack


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="the test forks")
def test_a_forked_child_packs_its_own(threads):
    threads(1)  # because OpenMP's own threads do not survive a fork
    model = flow().freeze()
    noise = random_noise(model)
    expected = model.reverse(noise)
    limit = model._frozen.held + 10**6
    child = os.fork()
    if child == 0:
        failed = 2
        try:
            failed = int(not same_bits(model.reverse(noise, memory_limit=limit), expected))
        finally:
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_bits(model.reverse(noise), expected)
