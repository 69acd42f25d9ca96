"""Turn run folders into a report: an HTML page, Markdown, a PDF and PNG figures. Run from code/:

python report.py ../logs/RUN [../logs/RUN ...] [--out ../results/NAME] [--data ../data]
python report.py --writeup ../logs/RUN [../logs/RUN ...] [--out ../writeup]

Curves and results come from the folders alone, also those of the course's own code. Predictions,
attacks and saliency need the data folder that the run recorded, or --data. With --writeup the
report is the one that the assignment asks for, with marked places for your text, which stays when
the command runs again.
"""

from __future__ import annotations

import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from deepvision.config import OneLineParser, default_workers
from deepvision.reporting import sections, writeup
from deepvision.reporting.analysis import RunAnalysis, analyse
from deepvision.reporting.document import Document, Section, Text
from deepvision.reporting.records import Run, read_runs
from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.console import script
from deepvision.runtime.provenance import ROOT, commit
from utils import UserError, relpath


def parse(argv: list[str] | None) -> Namespace:
    """Read the command line; a wrong flag ends the program with one line and status 2."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, logs/<kind>_exp_<date>")
    add("--out", type=Path, help="folder to write to (default results/report_RUN, or writeup)")
    add("--data", type=Path, help="data folder, where the run recorded none or it has moved")
    add("--benchmark", type=Path, help="results/conv_benchmark.json, to compare convolutions")
    add("--writeup", action="store_true", help="the report that the assignment asks for")
    return parser.parse_args(argv)


class Problems:
    """Errors that leave a part of the report out; printed once and listed in the document."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, error: UserError, label: str = "") -> None:
        """Print an error once, after the label of its run, and keep it for the document."""
        self.lines.append(f"{label}: {error}" if label else str(error))
        print(self.lines[-1])

    def section(self) -> list[Section]:
        """The section with one warning per problem; [] if there is none."""
        boxes = [Text(line, "warning") for line in self.lines]
        return [Section("Left out", boxes)] if boxes else []


def report(args: Namespace) -> None:
    """Write the report, or with --writeup the write-up, of the runs named.

    Raises:
        UserError: no run can be read, or a file cannot be written.
    """
    problems = Problems()
    runs = read_runs(args.runs, problems.add)
    out = args.out or (
        ROOT / "writeup" if args.writeup else ROOT / "results" / f"report_{runs[0].folder.name}"
    )
    make_folder(out)
    writer = sections.FigureWriter(out)
    analyses = analyse_all(runs, args.data, problems)
    if args.writeup:
        for file in writeup.write(out, runs, analyses, writer, args.benchmark, problems.lines):
            print(relpath(file))
        return
    content = [
        *from_records(runs, writer, args.benchmark, problems),
        *from_images(analyses, writer),
    ]
    title = "Training report: " + ", ".join(run.label for run in runs)
    made = f"{date.today()}, commit {commit() or 'unknown'}; from "
    subtitle = made + ", ".join(run.folder.name for run in runs)
    document = Document(title, subtitle, content + problems.section())
    write_atomically(out / "report.html", document.html().encode())
    write_atomically(out / "report.md", document.markdown().encode())
    write_atomically(out / "report.pdf", document.pdf())
    print(f"report.html, report.md, report.pdf and figures: {relpath(out)}")


def analyse_all(runs: Sequence[Run], data: Path | None, problems: Problems) -> list[RunAnalysis]:
    """The runs whose network and images are there."""
    analyses = []
    for run in runs:
        try:
            analyses.append(analyse(run, data, default_workers()))
        except UserError as e:
            problems.add(e, f"{run.label}: no predictions")
    return analyses


def from_records(
    runs: Sequence[Run],
    writer: sections.FigureWriter,
    benchmark: Path | None,
    problems: Problems,
) -> list[Section]:
    """The sections that the run folders alone allow."""
    content = [sections.provenance(runs), sections.summary(runs), sections.curves(runs, writer)]
    content += filter(None, (sections.robustness(run, writer) for run in runs))
    try:
        content += filter(None, [sections.convolution(runs, benchmark)])
    except UserError as e:
        problems.add(e)
    return content


def from_images(analyses: Sequence[RunAnalysis], writer: sections.FigureWriter) -> list[Section]:
    """The sections that need networks and images; the first run gets the explorer."""
    content = [sections.classes(analyses, writer)] if analyses else []
    content += filter(None, (sections.attack_explorer(a) for a in analyses[:1]))
    for a in analyses:
        content += [sections.confusion(a, writer), sections.explanations(a, writer)]
    return content


def make_folder(out: Path) -> None:
    """Make a folder with its parents.

    Raises:
        UserError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {out}: {e.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    try:
        report(parse(argv))
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the report is not complete.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    with script(INTERRUPT):
        sys.exit(main())
