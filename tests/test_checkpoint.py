"""Files: what is saved can be loaded, the original's .pth files load, and a file is written whole or not at all."""

import json
import os
import stat

import pytest
import torch
from flows import random_flow, random_images
from safetensors import safe_open

from tarflow_fast import ReferenceTarFlow, TarFlow
from tarflow_fast.checkpoint import infer_config
from tarflow_fast.files import load_tensors, save_tensors, write_atomic

CONFIGS = [
    dict(in_channels=1, num_classes=3),
    dict(in_channels=3, nvp=False),
    dict(in_channels=3, img_size=(4, 8), layers_per_block=2, num_blocks=3, channels=128),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_pretrained_round_trip(tmp_path, config):
    model = random_flow(**config)
    model.save_pretrained(tmp_path / "a" / "flow")
    again = TarFlow.from_pretrained(tmp_path / "a" / "flow")
    assert again.config == model.config and not again.training
    assert {k for k, v in again.state_dict().items() if torch.equal(v, model.state_dict()[k])} == set(
        model.state_dict()
    )
    assert all(p.requires_grad for p in again.parameters())
    with safe_open(tmp_path / "a" / "flow" / "model.safetensors", "pt") as file:
        assert not any(key.endswith("attn_mask") for key in file.keys())
    saved = json.loads((tmp_path / "a" / "flow" / "config.json").read_text())
    assert saved == {"model_type": "tarflow", **model.config}


def test_dtype_on_load(tmp_path):
    random_flow(dtype=torch.float16).save_pretrained(tmp_path)
    assert TarFlow.from_pretrained(tmp_path).var.dtype == torch.float16
    model = TarFlow.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.sample(1, seed=0).isfinite().all()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", ["plain", "ddp", "compiled", "nested", "safetensors"])
def test_checkpoint_of_the_original_loads_by_its_shapes(tmp_path, config, form):
    model = random_flow(**config)
    original = ReferenceTarFlow(**model.config)
    original.load_state_dict(model.state_dict())
    state = {key: value.clone() for key, value in original.state_dict().items()}  # includes the masks
    prefix = {"ddp": "module.", "compiled": "module._orig_mod."}.get(form, "")
    state = {prefix + key: value for key, value in state.items()}
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "safetensors":
        save_tensors(path, state)
    else:
        torch.save({"epoch": 3, "model": state} if form == "nested" else state, path)
    loaded = TarFlow.from_checkpoint(path, in_channels=config["in_channels"], img_size=config.get("img_size"))
    assert loaded.config == model.config
    x = random_images(model)
    assert torch.equal(loaded(x)[0], model(x)[0])


def test_the_flow_is_found_among_other_entries(tmp_path):
    model, other = random_flow(0, num_classes=3), random_flow(1, num_classes=3)
    state, ema = model.state_dict(), {f"module.{key}": value for key, value in other.state_dict().items()}
    moments = {"exp_avg": torch.zeros(3)}
    path = tmp_path / "run.pth"

    def load(content, **choice):
        torch.save(content, path)
        return TarFlow.from_checkpoint(path, in_channels=1, **choice).var.shape, load_tensors(path, **choice)

    def same(tensors, expected):
        return set(tensors) == set(expected) and all(torch.equal(tensors[k], expected[k]) for k in expected)

    assert same(load({"moments": moments, "model": state})[1], state)
    for content in ({"model": state, "ema": ema}, {"ema": ema, "model": state}):
        with pytest.raises(
            ValueError, match=r"run.pth holds several state_dicts, choose one with key=: \['\w+', '\w+'\]$"
        ):
            load(content)
        assert same(load(content, key="model")[1], state)
        assert same(load(content, key="ema")[1], other.state_dict())
        with pytest.raises(ValueError, match=r"key must name a state_dict in .*, got 'best'$"):
            load(content, key="best")
    with pytest.raises(
        ValueError, match=r"must hold a dict of tensors \(a state_dict\), got one where 'step' is of type int$"
    ):
        load({**state, "step": 3})
    with pytest.raises(ValueError, match=r"\(a state_dict\), got an empty one$"):
        load({})
    torch.save(state, path)
    with pytest.raises(TypeError, match=r"^from_checkpoint: in_channels must be an int, got str$"):
        TarFlow.from_checkpoint(path, in_channels="1")
    with pytest.raises(TypeError, match=r"^from_checkpoint: img_size must be an int, got tuple$"):
        TarFlow.from_checkpoint(path, in_channels=1, img_size=(8,))


def test_the_folder_of_a_run_will_do(tmp_path):
    model = random_flow()
    model.save_pretrained(tmp_path / "run" / "model")
    assert TarFlow.from_pretrained(tmp_path / "run").config == model.config


def test_infer_config_is_the_constructor():
    for config in CONFIGS:
        model = random_flow(**config)
        inferred = infer_config(model.state_dict(), config["in_channels"], config.get("img_size"))
        assert TarFlow(**inferred).config == model.config


def test_write_atomic_is_whole_or_nothing(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda temporary: temporary.write_text("old"))
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask

    def interrupted(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, interrupted)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
