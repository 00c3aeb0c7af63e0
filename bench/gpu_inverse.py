"""The inverse of published blocks and of whole flows: ours against PyTorch in three forms."""

import copy
import dataclasses

import torch
from compare import same_bits
from cost import inverse_cost
from peers.graph import GraphSampler
from peers.published import published_step
from workloads import WORKLOADS, build, inputs

from tarflow_fast import TarFlow
from tarflow_fast.engines.call import Call
from tarflow_fast.net import Order
from tarflow_fast.transforms import Guidance
from tarflow_fast.verify.rule import error_and_bound

BLOCKS = 8  # flow blocks of every published model


def guide(arguments):
    return Guidance(arguments.get("guidance", 0.0), "ab", arguments.get("attn_temp", 1.0))


class Inverse:
    """One published block on the device, its reference, and the rows that measure them."""

    def __init__(self, name, timer, record, dtype, tiny=False):
        self.name, self.timer, self.record, self.dtype = name, timer, record, dtype
        workload = WORKLOADS[name]
        if tiny:
            workload = dataclasses.replace(workload, img_size=2 * workload.patch_size, channels=64, layers_per_block=1)
        self.workload = dataclasses.replace(workload, num_blocks=1)
        model, reference = build(self.workload)
        self.block, self.reference = model.blocks[0].to(timer.device), reference.blocks[0].to(timer.device)
        self.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        self.about = {"model": name, "dtype": str(dtype).removeprefix("torch.")}

    def noise(self, B, guided):
        z, _, arguments = inputs(self.workload, B, guided)
        return z.to(self.timer.device), guide(arguments)

    def ours(self, z, guidance, call):
        call = Call("triton", self.precision) if call is None else call
        return self.block.invert(z, None, guidance, call)[0], call

    def check(self, B, guided, T=256):
        """Holds the first T tokens to float64, beside the reference under autocast, and the bits to a rerun's."""
        z, guidance = self.noise(B, guided)
        T = min(T, z.size(1))
        block, reference = copy.deepcopy(self.block), copy.deepcopy(self.reference)
        for short in (block, reference):
            short.pos_embed = torch.nn.Parameter(short.pos_embed[:T].detach())
        block.order = Order(T, block.flip)
        reference.attn_mask = reference.attn_mask[:T, :T]
        z, arguments = z[:, :T].contiguous(), (guidance.weight, guidance.what, guidance.attn_temp)
        with torch.no_grad():
            truth = copy.deepcopy(reference).double().reverse(z.double(), None, *arguments)
            with torch.autocast(z.device.type, self.dtype, enabled=self.dtype != torch.float32):
                plain = reference.reverse(z, None, *arguments)
            got, again = (block.invert(z, None, guidance, Call("triton", self.precision)) for _ in range(2))
        error, bound = error_and_bound(got[0], truth, plain)
        worst = (error / bound).max().item()
        ours, theirs = error.max().item(), (plain.double() - truth).abs().max().item()
        said = f"worst {worst:.2f} of the bound; largest error {ours:.2e}, plain PyTorch {theirs:.2e}"
        what = f"inverse {self.name} {self.about['dtype']} B = {B} T = {T}{' guided' if guided else ''}"
        self.record.check(what, worst <= 1, said)
        self.record.check(f"{what}, equal bits", all(map(same_bits, got, again)))

    def cost(self, B, guided):
        return inverse_cost(self.workload, B, guided, self.precision, self.dtype.itemsize)

    def row(self, variant, B, guided, times, **more):
        cost = self.cost(B, guided)
        return self.record.row(
            "block inverse", "block", variant, times, moved=cost.bytes, flops=cost.flops, B=B, guided=guided,
            **self.about, **more,
        )  # fmt: skip

    def measure(self, B, guided, runs):
        z, guidance = self.noise(B, guided)
        _, call = self.ours(z, guidance, None)
        times = self.timer.milliseconds(lambda: self.ours(z, guidance, call), runs, 0)
        median = self.row("ours", B, guided, times)
        self.record.row(
            "whole sample", "8 blocks, from one", "ours", [median], scale=BLOCKS, B=B, guided=guided, **self.about
        )
        return median

    def published(self, B, guided):
        """Times steps at four places of the sequence, and multiplies by the number of steps."""
        T, times = self.workload.T, []
        for position in sorted({0, T // 3, 2 * T // 3, T - 2}):
            run = published_step(self.reference, B, guided, position, self.dtype, self.timer.device)
            times += self.timer.milliseconds(run, 5, 2)
        mean = sum(times) / len(times)
        note = f"{len(times)} steps at 4 places, times {T - 1}"
        self.row("reference as published", B, guided, [mean], scale=T - 1, note=note)

    def graphed(self, B, guided, compiled, runs):
        z, guidance = self.noise(B, guided)
        sampler = GraphSampler(self.reference, B, guided, self.dtype, self.timer, compiled)
        x = sampler.invert(z, guidance.weight, guidance.attn_temp)
        expected = self.ours(z, guidance, None)[0]
        apart = (x[:, :8] - expected[:, :8]).abs().max().item()
        times = self.timer.milliseconds(lambda: sampler.invert(z), runs, 0)
        name = "static cache, compiled, CUDA graph" if compiled else "static cache, CUDA graph"
        self.row(name, B, guided, times, note=f"first 8 tokens differ by {apart:.1e}")

    def improved(self, B, guided):
        from peers.improved import ImprovedSampler

        z, guidance = self.noise(B, guided)
        shell = torch.nn.Module()
        shell.blocks, shell.var = [self.reference], torch.ones(z.shape[1:], device=z.device)
        shell.unpatchify = lambda tokens: tokens
        sampler = ImprovedSampler(shell)

        def run():
            with torch.autocast(z.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return sampler.reverse(z, None, guidance.weight, guidance.attn_temp)

        self.row("improved PyTorch, eager", B, guided, self.timer.milliseconds(run, 1, 0))


def whole_sample(name, timer, record, dtype, B, guided, tiny=False):
    """Times model.sample over all 8 blocks, after a block that compiles. The noise, made on the CPU, is included."""
    workload = WORKLOADS[name]
    size = {"num_blocks": BLOCKS}
    if tiny:
        size = {"num_blocks": 2, "channels": 64, "layers_per_block": 1, "img_size": 2 * workload.patch_size}
    workload = dataclasses.replace(workload, **size)
    torch.manual_seed(0)
    with torch.device(timer.device):
        model = TarFlow(**workload.config, backend="triton").eval()
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight.normal_(std=0.3 / workload.channels**0.5)
    arguments = dict(workload.guidance) if guided else {}
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"

    def run():
        return model.sample(B, **arguments, seed=0, precision=precision, nonfinite="ignore")

    z, _, _ = inputs(dataclasses.replace(workload, num_blocks=1), B, guided)
    with torch.no_grad():  # an eighth of a sample, which compiles what the sample needs
        model.blocks[-1].invert(z.to(timer.device), None, guide(arguments), Call("triton", precision))
    cost = inverse_cost(workload, B, guided, precision, dtype.itemsize)
    record.row(
        "whole sample", f"{workload.num_blocks} blocks", "ours", timer.milliseconds(run, 1, 0),
        moved=cost.bytes, flops=cost.flops, model=name, B=B, guided=guided, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
