"""The machine of a result: what `tarflow_fast.info.info()` tells of it, its measured peaks, and its class."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """info: of `tarflow_fast.info.info()`, without its list of ops. peaks: "read" in bytes a second, and the FLOP a
    second of every format. device: "cpu" or "cuda", where the results were computed.
    """

    info: dict[str, Any]
    device: str = "cpu"
    commit: str = "unknown"
    peaks: dict[str, float] = field(default_factory=dict)
    time: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_info(cls, info: dict[str, Any], **facts: Any) -> Machine:
        return cls({name: value for name, value in info.items() if name != "ops"}, **facts)

    @property
    def name(self) -> str:
        """Its class. Times of different classes are never put together: processor, cores, threads and instructions,
        or the GPU."""
        if self.device != "cpu":
            return self.info["gpus"][0]
        cpu, family = self.info["cpu"], self.info["cpu"].get("family")
        model = cpu["model"] + (f" (family {family})" if family else "")
        return f"{model}, {cpu['cores']} cores, {cpu['threads']} threads, {self.info['native']['isa'] or 'no kernels'}"

    @property
    def slug(self) -> str:
        """The name as a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def facts(self) -> dict[str, str]:
        """What a reader has to know, as name -> text."""
        versions, library = self.info["versions"], self.info["native"]
        build = library.get("build") or {}
        found = {"machine": self.name, "commit": self.commit, "measured": self.time}
        found |= {name: version for name, version in versions.items() if version and name != "tarflow_fast"}
        found["features"] = " ".join(self.info["cpu"].get("features", ()))
        found["compiler"] = build.get("compiler_version") or build.get("compiler") or ""
        found["compiler flags"] = build.get("flags", "")
        found["environment"] = " ".join(f"{k}={v}" for k, v in self.info.get("environment", {}).items())
        if self.peaks.get("read"):
            found["peak of memory"] = f"{self.peaks['read'] / 1e9:.1f} GB/s"
        found |= {f"peak of {name}": f"{rate / 1e9:.0f} GFLOP/s"
                  for name, rate in self.peaks.items() if name != "read" and rate}  # fmt: skip
        return {name: str(value) for name, value in (found | self.more).items() if value not in ("", None)}

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
