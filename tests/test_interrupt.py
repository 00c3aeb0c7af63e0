"""The state of an inverse belongs to its call, so results stay right after exceptions, Ctrl-C and other threads."""

import os
import signal
import threading
import time

import pytest
import torch
from flows import random_flow, random_images, random_noise

CONFIG = dict(num_classes=3, layers_per_block=2, img_size=16)
Y = torch.tensor([0, 2])


def test_two_threads_sample_with_one_model():
    model = random_flow(**CONFIG)
    jobs = [(random_noise(model, seed=s), Y if s % 2 else None, float(s % 2 * (s % 3))) for s in range(8)]
    expected = [model.reverse(noise, y, guidance) for noise, y, guidance in jobs]
    results, errors = [None] * len(jobs), []

    def work(numbers):
        try:
            for _ in range(2):
                for k in numbers:
                    results[k] = model.reverse(*jobs[k])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(range(start, len(jobs), 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def answers(model):
    return [model(random_images(model), Y)[0], model.reverse(random_noise(model), Y, 1.0)]


def test_an_exception_inside_reverse_leaves_nothing_behind(fresh_warnings):
    model = random_flow(**CONFIG)
    before, noise = answers(model), random_noise(model)
    calls = []

    def fail_late(module, inputs):
        calls.append(1)
        if len(calls) == 30:
            raise OSError("the disk went away")

    handle = model.blocks[0].attn_blocks[1].register_forward_pre_hook(fail_late)
    handle_mlp = model.blocks[0].attn_blocks[1].mlp.register_forward_pre_hook(fail_late)
    told = pytest.warns(RuntimeWarning, match=r"inverts block 0 on 'torch' .* attn_blocks\.1 has hooks")
    with told, pytest.raises(OSError, match="went away"):
        model.reverse(noise, Y, 1.0)
    assert len(calls) == 30
    handle.remove()
    handle_mlp.remove()
    for after, right in zip(answers(model), before, strict=True):
        assert torch.equal(after, right)


@pytest.mark.parametrize("solver", ["sequential", "windows"])
def test_ctrl_c_inside_reverse_leaves_right_answers_behind(solver):
    model = random_flow(**CONFIG)
    before, noise = answers(model), random_noise(model, 64)
    for delay in (0.01, 0.05):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            end = time.monotonic() + 20
            while time.monotonic() < end:  # if the Ctrl-C gets lost, the loop must end all the same
                model.reverse(noise, Y.repeat(32), 1.0, solver=solver)
        timer.join()
        for after, right in zip(answers(model), before, strict=True):
            assert torch.equal(after, right)
