"""Every function that may give results that are not finite counts and names them."""

import pytest
import torch
from flows import random_flow, random_images, random_noise

from tarflow_fast import NonFiniteError

NAN, INF = float("nan"), float("inf")


def test_overflow_is_counted_and_named():
    model, noise = random_flow(), random_noise(random_flow(), 3)
    noise[1, 5, 2] = INF
    said = "reverse: 1 of 3 rows are not finite, in the noise given, row 1, token 5"
    with pytest.warns(RuntimeWarning, match=rf"^{said} \(nonfinite='raise' or 'ignore' changes this warning\)$"):
        images = model.reverse(noise)
    assert images[[0, 2]].isfinite().all() and not images[1].isfinite().all()
    with pytest.raises(NonFiniteError, match=f"^{said}$"):
        model.reverse(noise, nonfinite="raise")
    model.reverse(noise, nonfinite="ignore")


def test_overflow_inside_a_block_is_named():
    model = random_flow()
    with torch.no_grad():
        model.blocks[1].proj_out.bias[:4] = 100.0  # exp(100) overflows float32
    place = "2 of 2 rows are not finite, first in block 1, row 0, token 14; the flow overflows there"
    with pytest.raises(NonFiniteError, match=f"{place}$"):
        model.reverse(random_noise(model), nonfinite="raise")
    with pytest.raises(NonFiniteError, match=f"{place}, lower guidance helps$"):
        model.reverse(random_noise(model), guidance=0.5, attn_temp=0.5, nonfinite="raise")


@pytest.fixture
def bad_labels():
    """A flow that overflows for label 2. Block 1 is inverted first and overflows there."""
    model = random_flow(num_classes=3)
    with torch.no_grad():
        model.blocks[1].class_embed[2] = 1e30
    return model


def test_a_sample_in_parts_names_the_rows_of_the_whole(bad_labels):
    model, y = bad_labels, torch.tensor([0, 1, 0, 1, 0, 2, 2])
    model.backend = "torch"  # with the native engine's float32, another token may be the first to overflow
    with pytest.warns(RuntimeWarning) as told:
        images = model.sample(7, y, seed=0, batch_size=2)
    assert len(told) == 1
    message = str(told[0].message)
    assert message.startswith("sample: 2 of 7 rows are not finite, first in block 1, row 5, token 14; ")
    assert torch.isfinite(images).flatten(1).all(dim=1).tolist() == [True] * 5 + [False] * 2
    with pytest.raises(NonFiniteError, match=r"sample: 1 of the first 6 of 7 rows are not finite, .* row 5, token 14"):
        model.sample(7, y, seed=0, batch_size=2, nonfinite="raise")
    model.sample(7, y, seed=0, batch_size=2, nonfinite="ignore")


def test_a_score_that_is_not_finite_is_told():
    model, x = random_flow(), random_images(random_flow(), 4)
    expected = model.denoise(x, noise_std=0.1)
    x[3, 0, 2, 2] = NAN
    with pytest.warns(RuntimeWarning, match=r"^denoise: 1 of 4 rows are not finite, first row 3; the image given"):
        clean = model.denoise(x, noise_std=0.1, batch_size=2)
    torch.testing.assert_close(clean[:3], expected[:3], rtol=0, atol=1e-5)
    with pytest.raises(NonFiniteError, match=r"^denoise: 1 of 4 rows are not finite, first row 3"):
        model.denoise(x, noise_std=0.1, nonfinite="raise")
    x[0, 0, 0, 0] = INF
    with pytest.raises(NonFiniteError, match=r"^denoise: 1 of the first 2 of 4 rows are not finite, first row 0"):
        model.denoise(x, noise_std=0.1, batch_size=2, nonfinite="raise")
    model.denoise(x, noise_std=0.1, nonfinite="ignore")


def test_reverse_under_vmap_is_that_of_the_batch():
    model = random_flow(num_classes=3)
    noise, y = random_noise(model, 3), torch.tensor([0, -1, 2])
    expected = model.reverse(noise, y)
    each = torch.func.vmap(lambda z, label: model.reverse(z[None], label[None])[0])(noise, y)
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)
    noise[1, 0, 0] = NAN  # vmap allows no warning here, and no row may be dropped
    each = torch.func.vmap(lambda z: model.reverse(z[None])[0])(noise)
    assert torch.isfinite(each).flatten(1).all(dim=1).tolist() == [True, False, True]


def test_other_transforms_still_tell():
    model, noise = random_flow(), random_noise(random_flow())
    noise[1, 0, 0] = NAN
    with pytest.raises(NonFiniteError, match=r"1 of 2 rows are not finite, in the noise given, row 1, token 0"):
        torch.func.grad(lambda z: model.reverse(z, differentiable=True, nonfinite="raise").sum())(noise)
