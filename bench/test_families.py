"""Families of flows of other libraries and of this project after `--seconds` of training each (20 by default).

Digits by default; --full adds Fashion-MNIST, where it is on this machine. `python bench/families.py` prints the same
as one page, which says how the figures are made. A flow that the check refuses is a row without figures. What
pytest-benchmark times is the log-density of 1000 rows.
"""

import warnings

import pytest
import torch
from families import row, run_one
from families_measure import ROWS, load
from peers import families

FAMILIES = families()


@pytest.fixture(scope="module")
def sets():
    return {}


CASES = [(name, family) for name in ("digits", "fashion-mnist") for family in FAMILIES]


def name_of(name, family):
    return f"{name}-B{ROWS}-{family.library}-{family.name}".replace(", ", " ").replace(" ", "_")


@pytest.mark.parametrize("name, family", CASES, ids=[name_of(*case) for case in CASES])
def test_families(family, name, sets, full, budget, table, benchmark, request):
    if family.build is None:
        pytest.skip(f"{family.library}: {family.why}")
    if name != "digits" and not full:
        pytest.skip("--full measures Fashion-MNIST too")
    if name not in sets:
        try:
            sets[name] = load(name)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            pytest.skip(str(error))
    images = sets[name]
    budget.needs(asked := request.config.getoption("--seconds"))
    peer, result = run_one(family, images, asked)
    table(f"families-{name}", {**row(family, result), "note": result.note})
    if result.bits is None:
        pytest.skip(result.note)
    generator = torch.Generator().manual_seed(1)
    x = images.draw(images.held_out[torch.arange(ROWS) % len(images.held_out)], generator)
    benchmark.group = f"families-{name}"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        benchmark.pedantic(lambda: peer.log_prob(x), rounds=3, warmup_rounds=1)
