"""Files and folders of results, read and put together by the class of their machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tarflow_fast.report.earlier import EARLIER, read_earlier
from tarflow_fast.report.record import Run

__all__ = ["Results", "read_results"]


@dataclass
class Results:
    """runs: by class of machine, in the order given. unread: files of a folder that hold no rounds, and why."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    unread: list[tuple[str, str]] = field(default_factory=list)

    @property
    def one_class(self) -> list[Run]:
        """All runs, which must come from one class of machine."""
        if len(self.runs) != 1:
            raise ValueError(f"report: a comparison needs results of one class of machine, got {_names(self.runs)}")
        return next(iter(self.runs.values()))


def read_results(paths: Sequence[str | Path]) -> Results:
    """Reads .json files, and the .json files in folders.

    Raises FileNotFoundError where a path does not exist, and ValueError where a file given by name holds no results, a
    folder holds none, or two files of one class of machine hold the same row.
    """
    if not paths:
        raise ValueError("report: results must be named, got none")
    found, seen = Results(), {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"report: results must be files or folders, got {path}")
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        runs = []
        for file in inside:
            try:
                runs += _read(file)
            except ValueError as error:
                if not path.is_dir():
                    raise
                found.unread.append((file.name, str(error).removeprefix(f"report: {file} ")))
        if not runs:
            raise ValueError(
                f"report: {path} must hold results, got {[file.name for file in inside] or 'no .json file'}"
            )
        for run in runs:
            for row in run.rows:
                where = seen.setdefault((run.machine.name, row.key), run.source)
                if where != run.source:
                    raise ValueError(
                        f"report: {row.name} is in {where} and in {run.source}: report them apart, or with --compare"
                    )
            found.runs.setdefault(run.machine.name, []).append(run)
    return found


def _read(file: Path) -> list[Run]:
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"report: {file} is not JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("runs"), list):
        return [Run.from_json(each, str(file)) for each in found["runs"]]
    if not isinstance(found, dict) or "rows" not in found or "machine" not in found:
        raise ValueError(f"report: {file} must hold machine and rows, got {type(found).__name__} of {[*found][:5]}")
    if "schema" in found:
        return [Run.from_json(found, str(file))]
    if file.stem not in EARLIER:
        raise ValueError(f"report: {file} has no rounds: its suite {file.stem!r} does not write results")
    try:
        return [read_earlier(file.stem, found, str(file))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"report: {file} is not a file of results: {error!r}") from error


def _names(names: object) -> str:
    return " and ".join(repr(name) for name in names)
