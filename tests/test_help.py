"""--help of every script prints its usage in one line and does nothing."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("*.py", "code/*.py", "code/reverse_attack/*.py", "benchmarks/*.py")
SCRIPTS = sorted(p for place in PLACES for p in ROOT.glob(place) if "__main__" in p.read_text())
SHELL = ("download_dataset.sh", "benchmarks/speedrun.sh")

# All scripts in one process, which imports torch once; prints {script: [status, help]} as JSON
CHILD = """
import contextlib, io, json, os, runpy, sys
found = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    sys.path.insert(0, os.path.dirname(script))
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            status = runpy.run_path(script, run_name="__main__") and None
        except SystemExit as e:
            status = e.code
        shown.flush()
    found[script] = status, shown.buffer.getvalue().decode()
print(json.dumps(found))
"""


def files() -> set[Path]:
    return set(ROOT.iterdir()) | {p for d in ("data", "results") for p in (ROOT / d).iterdir()}


def test_every_script_has_help(tmp_path):
    before = files()
    command = [sys.executable, "-B", "-c", CHILD, *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert len(shown) == len(SCRIPTS) > 25
    for script, (status, text) in shown.items():
        usage, blank, *_ = text.splitlines()
        assert status == 0 and usage.startswith("usage: ") and not blank, (script, text)
    assert not list(tmp_path.iterdir()) and files() == before


def test_shell_scripts_have_help(tmp_path):
    for script in SHELL:
        command = ["bash", str(ROOT / script), "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and Path(script).name in done.stdout, done.stderr


def test_the_readme_of_the_benchmarks_names_every_file():
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    names = {path.name for path in (ROOT / "benchmarks").iterdir() if path.is_file()}
    assert {name for name in names if f"`{name}`" not in readme} <= {"README.md"}
