"""sbi: a small posterior draws the same samples after `accelerate` as before."""

import warnings

import pytest
import torch

pytest.importorskip("sbi")

from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform

from tarflow_fast import made


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """sbi writes its logs into the folder it runs in."""
    monkeypatch.chdir(tmp_path)


def posterior_of(model):
    """Of a linear Gaussian, trained for two epochs, and an observation."""
    torch.manual_seed(0)
    prior = BoxUniform(-3 * torch.ones(2), 3 * torch.ones(2))
    theta = prior.sample((200,))
    x = theta @ torch.randn(2, 2) + 0.3 * torch.randn(200, 2)
    estimator = posterior_nn(model=model, num_transforms=2, hidden_features=16)
    inference = NPE(prior, density_estimator=estimator, show_progress_bars=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that two epochs are few
        inference.append_simulations(theta, x).train(max_num_epochs=2, training_batch_size=100)
    return inference.build_posterior(), x[:1]


def sample(posterior, observation):
    torch.manual_seed(1)
    return posterior.sample((30,), x=observation, show_progress_bars=False)


@pytest.mark.parametrize("model", ["maf", "maf_rqs", "zuko_maf", "zuko_nsf"])
def test_a_posterior_samples_the_same(model):
    posterior, observation = posterior_of(model)
    before = sample(posterior, observation)
    assert made.accelerate(posterior) is posterior
    explanations = made.explain(posterior)
    assert len(explanations) == 2 and all(each.path != "library" for each in explanations)
    assert explanations[0].name.startswith("potential_fn.posterior_estimator.net.")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*inverted by its own code")  # a gradient would be asked for
        after = sample(posterior, observation)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    made.restore(posterior)
    assert torch.equal(sample(posterior, observation), before)


def test_nsf_is_a_coupling_flow():
    """It needs one pass in either direction, so that there is nothing to accelerate."""
    posterior, _ = posterior_of("nsf")
    with pytest.raises(ValueError, match="no autoregressive transform in a DirectPosterior"):
        made.accelerate(posterior)
    assert made.explain(posterior) == []
