"""Runs the page's rules outside of the page, in node or in chromium, for tests."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.waiting import HANG_SECONDS

TEMPLATES = Path(__file__).parents[2] / "evaluation" / "report" / "templates"
NODE = shutil.which("node")
BROWSER = next(
    (b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
)
# For each case: what the rules say at every setting.
LOOP = """
const answers = cases.map(({data, settings, pair}) => settings.map(s => {
  const choice = choose(data, s), [at, d] = atSettings(data, s);
  return {...choice, verdict: verdictOf(choice),
    totals: at.arms.map(arm => totalCost(arm, d).usd), losses: at.arms.map(arm => lossUsd(arm, d)),
    break_even: pair ? breakEven(data, s, pair[0], pair[1]) : null};
}));
"""


def rules_source() -> str:
    """The script that the page holds."""
    return (TEMPLATES / "decision.js").read_text(encoding="utf-8")


def in_node(cases: list[dict[str, Any]]) -> Any:
    """The answers of node."""
    assert NODE is not None
    script = (
        f'"use strict";{rules_source()}\nconst cases = JSON.parse(require("fs").readFileSync(0));'
    )
    script += f"{LOOP}\nconsole.log(JSON.stringify(answers));"
    done = subprocess.run(
        [NODE, "-e", script],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    return json.loads(done.stdout)


def in_chromium(tmp_path: Path, cases: list[dict[str, Any]]) -> Any:
    """The answers of a real browser."""
    page = tmp_path / "rules.html"
    data = json.dumps(cases).replace("<", "\\u003c")
    page.write_text(
        f'<pre id="out"></pre><script>"use strict";{rules_source()}\nconst cases = {data};{LOOP}'
        'document.getElementById("out").textContent = JSON.stringify(answers);</script>'
    )
    return json.loads(dumped(tmp_path, page))


def dumped(tmp_path: Path, page: Path, *, virtual_milliseconds: int | None = 10_000) -> str:
    """The text of #out after the page has run; None: in real time, until its load event."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1400,1000"]
    if virtual_milliseconds is not None:
        command += [f"--virtual-time-budget={virtual_milliseconds}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not run: {done.stdout[:500]} {console}"
    return html.unescape(found[1])
