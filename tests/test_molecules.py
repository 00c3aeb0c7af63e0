"""A flow over the atoms of a molecule, with the weight names of its own file. Every way to compute it is tested.

The float64 tensors of the golden are the truth, and its float32 tensors stand for plain PyTorch. They have only five
rows, so PyTorch's error among them is partly luck. Therefore 64 rows of our own are tested too, with our float64
reference as the truth.
"""

import json
from pathlib import Path

import pytest
import torch
from compare import assert_accurate, same_bits
from safetensors import safe_open
from tokens import PlainTokens, draw_rows, random_tokens_flow

from tarflow_fast import TokenFlow, native
from tarflow_fast.files import save_tensors
from tarflow_fast.flows import open_flow

FILE = Path(__file__).parent / "goldens" / "molecule_tokens.safetensors"
ROWS = 64
needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
WAYS = ["reference", "torch", pytest.param("cpu", marks=needs_native)]


@pytest.fixture(scope="module")
def golden():
    with safe_open(FILE, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        sizes = json.loads(file.metadata()["meta"])
    return sizes, tensors, {key[6:]: value for key, value in tensors.items() if key.startswith("state.")}


@pytest.fixture(scope="module")
def file(golden, tmp_path_factory):
    """A file that has only the golden's weights, with their own names."""
    path = tmp_path_factory.mktemp("molecule") / "tarflow.safetensors"
    save_tensors(path, golden[2])
    return path


@pytest.fixture(scope="module")
def truth(golden):
    return PlainTokens(golden[2], **golden[0]).double()


@pytest.fixture(scope="module")
def plain(golden):
    return PlainTokens(golden[2], **golden[0])


def computed_by(way, golden, file):
    if way == "reference":
        return PlainTokens(golden[2], **golden[0])
    model = TokenFlow.from_checkpoint(file)
    model.backend = way
    return model


def hold(name, got, exact, plain):
    for part, *tensors in zip(("values", "log_det"), got, exact, plain, strict=True):
        assert_accurate(f"{name} {part}", *tensors)


def test_the_file_opens_by_its_shapes(golden, file):
    model = TokenFlow.from_checkpoint(file)
    expected = {"head_size": 64, "expansion": 4, "nvp": True, "orders": None}
    assert model.config == golden[0] | expected and not model.training
    assert torch.equal(model.var, torch.ones(22, 3)) and [block.flip for block in model.blocks] == [False, True] * 2
    ours = model.state_dict()
    assert all(torch.equal(ours[key.replace("main.3", "main.2")], value) for key, value in golden[2].items())
    opened, record = open_flow(file)
    assert type(opened) is TokenFlow and opened.config == model.config and record == {}


def test_our_float64_is_the_stored_truth(golden, truth, file):
    _, tensors, _ = golden
    exact = TokenFlow.from_checkpoint(file, dtype=torch.float64)
    for model in (truth, exact):
        with torch.no_grad():
            z, log_det = model(tensors["forward.x"].double())
        x, back = model.inverse(tensors["reverse.z"].double())
        for got, name in (
            (z, "forward64.z"),
            (log_det, "forward64.logdet"),
            (x, "reverse64.x"),
            (back, "reverse64.logdet"),
        ):
            torch.testing.assert_close(got, tensors[name], rtol=0, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_golden_forward(way, golden, file):
    _, tensors, _ = golden
    with torch.no_grad():
        got = computed_by(way, golden, file)(tensors["forward.x"])
    hold("forward", got, *([tensors[f"forward{kind}.{name}"] for name in ("z", "logdet")] for kind in ("64", "")))


@pytest.mark.parametrize("way", WAYS)
def test_golden_inverse(way, golden, file):
    _, tensors, _ = golden
    got = computed_by(way, golden, file).inverse(tensors["reverse.z"])
    hold("inverse", got, *([tensors[f"reverse{kind}.{name}"] for name in ("x", "logdet")] for kind in ("64", "")))


@pytest.mark.parametrize("way", WAYS[1:])
def test_more_rows_of_the_same_flow(way, golden, file, truth, plain):
    """The rows are drawn at half size.

    With rows of full size this flow gives one of them a log-density of -800, while the median is -190, and the rounding
    of that row alone would decide.
    """
    model = computed_by(way, golden, file)
    x, z = (0.5 * draw_rows(ROWS, 22, 3, seed=seed) for seed in (5, 6))
    with torch.no_grad():
        hold("forward", model(x), truth(x.double()), plain(x))
        assert_accurate("log_prob", model.log_prob(x), truth.log_prob(x.double()), plain.log_prob(x))
    hold("inverse", model.inverse(z), truth.inverse(z.double()), plain.inverse(z))


def test_signs_are_those_of_the_jacobians(file):
    model = TokenFlow.from_checkpoint(file, dtype=torch.float64)
    x = draw_rows(1, 22, 3, seed=7, dtype=torch.float64)
    z, log_det = model(x)
    jacobian = torch.autograd.functional.jacobian(lambda row: model(row)[0], x, vectorize=True).reshape(66, 66)
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-10)
    back, inverse_log_det = model.inverse(z)
    assert inverse_log_det.item() == pytest.approx(-log_det.item(), abs=1e-10) and abs(log_det.item()) > 0.01
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)


def test_twenty_thousand_samples_with_their_density(threads):
    """The batch size changes no bit, `sample` gives the same samples, and the density belongs to the samples."""
    threads(1)
    sizes = dict(num_tokens=22, token_size=3, channels=64, num_blocks=2, layers_per_block=2)
    model = random_tokens_flow(3, **sizes)
    x, log_prob = model.sample_and_log_prob(20000, seed=11, batch_size=4096)
    again, log_prob_again = model.sample_and_log_prob(20000, seed=11, batch_size=5000)
    assert same_bits(x, again) and same_bits(log_prob, log_prob_again)
    assert same_bits(model.sample(20000, seed=11), x)
    truth, plain = PlainTokens(model.state_dict(), **sizes).double(), PlainTokens(model.state_dict(), **sizes)
    x, log_prob = x[-256:], log_prob[-256:]
    with torch.no_grad():
        assert_accurate("log_prob(x)", model.log_prob(x), truth.log_prob(x.double()), plain.log_prob(x))
    noise = torch.randn(20000, 22, 3, generator=torch.Generator().manual_seed(11))[-256:]
    densities = []
    for flow, kind in ((truth, torch.float64), (plain, torch.float32)):
        z = noise.to(kind) * flow.var.sqrt()
        _, log_det = flow.inverse(z)
        densities.append(flow.log_prior(z) - log_det)
    assert_accurate("log_prob", log_prob, *densities)
