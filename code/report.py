"""Turn run folders into a report: PNG figures, an HTML page, Markdown, a PDF. Run from code/:

python report.py ../logs/RUN [../logs/RUN ...] [--out ../results/NAME] [--data ../data]

Curves and summary come from the folders alone, those of the course's own code included. What a
network does with single images needs the data folder that its run recorded, or --data.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from datetime import date
from pathlib import Path

from deepvision.checkpoint import write_atomically
from deepvision.config import OneLineParser, default_workers
from deepvision.reporting import sections
from deepvision.reporting.document import Document, Section, Text
from deepvision.reporting.records import read_runs
from deepvision.runtime.run_logger import LOGS, commit
from utils import UserError, relpath

RESULTS = LOGS.parent / "results"


def parse(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description="Turn run folders into figures, a page, Markdown and a PDF.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, logs/<kind>_exp_<date>")
    add("--out", type=Path, help="folder to write to (default: results/report_RUN)")
    add("--data", type=Path, help="data folder, where the run recorded none or it has moved")
    return parser.parse_args(argv)


def report(args: Namespace) -> None:
    runs = read_runs(args.runs)
    out = args.out or RESULTS / f"report_{runs[0].folder.name}"
    make_folder(out)
    album = sections.FigureWriter(out)
    content = [sections.summary(runs), sections.curves(runs, album)]
    content += filter(None, (sections.robustness(run, album) for run in runs))

    studies, missing = [], []
    for run in runs:
        try:
            studies.append(sections.study(run, args.data, default_workers()))
        except UserError as e:
            missing.append(f"{run.label}: nothing on single images ({e}).")
            print(missing[-1])
    if studies:
        content.append(sections.categories(studies, album))
    for study in studies:
        content += [sections.confusion(study, album), sections.explanations(study, album)]
    content += filter(None, [sections.convolution(RESULTS / "conv_benchmark.json")])
    if missing:
        content.append(Section("Left out", [Text(line) for line in missing]))

    title = "Training report: " + ", ".join(run.label for run in runs)
    made = f"{date.today()}, commit {commit() or 'unknown'}; from "
    document = Document(title, made + ", ".join(run.folder.name for run in runs), content)
    write_atomically(out / "report.html", document.html().encode())
    write_atomically(out / "report.md", document.markdown().encode())
    write_atomically(out / "report.pdf", document.pdf())
    print(f"report.html, report.md, report.pdf and figures: {relpath(out)}")


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {out}: {e.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    try:
        report(parse(argv))
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
