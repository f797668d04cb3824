"""`make faults`: injects every fault of the fault tests and prints what happened to each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

FILES = (
    "tests/launch/test_training_faults.py",
    "tests/launch/test_training_driver.py",
    "tests/launch/test_end_to_end.py",
    "tests/launch/test_memory_pressure.py",
    "tests/launch/test_ledger_and_hook.py",
    "tests/launch/search/test_leg_search_runs.py",
    *(str(p) for p in sorted(Path("tests/training").glob("test_faults*.py"))),
    *(str(p) for p in sorted(Path("tests/training").glob("test_state*.py"))),
)


def row(case: ElementTree.Element) -> tuple[str, str, str]:
    """fault, verdict, what happened: of one test."""
    name = case.get("name", "").removeprefix("test_").replace("_", " ")
    said = [p.get("value", "") for p in case.iter("property") if p.get("name") == "what"]
    for verdict in ("failure", "error", "skipped"):
        found = case.find(verdict)
        if found is not None:
            return name, verdict, found.get("message", "").partition("\n")[0][:120]
    return name, "passed", said[0] if said else ""


def main() -> int:
    """Run the tests one after another; 0 where each fault ended as it should."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "faults.xml"
        command = [sys.executable, "-m", "pytest", "-q", *FILES, f"--junitxml={path}"]
        code = subprocess.run(command, check=False).returncode
        rows = [row(case) for case in ElementTree.parse(path).iter("testcase")]
    width = max(len(name) for name, _, _ in rows)
    for name, verdict, what in rows:
        print(f"{name:<{width}}  {verdict:<8}{what}".rstrip())
    passed = sum(verdict == "passed" for _, verdict, _ in rows)
    print(f"{passed} of {len(rows)} faults ended as they should")
    return code


if __name__ == "__main__":
    sys.exit(main())
