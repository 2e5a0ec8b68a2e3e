"""The page in a headless browser: it fits small and large screens, works without scripts, and reports no error."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_moeedit.reports import Report, write_report
from tests.reports.sample import hostile, sample

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FACTS = 7
WIDTHS = (400, 1100, 1260, 1400)
CARDS = (400, 1100)

PROBE = """<!DOCTYPE html><title>probe</title><body><script>
const pages = PAGES;
const look = async ([name, source, width, scripts]) => {
  const frame = document.createElement("iframe");
  if (!scripts) frame.sandbox = "allow-same-origin";
  Object.assign(frame, {width, height: 3000, src: source});
  await new Promise((done) => { frame.onload = done; document.body.append(frame); });
  const page = frame.contentDocument, root = page.documentElement;
  const inside = (e) => e.closest(".scroll, svg, thead") === null && e.getClientRects().length;
  const sticksOut = (e) => e.getBoundingClientRect().right > width + 1;
  const wide = [...page.body.querySelectorAll("*")].filter((e) => inside(e) && sticksOut(e));
  const heights = [...page.querySelectorAll("svg text")].map((e) => e.getBoundingClientRect().height);
  const rows = () => [...page.querySelectorAll("#facts tbody tr")].filter((e) => e.getClientRects().length).length;
  const headings = [...page.querySelectorAll("#facts thead th")];
  const found = {
    name, width, scripts, title: page.title, overflow: root.scrollWidth - root.clientWidth, rows: rows(),
    wide: wide.slice(0, 5).map((e) => e.outerHTML.slice(0, 80)),
    filters: page.getElementById("filters")?.getClientRects().length ?? 0,
    cards: page.querySelector("#facts tbody tr") && getComputedStyle(page.querySelector("#facts tbody tr")).display,
    outside: [...page.querySelectorAll("[src], link, image, object, iframe")].map((e) => e.outerHTML.slice(0, 80)),
    small: heights.filter((height) => height < 9).length,
    unnamed: page.querySelectorAll("svg:not([aria-label]), th:not([scope]), section:not([aria-labelledby])").length,
  };
  if (scripts && found.filters) {
    const words = page.getElementById("words");
    words.value = "peru";
    words.dispatchEvent(new Event("input"));
    found.filtered = rows();
    words.value = "";
    words.dispatchEvent(new Event("input"));
    found.sorted = {};
    for (const name of ["new answer", "likely", "in other words", "outcome"]) {
      const heading = headings.find((e) => e.textContent === name), button = heading.querySelector("button");
      const column = heading.cellIndex, lines = () => [...page.querySelectorAll("#facts tbody tr")];
      const cells = () => lines().map((e) => e.cells[column].innerText);
      const orders = [["as it was", cells()]];
      for (let i = 0; i < 3; i++) {
        button.click();
        orders.push([heading.getAttribute("aria-sort"), cells()]);
      }
      found.sorted[name] = orders;
    }
    found.marked = page.querySelectorAll("[aria-sort]").length;
    const button = headings[0].querySelector("button").getBoundingClientRect();
    found.reachable = button.width > 9 && button.height > 9 && button.right <= width;
  }
  found.buttons = page.querySelectorAll("th button").length;
  frame.remove();
  return found;
};
(async () => {
  const found = [];
  for (const page of pages) found.push(await look(page));
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(found);
  document.body.replaceChildren(result);
})();
</script></body>
"""


def browse(folder: Path, reports: dict[str, Report]) -> tuple[list[dict[str, Any]], str]:
    """Open reports at all widths, the last one also without scripts; return findings and messages of the console."""
    pages = []
    for name, report in reports.items():
        write_report(report, folder / name)
        pages += [(name, f"{name}/report.html", width, True) for width in WIDTHS]
    pages.append((name, f"{name}/report.html", WIDTHS[0], False))
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1500,3000", "--virtual-time-budget=60000"]
    command += ["--enable-logging=stderr", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    match = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr
    return json.loads(html.unescape(match[1])), "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_fits_and_works_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found, console = browse(tmp_path, {"empty": Report(), "hostile": hostile(FACTS), "sample": sample(FACTS)})
    assert len(found) == 3 * len(WIDTHS) + 1
    # Chromium tells of the scripts that the sandbox of the frames without scripts has stopped
    errors = [line for line in console.splitlines() if "Blocked script execution" not in line]
    assert not errors, errors
    for page in found:
        assert page["overflow"] <= 0, page
        assert not page["wide"], page
        assert not page["outside"], page
        assert page["unnamed"] == 0, page
        assert page["small"] == 0, page
        assert page["title"] != "owned", page
        facts = 0 if page["name"] == "empty" else FACTS
        assert page["rows"] == facts, page
        assert bool(page["filters"]) is (page["scripts"] and facts > 0), page
        if facts:
            assert page["cards"] == ("block" if page["width"] in CARDS else "table-row"), page
        if page["name"] == "sample" and page["scripts"]:
            assert page["filtered"] == 1, page
            assert page["reachable"] and page["marked"] == 0, page
            check_order(page["sorted"], page)
        assert bool(page["buttons"]) is (page["scripts"] and facts > 0), page


def check_order(found: dict[str, list[tuple[str | None, list[str]]]], page: object) -> None:
    """Each heading sorts by its column: ascending, descending, and as it was."""
    ranks: dict[str, Callable[[str], Any]] = {
        "new answer": lambda text: text.lower(),
        "likely": lambda text: float(text.split(" ")[0]),
        "in other words": lambda text: int(text[0]),
        "outcome": lambda text: ["failed", "lost later", "holds"].index(text[2:]),
    }
    for name, ((_, first), (up, rising), (down, falling), (none, last)) in found.items():
        rank = ranks[name]
        assert (up, down, none) == ("ascending", "descending", None), page
        assert first == last and len(set(first)) > 1, page
        assert rising == sorted(first, key=rank) and falling == sorted(first, key=rank, reverse=True), page
