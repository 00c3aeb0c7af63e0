"""The report of measured speed: its intervals, its page, its comparison, and the files that it reads."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from results import SPEEDS, made_run

from tarflow_fast.cli import main
from tarflow_fast.report import Dropped, Result, Run, compare, losing, paired_ratio, ratio_of_medians, read_results

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "bench" / "results"


class Page(HTMLParser):
    """What a browser would see of a page: elements with their text, ids, and every address."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.tags, self.open, self.texts, self.named = [], [], [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.named += [attributes["aria-labelledby"]] if "aria-labelledby" in attributes else []
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "data")]
        if tag in ("meta", "link", "input", "br", "hr", "img"):
            self.open.pop()

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag  # every element is closed, in order

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts.setdefault(tag, []).append(data)


@pytest.fixture
def written(tmp_path):
    """Writes a run and returns the path of its file."""

    def write(run, name="made_up.json"):
        path = tmp_path / name
        run.write(path)
        return path

    return write


def command(*arguments):
    return main(["report", *map(str, arguments)])


def test_identical_samples_are_a_point_at_1():
    seconds = [0.5, 0.7, 0.6, 0.9, 0.4, 0.55, 0.8]
    for ratio in (paired_ratio(seconds, seconds), ratio_of_medians(seconds, seconds)):
        assert (ratio.low, ratio.median, ratio.high) == (1, 1, 1) and ratio.side == 0


def test_swapping_inverts_the_ratio():
    random = np.random.default_rng(0)
    before, after = np.exp(0.1 * random.standard_normal((2, 15)))
    one, two = ratio_of_medians(before, after), ratio_of_medians(after, before)
    assert [two.median, two.low, two.high] == pytest.approx([1 / one.median, 1 / one.high, 1 / one.low], rel=1e-12)


def test_interval_covers_the_true_ratio():
    """Of 300 benchmarks whose true ratio is 2, about 95 % have it inside; what all variants share does not widen it."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(300):
        shared = np.exp(random.standard_normal(12))
        noise = np.exp(0.05 * random.standard_normal((2, 12)))
        ratio = paired_ratio(2 * shared * noise[0], shared * noise[1])
        assert ratio.high / ratio.low < 1.3
        hits += ratio.low <= 2 <= ratio.high
    assert 0.90 <= hits / 300 <= 0.99


def test_few_rounds_say_nothing_for_sure():
    ratio = paired_ratio([2.0, 2.2, 2.4], [1.0, 1.0, 1.0])
    assert (ratio.low, ratio.high) == (2.0, 2.4) and ratio.side == 0 and not ratio.sure


@pytest.mark.parametrize("bad", [[], [0.0], [-1.0], [np.nan], [np.inf]])
def test_bad_seconds(bad):
    with pytest.raises(ValueError, match="paired_ratio: baseline must be positive finite seconds"):
        paired_ratio(bad, bad)
    if bad:
        with pytest.raises(ValueError, match="Result: seconds must be positive finite"):
            Result("s", "x", "w", 1, "v", "ours", seconds=bad)


def test_file_round_trip(written):
    run = made_run(dropped=[Dropped("c, B 1", "no time")])
    path = written(run)
    found = read_results([path]).one_class[0]
    assert (found.rows, found.machine, found.dropped) == (run.rows, run.machine, run.dropped)
    row = json.loads(path.read_text())["rows"][2]
    ratio = run.ratio(run.rows[2])
    assert row["ratio"] == {"median": ratio.median, "low": ratio.low, "high": ratio.high, "rounds": 12}
    assert ratio.median == pytest.approx(5, rel=0.05) and row["share"] == run.rows[2].share


def test_page(written, tmp_path, capsys):
    slow = made_run(SPEEDS | {"int8": 0.8})
    path = written(slow)
    assert command(path, "-o", tmp_path / "out") == 0
    page_path = tmp_path / "out" / "report.html"
    assert capsys.readouterr().out.strip() == str(page_path.resolve())
    text, markdown = page_path.read_text(), (tmp_path / "out" / "report.md").read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) > 10
    assert not page.open and not page.addresses and "script" not in page.tags
    assert not re.findall(r"https?:|url\(|@import", text)
    titles = page.texts["figcaption"]
    wanted = [
        "made_up: a",
        "made_up: b",
        "Roofline: every row that counts bytes and FLOPs",
        "made_up: a, time over T at B 1",
    ]
    assert set(wanted) <= set(titles) and len(titles) == page.tags.count("svg") == page.tags.count("figure")
    assert set(page.named) <= set(page.ids) and len(page.named) == len(titles)
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    # every row has its speed, its interval and its error, in both pages
    for row in slow.rows:
        ratio = slow.ratio(row)
        line = next(line for line in markdown.split("### All rows")[1].splitlines()
                    if line.startswith(f"| {row.workload}, B {row.B}, {row.variant} | {row.T} "))  # fmt: skip
        assert "2.0e-07" in line and "1.0e-06" in line and f"[{ratio.low:.2f}"[:4] in line
    roofline = text.split("<figcaption>Roofline")[1].split("</svg>")[0]
    assert roofline.count("<g><title>") == len(slow.rows)
    # what loses is listed, and nothing else
    lost = markdown.split("### Losing cases")[1].split("###")[0]
    assert lost.count("int8 | reference |") == lost.count("int8 | improved |") == 8 and "fp32" not in lost
    for each in (
        "pytest bench/test_made_up.py",
        "Test CPU (family 1), 2 cores, 2 threads, avx2",
        "1.00 MB",
        "500 GFLOP/s",
    ):
        assert each in markdown and each in text


def test_a_tie_is_a_losing_case():
    run = made_run({"reference": 1.0, "fp32": 1.0}, noise=0.05)
    assert {row.variant for _, row, *_ in losing([run])} == {"fp32"}
    assert not losing([made_run({"reference": 1.0, "fp32": 2.0})])


def test_names_are_escaped(written, tmp_path):
    path = written(made_run(workloads=("<script>a</script> & |b|",)))
    assert command(path, "-o", tmp_path) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags and any("<script>a" in text for text in page.texts["th"])


def test_classes_are_kept_apart(written, tmp_path, capsys):
    one, two = written(made_run(), "one.json"), written(made_run(model="Other CPU"), "two.json")
    assert command(one, two, "-o", tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    sections = re.findall(r"^## (.*)$", text, re.M)
    assert sections == [f"{name} CPU (family 1), 2 cores, 2 threads, avx2" for name in ("Test", "Other")]
    assert command(one, two, "--compare", "-o", tmp_path / "no") == 2
    told = capsys.readouterr().err
    assert "must come from one class of machine" in told and "Other CPU" in told and not (tmp_path / "no").exists()


def test_comparison(written, tmp_path):
    """The planted slower row is named, and so is the faster one; a machine that is 30 % slower moves no other row."""
    before, drifted = made_run(), made_run(seed=1)
    planted = {("a", 16, 8, "bf16"): 1.25, ("b", 64, 1, "fp32"): 0.6}
    rows = [
        dataclasses.replace(row, seconds=[1.3 * planted.get(row.key[2:], 1) * s for s in row.seconds])
        for row in drifted.rows
    ]
    after = Run("made_up", drifted.machine, drifted.command, rows)
    one, two = written(before, "before.json"), written(after, "after.json")
    forth, back = (compare(read_results([a]), read_results([b])) for a, b in ((one, two), (two, one)))
    named = {each.before.key[2:]: each.verdict for each in forth if each.verdict in ("faster", "slower")}
    assert named == {("a", 16, 8, "bf16"): "slower", ("b", 64, 1, "fp32"): "faster"}
    inverse = {"slower": "faster", "faster": "slower"}
    for there, again in zip(forth, back, strict=True):
        assert again.raw.median == pytest.approx(1 / there.raw.median)
        assert again.verdict == inverse.get(there.verdict, there.verdict)
    assert command(one, two, "--compare", "-o", tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert "16 rows of ours: 1 faster, 1 slower, 14 no difference seen" in text
    assert text.split("## Slower")[1].split("## All")[0].count("made_up: a, T 16, B 8, bf16") == 1
    Page((tmp_path / "report.html").read_text())


def test_two_runs_of_one_engine_show_no_difference():
    """Measured minutes apart, on the same commit. The earlier engine, whose packing was slower, shows one."""
    runs = {name: read_results([COMMITTED / f"epyc-zen5-2cores{name}" / "block_inverse.json"])
            for name in ("", "-again", "-earlier")}  # fmt: skip
    assert {each.verdict for each in compare(runs["-again"], runs[""])} == {"control", "no difference seen"}
    verdicts = [each.verdict for each in compare(runs["-earlier"], runs[""])]
    assert "slower" not in verdicts and 5 < verdicts.count("faster") < 25


def test_committed_results(tmp_path):
    """The files from before there was a schema: the ratios of their tables, and amounts that fit bench/cost.py."""
    assert command(COMMITTED / "epyc-zen5-2cores", "-o", tmp_path) == 0
    Page((tmp_path / "report.html").read_text())
    run = read_results([COMMITTED / "epyc-zen5-2cores" / "block_inverse.json"]).one_class[0]
    told = json.loads((COMMITTED / "epyc-zen5-2cores" / "block_inverse.json").read_text())["rows"]
    assert len(run.rows) == len(told) == 108
    for row, old in zip(run.rows, told, strict=True):
        assert run.ratio(row).median == pytest.approx(float(old["ratio"]), rel=2e-3, abs=0.051)  # seconds are rounded
        assert abs(row.share - int(old["memory" if row.peak == "memory" else "FLOP"][:-1]) / 100) < 0.03
    # digits: K 4, T 16, C 128, L 2, D 4, R 1
    weights = 12 * 128**2 * 2 + 3 * 128 * 4
    assert run.rows[0].flops == pytest.approx(4 * (15 * 2 * weights + 4 * 128 * 2 * 15 * 16 / 2), rel=0.01)


def test_refusals(written, tmp_path, capsys):
    path = written(made_run())
    row = json.loads(path.read_text())
    cases = {
        "no.json": ("", FileNotFoundError, "results must be files or folders"),
        "text.json": ("{", ValueError, "is not JSON"),
        "list.json": ("[]", ValueError, "must hold machine and rows"),
        "new.json": (json.dumps(row | {"schema": 2}), ValueError, "must have schema 1, got 2"),
        "odd.json": (json.dumps(row | {"rows": [{"suite": "x", "colour": 1}]}), ValueError, "is not a file of results"),
        "role.json": (
            json.dumps(row | {"rows": [row["rows"][0] | {"role": "best"}]}),
            ValueError,
            "role must be one of",
        ),
        "affine.json": (json.dumps({"machine": {}, "rows": []}), ValueError, "has no rounds"),
    }
    for name, (text, kind, said) in cases.items():
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(kind, match=said):
            read_results([tmp_path / name])
    with pytest.raises(ValueError, match=r"is in .*copy\.json|is in .*made_up\.json"):
        read_results([path, written(made_run(), "copy.json")])
    run = made_run()
    with pytest.raises(ValueError, match="rows must differ"):
        Run("s", run.machine, "c", [*run.rows, dataclasses.replace(run.rows[0], seconds=[1.0])])
    assert command(path, "--compare", "-o", tmp_path / "out") == 2
    assert "needs two results" in capsys.readouterr().err and not (tmp_path / "out").exists()
