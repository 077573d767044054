"""Look for faults of accessibility in HTML pages, in a real browser: ``python docs/check_pages.py [--axe FILE] PAGE_OR_FOLDER...``.

Every page is opened by Chromium as on a desk, on a telephone and in the dark, and axe-core (``npm install axe-core``; FILE is its
``axe.min.js``, or the environment's LIBMTL_FAIR_AXE) is run in it. Serious and critical faults are printed, and end with 1. Without
Chromium or axe it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

VIEWS = {
    "desk": ["--window-size=1280,900"],
    "telephone": ["--window-size=400,800"],
    "dark": ["--window-size=1280,900", "--blink-settings=preferredColorScheme=0"],
}
QUIET = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--allow-file-access-from-files",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip
RUN = """
<script id="axe-source">{axe}</script>
<pre id="axe-found" hidden></pre>
<script>
addEventListener("load", () => setTimeout(() => {{
  document.querySelectorAll("details").forEach((each) => {{ each.open = true; }});
  document.getAnimations().forEach((each) => each.finish());
  axe.run(document, {{ resultTypes: ["violations"] }}).then((found) => {{
    const kept = found.violations.map((v) => ({{ id: v.id, impact: v.impact, help: v.help,
      nodes: v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200) + " :: " + n.failureSummary.slice(0, 300)), count: v.nodes.length }}));
    document.getElementById("axe-found").textContent = JSON.stringify({{ done: true, wide: document.documentElement.scrollWidth, kept }});
  }});
}}, 300));
</script>
"""


def chromium() -> str | None:
    """Return the browser, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def faults(page: Path, axe: str, browser: str, view: str) -> list[dict[str, object]]:
    """Return what axe finds on a page, of any impact; a page wider than its window is a fault, too."""
    text = page.read_text(encoding="utf-8")
    script = RUN.format(axe=axe.replace("</script", "<\\/script"))
    copy = page.with_name(
        f".axe_{os.getpid()}_{view}_{page.name}"
    )  # beside it, so that its pictures and styles are found
    at = text.rindex("</body>")
    with tempfile.TemporaryDirectory() as profile:
        try:
            copy.write_text(text[:at] + script + text[at:], encoding="utf-8")
            command = [
                browser,
                *QUIET,
                *VIEWS[view],
                f"--user-data-dir={profile}",
                "--virtual-time-budget=60000",
                "--dump-dom",
            ]
            dom = subprocess.run(
                [*command, copy.as_uri()], capture_output=True, text=True, timeout=300, check=True
            ).stdout
        finally:
            copy.unlink(missing_ok=True)
    held = re.search(r'<pre id="axe-found"[^>]*>(.*?)</pre>', dom, re.DOTALL)
    if held is None or not held[1]:
        raise RuntimeError(f"{page}: axe did not end in the browser")
    found = json.loads(html.unescape(held[1]))
    width = int(re.search(r"size=(\d+)", VIEWS[view][0])[1])  # type: ignore[index]
    # Chromium's window is at least 500 wide on some systems, even headless
    if found["wide"] > max(width, 500):
        found["kept"].append(
            {"id": "too-wide", "impact": "serious", "help": f"{found['wide']} px in {width}", "nodes": [], "count": 1}
        )
    return list(found["kept"])


def pages(paths: list[Path]) -> Iterator[Path]:
    """Yield the pages named, and those in folders named."""
    for path in paths:
        yield from sorted(path.rglob("*.html")) if path.is_dir() else [path]


def main(arguments: list[str] | None = None) -> int:
    """Check pages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axe", type=Path, default=os.environ.get("LIBMTL_FAIR_AXE"), help="axe.min.js of axe-core")
    parser.add_argument("--views", nargs="+", choices=list(VIEWS), default=list(VIEWS))
    parser.add_argument("paths", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    browser = chromium()
    if browser is None or given.axe is None or not Path(given.axe).exists():
        print(
            "not checked: "
            + ("there is no chromium here" if browser is None else "there is no axe-core here (npm install axe-core)")
        )
        return 0
    axe, bad = Path(given.axe).read_text(encoding="utf-8"), 0
    for page in pages(given.paths):
        for view in given.views:
            found = faults(page.resolve(), axe, browser, view)
            grave = [each for each in found if each["impact"] in ("serious", "critical")]
            bad += len(grave)
            print(f"{page} ({view}): {len(grave)} grave, {len(found) - len(grave)} slight")
            for each in found:
                print(f"  {each['impact']}: {each['id']} ({each['count']}): {each['help']}")
                for node in each["nodes"] if each in grave else ():  # type: ignore[attr-defined]
                    print(f"    {node}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
