"""Students' files work under our driver, and ours work under the course's."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = Path(__file__).parent.parent / "code"
COURSE = Path(__file__).parent / "course"
OWN = ["student_code.py", "custom_*.py", "utils.py"]


def run(folder, *words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def students_tree(tmp_path_factory):
    """Our code/ with a student's student_code.py in place of ours, and nothing else touched."""
    code = tmp_path_factory.mktemp("student") / "code"
    shutil.copytree(CODE, code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(COURSE / "student_answer.py", code / "student_code.py")
    return code


@pytest.mark.parametrize(
    "flags", [["--use-custom-conv"], ["--use-vit", "--lr=0.001"], ["--pgd"]], ids=" ".join
)
def test_a_students_file_trains_evaluates_and_attacks_under_our_driver(
    students_tree, sample_root, flags
):
    """One process for the three commands: imports take longer than they do."""
    words = [str(sample_root), "--gpu=-1", "-j", "1", "-b", "16"]
    out = run(students_tree, "-c", COMMANDS, json.dumps([words, flags]))
    final = r"^\*{6}Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}$"
    trained, evaluated, attacked = (re.findall(final, part, re.M) for part in out.split("----"))
    assert (len(trained), len(evaluated), len(attacked)) == (1, 2, 2)


COMMANDS = """
import glob, json, sys, main
words, flags = json.loads(sys.argv[1])
assert main.main([*words, "--epochs=1", *flags]) == 0
newest = max(glob.glob("../logs/*"), key=lambda path: path[-19:])  # date
for action in ("-e", "-a"):
    print("----")
    assert main.main([*words, f"--resume={newest}/models/model_best.pth.tar", action, "-v"]) == 0
"""


def test_our_files_work_under_the_courses_driver(tmp_path, sample_root):
    for pattern in OWN:
        for file in CODE.glob(pattern):
            shutil.copy(file, tmp_path)
    shutil.copy(COURSE / "course_driver.py", tmp_path)
    lines = run(tmp_path, "course_driver.py", sample_root).split("\n")[:3]
    assert lines == [f"{name} True 0.1 3" for name in ("cnn", "custom", "vit")]


def test_our_files_work_under_the_driver_of_2022(tmp_path, sample_root):
    """Over a custom_blocks.py without the three classes that later editions leave to students."""
    for pattern in OWN:
        for file in CODE.glob(pattern):
            shutil.copy(file, tmp_path)
    blocks = (CODE / "custom_blocks.py").read_text().split("class Attention")[0]
    blocks = blocks.split("__all__")[0] + blocks[blocks.index("class PatchEmbed") :]
    (tmp_path / "custom_blocks.py").write_text(blocks)
    shutil.copy(COURSE / "course_driver_2022.py", tmp_path)
    out = run(tmp_path, "course_driver_2022.py", sample_root)
    assert out.split("\n")[0] == "True (4, 1, 128, 128) 3"
