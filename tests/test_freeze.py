"""freeze(): packed weights kept between calls, the same bits, and changes noticed."""

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

from tarflow_fast import native
from tarflow_fast.inverse.plan import Plan, Sizes, Workspace

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
BLOCKS = 3


def flow(seed=0, **config):
    return random_flow(seed, num_blocks=BLOCKS, num_classes=3, **config)


@pytest.fixture
def packed(monkeypatch):
    """Grows by one for every plan packed."""
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


CHANGES = {
    "in place": lambda model: model.blocks[0].attn_blocks[0].mlp.main[2].bias.detach().add_(1),
    "a class embedding": lambda model: model.blocks[1].class_embed.detach().neg_(),
    "an optimizer": optimize,
    "load_state_dict": lambda model: model.load_state_dict(flow(1).state_dict()),
    "another dtype": lambda model: model.bfloat16(),
    "other memory": lambda model: setattr(model.blocks[2].pos_embed, "data", model.blocks[2].pos_embed.data + 1),
    "another block": replace_block,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change):
    model = flow().freeze()
    noise = random_noise(model)
    before = model.reverse(noise, torch.tensor([0, 1]))
    change(model)
    noise, y = noise.to(model.var.dtype), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match=r"^reverse: the model was changed after freeze\(\): .*call freeze"):
        model.reverse(noise, y)
    right = copy.deepcopy(model).reverse(noise, y)
    assert same_bits(model.freeze().reverse(noise, y), right) and same_bits(model.unfreeze().reverse(noise, y), right)
    if change is not replace_block:
        assert not same_bits(before, right.to(before.dtype))


def test_the_weight_that_changed_is_named():
    model = flow().freeze()
    CHANGES["in place"](model)
    with pytest.raises(RuntimeError, match=r"freeze\(\): attn_blocks.0.mlp.main.2.bias of a block is not what it was"):
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


def test_the_memory_limit_counts_every_plan():
    model = flow()
    noise = random_noise(model, 4)
    expected, block = model.reverse(noise), model.blocks[0]
    model.freeze()
    weights = model._frozen.weights(block)
    sizes = Sizes.of(block, weights, "fp32")
    plan, workspace = Plan.bytes_of(sizes), Workspace.bytes_of(sizes, 1)
    limit = BLOCKS * plan + workspace
    with pytest.raises(MemoryError, match=rf"one row needs {limit:,} bytes \(plans {BLOCKS * plan:,}, workspace"):
        model.reverse(noise, memory_limit=limit - 1)
    assert same_bits(model.reverse(noise, memory_limit=limit), expected)
    assert model._frozen.bytes() == BLOCKS * plan == model._frozen.bytes_with(block, sizes)


def test_two_threads_share_the_plans(packed):
    model = flow()
    noises = [random_noise(model, 2, seed) for seed in range(4)]
    expected, wrong = [model.reverse(noise) for noise in noises], []
    model.freeze().reverse(noises[0])
    packed.clear()

    def work(numbers):
        for _ in range(5):
            wrong.extend(k for k in numbers if not same_bits(model.reverse(noises[k]), expected[k]))

    workers = [threading.Thread(target=work, args=([k, k + 1],)) for k in (0, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and not packed


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks")
def test_a_forked_child_packs_its_own(threads):
    threads(1)  # OpenMP's own threads do not survive a fork
    model = flow().freeze()
    noise = random_noise(model)
    expected = model.reverse(noise)
    child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(model.reverse(noise), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_bits(model.reverse(noise), expected)
