"""A run that is killed at any moment, and started again, ends with the bytes of one that was left alone."""

import json
import subprocess

from training import command

from tarflow_fast.training.trainer import CHECKPOINT

KILLS = 50
# Starting Python with torch takes seconds. So one process imports everything, and forks a child for each life.
LIVES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tarflow_fast.training.config import TrainConfig
from tarflow_fast.training.run import train

torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])

def live(name, seconds):
    config = TrainConfig(
        out=folder / name, patch_size=4, channels=64, num_blocks=2, layers_per_block=1, batch_size=32, epochs=3.0,
        holdout=0.1, log_every=4, checkpoint_every=3, sample_every=35, eval_every=8, eval_images=20, curve=False,
        device="cpu", progress=False,
    )
    child = os.fork()
    if not child:
        try:
            train(config)
        except BaseException as error:
            print(f"a life ended by {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True

def first_life():
    start = time.monotonic()
    live("straight", 600)
    return time.monotonic() - start

whole = first_life()
lines = (folder / "straight" / "metrics.jsonl").read_text().count("\\n")
draw = random.Random(0)
killed = 0
for _ in range(10 * kills):
    # a life sees a twentieth of the run on average, its own beginning included
    killed += live("killed", draw.uniform(0, whole / 10))
    if killed == kills:
        break
else:
    print("the run was over before it was killed often enough")
live("killed", 600)
print(f"killed {killed} times")
"""


def test_fifty_kills_change_no_byte(tmp_path):
    args, options = command("tarflow_fast")
    done = subprocess.run([args[0], "-c", LIVES, str(tmp_path), str(KILLS)], timeout=600, **options)
    assert done.stdout.splitlines()[-1] == f"killed {KILLS} times", done.stdout[-2000:]
    assert "a life ended by" not in done.stdout, done.stdout[-2000:]
    straight, killed = contents(tmp_path / "straight"), contents(tmp_path / "killed")
    assert sorted(straight) == sorted(killed)
    assert [name for name in straight if straight[name] != killed[name]] == []
    assert {CHECKPOINT, "model/model.safetensors", "best/model.safetensors", "metrics.jsonl"} <= set(straight)


def contents(folder):
    """Every file of a run by name, without the speeds that are measured."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
        elif path.name == "train.json":
            found[name] = json.loads(path.read_text())
            found[name]["result"].pop("images_per_second", None)
        else:
            found[name] = path.read_bytes()
    return found
