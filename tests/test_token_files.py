"""Files of flows over tokens: our folders, checkpoints of other packages with their own names, and what is refused."""

import json
import re
from collections import OrderedDict

import pytest
import torch
from flows import random_flow
from safetensors.torch import load_file, save_file
from tokens import draw_rows, random_tokens_flow
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tarflow_fast import TarFlow, TokenFlow
from tarflow_fast.files import load_tensors, save_tensors
from tarflow_fast.flows import SHIPPED, open_flow

CONFIGS = [
    dict(num_blocks=3, orders=[[0, 1, 2, 3, 4], [3, 1, 4, 0, 2], [1, 0, 2, 4, 3]]),
    dict(head_size=16, expansion=2, channels=48, num_classes=3),
    dict(nvp=False, num_tokens=1, layers_per_block=2, num_blocks=1),
]


def theirs(model):
    """The model's weights as other packages store them: without var, with masks, and as if MLPs had a Dropout."""
    state = {key.replace("mlp.main.2", "mlp.main.3"): value for key, value in model.state_dict().items()}
    return OrderedDict((key, value) for key, value in state.items() if key != "var")


def same_flow(model, other, var=True):
    ours, theirs = model.state_dict(), other.state_dict()
    assert model.config == other.config and set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if var or key != "var")


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("config", CONFIGS)
def test_pretrained_round_trip(tmp_path, config):
    model = random_tokens_flow(**config)
    model.save_pretrained(tmp_path / "flow")
    saved = json.loads((tmp_path / "flow" / "config.json").read_text())
    assert saved == {"model_type": "tokenflow", **model.config} and saved["orders"] == config.get("orders")
    assert not any(key.endswith("attn_mask") for key in load_file(tmp_path / "flow" / "model.safetensors"))
    opened, record = open_flow(tmp_path / "flow")
    assert type(opened) is TokenFlow and record == {}
    z = draw_rows(4, *model.var.shape)
    for again in (opened, TokenFlow.from_pretrained(tmp_path / "flow")):
        same_flow(again, model)
        assert not again.training
        for got, expected in zip(again.inverse(z), model.inverse(z), strict=True):
            assert torch.equal(got, expected)


def test_the_orders_of_the_file_are_those_of_the_flow(tmp_path):
    model, x = random_tokens_flow(**CONFIGS[0]), draw_rows(3, 5, 3)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    config = json.loads(text)
    config["orders"][1] = [4, 3, 2, 1, 0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not torch.allclose(TokenFlow.from_pretrained(tmp_path)(x)[0], model(x)[0], atol=1e-3)
    (tmp_path / "config.json").write_text(text)
    assert torch.equal(TokenFlow.from_pretrained(tmp_path)(x)[0], model(x)[0])


def test_a_folder_of_the_other_kind_is_refused(tmp_path):
    random_tokens_flow().save_pretrained(tmp_path / "tokens")
    random_flow().save_pretrained(tmp_path / "images")
    for kind, folder, there, right in (
        (TokenFlow, tmp_path / "images", "tarflow", "TarFlow"),
        (TarFlow, tmp_path / "tokens", "tokenflow", "TokenFlow"),
        (TokenFlow, SHIPPED["digits"], "tarflow", "TarFlow"),
    ):
        wanted = "tokenflow" if kind is TokenFlow else "tarflow"
        message = (
            f"from_pretrained: {folder} must hold a {wanted!r} flow, got {there!r}: open it with "
            f"{right}.from_pretrained"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            kind.from_pretrained(folder)


SETTINGS = {
    "order of another length": (dict(orders=[[0, 1, 2, 3, 4], [0, 1]]), "TokenFlow: orders[1] must be a permutation of "
                                "range(5), got 2 numbers"),
    "no permutation": (dict(orders=[[0, 1, 2, 3, 4], [0, 1, 2, 3, 3]]), "TokenFlow: orders[1] must be a permutation of "
                       "range(5), got one without 4"),
    "too few orders": (dict(orders=[[0, 1, 2, 3, 4]]), "TokenFlow: orders must be num_blocks = 2 permutations of "
                       "range(5), got 1"),
    "another size": (dict(num_tokens=6), "from_pretrained: the weights do not fit the model: size mismatch (3): var is "
                     "(5, 3), expected (6, 3), blocks.0.pos_embed is (5, 64), expected (6, 64), blocks.1.pos_embed is "
                     "(5, 64), expected (6, 64)"),
    "another head": (dict(head_size=24), "TokenFlow: channels must be a multiple of 24, got 64"),
    "another kind": (dict(model_type="bert"), "must be 'tarflow' or 'tokenflow', got 'bert'"),
    "no kind at all": (dict(model_type=["a"]), "must be 'tarflow' or 'tokenflow', got ['a']"),
    "unknown key": (dict(dropout=0.1), "'head_size', 'expansion', 'nvp', 'num_classes', 'orders'], differing in "
                    "['dropout']"),
    "a size of None": (dict(channels=None), "TokenFlow: channels must be an int, got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("change", SETTINGS)
def test_a_wrong_setting_is_refused(tmp_path, change):
    random_tokens_flow().save_pretrained(tmp_path)
    changes, message = SETTINGS[change]
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError), match=f"{re.escape(message)}$"):
        TokenFlow.from_pretrained(tmp_path)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "net.", "model.", "flow.", "ema.", "net._orig_mod.", "_average.module.net."]
)
def test_a_checkpoint_opens_under_its_own_names(tmp_path, prefix):
    model = random_tokens_flow(num_blocks=3, layers_per_block=2, num_classes=2, expansion=3)
    state = {prefix + key: value for key, value in theirs(model).items()}
    assert any(key.endswith("attn_mask") for key in state)
    torch.save(state, tmp_path / "a.pth")
    save_tensors(tmp_path / "a.safetensors", state)
    for path in tmp_path.iterdir():
        loaded = TokenFlow.from_checkpoint(path)
        same_flow(loaded, model, var=False)
        assert torch.equal(loaded.var, torch.ones(5, 3)) and not loaded.training
        same_flow(open_flow(path)[0], loaded)
        assert TokenFlow.from_checkpoint(path, dtype=torch.float64).var.dtype == torch.float64


def test_our_own_state_dict_opens_with_its_variance(tmp_path):
    model = random_tokens_flow(nvp=False)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    same_flow(TokenFlow.from_checkpoint(tmp_path / "a.pth"), model)
    torch.save(AveragedModel(model).state_dict(), tmp_path / "averaged.pth")  # has n_averaged beside module.*
    same_flow(TokenFlow.from_checkpoint(tmp_path / "averaged.pth"), model)


def test_a_variance_beside_a_dropout_is_kept(tmp_path):
    model = random_tokens_flow()
    torch.save(theirs(model) | {"var": model.var, "blocks.0.causal_mask": torch.ones(5, 5)}, tmp_path / "a.pth")
    same_flow(TokenFlow.from_checkpoint(tmp_path / "a.pth"), model)
    assert type(open_flow(tmp_path / "a.pth")[0]) is TokenFlow


def test_head_size_and_orders_are_told(tmp_path):
    orders = [[4, 2, 0, 1, 3], [0, 1, 2, 3, 4]]
    model, x = random_tokens_flow(head_size=32, orders=orders), draw_rows(3, 5, 3)
    model.var.fill_(1.0)
    torch.save(theirs(model), tmp_path / "a.pth")
    same_flow(TokenFlow.from_checkpoint(tmp_path / "a.pth", head_size=32, orders=torch.tensor(orders)), model)
    for other in ({"head_size": 32}, {"orders": orders}):
        assert not torch.allclose(TokenFlow.from_checkpoint(tmp_path / "a.pth", **other)(x)[0], model(x)[0], atol=1e-4)
    small = random_tokens_flow(channels=48, head_size=16)
    torch.save(theirs(small), tmp_path / "small.pth")
    same_flow(TokenFlow.from_checkpoint(tmp_path / "small.pth", head_size=16), small, var=False)
    same_flow(open_flow(tmp_path / "small.pth", head_size=16)[0], small, var=False)


def test_a_lightning_file_opens(tmp_path):
    model = random_tokens_flow()
    net = nn.ModuleDict({"net": model})
    optimizer = torch.optim.AdamW(net.parameters())
    model(draw_rows(2, 5, 3))[0].sum().backward()
    optimizer.step()
    state = OrderedDict((f"net.{key}", value) for key, value in theirs(model).items())
    content = {
        "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "2.5.0", "state_dict": state, "loops": {"a": [1]},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
        "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [],
        "hparams_name": "kwargs", "hyper_parameters": {"lr": 1e-4, "sizes": (5, 3)},
    }  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    for choice in ({}, {"key": "state_dict"}, {"key": "state_dict.net"}):
        same_flow(TokenFlow.from_checkpoint(tmp_path / "last.ckpt", **choice), model, var=False)

    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(marker)!r}, 'w').close()",))

    torch.save(content | {"hyper_parameters": {"net": Trap()}}, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"last.ckpt holds objects other than tensors \(.*exec\) and was not unpickled$"
    ):
        TokenFlow.from_checkpoint(tmp_path / "last.ckpt")
    assert not marker.exists()


def test_one_of_several_flows_is_chosen(tmp_path):
    student, teacher = random_tokens_flow(0), random_tokens_flow(1)
    both = {f"net.{k}": v for k, v in theirs(student).items()} | {f"teacher.{k}": v for k, v in theirs(teacher).items()}
    path = tmp_path / "a.ckpt"
    for content, names in (
        (both, ["net", "teacher"]),
        ({"state_dict": both}, ["state_dict.net", "state_dict.teacher"]),
    ):
        torch.save(content, path)
        several = re.escape(f"load_tensors: {path} holds several state_dicts, choose one with key=: {names}")
        with pytest.raises(ValueError, match=f"^{several}$"):
            TokenFlow.from_checkpoint(path)
        for name, model in zip(names, (student, teacher), strict=True):
            same_flow(TokenFlow.from_checkpoint(path, key=name), model, var=False)
            same_flow(open_flow(path, key=name)[0], model, var=False)
        with pytest.raises(ValueError, match=re.escape(f"one of {names}, got 'ema'")):
            TokenFlow.from_checkpoint(path, key="ema")
    torch.save(theirs(student) | {f"ema.{key}": value for key, value in theirs(teacher).items()}, path)
    same_flow(TokenFlow.from_checkpoint(path, key="ema"), teacher, var=False)
    same_flow(TokenFlow.from_checkpoint(path, key=""), student, var=False)


def test_tensors_beside_the_flow_are_named(tmp_path):
    model, path = random_tokens_flow(), tmp_path / "a.pth"
    state = {f"net.model.{key}": value for key, value in theirs(model).items()}
    shadows = {f"net.shadow_params.{i}": torch.zeros(1) for i in range(5)}
    torch.save(state | {"net.num_updates": torch.tensor(3)} | shadows, path)
    message = (
        f"load_tensors: {path} holds 6 other tensors beside the flow: net.num_updates, net.shadow_params.0, "
        "net.shadow_params.1 and 3 more; key='net.model' takes the flow alone"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TokenFlow.from_checkpoint(path)
    same_flow(TokenFlow.from_checkpoint(path, key="net.model"), model, var=False)
    assert "pos_embed" in str(sorted(load_tensors(path, "net.model")))


STATE = theirs(random_tokens_flow(layers_per_block=2))
ODD = theirs(random_tokens_flow(channels=48, head_size=48))
FIT = "from_checkpoint: the weights do not fit the model: "


def changed(state=STATE, drop="^$", **new):
    kept = {key: value for key, value in state.items() if not re.search(drop, key)}
    return kept | {key.replace("__", "."): value for key, value in new.items()}


REFUSED = {
    "a key is missing": (changed(drop="blocks.1.proj_in.bias"), {}, FIT + "Missing keys (1): blocks.1.proj_in.bias"),
    "many keys are missing": (
        changed(drop="blocks.1.attn_blocks.1"), {},
        FIT + "Missing keys (12): blocks.1.attn_blocks.1.attention.norm.weight, "
        "blocks.1.attn_blocks.1.attention.norm.bias, blocks.1.attn_blocks.1.attention.qkv.weight and 9 more",
    ),
    "foreign keys": (
        changed(blocks__0__q_norm__weight=torch.ones(64), head__weight=torch.ones(3)), {},
        FIT + "foreign keys (2): blocks.0.q_norm.weight, head.weight",
    ),
    "both": (
        {key.replace("main.3", "main.4"): value for key, value in changed(drop="attn_blocks.1").items()}, {},
        FIT + "Missing keys (4): blocks.0.attn_blocks.0.mlp.main.2.weight, blocks.0.attn_blocks.0.mlp.main.2.bias, "
        "blocks.1.attn_blocks.0.mlp.main.2.weight and 1 more; foreign keys (4): "
        "blocks.0.attn_blocks.0.mlp.main.4.weight, blocks.0.attn_blocks.0.mlp.main.4.bias, "
        "blocks.1.attn_blocks.0.mlp.main.4.weight and 1 more",
    ),
    "the layer twice": (
        changed(blocks__0__attn_blocks__0__mlp__main__2__bias=torch.zeros(64)), {},
        FIT + "foreign keys (1): blocks.0.attn_blocks.0.mlp.main.3.bias",
    ),
    "blocks of two lengths": (
        changed(blocks__1__pos_embed=torch.zeros(7, 64)), {},
        FIT + "size mismatch (1): blocks.1.pos_embed is (7, 64), expected (5, 64)",
    ),
    "a gap in the numbers": (
        {key.replace("blocks.1.", "blocks.7."): value for key, value in changed(drop="attn_blocks").items()}
        | {key: value for key, value in STATE.items() if key.startswith("blocks.0")}, {},
        FIT + "Missing keys (29): ",
    ),
    "the head size is not told": (
        ODD, {}, "from_checkpoint: head_size must be given, because the shapes do not tell it and 64, the usual one, "
        "does not divide channels = 48",
    ),
    "a head size that does not divide": (
        STATE, {"head_size": 48}, "from_checkpoint: channels must be a multiple of 48, got 64",
    ),
    "a head size of another type": (
        STATE, {"head_size": 64.0}, "from_checkpoint: head_size must be an int, got float",
    ),
    "orders of another length": (
        STATE, {"orders": [[0, 1, 2], [2, 1, 0]]},
        "from_checkpoint: orders[0] must be a permutation of range(5), got 3 numbers",
    ),
    "an odd output": (
        changed(blocks__0__proj_out__weight=torch.zeros(5, 64)), {},
        "from_checkpoint: proj_out.weight must have 3 or 6 rows for tokens of size 3, got 5",
    ),
    "an odd MLP": (
        changed(blocks__0__attn_blocks__0__mlp__main__0__weight=torch.zeros(100, 64)), {},
        "from_checkpoint: mlp.main.0.weight must have a multiple of channels = 64 rows, got 100",
    ),
    "an embedding of three dimensions": (
        changed(blocks__0__pos_embed=torch.zeros(1, 5, 64)), {},
        "from_checkpoint: blocks.0.pos_embed must have 2 dimensions, got shape (1, 5, 64)",
    ),
    "class embeddings of two": (
        changed(blocks__0__class_embed=torch.zeros(3, 64)), {},
        "from_checkpoint: blocks.0.class_embed must have 3 dimensions, got shape (3, 64)",
    ),
    "no flow at all": (
        {"conv.weight": torch.zeros(3)}, {},
        "from_checkpoint: not a state_dict of a flow over tokens, missing blocks.0.pos_embed, blocks.0.proj_in.weight, "
        "blocks.0.proj_out.weight and 1 more; got conv.weight",
    ),
    "two dtypes": (
        changed(blocks__0__proj_in__bias=torch.zeros(64, dtype=torch.float64)), {},
        "from_checkpoint: tensors must share one floating dtype (or pass dtype=), got ['torch.float32', "
        "'torch.float64']",
    ),
    "integers": (
        {key: value.long() for key, value in STATE.items()}, {},
        "from_checkpoint: tensors must share one floating dtype (or pass dtype=), got ['torch.int64']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, kind):
    state, choice, message = REFUSED[kind]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}{'' if message.endswith(' ') else '$'}"):
        TokenFlow.from_checkpoint(tmp_path / "a.pth", **choice)


@pytest.mark.parametrize("kind", ["truncated", "pickle", "missing"])
def test_a_damaged_file_is_refused(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    if kind != "missing":
        save_file(dict(STATE), path)
        path.write_bytes(path.read_bytes()[:-50] if kind == "truncated" else b"\x80\x04N.")
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"^load_tensors: .*(whole safetensors file|must be a file)"
    ):
        TokenFlow.from_checkpoint(path)


def test_an_image_flow_is_not_taken_for_tokens(tmp_path):
    images, tokens = random_flow(), random_tokens_flow()
    torch.save(images.state_dict(), tmp_path / "images.pth")
    torch.save(theirs(tokens), tmp_path / "tokens.pth")
    assert type(open_flow(tmp_path / "images.pth", in_channels=1)[0]) is TarFlow
    patches = TokenFlow.from_checkpoint(tmp_path / "images.pth")
    x = draw_rows(2, 16, 4)
    assert torch.equal(patches.inverse(x)[0], images.inverse(x)[0])
    hint = r"missing \['var'\] \(TokenFlow.from_checkpoint opens flows over tokens\)$"
    with pytest.raises(ValueError, match=hint):
        TarFlow.from_checkpoint(tmp_path / "tokens.pth")
    for argument, value in {"in_channels": 1, "img_size": (8, 8)}.items():
        message = f"open_flow: {argument} is of flows over images, {tmp_path}/tokens.pth holds one over tokens"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            open_flow(tmp_path / "tokens.pth", **{argument: value})
    with pytest.raises(ValueError, match=r"^open_flow: head_size is of flows over tokens, .* holds one over images$"):
        open_flow(tmp_path / "images.pth", head_size=64)


def test_a_failed_save_leaves_no_half_folder(tmp_path, monkeypatch):
    random_tokens_flow().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tarflow_fast.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        random_tokens_flow(seed=9).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
