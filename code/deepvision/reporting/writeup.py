"""The report that the assignment asks for, filled from run folders: Markdown and PDF.

Each part shows what the given runs have. What is missing is named with the command that makes it,
and each part has a marked place for the student's text, which stays when the report is made again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepvision.reporting import sections
from deepvision.reporting.analysis import RunAnalysis
from deepvision.reporting.document import Block, Figure, Pages, Text, markdown_of
from deepvision.reporting.records import Run
from deepvision.reporting.sections import RESULTS, FigureWriter, table_of
from deepvision.reporting.student_text import (
    MISSING,
    add_checksum,
    place,
    read_places,
    was_edited,
)
from deepvision.runtime.atomic import write_atomically
from utils import UserError, relpath

NAME = "writeup"
TITLE = "Deep vision: convolutions, attention and adversarial examples"
ACCURACY = ("best top-1", "… its top-5", "… its epoch", "top-1, averaged with the mirror image")
SIZE = ("parameters", "MFLOPs per image", "epochs", "wall time, h:mm:ss")
ROBUST = ("best top-1", "top-1 under the default attack")


@dataclass
class Inputs:
    """What the parts of the write-up are made from."""

    runs: Sequence[Run]
    analyses: Sequence[RunAnalysis]
    writer: FigureWriter
    benchmark: Path | None

    def of(self, *archs: str | None) -> list[Run]:
        """The runs of these networks with standard training; None: any other network."""
        return [run for run in self.runs if run.arch in archs and not run.adversarial_mode]

    def analysis_of(self, run: Run) -> RunAnalysis | None:
        """The analysis of a run; None if its network or images are missing."""
        return next((a for a in self.analyses if a.run is run), None)


@dataclass
class Part:
    """A section of the write-up; `fill` gives the blocks, `asks` says what the text is about."""

    title: str
    fill: Callable[[Inputs], list[Block]]
    asks: str
    bonus: bool = False


def missing(what: str, command: str) -> Text:
    """The line of an item that no run folder fills."""
    return Text(f"{what} Make it from code/: {command}", "missing")


def training(
    inputs: Inputs,
    archs: Sequence[str | None],
    name: str,
    flags: str,
) -> list[Block]:
    """Curves, results and settings of the runs of these networks."""
    runs = inputs.of(*archs)
    if not runs:
        return [missing(f"No run of {name}.", f"python main.py ../data {flags}")]
    blocks = [table_of(runs, {key: RESULTS[key] for key in (*ACCURACY, *SIZE)})]
    blocks += sections.settings(runs)
    blocks.append(curves(inputs, runs, archs[0]))
    for run in runs:
        if run.evaluation("mirrored_top1") is None:
            command = f"python main.py ../data --resume=../logs/{run.folder.name} -e -v"
            blocks.append(missing(f"No evaluation of {run.label}.", command))
    return blocks


def curves(inputs: Inputs, runs: Sequence[Run], name: str) -> Figure:
    """The learning curves of these runs in one figure, curves_<name>.png."""
    figure = sections.figures.learning_curves(runs)
    labels = " and ".join(run.label for run in runs)
    caption = f"Loss, learning rate and accuracy of {labels}."
    return inputs.writer.add(f"curves_{name}", figure, caption)


def simple_net(inputs: Inputs) -> list[Block]:
    """SimpleNet on nn.Conv2d."""
    return training(inputs, ["torch_conv"], "SimpleNet", "--epochs=60")


def custom_convolution(inputs: Inputs) -> list[Block]:
    """Memory, speed and loss curve next to nn.Conv2d's."""
    blocks = training(inputs, ["custom_conv"], "CustomConv2d", "--epochs=10 --use-custom-conv")
    pair = [*inputs.of("torch_conv")[:1], *inputs.of("custom_conv")[:1]]
    if len(pair) == 2:
        blocks.append(curves(inputs, pair, "convolutions"))
    table = sections.convolution(pair, inputs.benchmark)
    if table is None:
        command = "python ../benchmarks/conv.py, then report.py with --benchmark"
        return [*blocks, missing("No comparison of memory and speed.", command)]
    return blocks + table.blocks


def own_network(inputs: Inputs) -> list[Block]:
    """The student's network, or SceneNet."""
    return training(inputs, ["scene_net", None], "your own network", "--epochs=60 --use-scene-net")


def resnet18(inputs: Inputs) -> list[Block]:
    """ResNet-18 with ImageNet weights compared with the networks from scratch."""
    blocks = training(inputs, ["resnet18"], "ResNet-18", "--epochs=60 --use-resnet18")
    compared = inputs.of("torch_conv", "scene_net", "resnet18")
    if inputs.of("resnet18") and len(compared) > 1:
        blocks.insert(0, table_of(compared, {k: RESULTS[k] for k in (*ACCURACY, *SIZE)}))
    return blocks


def vision_transformer(inputs: Inputs) -> list[Block]:
    """SimpleViT."""
    flags = "--epochs=90 --wd 0.05 --lr 0.01 --use-vit"
    return training(inputs, ["vit"], "SimpleViT", flags)


def attack(inputs: Inputs) -> list[Block]:
    """Accuracy drop under the default attack, samples, and the sweep over ε and steps."""
    runs = [run for run in inputs.runs if not run.adversarial_mode]
    if not runs:
        return [missing("No network to attack.", "python main.py ../data --epochs=60")]
    blocks: list[Block] = [table_of(runs, {key: RESULTS[key] for key in ROBUST})]
    for run in runs:
        a = inputs.analysis_of(run)
        command = f"python main.py ../data --resume=../logs/{run.folder.name} -a -v"
        if run.evaluation("attacked_top1") is None:
            blocks.append(missing(f"No accuracy of {run.label} under attack.", command))
        if a is None:
            command = "python report.py --writeup RUN --data DATA_FOLDER"
            blocks.append(missing(f"No samples of {run.label}: images or network.", command))
        else:
            blocks += on_paper(sections.explanations(a, inputs.writer).blocks)
    swept = next((run for run in runs if run.sweep()), None)
    if swept is None:
        command = f"python main.py ../data --resume=../logs/{runs[0].folder.name} -a --sweep"
        return [*blocks, missing("No sweep over ε and steps.", command)]
    return blocks + on_paper(sections.robustness(swept, inputs.writer).blocks)


def adversarial_training(inputs: Inputs) -> list[Block]:
    """Adversarially trained runs compared with plain ones of the same networks."""
    runs = [run for run in inputs.runs if run.adversarial_mode]
    if not runs:
        command = "python main.py ../data --epochs=60 --pgd"
        return [missing("No run of adversarial training (bonus).", command)]
    archs = {run.arch for run in runs}
    compared = [*inputs.of(*archs), *runs]
    table = table_of(compared, {key: RESULTS[key] for key in ROBUST})
    return [table, *sections.settings(runs), curves(inputs, compared, "adversarial_training")]


def on_paper(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that Markdown and PDF have."""
    return [block for block in blocks if block.media in ("all", "paper")]


PARTS = (
    Part("Contributions", lambda inputs: [], "who of the team did what"),
    Part("SimpleNet", simple_net, "what the curves and the evaluation show"),
    Part(
        "Own convolution compared with PyTorch's",
        custom_convolution,
        "how CustomConv2d works; why memory, speed and loss differ, or do not",
    ),
    Part("Own network", own_network, "the design, the training scheme, what helped"),
    Part("Comparison with ResNet-18", resnet18, "why the accuracies differ"),
    Part("Vision transformer", vision_transformer, "global and window attention; what differs"),
    Part(
        "Adversarial attack",
        attack,
        "whether you see the difference; what more iterations and a smaller ε do",
    ),
    Part(
        "Adversarial training (bonus)",
        adversarial_training,
        "the scheme, its gain, its cost",
        bonus=True,
    ),
)


def write(
    out: Path,
    runs: Sequence[Run],
    analyses: Sequence[RunAnalysis],
    writer: FigureWriter,
    benchmark: Path | None,
    problems: Sequence[str],
) -> list[Path]:
    """Write writeup.md, writeup.pdf and figures to `out`; return the files to look at.

    The student's texts are taken over from the writeup.md that is there. If other parts of it were
    edited, it is kept as writeup_edited.md.

    Raises:
        UserError: the markers of the student's text are damaged; nothing is written then.
    """
    file = out / f"{NAME}.md"
    texts, kept = old_texts(file)
    inputs = Inputs(runs, analyses, writer, benchmark)
    warning = [Text(text, "warning") for text in [sections.data_warning(runs), *problems] if text]
    parts = [(part, fill(part, inputs)) for part in PARTS]
    write_atomically(file, as_markdown(warning, parts, texts).encode())
    write_atomically(out / f"{NAME}.pdf", as_pdf(warning, parts, texts, out))
    return [file, out / f"{NAME}.pdf", *kept]


def fill(part: Part, inputs: Inputs) -> list[Block]:
    """The blocks of a part, or a box that says why there are none."""
    try:
        return part.fill(inputs)
    except UserError as e:
        return [Text(str(e), "warning")]


def old_texts(file: Path) -> tuple[dict[str, str], list[Path]]:
    """The student's texts in the old write-up, and the copy of it that was kept, if any."""
    if not file.exists():
        return {}, []
    try:
        markdown = file.read_text(encoding="utf-8")
        texts = read_places(markdown)
    except (OSError, UnicodeDecodeError, ValueError) as e:
        raise UserError(f"{relpath(file)}: {e}; repair it or move it away") from None
    titles = {part.title for part in PARTS}
    if was_edited(markdown) or not texts.keys() <= titles:
        edited = file.with_name(f"{NAME}_edited.md")
        write_atomically(edited, markdown.encode())
        print(f"Text outside the marked places was edited: the old file is {relpath(edited)}")
        return texts, [edited]
    return texts, []


def as_markdown(warning: Sequence[Text], parts: Sequence[tuple], texts: dict[str, str]) -> str:
    """The write-up in Markdown, with a checksum of what is not the student's text."""
    lines = [f"# {TITLE}", *map(markdown_of, warning)]
    for part, blocks in parts:
        lines += [f"## {part.title}", *map(block_markdown, blocks)]
        lines += [f"<!-- {part.asks} -->", place(part.title, texts)]
    return add_checksum("\n\n".join(lines) + "\n")


def block_markdown(block: Block) -> str:
    """A block in Markdown; a missing item is marked."""
    if isinstance(block, Text) and block.style == "missing":
        return f"{MISSING} {markdown_of(block)}"
    return markdown_of(block)


def as_pdf(
    warning: Sequence[Text], parts: Sequence[tuple], texts: dict[str, str], folder: Path
) -> bytes:
    """The write-up as PDF; images of the student's text come from `folder`."""
    pages = Pages()
    pages.masthead(TITLE, "")
    for block in warning:
        pages.add(block)
    for part, blocks in parts:
        if part.bonus and not texts.get(part.title) and all_missing(blocks):
            continue  # the handout does not ask for it
        pages.heading(part.title, blocks[0] if blocks else None)
        for block in blocks:
            pages.add(block)
        for block in text_blocks(texts.get(part.title, ""), folder):
            pages.add(block)
    return bytes(pages.output())


def all_missing(blocks: Sequence[Block]) -> bool:
    """Whether no run folder fills any of these blocks."""
    return all(isinstance(block, Text) and block.style == "missing" for block in blocks)


def text_blocks(text: str, folder: Path) -> list[Block]:
    """The student's Markdown for the PDF: paragraphs, and images that stand alone."""
    blocks: list[Block] = []
    for paragraph in filter(None, re.split(r"\n\s*\n", text)):
        image = re.fullmatch(r"!\[(.*?)\]\((.*?)\)\s*", paragraph)
        if image and (folder / image[2]).is_file():
            blocks.append(Figure(folder / image[2], image[1], 0.7))
        else:
            joined = re.sub(r"\n(?!\s*(?:[-*] |\d+[.)] |[|#]))", " ", paragraph)  # lists stay lines
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", joined)  # links
            blocks.append(Text(re.sub(r"\*\*|__|`", "", plain)))
    return blocks
