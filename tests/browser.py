"""Opens a page in headless Chromium: what it says on its console, and where its figures stand.

Chromium's windows are at least 500 pixels wide, so the page stands in a frame of the width asked for.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>
addEventListener("load", () => {
  const box = (each) => {
    const r = each.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom];
  };
  const style = getComputedStyle(document.body);
  parent.postMessage(JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    ink: style.color, page: style.backgroundColor,
    figures: [...document.querySelectorAll("figure")].map((figure) => ({
      title: figure.querySelector("figcaption").textContent, box: box(figure.querySelector("svg")),
      shapes: [...figure.querySelectorAll("svg circle, svg rect, svg path, svg line")].map(box),
      texts: [...figure.querySelectorAll("svg text")].map((text) => [text.textContent, ...box(text)]),
    })),
  }), "*");
});
</script>"""
FRAME = """<!DOCTYPE html><meta charset="utf-8">
<style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<pre id="found" hidden></pre><iframe src="{name}" width="{width}" height="{height}"></iframe>
<script>addEventListener("message", (m) => {{ document.getElementById("found").textContent = m.data; }});</script>"""


def run(folder: Path, frame: Path, width: int, height: int, dark: bool, *arguments: str) -> tuple[str, str]:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=10000",
        f"--window-size={max(width, 500)},{height}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]  # fmt: skip
    done = subprocess.run([*command, *arguments, frame.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def look(page: Path, folder: Path, width: int, dark: bool, picture: Path | None = None) -> tuple[dict, list[str]]:
    """What a reader finds on the page, and the lines of its console. picture: where a screenshot goes."""
    (folder / "page.html").write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(name="page.html", width=width, height=2000))
    dom, log = run(folder, frame, width, 2000, dark, "--dump-dom")
    found = json.loads(unescape(re.search(r'id="found"[^>]*>(.*?)</pre>', dom, re.S)[1]))
    if picture is not None:
        frame.write_text(FRAME.format(name="page.html", width=width, height=found["height"]))
        run(folder, frame, width, min(found["height"], 16000), dark, f"--screenshot={picture}")
    return found, re.findall(r":CONSOLE.*?\] (.*)", log)
