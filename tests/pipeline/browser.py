"""Pages in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

needed = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")


def widths(folder: Path, page: str, width: int) -> tuple[int, int]:
    """Inner width of a window of this width that shows the page, and the width that it scrolls over, in pixels."""
    seen = "document.title=[innerWidth,document.documentElement.scrollWidth].join()"
    probe = f"<script>addEventListener('load',()=>{{{seen}}})</script>"
    # a frame, because a headless window is never narrower than 500 pixels
    (folder / "page.html").write_text(page.replace("</body>", f"{probe}</body>"))
    told = "setTimeout(()=>document.body.append('seen:'+this.contentDocument.title),50)"
    frame = f'<iframe src=page.html style="width:{width}px;height:4000px;border:0" onload="{told}"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><body>{frame}</body>")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000",
         "--window-size=1300,900", "--dump-dom", (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"seen:(\d+),(\d+)", done.stdout)
    assert found is not None, done.stdout[-500:]
    return int(found[1]), int(found[2])
