"""The page in a headless browser: it fits small and large screens, works without scripts, and reports no error."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
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
  }
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
