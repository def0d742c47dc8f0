"""Claims about the playground's page, on a server that runs: quick lights, no console message, no fault for axe-core.

    budgetvlm serve --playground &
    npm pack axe-core && tar xzf axe-core-*.tgz       # not part of the repository
    python benchmarks/playground_page.py --axe package/axe.min.js --screenshots results/playground

It drives Chromium with real clicks and keys at 1280 and 390 pixels, light and dark: moves the slider, asks, compares.
The exit code is 1 if a light took more than 100 ms from the key to the drawn frame, if anything came to the console, or
if axe-core found a fault that it calls serious or critical.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.browser import Browser, browser

SIZES = ((1280, 800), (390, 844))
LONGEST_LIGHT_MS = 100.0
FAULTS = ("serious", "critical")
_MEASURE = """
window.lights = [];
document.getElementById("budget").addEventListener("input", (event) => requestAnimationFrame(() => {
  const channel = new MessageChannel();  // its message comes once the frame is drawn
  channel.port1.onmessage = () => window.lights.push(performance.now() - event.timeStamp);
  channel.port2.postMessage(null);
}));
document.getElementById("budget").focus();
"""


def main() -> int:
    """Look at the page in every size and colour; print what was found."""
    args = _arguments()
    results = []
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as page:
        for width, height in SIZES:
            for dark in (False, True):
                page.open(f"{args.url}/playground/?{width}{dark}", width, height, dark=dark)
                results.append({"width": width, "dark": dark, **look(page, args.axe)})
                if args.screenshots:
                    args.screenshots.mkdir(parents=True, exist_ok=True)
                    page.screenshot(args.screenshots / f"{width}-{'dark' if dark else 'light'}.png")
        messages = page.messages
    print(json.dumps({"pages": results, "console": messages}, indent=2))
    slow = [one for one in results if one["longest_light_ms"] > LONGEST_LIGHT_MS]
    return 1 if slow or messages or any(one["faults"] for one in results) else 0


def look(page: Browser, axe: Path | None) -> dict[str, Any]:
    """Use the page as a visitor would, and measure."""
    page.wait_for("document.querySelector('#settings td.lit')")
    page.run(_MEASURE)
    moves = ["Home", *["ArrowRight"] * 39, *["ArrowLeft"] * 15]
    for number, key in enumerate(moves):
        before = page.run("window.lights.length")
        page.press(key)
        if number:  # Home may not move it
            page.wait_for(f"window.lights.length > {before}")
    lights = page.run("window.lights")
    page.click("#ask")
    page.wait_for("document.querySelector('#answer .why')?.textContent")
    page.click("#compare")
    page.wait_for("document.querySelectorAll('#three .why b').length == 3")
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    return {
        "median_light_ms": sorted(lights)[len(lights) // 2],
        "longest_light_ms": max(lights),
        "wider_than_window": page.run("document.documentElement.scrollWidth > innerWidth"),
        "faults": faults(page, axe) if axe else None,  # not looked for
    }


def faults(page: Browser, axe: Path) -> list[str]:
    """What axe-core calls serious or worse."""
    page.run(axe.read_text("utf-8") + "; undefined")
    found = page.run("axe.run(document).then(({ violations }) => violations)")
    for one in found:
        print(f"axe: {one['impact']} {one['id']}: {one['nodes'][0]['html']}", file=sys.stderr)
    return [f"{one['impact']} {one['id']}: {one['help']}" for one in found if one["impact"] in FAULTS]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--axe", type=Path, metavar="FILE", help="axe.min.js of the npm package axe-core")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="where to save a picture of each")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
