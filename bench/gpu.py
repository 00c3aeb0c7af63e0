"""`make gpu`: is it right on this GPU, and how fast? Correctness first, then times in order of importance.

python bench/gpu.py [--seconds 480] [--out bench/results/<gpu>]
python bench/gpu.py --dry-run      the same script on the CPU through Triton's interpreter, tiny shapes: proves it runs

Needs torch, triton, numpy, pytest and safetensors; no install, no network. Everything is saved as it comes: gpu.csv (a
row a measurement), gpu.json (machine, clocks, checks), gpu.md (both, to read). Exit code 0: every check held; 1: not;
2: there is no GPU.
"""

import argparse
import os
import sys
import traceback


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="time to fit into")
    parser.add_argument("--out", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        print("bench/gpu.py: no GPU here (torch.cuda.is_available() is false); nothing was measured")
        return 2
    import gpu_bare
    from gpu_record import Budget, Record, Timer, clocks, machine

    torch.manual_seed(0)
    facts = machine()
    name = "dry-run" if arguments.dry_run else facts["gpu"].lower().replace(" ", "-")
    record = Record(arguments.out or gpu_bare.ROOT / "bench" / "results" / name, facts)
    timer = Timer("cpu" if arguments.dry_run else "cuda")
    budget = Budget(arguments.seconds)
    record.facts["clocks_before"] = clocks()
    record.peaks = timer.peaks()
    print(f"{name}: {record.peaks['bytes'] / 1e12:.2f} TB/s copied, {record.peaks['flops'] / 1e12:.0f} TFLOP/s")
    for what, needs, work in plan(timer, record, budget, arguments.dry_run):
        if budget.left() < needs:
            record.skip(what, f"{budget.left():.0f} s left, about {needs} s needed")
            continue
        print(f"{budget.spent():5.0f} s  {what}", flush=True)
        try:
            work()
        except Exception as error:  # the next piece may still run, and a piece that cannot is a failed check
            traceback.print_exc()
            record.check(what, False, f"{type(error).__name__}: {error}".splitlines()[0])
        if timer.cuda:
            torch.cuda.empty_cache()
    record.facts["clocks_after"], record.facts["seconds"] = clocks(), round(budget.spent())
    record.save()
    failed = [check["name"] for check in record.checks if not check["ok"]]
    print(f"{len(record.checks) - len(failed)} of {len(record.checks)} checks held; results in {record.folder}")
    for check in failed:
        print(f"  FAILED: {check}")
    return 0 if record.ok else 1


def plan(timer, record, budget, tiny):
    """(what, seconds it needs, work), most important first."""
    import gpu_checks
    import torch
    from gpu_inverse import Inverse, whole_sample
    from gpu_kernels import attention, step_kernels
    from gpu_training import training

    dtype = torch.float32 if tiny else torch.bfloat16
    dtypes = [torch.float32] if tiny else [torch.bfloat16, torch.float16, torch.float32]
    device, models = timer.device, ["afhq256"] if tiny else ["afhq256", "imagenet64", "imagenet128"]
    made = {}

    def inverse(model):
        if model not in made:
            made.clear()  # one block's weights and cache at a time
            made[model] = Inverse(model, timer, record, dtype, tiny)
        return made[model]

    def blocks(model, batches, runs=1 if tiny else 3):
        return lambda: [inverse(model).measure(B, guided, runs) for B, guided in batches]

    yield "laws of a whole model", 5, lambda: gpu_checks.laws(record, device, dtypes, tiny)
    for kind in dtypes[:2]:
        yield (
            f"equal bits {kind}",
            5,
            lambda kind=kind: gpu_checks.equal_bits(record, device, kind, 2 if tiny else 1000, tiny),
        )
    if not tiny:
        yield "CUDA C++", 25, lambda: gpu_checks.cuda_library(record, device)
        yield "ops against float64", 5, lambda: gpu_checks.run_verify(record, "cuda")
    for model in models:
        for guided in (True,) if tiny else (False, True):
            yield f"{model} against float64", 5, lambda m=model, g=guided: inverse(m).check(g)
        if not tiny:
            yield f"{model}, one image", 5, blocks(model, [(1, False)], 5)
    if not tiny:
        yield "the project's tests on this GPU", 30, lambda: gpu_checks.run_tests(record, min(150, budget.left() - 200))
    small = [(1, True)] if tiny else [(1, True), (16, False), (16, True), (128, True)]
    rest = [] if tiny else [(4, False), (4, True), (64, False), (64, True), (128, False)]
    for model in models:
        yield f"{model}, blocks", 15, blocks(model, small)
    whole = [("afhq256", 1, True)] if tiny else [("afhq256", 1, False), ("imagenet64", 32, True)]
    for model, B, guided in whole:
        yield (
            f"whole sample {model} B = {B}",
            10,
            lambda a=(model, B, guided): whole_sample(a[0], timer, record, dtype, *a[1:], tiny),
        )
    for B, guided in [(1, False)] if tiny else [(1, False), (16, True), (128, True)]:
        yield f"kernels B = {B}", 8, lambda B=B, g=guided: step_kernels("afhq256", timer, record, dtype, B, g, tiny)
    for T in (16,) if tiny else (1024, 256, 2048):
        yield f"attention T = {T}", 5, lambda T=T: attention(timer, record, dtype, T, tiny)
    variants = ["ours", "reference"]
    yield "training", 15, lambda: training("imagenet64", timer, record, dtype, 1 if tiny else 8, variants, tiny)
    for B, guided in [(1, True)] if tiny else [(1, False), (16, True), (128, True)]:
        yield f"published step B = {B}", 5, lambda B=B, g=guided: inverse("afhq256").published(B, g)
        yield (
            f"graph of PyTorch B = {B}",
            10,
            lambda B=B, g=guided: inverse("afhq256").graphed(B, g, False, 1 if tiny else 2),
        )
    if not tiny:
        yield "compiled graph of PyTorch", 40, lambda: [inverse("afhq256").graphed(B, False, True, 2) for B in (1, 16)]
        yield (
            "training, torch.compile",
            60,
            lambda: training("imagenet64", timer, record, dtype, 8, ["ours", "reference, torch.compile"]),
        )
    for model in models:
        if rest:
            yield f"{model}, more blocks", 20, blocks(model, rest, 2)
    yield "improved PyTorch", 10, lambda: inverse("afhq256").improved(1, False)
    if not tiny:
        for model in models:
            for B, guided in ((1, True), (16, False), (16, True), (128, False), (128, True)):
                yield (
                    f"whole sample {model} B = {B}",
                    25,
                    lambda a=(model, B, guided): whole_sample(a[0], timer, record, dtype, *a[1:]),
                )
        yield "compute-sanitizer", 40, lambda: gpu_checks.sanitize(record, min(60, budget.left() - 5))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    sys.exit(main())
