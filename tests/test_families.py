"""Families of flows (bench/families.py): the check finds planted errors, and the libraries' flows have one form."""

import copy
import importlib.util
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import families
import families_check
import families_measure
import peers
from families_check import Checked, check, true_log_prob
from families_measure import Result, Trained
from peers.peer import Peer, log_normal
from results import machine as made_machine

SHAPE = (1, 4, 4)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(autouse=True, scope="module")
def warm():
    """The first AdamW of a process takes a second, which would be a test's whole training."""
    families_measure._warm_up(Linear(), some_images())


class Linear(Peer):
    """z = A x + b, with faults to plant."""

    def __init__(self, wrong=0.0, off=0.0, noise=None, samples=0.0):
        super().__init__(SHAPE)
        self.A = nn.Parameter(torch.eye(self.dims) * 1.5 + torch.randn(self.dims, self.dims) / 10)
        self.b = nn.Parameter(torch.randn(self.dims))
        self.wrong, self.off, self.samples, self.estimated = wrong, off, samples, noise is not None
        self.noise = noise or 0.0

    def log_prob(self, x):
        right = log_normal(self.encode(x)) + torch.linalg.slogdet(self.A).logabsdet
        return right + self.wrong + self.noise * torch.randn(len(x), dtype=x.dtype)

    def encode(self, x):
        return x.flatten(1) @ self.A.T + self.b

    def decode(self, z):
        return (torch.linalg.solve(self.A, (z - self.b).T).T + self.off).view(-1, *SHAPE)

    def sample(self, n):
        time.sleep(self.samples)
        x = self.decode(torch.randn(n, self.dims))
        x[-1] = math.nan
        return x


def some_images(count=300, levels=17):
    """Bytes with a bright half, so that there is something to learn."""
    x = torch.randint(0, levels, (count, *SHAPE), dtype=torch.uint8)
    x[..., :2] //= 4
    return families_measure.images("made", x[: count - 100], x[-100:-50], x[-50:], levels)


def test_the_truth_of_a_linear_flow():
    peer = Linear().double()
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    z = x.flatten(1) @ peer.A.T + peer.b
    normal = torch.distributions.MultivariateNormal(torch.zeros(16).double(), torch.eye(16).double())
    expected = normal.log_prob(z) + torch.linalg.slogdet(peer.A).logabsdet
    torch.testing.assert_close(true_log_prob(peer, x), expected.detach(), rtol=1e-12, atol=1e-12)
    assert log_normal(z).allclose(normal.log_prob(z), rtol=1e-12)


def test_the_truth_does_not_depend_on_the_parts_of_the_jacobian(monkeypatch):
    peer, x = Linear().double(), torch.randn(2, *SHAPE, dtype=torch.float64)
    whole = true_log_prob(peer, x)
    monkeypatch.setattr(families_check, "_ROWS", 5)
    torch.testing.assert_close(true_log_prob(peer, x), whole, rtol=1e-12, atol=0)


BIAS = families_check.ESTIMATE * 16 * math.log(2)  # nats, what an estimate of 16 dimensions may be off by


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        (dict(), ""),
        (dict(noise=0.3), ""),
        (dict(wrong=1e-3), "its log-density is 0.001 nats from autograd's"),
        (dict(wrong=math.nan), "its log-density is nan nats from autograd's"),
        (dict(off=0.05), "its inverse comes back 0.05 from where it started"),
        (dict(off=math.nan), "its inverse comes back nan from where it started"),
        (dict(noise=0.001, wrong=3 * BIAS), "its log-density is 0.33"),
    ],
    ids=str,
)
def test_planted_faults_are_refused(faults, why):
    found = check(Linear(**faults), torch.randn(2, *SHAPE))
    assert found.why.startswith(why) and bool(found.why) == bool(why)
    if not why and not faults:
        assert 0 < found.single < 1e-4 and found.error < 1e-12 and found.spread == 0


def test_an_estimate_is_judged_by_its_spread():
    found = check(Linear(noise=2.0), torch.randn(2, *SHAPE))
    assert 0.5 * 2.0 / 8 < found.spread < 2 * 2.0 / 8  # 64 draws
    assert found.why == ""


def test_bits_of_a_uniform_density():
    """Every byte alike costs log2(levels), whatever the shift and the scale of x were."""
    images = some_images(levels=17)
    log_prob = torch.full((3,), 16 * math.log(images.std / 2))  # x is uniform on an interval of length 2 / std
    torch.testing.assert_close(images.bits_per_dim(log_prob), torch.full((3,), math.log2(17)).double())
    x = images.draw(images.train, torch.Generator().manual_seed(0))
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


def test_training_learns_and_keeps_to_its_seconds():
    images = some_images()
    peer = Linear()
    before = images.bits_per_dim(families_measure.log_prob(peer, images, images.choose)).mean()
    trained = families_measure.train(peer, images, 1.0)
    after = images.bits_per_dim(families_measure.log_prob(peer, images, images.choose)).mean()
    assert after < before - 0.3 and trained.steps > 20 and trained.skipped == 0, (before, after, trained)
    assert 1.0 <= trained.seconds < 5.0 and not peer.training


def test_the_best_weights_are_kept():
    """A peer that training makes worse ends where it was best."""

    class Worse(Linear):
        def loss(self, x):
            return -super().loss(x)

    images, peer = some_images(), Worse()
    families_measure.train(peer, images, 0.3)
    kept = images.bits_per_dim(families_measure.log_prob(peer, images, images.choose)).mean()
    last = Worse()
    last.load_state_dict(peer.state_dict())
    optimizer = torch.optim.SGD(last.parameters(), lr=1e-2)
    last.loss(images.draw(images.train[:50], torch.Generator())).backward()
    optimizer.step()
    assert kept < images.bits_per_dim(families_measure.log_prob(last, images, images.choose)).mean()


def test_there_is_one_step_however_few_the_seconds():
    trained = families_measure.train(Linear(), some_images(), 1e-9)
    assert trained.steps == 1 and trained.seconds > 1e-9


def test_steps_that_are_not_finite_change_nothing():
    peer = Linear(wrong=math.nan)
    before = {name: value.clone() for name, value in peer.state_dict().items()}
    trained = families_measure.train(peer, some_images(), 0.2)
    assert trained.skipped == trained.steps > 0
    assert all(torch.equal(value, before[name]) for name, value in peer.state_dict().items())


def test_samples_are_timed_and_counted(monkeypatch):
    seconds, bad, note = families_measure.time_sampling(Linear())
    assert 0 < seconds < 1 and bad == 1 and note == "1 of 1000 samples are not finite"
    monkeypatch.setattr(families_measure, "MOST_SECONDS", 0.1)
    seconds, bad, note = families_measure.time_sampling(Linear(samples=0.05))
    assert seconds is None and note == "1 sample took 0 s, so 1000 were not drawn"


def test_a_sweep_that_differs_is_not_timed():
    class Swept(Linear):
        def one_sweep(self):
            other = copy.deepcopy(self)
            other.off = self.wrong
            return other

    x = torch.randn(4, *SHAPE)
    seconds, note = families_measure.time_one_sweep(Swept(), x)
    assert seconds > 0 and note == ""
    for wrong in (0.1, math.nan):
        seconds, note = families_measure.time_one_sweep(Swept(wrong=wrong), x)
        assert seconds is None and note.startswith("the sweep differs from the library's inverse by")
    assert families_measure.time_one_sweep(Linear(), x) == (None, "")


def test_a_refused_flow_has_no_figures():
    result = families_measure.measure(Linear(wrong=0.5), some_images(), 0.1)
    line = families.row(peers.Family("made", "linear", Linear), result)
    assert result.density is result.sampling is result.bits is None and "0.5 nats" in result.note
    assert line["bits/dim"] == "refused" and line["1000 samples, s"] == line["1000 log-densities, s"] == "-"


def test_the_page(monkeypatch):
    monkeypatch.setattr(families, "machine", lambda: made_machine("A CPU", commit="c0ffee"))
    monkeypatch.setattr(families, "families", lambda: [peers.Family("gone", "all", None, "gone is not installed")])
    good = Result(1234, Trained(10, 2.04, 1), Checked(1e-9, 2e-5, 0, 1e-12, ""), 2.5, 0.01, None, None, 0.5, 0, "slow")
    wrong = Result(5, Trained(3, 2.0, 0), Checked(9.0, 9.0, 0, 0, "wrong by 9"), note="wrong by 9")
    table = {
        peers.Family("tarflow_fast", "right", Linear): good,
        peers.Family("tarflow_fast", "wrong", Linear): wrong,
    }
    text = families.page({some_images(): table}, 2.0, ["The data set x was skipped: not here"], None)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    right = dict(zip(lines[0], lines[2], strict=True))
    assert right["bits/dim"] == "2.500 +- 0.010" and right["parameters"] == "1,234" and right["steps"] == "10"
    assert right["1000 samples, s"] == "not drawn" and right["1000 log-densities, s"] == "0.5"
    for note in (
        "- tarflow_fast, right: slow.",
        "- tarflow_fast, right: 1 of 10 steps were not finite and changed nothing.",
        "- tarflow_fast, wrong: wrong by 9.",
        "- gone was skipped: gone is not installed.",
        "- The data set x was skipped: not here",
        "200 images of 4 x 4 x 1 with 17 levels",
    ):
        assert note in text, note
    assert max(map(len, text[: text.index("## made")].splitlines())) <= 120


def test_what_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "normflows", None)
    monkeypatch.delitem(sys.modules, "peers.normflows", raising=False)
    absent = [family for family in peers.families() if family.library == "normflows"]
    assert [(family.build, family.why) for family in absent] == [(None, "normflows is not installed")]
    with pytest.raises(ValueError, match=r"families: --only must name libraries among .*, got 'nothing'"):
        families.chosen(["nothing"])


# What each library's flows are, less those that the check refuses with the versions of today.
SOUND = [
    ("zuko", "MAF"), ("zuko", "neural spline flow"), ("zuko", "neural autoregressive flow"),
    ("nflows", "MAF"), ("nflows", "neural spline flow, coupling"),
    ("normflows", "RealNVP"), ("normflows", "Glow"), ("normflows", "residual flow"),
    ("torchflows", "RealNVP, multiscale"), ("tarflow_fast", "TarFlow"), ("tarflow_fast", "TokenFlow"),
]  # fmt: skip


@pytest.mark.parametrize(("library", "name"), SOUND, ids=["-".join(each).replace(" ", "_") for each in SOUND])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_library_s_flow_is_sound(library, name):
    """After a few steps, which move it off the identity, it passes the check; it leaves its input alone."""
    if library != "tarflow_fast" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    build = {(each.library, each.name): each.build for each in peers.families()}[library, name]
    images, peer = some_images(), build(SHAPE)
    trained = families_measure.train(peer, images, 0.5)
    x = images.draw(images.held_out[:2], torch.Generator().manual_seed(0))
    before = x.clone()
    found = check(peer, x)
    assert trained.steps - trained.skipped > 0 and found.why == "", found
    assert torch.equal(x, before) and not x.requires_grad
    with torch.no_grad():
        assert peer.sample(3).shape == (3, *SHAPE) and peer.log_prob(x).shape == (2,)
        z = peer.encode(x)
        sweep = peer.one_sweep()
        if sweep is not None:
            torch.testing.assert_close(sweep.decode(z), peer.decode(z), rtol=1e-4, atol=1e-4)
    assert z.shape == (2, 16)
