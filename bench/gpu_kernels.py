"""Each kernel of a sampling step, and attention over a whole sequence, against cuBLAS, cuDNN and flash attention.

A step's kernels are timed as a CUDA graph that walks through the 8 layers of a block. The weights of the layers are
more than L2 holds, so every run reads memory, as it does in use.
"""

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import inspect

RUNS, WARM = 7, 2


def step_kernels(inverse, B, guided):
    """Writes a row for each kernel and variant, with the time of one layer.

    inverse: a gpu_inverse.Inverse, whose block is taken.
    """
    from tarflow_fast.kernels.triton.affine_inverse import affine_inverse
    from tarflow_fast.kernels.triton.cached_attention import cached_attention
    from tarflow_fast.kernels.triton.step_embed import embed
    from tarflow_fast.kernels.triton.step_linear import Append, Norm, linear

    timer, record, dtype, tiny = inverse.timer, inverse.record, inverse.dtype, not inverse.timer.cuda
    z, guidance = inverse.noise(B, guided)
    ws = GraphWorkspace(inspect(inverse.block), B, guided, dtype, capture=False)
    ws.load(inverse.block.bijection, inspect(inverse.block), z, None, guidance)
    T, size, L = ws.T, torch.finfo(dtype).bits // 8, len(ws.eps)
    R, C = ws.h.shape
    about = inverse.about | {"B": B, "guided": guided}
    w = ws.weights

    def of(layer, part):
        return w[f"attn_blocks.{layer}.{part}.weight"], w[f"attn_blocks.{layer}.{part}.bias"]

    def time(kernel, variant, launch, moved, flops, layers=L):
        run = timer.graph(lambda: [launch(layer) for layer in range(layers)])
        times = timer.milliseconds(run, 1 if tiny else RUNS, 0 if tiny else WARM, cold=True)
        record.row("step kernel", kernel, variant, times, scale=1 / layers, moved=moved, flops=flops, **about)

    for kernel, part, x, out, epilogue, norm in (
        ("LN+qkv+append", "attention.qkv", ws.h, ws.queries, "append", "attention.norm"),
        ("out-proj+residual", "attention.proj", ws.heads, ws.h, "residual", None),
        ("LN+fc1+GELU", "mlp.main.0", ws.h, ws.hidden, "gelu", "mlp.norm"),
        ("fc2+residual", "mlp.main.2", ws.hidden, ws.h, "residual", None),
    ):
        N, K = of(0, part)[0].shape
        moved, flops = N * K * size + R * (N + K) * size, 2 * R * N * K

        def ours(layer, part=part, x=x, out=out, epilogue=epilogue, norm=norm):
            before = Norm(*of(layer, norm), 1e-5) if norm else None
            append = Append(ws.cache[layer], ws.starts, 1) if epilogue == "append" else None
            linear(x, *of(layer, part), out=out, scratch=ws.scratch, epilogue=epilogue, norm=before, append=append)

        def cublas(layer, part=part, x=x, epilogue=epilogue, norm=norm):
            weight, bias = of(layer, part)
            y = F.layer_norm(x, (x.size(1),), *of(layer, norm)) if norm else x
            y = F.linear(y.to(dtype), weight, bias.to(dtype))
            if epilogue == "gelu":
                return F.gelu(y)
            return ws.h + y if epilogue == "residual" else y

        time(kernel, "ours", ours, moved, flops)
        time(kernel, "cuBLAS and PyTorch", cublas, moved, flops)

    for place in (T // 2, T - 2):
        ws.starts.fill_(place)
        length = place + 1
        moved, flops = 2 * R * length * C * size, 4 * R * length * C

        def ours(layer):
            cached_attention(
                ws.queries, ws.cache[layer], scale=ws.scale, starts=ws.starts, out=ws.heads, scratch=ws.scratch, W=1
            )

        def sdpa(layer, length=length):
            query = ws.queries.view(R, C // 64, 1, 64)
            keys, values = ws.cache[layer][:, :, :, :length]
            return F.scaled_dot_product_attention(query, keys, values)

        time(f"attention, {length} keys", "ours", ours, moved, flops)
        time(f"attention, {length} keys", "SDPA as PyTorch chooses", sdpa, moved, flops)
    ws.starts.zero_()
    D = ws.x.size(2)

    def head(_):
        embed(
            x=ws.x, weight=w["proj_in.weight"], bias=w["proj_in.bias"], pos_embed=ws.pos_embed, classes=ws.classes,
            h=ws.h, starts=ws.starts, order=ws.order, W=1,
        )  # fmt: skip

    def tail(_):
        affine_inverse(
            h=ws.h, weight=w["proj_out.weight"], bias=w["proj_out.bias"], z=ws.z, x=ws.x, sums=ws.sums,
            starts=ws.starts, order=ws.order, guidance=ws.guidance, W=1, guided=guided,
        )  # fmt: skip

    time("head", "ours", head, C * D * size + R * C * 4, 2 * R * C * D, 1)
    time("tail", "ours", tail, 2 * C * D * size + R * C * 4, 4 * R * C * D, 1)


def attention(timer, record, dtype, T, tiny=False):
    """Times causal attention of whole sequences, head size 64, 16k tokens: forward, and forward with backward."""
    import tarflow_fast.ops as ops

    H, E = (1, 64) if tiny else (12, 64)
    B = 1 if tiny else max(1, 16384 // T)
    tensors = [torch.randn(B, T, H, E, device=timer.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    pull = torch.randn(B, T, H, E, device=timer.device, dtype=dtype)
    variants = {}
    if hasattr(ops, "attention"):
        variants["ours"] = lambda: ops.attention(*tensors, backend="triton")
    else:
        record.skip("causal attention, ours", "this checkout has no op `attention`")

    def sdpa(backend):
        def run():
            with sdpa_kernel(backend):
                turned = (t.transpose(1, 2) for t in tensors)
                return F.scaled_dot_product_attention(*turned, is_causal=True).transpose(1, 2)

        return run

    kinds = {"flash SDPA": SDPBackend.FLASH_ATTENTION, "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION}
    variants |= {name: sdpa(kind) for name, kind in ({"SDPA": SDPBackend.MATH} if tiny else kinds).items()}
    flops = 2 * B * H * T * T * E  # of two products, half of which is masked
    note = f"T={T} H={H} E={E}"
    for variant, forward in variants.items():
        try:
            forward_and_backward("attention", "", variant, timer, record, dtype, forward, tensors, pull, note,
                                 (flops, 3.5 * flops), "flops", B=B)  # fmt: skip
        except RuntimeError as error:
            if variant == "ours":
                raise
            record.skip(f"causal attention, {variant}, T = {T}", str(error).splitlines()[0])


def forward_and_backward(
    section, name, variant, timer, record, dtype, forward, leaves, pull, note, work, unit, **about
):
    """Writes two rows.

    Both are timed as CUDA graphs, because a kernel of 0.1 ms takes less time than Python to launch it.

    work: (of forward, of both), in `unit`, which is "flops" or "moved".
    """

    def both():
        return torch.autograd.grad(forward(), leaves, pull)

    for what, run, amount in (("forward", forward, work[0]), ("forward+backward", both, work[1])):
        run()  # an error here is the variant's and not the capture's
        said = note
        try:
            launch = timer.graph(run)
        except RuntimeError as error:
            launch, said = run, f"{note}, launched from Python: {str(error).splitlines()[0][:60]}"
            if variant.startswith("ours"):
                record.check(f"{section} {name} {what}: a CUDA graph was captured", False, said)
        times = timer.milliseconds(launch, RUNS if timer.cuda else 1, WARM if timer.cuda else 0)
        about |= {"dtype": str(dtype).removeprefix("torch."), "note": said, unit: amount}
        record.row(section, f"{name} {what}".strip(), variant, times, **about)


def density(timer, record, dtype, tiny=False):
    """Times the ops between the matrix products of training, 16k tokens: ours against PyTorch's."""
    from tarflow_fast import ops
    from tarflow_fast.ops.registry import OPS

    rows, C, D = (8, 64, 12) if tiny else (16384, 768, 192)
    device, size = timer.device, torch.finfo(dtype).bits // 8

    def leaf(*shape, kind=torch.float32):
        return torch.randn(*shape, device=device, dtype=kind, requires_grad=True)

    h, gain, shift, wide_shift = leaf(rows, C), leaf(C), leaf(C), leaf(4 * C)
    x, wide = leaf(rows, C, kind=dtype), leaf(rows, 4 * C, kind=dtype)
    tokens, ab = leaf(max(rows // 1024, 1), min(rows, 1024), D), leaf(max(rows // 1024, 1), min(rows, 1024), 2 * D)
    cases = {  # op: (of a backend, leaves, bytes an element read and written forward, and backward, elements)
        "layer_norm": (
            lambda b: ops.layer_norm(h, gain, shift, 1e-5, dtype, b),
            [h, gain, shift], 4 + size, size + 8, h.numel(),
        ),
        "bias_gelu": (
            lambda b: ops.bias_gelu(wide, wide_shift, b),
            [wide, wide_shift], 2 * size, 3 * size, wide.numel(),
        ),
        "bias_residual": (
            lambda b: ops.bias_residual(x, shift, h, b),
            [x, shift, h], 8 + size, 4 + size, h.numel(),
        ),
        "affine": (lambda b: ops.affine(tokens, ab, False, b)[0], [tokens, ab], 16, 28, tokens.numel()),
    }  # fmt: skip
    for name, (of, leaves, forward, backward, elements) in cases.items():
        pull = torch.randn_like(of("torch"))
        for backend, variant in (("triton", "ours"), ("torch", "PyTorch")):
            if not OPS[name].why_not(backend, device, leaves[0].dtype):
                moved = elements * forward, elements * (forward + backward)
                forward_and_backward(
                    "training kernel", name, variant, timer, record, leaves[0].dtype,
                    lambda of=of, backend=backend: of(backend), leaves, pull, f"{rows} tokens", moved, "moved",
                )  # fmt: skip
