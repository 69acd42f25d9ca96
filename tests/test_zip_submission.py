"""zip_submission.py, run in a separate project with traps in it; the zip is opened and read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HELPERS = ("custom_blocks", "custom_dataloader", "custom_transforms", "utils")
MODULES = ("student_code", "main", *HELPERS)


@pytest.fixture
def project(tmp_path):
    """A submission with nothing wrong."""
    root = tmp_path / "project"
    for folder in ("code/part", "writeup", "results", "data", "logs"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "zip_submission.py", root)
    for name in MODULES:
        (root / "code" / f"{name}.py").write_text(f"NAME = {name!r}\n")
    (root / "code" / "part" / "attack.py").write_text("DATA = '../../data'\n")
    (root / "writeup" / "report.pdf").write_bytes(b"%PDF-1.7 \r\n\x00")
    (root / "results" / "curve.png").write_bytes(bytes(range(256)))
    return root


CLEAN = {f"code/{name}.py" for name in MODULES} | {
    "code/part/attack.py",
    "writeup/report.pdf",
    "results/curve.png",
}


def run(project: Path) -> tuple[int, str]:
    command = [sys.executable, "zip_submission.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    assert bool(done.stderr) == bool(done.returncode)
    return done.returncode, done.stdout + done.stderr


def packed(project: Path) -> set[str]:
    with zipfile.ZipFile(project / "submission.zip") as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


def test_packs_every_file_unchanged(project, tmp_path):
    code, said = run(project)
    assert code == 0
    assert packed(project) == CLEAN
    with zipfile.ZipFile(project / "submission.zip") as archive:
        archive.extractall(tmp_path / "out")
    for name in CLEAN:
        assert (tmp_path / "out" / name).read_bytes() == (project / name).read_bytes()
        assert f"{(project / name).stat().st_size:,}  {name}" in said
    assert f"submission.zip: {len(CLEAN)} files" in said
    assert f"{(project / 'submission.zip').stat().st_size:,} packed" in said


def test_runs_from_anywhere(project, tmp_path):
    script = str(project / "zip_submission.py")
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True)
    assert packed(project) == CLEAN


TRAPS = [
    "code/model_best.pth.tar",
    "code/Weights.PT",
    "code/weights.pth",
    "results/archive.tar",
    "results/features.npy",
    "results/sample.tar.gz",
    "results/events.out.tfevents.1700000000.host.1.0",
    "results/train.log",
    "code/data/train.txt",
    "code/part/logs/config.json",
    "code/__pycache__/utils.cpython-311.pyc",
    "code/.git/config",
    "code/.DS_Store",
    "writeup/.ipynb_checkpoints/report.md",
    "code/venv/pyvenv.cfg",
    "data/train.txt",
    "logs/run/models/config.json",
    "secret.txt",
]


def test_traps_stay_out(project):
    for trap in TRAPS:
        (project / trap).parent.mkdir(parents=True, exist_ok=True)
        (project / trap).write_text("trap")
    code, said = run(project)
    assert code == 0
    assert packed(project) == CLEAN
    for name in ("code/weights.pth (model)", "code/data (data)", "code/.git (hidden)"):
        assert f"left out  {name}" in said


def test_a_package_named_data_is_packed(project):
    package = project / "code" / "part" / "data"
    package.mkdir()
    for name in ("__init__.py", "loader.py"):
        (package / name).write_text("")
    assert run(project)[0] == 0
    assert packed(project) == CLEAN | {f"code/part/data/{n}" for n in ("__init__.py", "loader.py")}


def test_links_out_of_the_project_stay_out(project, tmp_path):
    (tmp_path / "secret.txt").write_text("trap")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text("trap")
    (project / "data" / "train.txt").write_text("trap")
    (project / "results" / "weights.pth").write_text("trap")
    links = {
        "code/secret.txt": tmp_path / "secret.txt",
        "code/private": tmp_path / "private",
        "code/labels.txt": project / "data" / "train.txt",
        "code/renamed.txt": project / "results" / "weights.pth",
        "code/nowhere.txt": project / "gone",
        "code/loop": project / "code",
    }
    for name, target in links.items():
        (project / name).symlink_to(target)
    (project / "writeup" / "figure.png").symlink_to(project / "results" / "curve.png")
    code, said = run(project)
    assert code == 0
    assert packed(project) == CLEAN | {"writeup/figure.png"}
    with zipfile.ZipFile(project / "submission.zip") as archive:
        assert archive.read("writeup/figure.png") == bytes(range(256))
    assert all(f"left out  {name}" in said for name in links)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(project):
    os.mkfifo(project / "results" / "pipe.txt")
    assert run(project)[0] == 0
    assert packed(project) == CLEAN


def test_the_same_files_give_the_same_bytes(project, tmp_path):
    run(project)
    first = (project / "submission.zip").read_bytes()
    twin = tmp_path / "twin"
    shutil.copytree(project, twin)
    for i, path in enumerate(sorted(twin.rglob("*"), reverse=True)):
        os.utime(path, (1_500_000_000 + i, 1_500_000_000 + i))
        path.chmod(0o700)
    (twin / "submission.zip").unlink()
    run(twin)
    assert (twin / "submission.zip").read_bytes() == first


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_file_is_an_error_and_the_old_zip_stays(project, name):
    run(project)
    before = (project / "submission.zip").read_bytes()
    (project / "code" / f"{name}.py").unlink()
    code, said = run(project)
    assert code == 1 and said == f"zip_submission.py: code/{name}.py is missing\n"
    assert (project / "submission.zip").read_bytes() == before


def test_a_required_file_that_is_a_link_away_is_missing(project, tmp_path):
    (project / "code" / "utils.py").replace(tmp_path / "utils.py")
    (project / "code" / "utils.py").symlink_to(tmp_path / "utils.py")
    code, said = run(project)
    assert code == 1 and "code/utils.py is missing (link to" in said
    assert not (project / "submission.zip").exists()


@pytest.mark.parametrize(
    "line",
    [
        "PATH = '/home/ada/data'",
        'PATH = "/Users/ada/models/best"',
        "PATH = r'C:\\Users\\ada\\data'",
        "PATH = 'D:/data/miniplaces'",
        "PATH = f'/mnt/{1}/x' + f'{1} /root/x'",
        "def f(path='/content/drive/MyDrive'): ...",
        "open('''\n/home/ada/notes.txt''')",
    ],
)
def test_own_paths_in_code_are_refused_with_file_and_line(project, line):
    (project / "code" / "part" / "attack.py").write_text("import os\n\n" + line + "\n")
    code, said = run(project)
    assert code == 1 and "zip_submission.py: code/part/attack.py:3: " in said
    assert "exists on your computer only" in said
    assert not (project / "submission.zip").exists()


@pytest.mark.parametrize(
    "line",
    [
        '"""Example: python main.py /home/ada/data"""',
        "# once at /home/ada/data",
        "URL = 'https://example.org/home/ada/data'",
        "PATH = '../data/home/ada'",
        "PRINT = f'Acc@1:\\t{1}\\nx:\\t{2}'",
        "PATTERN = r'(?P<a>\\w:\\d+)'",
        "RATIO = 'a/b', 'x:/', 'x:/y', '/'",
    ],
)
def test_harmless_lines_are_not_refused(project, line):
    (project / "code" / "part" / "attack.py").write_text(line + "\n")
    code, said = run(project)
    assert code == 0, said


def test_own_paths_in_other_text_are_a_warning(project):
    (project / "results" / "log.md").write_text("one\nran in /home/ada/course\n")
    code, said = run(project)
    assert code == 0 and "warning  results/log.md:2: /home/ada/course" in said


def test_code_that_does_not_parse_is_refused(project):
    (project / "code" / "student_code.py").write_text("def f(:\n")
    code, said = run(project)
    assert code == 1 and "code/student_code.py:1: not valid Python" in said


def test_a_missing_writeup_is_a_warning(project):
    (project / "writeup" / "report.pdf").unlink()
    code, said = run(project)
    assert code == 0 and "warning  writeup/ holds neither a PDF nor a Markdown file" in said
    shutil.rmtree(project / "writeup")
    assert run(project)[0] == 0
    assert packed(project) == CLEAN - {"writeup/report.pdf"}


def test_missing_parts_of_a_writeup_are_named(project):
    module = "code/deepvision/reporting/student_text.py"
    (project / module).parent.mkdir(parents=True)
    shutil.copy(ROOT / module, project / module)
    text = "> **Missing.** SimpleNet: train it\n<!-- yours: Design -->\n\n<!-- end of yours -->\n"
    (project / "writeup" / "writeup.md").write_text(text)
    status, said = run(project)
    assert status == 0
    assert "writeup/writeup.md lacks SimpleNet: train it" in said
    assert "writeup/writeup.md lacks your text: Design" in said
    (project / "writeup" / "writeup.md").write_text("<!-- yours: Design -->\nunfinished")
    assert "writeup/writeup.md: " in run(project)[1]


def test_a_disk_that_is_full_leaves_the_old_zip(project):
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    disk = project.parent / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        small = disk / "project"
        shutil.copytree(project, small)
        assert run(small)[0] == 0
        before = (small / "submission.zip").read_bytes()
        (small / "results" / "noise.png").write_bytes(os.urandom(30_000))
        fill_up(disk / "ballast")
        code, said = run(small)
        assert code == 1 and "No space left on device" in said and said.count("\n") == 1
        assert (small / "submission.zip").read_bytes() == before
        assert not list(small.glob("*.part"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill_up(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_our_own_project_can_be_handed_in(tmp_path):
    for name in ("code", "writeup", "results"):
        if (ROOT / name).exists():  # git keeps no empty folders
            shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "zip_submission.py", tmp_path)
    code, said = run(tmp_path)
    assert code == 0, said
    assert {"code/student_code.py", "code/main.py", "code/utils.py"} <= packed(tmp_path)


def test_a_whole_folder_that_is_a_link_stays_out(project, tmp_path):
    (project / "results").rename(tmp_path / "results")
    (project / "results").symlink_to(tmp_path / "results")
    code, said = run(project)
    assert code == 0 and "left out  results (link)" in said
    assert packed(project) == CLEAN - {"results/curve.png"}
