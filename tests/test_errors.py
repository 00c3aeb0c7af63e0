"""Bad input, in one table. Each row is a call and its exact message. The call must change neither model nor disk."""

import pickle
import re

import numpy as np
import pytest
import torch
from flows import random_flow, random_images, random_noise
from safetensors.torch import save_file
from tokens import draw_rows, random_tokens_flow
from transform_errors import TRANSFORM_CALLS

from tarflow_fast import TarFlow, TokenFlow
from tarflow_fast.files import load_tensors

MODEL = random_flow(num_classes=3)
PLAIN = random_flow()
X, Z, Y = random_images(MODEL), random_noise(MODEL), torch.tensor([0, 1])
TOKENS, ROWS = random_tokens_flow(), draw_rows(2, 5, 3)  # T = 5, D = 3
PIXELS = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)

WITHOUT_GPU = "it needs GPU tensors, or TRITON_INTERPRET=1 for CPU tensors, got cpu"


def asked_for(backend):
    flow = random_flow()
    flow.backend = backend
    return flow(X)


CUDA_HAS_NONE = "block_inverse: backend 'cuda' cannot run: block_inverse has no cuda kernel"


def inverse_asked_for(backend):
    flow = random_flow()
    flow.backend = backend
    return flow.reverse(Z)


CALLS = [
    *TRANSFORM_CALLS,
    # constructor
    (lambda: TarFlow(1, 8, 2, 65, 1, 1), ValueError, "TarFlow: channels must be a multiple of 64, got 65"),
    (lambda: TarFlow(1, 9, 2, 64, 1, 1), ValueError, "TarFlow: img_size must be a multiple of patch_size = 2, got 9"),
    (
        lambda: TarFlow(1, (8, 9), 2, 64, 1, 1),
        ValueError,
        "TarFlow: img_size must be a multiple of patch_size = 2, got (8, 9)",
    ),
    (lambda: TarFlow(1, (8, 8, 8), 2, 64, 1, 1), TypeError, "TarFlow: img_size must be an int, got tuple"),
    (lambda: TarFlow(0, 8, 2, 64, 1, 1), ValueError, "TarFlow: in_channels must be >= 1, got 0"),
    (lambda: TarFlow(1, 8, 2, 64, 0, 1), ValueError, "TarFlow: num_blocks must be >= 1, got 0"),
    (lambda: TarFlow(1, 8, 2, 64, 1, 1.0), TypeError, "TarFlow: layers_per_block must be an int, got float"),
    (lambda: TarFlow(1, 8, 2, 64, 1, 1, num_classes=-1), ValueError, "TarFlow: num_classes must be >= 0, got -1"),
    (
        lambda: TarFlow(1, 8, 2, 64, 1, 1, backend="gpu"),
        ValueError,
        "TarFlow: backend must be one of auto, torch, cpu, triton, cuda, got 'gpu'",
    ),
    (lambda: asked_for("triton"), RuntimeError, "layer_norm: backend 'triton' cannot run: " + WITHOUT_GPU),
    (lambda: asked_for("cuda"), RuntimeError, "affine: backend 'cuda' cannot run: it needs GPU tensors, got cpu"),
    # images
    (lambda: MODEL([1.0]), TypeError, "forward: x must be a torch.Tensor, got list"),
    (lambda: MODEL(X[0]), ValueError, "forward: x must have shape (B, 1, 8, 8), got (1, 8, 8)"),
    (lambda: MODEL(X.repeat(1, 3, 1, 1)), ValueError, "forward: x must have shape (B, 1, 8, 8), got (2, 3, 8, 8)"),
    (lambda: MODEL(X[..., :6]), ValueError, "forward: x must have shape (B, 1, 8, 8), got (2, 1, 8, 6)"),
    (lambda: MODEL(X.double()), TypeError, "forward: x must have the model's dtype torch.float32, got torch.float64"),
    (lambda: MODEL(X.long()), TypeError, "forward: x must have the model's dtype torch.float32, got torch.int64"),
    (lambda: MODEL(X.to("meta")), ValueError, "forward: x must be on the model's device cpu, got meta"),
    (lambda: MODEL(X.to_sparse()), TypeError, "forward: x must be a dense (strided) tensor, got torch.sparse_coo"),
    # labels
    (lambda: MODEL(X, [0, 1]), TypeError, "forward: y must be an integer torch.Tensor of shape (2,), got list"),
    (lambda: MODEL(X, Y.float()), ValueError, "forward: y must have an integer dtype, got torch.float32"),
    (lambda: MODEL(X, Y.bool()), ValueError, "forward: y must have an integer dtype, got torch.bool"),
    (lambda: MODEL(X, Y[:1]), ValueError, "forward: y must have shape (2,), one label a row, got (1,)"),
    (lambda: MODEL(X, Y[:, None]), ValueError, "forward: y must have shape (2,), one label a row, got (2, 1)"),
    (lambda: MODEL(X, Y + 2), ValueError, "forward: y must be below num_classes = 3 (negative: no label), got 3"),
    (lambda: MODEL(X, Y.to("meta")), ValueError, "forward: y must be on the model's device cpu, got meta"),
    (
        lambda: MODEL.reverse(Z, Y + 2),
        ValueError,
        "reverse: y must be below num_classes = 3 (negative: no label), got 3",
    ),
    (lambda: MODEL.sample(2, Y.double()), ValueError, "sample: y must have an integer dtype, got torch.float64"),
    (
        lambda: MODEL.blocks[0].reverse(Z, Y.half()),
        ValueError,
        "reverse: y must have an integer dtype, got torch.float16",
    ),
    (lambda: MODEL.log_prob(X, Y.float()), ValueError, "log_prob: y must have an integer dtype, got torch.float32"),
    # reverse and sample
    (lambda: MODEL.reverse(X), ValueError, "reverse: x must have shape (B, 16, 4), got (2, 1, 8, 8)"),
    (
        lambda: MODEL.reverse(Z.double()),
        TypeError,
        "reverse: x must have the model's dtype torch.float32, got torch.float64",
    ),
    (lambda: MODEL.reverse(Z, Y, float("nan")), ValueError, "reverse: guidance must be finite and >= 0, got nan"),
    (lambda: MODEL.reverse(Z, Y, 1e39), ValueError, "reverse: guidance must be finite and >= 0, got 1e+39"),
    (lambda: MODEL.reverse(Z, Y, -1), ValueError, "reverse: guidance must be finite and >= 0, got -1"),
    (lambda: MODEL.reverse(Z, Y, "2"), TypeError, "reverse: guidance must be a number, got str"),
    (lambda: MODEL.reverse(Z, Y, 1, "abc"), ValueError, "reverse: guide_what must be 'a', 'b' or 'ab', got 'abc'"),
    (lambda: MODEL.reverse(Z, Y, 1, ""), ValueError, "reverse: guide_what must be 'a', 'b' or 'ab', got ''"),
    (lambda: MODEL.reverse(Z, Y, 1, "ab", 0.0), ValueError, "reverse: attn_temp must be finite and > 0, got 0.0"),
    (lambda: MODEL.reverse(Z, Y, 1, "ab", -0.5), ValueError, "reverse: attn_temp must be finite and > 0, got -0.5"),
    (
        lambda: MODEL.reverse(Z, Y, nonfinite="drop"),
        ValueError,
        "reverse: nonfinite must be one of warn, raise, ignore, got 'drop'",
    ),
    (
        lambda: MODEL.blocks[0].reverse(Z, Y, guidance=float("inf")),
        ValueError,
        "reverse: guidance must be finite and >= 0, got inf",
    ),
    (lambda: MODEL.blocks[0].reverse(Z[:, 1:], Y), ValueError, "reverse: z must have shape (B, 16, 4), got (2, 15, 4)"),
    (
        lambda: MODEL.blocks[0].reverse(Z, Y[:1]),
        ValueError,
        "reverse: y must have shape (2,), one label a row, got (1,)",
    ),
    (lambda: MODEL.update_prior(Z[:0]), ValueError, "update_prior: z must hold at least one row, got 0"),
    (lambda: inverse_asked_for("cuda"), RuntimeError, CUDA_HAS_NONE),
    (
        lambda: MODEL.sample(2, nonfinite="drop"),
        ValueError,
        "sample: nonfinite must be one of warn, raise, ignore, got 'drop'",
    ),
    (
        lambda: MODEL.denoise(X, Y, nonfinite="drop"),
        ValueError,
        "denoise: nonfinite must be one of warn, raise, ignore, got 'drop'",
    ),
    (lambda: MODEL.sample(2, guidance=-1), ValueError, "sample: guidance must be finite and >= 0, got -1"),
    (lambda: MODEL.sample(2, memory_limit=0), ValueError, "sample: memory_limit must be >= 1, got 0"),
    (lambda: MODEL.sample(-1), ValueError, "sample: n must be >= 0, got -1"),
    (lambda: MODEL.sample(2, batch_size=0), ValueError, "sample: batch_size must be >= 1, got 0"),
    (
        lambda: MODEL.sample(2, 10**30),
        ValueError,
        f"sample: y must be below num_classes = 3 (negative: no label), got {10**30}",
    ),
    (lambda: MODEL.sample(2, seed=2**63), ValueError, f"sample: seed must be below 2**63, got {2**63}"),
    (lambda: MODEL.sample(2, generator=3), TypeError, "sample: generator must be a torch.Generator, got int"),
    (
        lambda: MODEL.reverse(Z, Y, annealed_guidance="no"),
        TypeError,
        "reverse: annealed_guidance must be a bool, got str",
    ),
    (lambda: MODEL.reverse(Z, memory_limit=0), ValueError, "reverse: memory_limit must be >= 1, got 0"),
    (lambda: MODEL.reverse(Z, True), TypeError, "reverse: y must be an integer torch.Tensor of shape (2,), got bool"),
    (lambda: MODEL.sample(2, 3), ValueError, "sample: y must be below num_classes = 3 (negative: no label), got 3"),
    (
        lambda: MODEL.sample(2, seed=1, generator=torch.Generator()),
        ValueError,
        "sample: pass seed or generator, got both",
    ),
    (
        lambda: PLAIN.sample(2, 0),
        ValueError,
        "sample: y must be None for an unconditional flow (num_classes = 0), got labels",
    ),
    # flows over tokens
    (lambda: TokenFlow(0, 3, 64, 2, 1), ValueError, "TokenFlow: num_tokens must be >= 1, got 0"),
    (lambda: TokenFlow(5, 3.0, 64, 2, 1), TypeError, "TokenFlow: token_size must be an int, got float"),
    (lambda: TokenFlow(5, 3, 96, 2, 1), ValueError, "TokenFlow: channels must be a multiple of 64, got 96"),
    (
        lambda: TokenFlow(5, 3, 96, 2, 1, head_size=36),
        ValueError,
        "TokenFlow: channels must be a multiple of 36, got 96",
    ),
    (lambda: TokenFlow(5, 3, 64, 2, 1, expansion=0), ValueError, "TokenFlow: expansion must be >= 1, got 0"),
    *(
        (
            lambda orders=orders: TokenFlow(3, 3, 64, 2, 1, orders=orders),
            ValueError,
            f"TokenFlow: orders[{at}] must be a permutation of range(3), got {got}",
        )
        for orders, at, got in (
            ([[0, 1, 2], [0, 1, 1]], 1, "one without 2"),
            ([[1, 2, 3], [0, 1, 2]], 0, "one without 0"),
            ([[0, 1, 2], [0, 1]], 1, "2 numbers"),
            ([[0, 1, 2], [0, 1, 2.0]], 1, "[0, 1, 2.0]"),
            ([[0, 1, 2], None], 1, "None"),
            ([[0, True, 2], [0, 1, 2]], 0, "[0, True, 2]"),
            (torch.tensor([[0, 1, 2], [2, 1, -1]]), 1, "one without 0"),
        )
    ),
    (
        lambda: TokenFlow(3, 3, 64, 2, 1, orders=[[0, 1, 2]]),
        ValueError,
        "TokenFlow: orders must be num_blocks = 2 permutations of range(3), got 1",
    ),
    (
        lambda: TokenFlow(3, 3, 64, 2, 1, orders=7),
        ValueError,
        "TokenFlow: orders must be num_blocks = 2 permutations of range(3), got int",
    ),
    (lambda: TOKENS(ROWS[:, 1:]), ValueError, "forward: x must have shape (B, 5, 3), got (2, 4, 3)"),
    (lambda: TOKENS(ROWS.mT), ValueError, "forward: x must have shape (B, 5, 3), got (2, 3, 5)"),
    (lambda: TOKENS.log_prob(ROWS[0]), ValueError, "log_prob: x must have shape (B, 5, 3), got (5, 3)"),
    (lambda: TOKENS.inverse(ROWS[..., :2]), ValueError, "inverse: z must have shape (B, 5, 3), got (2, 5, 2)"),
    (lambda: TOKENS.inverse(ROWS.flatten(1)), ValueError, "inverse: z must have shape (B, 5, 3), got (2, 15)"),
    (lambda: TOKENS.inverse(ROWS.numpy()), TypeError, "inverse: z must be a torch.Tensor, got ndarray"),
    (
        lambda: TOKENS.inverse(ROWS.half()),
        TypeError,
        "inverse: z must have the model's dtype torch.float32, got torch.float16",
    ),
    (lambda: TOKENS.inverse(ROWS, guidance=-1), ValueError, "inverse: guidance must be finite and >= 0, got -1"),
    (
        lambda: TOKENS.inverse(ROWS, nonfinite="drop"),
        ValueError,
        "inverse: nonfinite must be one of warn, raise, ignore, got 'drop'",
    ),
    (lambda: TOKENS.inverse(ROWS, memory_limit=0), ValueError, "inverse: memory_limit must be >= 1, got 0"),
    (lambda: TOKENS.sample_and_log_prob(0), ValueError, "sample_and_log_prob: n must be >= 1, got 0"),
    (lambda: TOKENS.sample_and_log_prob(-4), ValueError, "sample_and_log_prob: n must be >= 1, got -4"),
    (lambda: TOKENS.sample_and_log_prob(1e6), TypeError, "sample_and_log_prob: n must be an int, got float"),
    (
        lambda: TOKENS.sample_and_log_prob(2, batch_size=0),
        ValueError,
        "sample_and_log_prob: batch_size must be >= 1, got 0",
    ),
    (
        lambda: TOKENS.sample_and_log_prob(2, 1),
        ValueError,
        "sample_and_log_prob: y must be None for an unconditional flow (num_classes = 0), got labels",
    ),
    (
        lambda: TOKENS.sample_and_log_prob(2, seed=1, generator=torch.Generator()),
        ValueError,
        "sample_and_log_prob: pass seed or generator, got both",
    ),
    # likelihood
    (
        lambda: MODEL.bits_per_dim(X),
        TypeError,
        "bits_per_dim: x must be a tensor of integers in [0, 256), got torch.float32",
    ),
    (
        lambda: MODEL.bits_per_dim(PIXELS + 17, levels=17),
        ValueError,
        "bits_per_dim: x must be in [0, 17), got [17, 17]",
    ),
    (
        lambda: MODEL.bits_per_dim(PIXELS[:, :, 1:]),
        ValueError,
        "bits_per_dim: x must have shape (B, 1, 8, 8), got (2, 1, 7, 8)",
    ),
    (lambda: MODEL.bits_per_dim(PIXELS, seed=1.5), TypeError, "bits_per_dim: seed must be an int, got float"),
    (lambda: MODEL.bits_per_dim(PIXELS, importance=0), ValueError, "bits_per_dim: importance must be >= 1, got 0"),
    (
        lambda: MODEL.bits_per_dim(PIXELS, dequantizer="variational"),
        TypeError,
        "bits_per_dim: dequantizer must be one of tarflow_fast.data, or None, got str",
    ),
    (lambda: MODEL.log_prob(X, 3), ValueError, "log_prob: y must be below num_classes = 3 (negative: no label), got 3"),
    (lambda: MODEL.denoise(X, Y, "a"), TypeError, "denoise: noise_std must be a number, got str"),
    (lambda: MODEL.denoise(X, Y, 0.0), ValueError, "denoise: noise_std must be finite and > 0, got 0.0"),
    (lambda: MODEL.denoise(X, Y, float("nan")), ValueError, "denoise: noise_std must be finite and > 0, got nan"),
    (
        lambda: MODEL.denoise(X[:, :, 1:], Y, 0.1),
        ValueError,
        "denoise: x must have shape (B, 1, 8, 8), got (2, 1, 7, 8)",
    ),
    (lambda: PLAIN.classify(X), ValueError, "classify: needs a class-conditional flow, got num_classes = 0"),
    (lambda: MODEL.update_prior(X), ValueError, "update_prior: z must have shape (B, 16, 4), got (2, 1, 8, 8)"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[message for _, _, message in CALLS])
def test_call_is_refused_with_the_exact_message(call, error, message):
    before = {key: value.clone() for key, value in MODEL.state_dict().items()}
    with pytest.raises(error, match=f"^{re.escape(message)}$") as raised:
        call()
    assert raised.type is error
    after = MODEL.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    MODEL.save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_key(path):
    tensors = load_tensors(path)
    save_file({k: v for k, v in tensors.items() if k != "var"}, path)


def foreign(path):
    save_file({"conv.weight": torch.zeros(3)}, path)


def edit_config(path, old, new):
    config = path.parent / "config.json"
    config.write_text(config.read_text().replace(old, new))


DAMAGE = {
    "truncated": (truncate, ValueError, "is not a whole safetensors file"),
    "missing key": (drop_key, ValueError, r"from_pretrained: the weights do not fit the model:.*Missing key.*var"),
    "foreign": (foreign, ValueError, r"from_pretrained: the weights do not fit the model:.*Missing key"),
    "no weights": (lambda path: path.unlink(), FileNotFoundError, "load_tensors: path must be a file, got"),
    "other config": (lambda path: edit_config(path, '"channels": 64', '"channels": 128'), ValueError, "size mismatch"),
    "unknown key": (
        lambda path: edit_config(path, '"channels"', '"width"'),
        ValueError,
        "differing in .*channels.*width",
    ),
    "not json": (lambda path: edit_config(path, "{", ""), ValueError, "is not a JSON object"),
    "no config": (
        lambda path: (path.parent / "config.json").unlink(),
        FileNotFoundError,
        "folder must hold config.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_refused(folder, damage):
    harm, error, message = DAMAGE[damage]
    harm(folder / "model.safetensors")
    with pytest.raises(error, match=f"(?s){message}"):
        TarFlow.from_pretrained(folder)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="from_pretrained: folder must exist"):
        TarFlow.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_and_never_run(tmp_path, write):
    marker = tmp_path / "payload_ran"

    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(marker)!r}, 'w').close()",))

    path = tmp_path / "model.pth"
    with path.open("wb") as file:
        write({"var": Trap()}, file)
    with pytest.raises(ValueError, match=r"load_tensors: .* (holds objects other than tensors|is not a whole torch)"):
        TarFlow.from_checkpoint(path)
    assert not marker.exists()


CHECKPOINTS = {
    "truncated": (
        lambda path: (torch.save(MODEL.state_dict(), path), truncate(path)),
        "is not a whole torch checkpoint",
    ),
    "empty": (lambda path: path.write_bytes(b""), "is not a whole torch checkpoint"),
    "numpy": (lambda path: path.write_bytes(np.arange(9).tobytes()), "load_tensors"),
    "a list": (lambda path: torch.save([torch.zeros(1)], path), "must hold a dict of tensors"),
    "foreign": (lambda path: torch.save({"conv.weight": torch.zeros(3)}, path), "not a TarFlow state_dict, missing"),
    "missing key": (
        lambda path: torch.save({k: v for k, v in MODEL.state_dict().items() if k != "blocks.1.proj_in.bias"}, path),
        r"the weights do not fit the model:.*Missing key.*blocks.1.proj_in.bias",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bad_checkpoint_is_refused(tmp_path, kind):
    write, message = CHECKPOINTS[kind]
    write(tmp_path / "model.pth")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        TarFlow.from_checkpoint(tmp_path / "model.pth", in_channels=1)


def test_checkpoint_with_wrong_channels_or_size_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(MODEL.state_dict(), path)
    with pytest.raises(ValueError, match=re.escape("in_channels * p**2 must make token size 4, got in_channels = 3")):
        TarFlow.from_checkpoint(path)
    with pytest.raises(ValueError, match=re.escape("img_size must give 16 patches of 2 x 2 pixels")):
        TarFlow.from_checkpoint(path, in_channels=1, img_size=(8, 6))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tarflow_fast.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        random_flow(seed=9, num_classes=3).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
