"""The page of the report in a real browser, on a desk and on a phone, in light and dark."""

import re

import browser
import pytest
from results import SPEEDS, made_run

from tarflow_fast.report import Dropped, report

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with everything on it: two machines, long names, losing cases, dropped rows."""
    folder = tmp_path_factory.mktemp("page")
    speeds = SPEEDS | {"int8": 0.8, "int8 frozen": 1.0}
    first = made_run(
        speeds, workloads=("mnist", "a flow with a rather long name, guided"), dropped=[Dropped("c", "why")]
    )
    first.write(folder / "one.json")
    made_run(model="Other CPU", seed=1).write(folder / "two.json")
    return report([folder / "one.json", folder / "two.json"], folder / "page")[1]


def luminance(colour):
    channels = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_figure_is_there(page, tmp_path, width, dark):
    found, console = browser.look(page, tmp_path, width, dark)
    assert console == []
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page.read_text())
    assert [figure["title"] for figure in found["figures"]] == titles and len(titles) > 6
    assert found["width"] == found["scroll"] == width  # nothing makes the page wider than its window
    low, high = sorted(map(luminance, (found["ink"], found["page"])))
    assert (high + 0.05) / (low + 0.05) > 7 and (luminance(found["page"]) < 0.1) is dark
    for figure in found["figures"]:
        left, top, right, bottom = figure["box"]
        assert left >= 0 and right <= width and right - left > 250 and bottom - top > 80, figure["title"]
        assert len(figure["shapes"]) > 5 and len(figure["texts"]) > 3, figure["title"]
        for text, x0, y0, x1, y1 in figure["texts"]:  # no label is cut off at the edge of its drawing
            assert left - 2 <= x0 and x1 <= right + 2 and top - 2 <= y0 and y1 <= bottom + 2, (figure["title"], text)


def test_an_error_on_the_console_would_be_seen(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", "<script>nobody.home()</script></body>"))
    _, console = browser.look(broken, tmp_path, 1280, False)
    assert len(console) == 1 and "nobody is not defined" in console[0]
