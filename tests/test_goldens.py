"""The reference and TarFlow must give every tensor that the original implementation gave.

The error against float64 may be at most twice the original's own error, plus 1e-6. Where the golden has no float64
twin of a tensor, the float64 reference serves as the truth. It is itself tested here against the twins that there are.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tarflow_fast import ReferenceTarFlow, TarFlow

FOLDER = Path(__file__).parent / "goldens"
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors") if path.stem != "molecule_tokens")
KINDS = {"reference": ReferenceTarFlow, "tarflow": TarFlow}


class Golden:
    def __init__(self, name):
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.meta = json.loads(file.metadata()["meta"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
        self.state = {key[6:]: value for key, value in self.tensors.items() if key.startswith("state.")}

    def model(self, kind, dtype=torch.float32):
        model = KINDS[kind](**self.meta["config"])
        missing, unexpected = model.load_state_dict(self.state, strict=False)
        assert not unexpected and all(key.endswith("attn_mask") for key in missing)
        return model.to(dtype)

    def reverse_cases(self):
        for i, case in enumerate(self.meta["reverse"]):
            arguments = {key: value for key, value in case.items() if key != "conditional"}
            yield i, self[f"reverse.{i}.z"], self[f"reverse.{i}.y"] if case["conditional"] else None, arguments

    def __getitem__(self, key):
        return self.tensors[key]


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return Golden(request.param)


def check(ours, original, truth, what):
    """Checks that the error of `ours` is at most twice the original's own error, plus 1e-6."""
    assert ours.shape == original.shape, f"{what}: shape {tuple(ours.shape)}, original {tuple(original.shape)}"
    error = (ours.double() - truth.double()).abs().max().item()
    bound = 2 * (original.double() - truth.double()).abs().max().item() + 1e-6
    assert error <= bound, f"{what}: error {error:.3g} against float64, allowed {bound:.3g}"


def run_forward(golden, kind, dtype):
    model = golden.model(kind, dtype)
    x = golden["forward.x"].to(dtype).clone().requires_grad_()
    z, outputs, logdets = model(x, golden.tensors.get("forward.y"))
    loss = model.get_loss(z, logdets)
    loss.backward()
    results = {"forward.z": z, "forward.logdets": logdets, "forward.loss": loss, "grad.x": x.grad}
    results |= {f"forward.outputs.{i}": output for i, output in enumerate(outputs)}
    results |= {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {key: value.detach() for key, value in results.items()}


def test_float64_reference_is_the_stored_truth(golden):
    truth = run_forward(golden, "reference", torch.float64)
    torch.testing.assert_close(truth["forward.z"], golden["forward64.z"], rtol=0, atol=1e-12)
    torch.testing.assert_close(truth["forward.logdets"], golden["forward64.logdets"], rtol=0, atol=1e-12)
    model = golden.model("reference", torch.float64)
    for i, z, y, arguments in golden.reverse_cases():
        x = model.reverse(z.double(), y, **arguments)
        torch.testing.assert_close(x, golden[f"reverse64.{i}.x"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_loss_and_every_gradient(golden, kind):
    truth, ours = run_forward(golden, "reference", torch.float64), run_forward(golden, kind, torch.float32)
    stored = {
        key for key in golden.tensors if key.startswith(("forward.", "grad.")) and key not in ("forward.x", "forward.y")
    }
    assert stored == set(ours)
    for key in sorted(stored):
        check(ours[key], golden[key], truth[key], key)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reverse_case_and_stage(golden, kind):
    model, truth_model = golden.model(kind), golden.model("reference", torch.float64)
    for i, z, y, arguments in golden.reverse_cases():
        noise = z.clone()
        ours = model.reverse(z, y, **arguments, return_sequence=True)
        truth = truth_model.reverse(z.double(), y, **arguments, return_sequence=True)
        assert torch.equal(z, noise), "reverse wrote into the caller's noise"
        assert sum(key.startswith(f"reverse.{i}.sequence.") for key in golden.tensors) == len(ours)
        for j, stage in enumerate(ours):
            check(stage, golden[f"reverse.{i}.sequence.{j}"], truth[j], f"reverse {i} {arguments} stage {j}")
        check(ours[-1], golden[f"reverse.{i}.sequence.{len(ours) - 1}"], golden[f"reverse64.{i}.x"], f"reverse {i}")
        torch.testing.assert_close(model.reverse(z, y, **arguments), ours[-1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_update_prior(kind):
    golden = Golden("volume_preserving")
    truth, model = golden.model("reference", torch.float64), golden.model(kind)
    truth.update_prior(golden["forward.z"].double())
    model.update_prior(golden["forward.z"])
    check(model.var, golden["update_prior.var"], truth.var, "update_prior")
