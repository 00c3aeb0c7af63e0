"""Forward pass (density) and training step of a published flow under bf16 autocast: ours, reference, torch.compile."""

import dataclasses

import torch
from workloads import WORKLOADS

from tarflow_fast import ReferenceTarFlow, TarFlow


def step(model, optimizer, x, dtype):
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        z, _, logdets = model(x)
        loss = model.get_loss(z, logdets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def training(name, timer, record, dtype, B, variants, tiny=False, backend="auto"):
    """Writes rows of forward and of a whole step (forward, backward, AdamW). The losses of the variants must agree."""
    workload = dataclasses.replace(WORKLOADS[name], num_blocks=2)
    if tiny:
        workload = dataclasses.replace(workload, channels=64, layers_per_block=1, img_size=2 * workload.patch_size)
    C, T, L, K = workload.channels, workload.T, workload.layers_per_block, workload.num_blocks
    # There are 2 FLOPs a weight and token, and 2 products of attention, half of which is masked. Backward takes twice
    # as many as forward.
    flops = B * T * K * (2 * (12 * C * C * L + 3 * C * workload.D) + 2 * C * T * L)
    generator = torch.Generator().manual_seed(0)
    side = workload.img_size
    x = torch.randn(B, workload.in_channels, side, side, generator=generator).to(timer.device)
    state, losses = None, {}
    for variant in variants:
        torch.manual_seed(0)
        with torch.device(timer.device):
            ours = variant == "ours"
            model = TarFlow(**workload.config, backend=backend) if ours else ReferenceTarFlow(**workload.config)
        if state is None:
            # proj_out is zero at the start, which would hide all that comes before it from the loss.
            with torch.no_grad():
                for block in model.blocks:
                    block.proj_out.weight.normal_(std=0.1 / C**0.5)
            state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=timer.cuda)
        run = torch.compile(model) if "compile" in variant else model
        run.get_loss = model.get_loss
        about = {"model": name, "B": B, "dtype": str(dtype).removeprefix("torch."), "note": f"{K} blocks"}

        def forward(run=run):
            with torch.no_grad(), torch.autocast(timer.device.type, dtype, enabled=dtype != torch.float32):
                return run(x)

        losses[variant] = float(step(run, optimizer, x, dtype))
        record.row("training", "forward", variant, timer.milliseconds(forward, 5, 2), flops=flops, **about)
        times = timer.milliseconds(lambda run=run, optimizer=optimizer: step(run, optimizer, x, dtype), 5, 2)
        record.row("training", "step", variant, times, flops=3 * flops, **about)
        del model, optimizer, run
    first = next(iter(losses.values()))
    apart = max(abs(value - first) for value in losses.values())
    record.check(f"losses of a training step agree, {name}", apart <= 0.02 * abs(first) + 1e-3, str(losses))
