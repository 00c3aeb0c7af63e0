"""What the benches compare this project with, one file a peer; its docstring says what the peer stands for.

Other ways to sample a TarFlow are published.py, improved.py, graph.py and jacobi.py; bare.py holds the operations that
all of them need. The other files are flows of other libraries in the one form of peer.py, one file a library.

`families()` lists the flows. A library that is not installed is listed too, with the reason.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

LIBRARIES = ("zuko", "nflows", "normflows", "torchflows", "tarflow_fast")  # files of this folder


class Family(NamedTuple):
    """A kind of flow in a library. build: its class, a `Peer`; None where the library is absent, and why says so."""

    library: str
    name: str
    build: type | None
    why: str = ""


def families() -> list[Family]:
    """All families, library by library."""
    found = []
    for library in LIBRARIES:
        try:
            module = importlib.import_module(f"peers.{library}")
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith(("peers", "tarflow_fast")):
                raise  # a mistake of ours, and no library that is absent
            found.append(Family(library, "all", None, f"{error.name} is not installed"))
            continue
        found += [Family(library, name, build) for name, build in module.FAMILIES.items()]
    return found
