"""Results of a GPU run: each group's process writes a part, and the parts together are the tables and the archive.

    parts/<group>.json    rows, checks, and what was not run, each under the piece that it came from; saved as they come
    gpu.csv               a row a measurement
    gpu.json, gpu.md      machine, clocks, checks; and all of it, to read
    gpu.tar.gz            all of the folder

It imports no torch, because the process that starts the others must not hold the GPU.
"""

import csv
import json
import os
import statistics
import tarfile
import time
from pathlib import Path

COLUMNS = ["section", "name", "variant", "model", "B", "guided", "dtype", "median_ms", "p20_ms", "p80_ms", "runs"]
COLUMNS += ["GB_s", "TFLOP_s", "share_of_peak", "note"]
ARCHIVE = "gpu.tar.gz"


class Record:
    """The part of one group: rows, checks and what was not run, saved after each change.

    Attributes:
        piece: the name of the piece that runs; what is recorded belongs to it.
        peaks: {"bytes": a second, "flops": a second} of the machine, or None.
    """

    def __init__(self, folder, group, peaks=None):
        self.folder, self.path, self.peaks, self.piece = Path(folder), part_path(folder, group), peaks, ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = read_json(self.path) or {}
        self.rows, self.checks = part.get("rows", []), part.get("checks", [])
        self.skipped, self.done = part.get("not_run", []), part.get("done", [])
        self.running = None

    @property
    def ok(self):
        return all(check["ok"] for check in self.checks)

    def begin(self, piece, limit):
        """Notes what is about to run, for `limit` seconds at most, so that it is known should the process die."""
        self.piece, self.running = piece, {"piece": piece, "since": time.time(), "limit": limit}
        self.save()

    def end(self, finished=True):
        """finished: False for what another run should try again."""
        if finished:
            self.done.append(self.piece)
        self.running = None
        self.save()

    def forget_unfinished(self):
        """Leaves out what pieces recorded that are not done, or of which a check failed: they are to be tried again."""
        bad = {check["piece"] for check in self.checks if not check["ok"]}
        self.done = [piece for piece in self.done if piece not in bad]
        for entries in (self.rows, self.checks, self.skipped):
            entries[:] = [entry for entry in entries if entry["piece"] in self.done]
        self.save()

    def check(self, name, ok, detail=""):
        print(f"  {'ok  ' if ok else 'FAIL'} {name}  {detail}", flush=True)
        self.checks.append({"piece": self.piece, "name": name, "ok": bool(ok), "detail": detail})
        self.save()

    def skip(self, name, why):
        print(f"  not run: {name}: {why}", flush=True)
        self.skipped.append({"piece": self.piece, "name": name, "why": why})
        self.save()

    def row(self, section, name, variant, times, *, scale=1.0, moved=None, flops=None, **about):
        """Adds a row.

        times: in ms, each of which is multiplied by `scale`. moved: bytes that the scaled time moves; flops: likewise.
        """
        times = sorted(scale * t for t in times)
        cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        median = statistics.median(times)
        row = dict.fromkeys(COLUMNS, "") | about | {"section": section, "name": name, "variant": variant}
        row |= {"median_ms": f"{median:.4g}", "runs": len(times)}
        row |= {"p20_ms": f"{cuts[0]:.4g}", "p80_ms": f"{cuts[3]:.4g}"}
        shares = []
        if moved:
            row["GB_s"] = f"{moved / median / 1e6:.4g}"
            shares += [moved / self.peaks["bytes"]] if self.peaks else []
        if flops:
            row["TFLOP_s"] = f"{flops / median / 1e9:.4g}"
            shares += [flops / self.peaks["flops"]] if self.peaks else []
        if shares:
            row["share_of_peak"] = f"{max(shares) * 1e3 / median:.1%}"
        self.rows.append(row | {"piece": self.piece})
        shown = [str(row[c]) for c in ("section", "name", "variant", "model", "B", "guided", "dtype") if row[c] != ""]
        print(f"  {' '.join(shown)}: {row['median_ms']} ms  {row['share_of_peak']}", flush=True)
        self.save()
        return median

    def save(self):
        part = {"running": self.running, "done": self.done, "checks": self.checks, "not_run": self.skipped}
        write_text(self.path, json.dumps(part | {"rows": self.rows}, indent=1) + "\n")


def part_path(folder, group):
    return Path(folder, "parts", group.replace(" ", "-") + ".json")


def read_json(path):
    """What the file holds; None where there is none, or it is being written."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def write_text(path, text):
    """Whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text)
    os.replace(part, path)


def write_all(folder, groups, facts):
    """Writes the tables and the archive. Returns the checks of all groups.

    groups: names, in the order of the plan. facts: about the machine and the run; "peaks" among them.
    """
    folder, parts = Path(folder), [read_json(part_path(folder, group)) or {} for group in groups]
    rows, checks, skipped = ([each for part in parts for each in part.get(key, [])] for key in KEYS)
    with open(folder / "gpu.csv.part", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(folder / "gpu.csv.part", folder / "gpu.csv")
    peaks = facts.get("peaks")
    facts = {key: value for key, value in facts.items() if key != "peaks"}
    told = {"machine": facts, "peaks": peaks, "checks": checks, "not_run": skipped}
    write_text(folder / "gpu.json", json.dumps(told, indent=1) + "\n")
    write_text(folder / "gpu.md", markdown(facts, peaks, rows, checks, skipped))
    with tarfile.open(folder / f"{ARCHIVE}.part", "w:gz") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if not path.name.startswith(ARCHIVE) and "triton-cache" not in path.parts:
                archive.add(path, Path(folder.name, path.relative_to(folder)))
    os.replace(folder / f"{ARCHIVE}.part", folder / ARCHIVE)
    return checks


KEYS = ("rows", "checks", "not_run")


def markdown(facts, peaks, rows, checks, skipped):
    head = [f"- {key}: {value}" for key, value in facts.items()]
    if peaks:
        copied, multiplied = peaks["bytes"] / 1e12, peaks["flops"] / 1e12
        head.append(f"- measured peaks: {copied:.2f} TB/s copied, {multiplied:.0f} TFLOP/s bf16")
    lines = ["# GPU", "", *head, "", "## Checks", ""]
    lines += [f"- {'ok' if c['ok'] else '**FAILED**'}: {c['name']} {c['detail']}" for c in checks]
    lines += [f"- not run: {s['name']} ({s['why']})" for s in skipped]
    lines += ["", "## Times", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[c]) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"
