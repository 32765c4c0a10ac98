"""Take the pictures of the demo's tabs for docs/evaluation.md, in headless Chromium.

    make demo &
    python benchmarks/demo_pictures.py [http://127.0.0.1:7860]

It also prints how long each answer took, in seconds.
"""

import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parents[1] / "docs"
TABS = {  # the name of each tab, and what its answer looks like
    "Classify": "#classify-result h2",
    "Search": "#search-result img",
    "Caption": "#caption-result textarea",
    "Match": "#match-heat img",
    "Ask": "#ask-result textarea",
    "Word order": "#order-match h2",
}


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860"
    with sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = chromium.new_page(viewport={"width": 1000, "height": 600})
        window.goto(address)
        window.wait_for_selector("#classify-picture img")
        for tab, answer in TABS.items():
            window.get_by_role("tab", name=tab).click()
            name = tab.split()[-1].lower()
            if name == "search":
                window.fill("#search-words textarea", "red apple")
            for _ in range(2):  # the first answer loads the model
                started = time.perf_counter()
                window.click(f"#{name}-go")
                window.wait_for_function(
                    f"(() => {{ const e = document.querySelector('{answer}'); return e && e.value !== ''; }})()"
                )
                print(f"{tab}: {time.perf_counter() - started:.2f} s")
                time.sleep(1)
            window.screenshot(path=DOCS / f"demo-{name}.png", full_page=True)
        chromium.close()


if __name__ == "__main__":
    main()
