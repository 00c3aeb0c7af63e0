"""The engine under the compiler's sanitizers, in a program without Python (tests/native).

No thread reads what another thread may be writing, and there is no access outside of the engine's memory, no undefined
behaviour and no leak.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tarflow_fast import native

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests/native"
COMPILER = shutil.which("g++")
# Lines are all that a report needs: -g1 compiles a quarter faster than -g.
FLAGS = "-std=c++17 -O1 -g1 -fopenmp -ffp-contract=off -fno-exceptions -fno-rtti".split()
THREADS, MEMORY = ["-fsanitize=thread"], ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CASES = 108 + 12  # tests/native/engine.cpp and made.cpp run that many for each instruction set


def run(command, **variables):
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})


def links(folder, sanitizer):
    (folder / "empty.cpp").write_text("int main() {}\n")
    built = run([COMPILER, *sanitizer, str(folder / "empty.cpp"), "-o", str(folder / "empty")])
    return built.returncode == 0 and run([str(folder / "empty")]).returncode == 0


def compile_program(folder, sanitizer, isas, csrc=ROOT / "csrc"):
    """Compiles the programs of tests/native with the sources, once for each entry of {instruction set: flags}."""
    common = csrc / "cpu/dispatch.cpp"
    units = [(common, [f"-DTF_HAVE_{isa}" for isa in isas]), (HERE / "engine.cpp", []), (HERE / "made.cpp", [])]
    link = ["-fopenmp"]
    if sanitizer == THREADS:
        units.append((HERE / "gomp.cpp", []))
        link = []  # gomp.cpp takes the place of the system's OpenMP
    for source in sorted(csrc.glob("cpu/**/*.cpp")):
        if source != common:
            units += [(source, [*flags, f"-DTF_ISA={isa}"]) for isa, flags in isas.items()]

    def compile_one(number):
        source, flags = units[number]
        command = [COMPILER, *FLAGS, *sanitizer, *flags, "-c", str(source), "-o", str(folder / f"{number}.o")]
        done = run(command)
        assert done.returncode == 0, done.stderr[-3000:]
        return command[-1]

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, range(len(units))))
    done = run([COMPILER, *sanitizer, *objects, "-o", str(folder / "engine"), *link])
    assert done.returncode == 0, done.stderr[-3000:]
    return str(folder / "engine")


@pytest.fixture
def build(tmp_path):
    if COMPILER is None:
        pytest.skip("no g++")

    def build(sanitizer, isas, csrc=ROOT / "csrc"):
        if not links(tmp_path, sanitizer):
            pytest.skip(f"programs built with {sanitizer[0]} do not run here")
        return compile_program(tmp_path, sanitizer, isas, csrc)

    return build


def test_threads_do_not_race(build):
    done = run([build(THREADS, {"baseline": []}), "baseline"])
    assert (done.returncode, done.stdout) == (0, f"{CASES} cases\n"), done.stdout + done.stderr[-5000:]


def without(folder, file, text):
    """A copy of the sources in which the last occurrence of `text` is removed from one file of the engine."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    source = folder / "csrc/cpu/engine" / file
    head, found, tail = source.read_text().rpartition(text)
    assert found
    source.write_text(head + tail)
    return folder / "csrc"


@pytest.mark.parametrize("file", ["layer.h", "invert.cpp", "pass.cpp"])
def test_one_meeting_less_is_a_race(build, tmp_path, file):
    """If a meeting of the threads is removed, the test before this one fails.

    Usually the sanitizer reports the race. When other programs hold up the threads, it may have forgotten the other
    access by then; in that case bits differ.
    """
    program = build(THREADS, {"baseline": []}, without(tmp_path, file, "p.meet();"))
    done = run([program, "baseline"], TSAN_OPTIONS="halt_on_error=1")
    seen = "WARNING: ThreadSanitizer: data race" in done.stderr or "memcmp" in done.stdout
    assert done.returncode and seen, done.stdout + done.stderr[-5000:]


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
def test_memory_is_used_as_it_should_be(build):
    isas = native.build_report()["isas"]
    done = run([build(MEMORY, isas), *isas])
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr[-5000:]
    cases, _, unit = done.stdout.partition(" ")
    assert unit == "cases\n" and int(cases) % CASES == 0 and int(cases) > 0


def test_a_piece_of_memory_too_small_is_found(build, tmp_path):
    """The sanitizer finds a piece of the engine's own memory that is too small.

    The engine's memory is one allocation, so the sanitizer knows the pieces only by the gaps between them.
    """
    program = build(MEMORY, {"baseline": []}, without(tmp_path, "attention.h", "+ Bytes{round_up(queries, 16), false}"))
    done = run([program, "baseline"])
    assert done.returncode and "AddressSanitizer: use-after-poison" in done.stderr
