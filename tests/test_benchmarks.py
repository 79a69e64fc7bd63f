"""The benchmarks run, at toy sizes, and write what they say; their figures mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name, keys", [
    ("strategies", {"topics", "recall", "long", "quarters", "grid"}),
    ("auto", {"cells"}),
])  # fmt: skip
def test_smoke(tmp_path, name, keys):
    out = tmp_path / "out.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--smoke", "--out", str(out)]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert keys | {"command", "date", "environment"} <= result.keys()
    table = out.with_suffix(".md").read_text().splitlines()
    assert len(table) > 3 and all(line.count("|") == table[0].count("|") for line in table)
    if name == "strategies":
        for workload in result["grid"].values():
            assert all(r["identical"] == r["rows"] == 2 for r in workload["results"])
