"""The sections of a report: each function makes one, from runs or from their networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from matplotlib.figure import Figure as Drawing
from torch import Tensor, nn

from deepvision.evaluation import pictures
from deepvision.evaluation.saliency import grad_cam, saliency
from deepvision.reporting import explorer, figures
from deepvision.reporting.analysis import (
    Predictions,
    RunAnalysis,
    count_flops,
    count_parameters,
)
from deepvision.reporting.document import Explorer, Figure, Pictures, Section, Table, Text
from deepvision.reporting.records import Run
from deepvision.runtime.atomic import write_atomically
from deepvision.runtime.jsonl import read_json
from utils import UserError

UNKNOWN = "–"
CONFUSED_PAIRS, EXAMPLES = 3, 5
SHOWN, FACTOR = 5, 10  # images, and the amplification of their change
SETTINGS = ("epochs", "batch_size", "lr", "warmup", "wd", "momentum", "clip_grad", "amp", "seed")
BENCHMARK = "conv_benchmark.json"  # of benchmarks/conv.py


@dataclass
class FigureWriter:
    """Saves figures to a folder."""

    folder: Path

    def add(self, name: str, drawing: Drawing, caption: str, **options: object) -> Figure:
        """Write <name>.png; `options` are fields of the Figure."""
        file = self.folder / f"{name}.png"
        write_atomically(file, figures.png(drawing))
        return Figure(file, caption, drawing.get_figwidth() / figures.WIDTH, **options)

    def add_pictures(self, name: str, rows: list, caption: str) -> list[Pictures | Figure]:
        """Rows of pictures: elements on the page, one PNG on paper."""
        figure = self.add(name, figures.picture_rows(rows), caption, media="paper")
        figure.width = min(figure.width, 1)
        return [Pictures([tuple(map(list_of, row)) for row in rows], caption), figure]


def list_of(part: object) -> object:
    """A text as it is; a sequence as a list."""
    return part if isinstance(part, str) else list(part)


# ---------------------------------------------------------------------------------------------
# From the run folders alone
# ---------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """An accuracy as text; a dash for None and nan."""
    return UNKNOWN if value is None or value != value else f"{value:.2f} %"


def number(value: float | None, unit: str = "", digits: int = 0, scale: float = 1.0) -> str:
    """value / scale with thousands separators and its unit; a dash for None."""
    return UNKNOWN if value is None else f"{value / scale:,.{digits}f}{unit}"


def known(value: object) -> str:
    """A value as text; a dash for None."""
    return UNKNOWN if value is None else str(value)


def of_network(run: Run, count: Callable[[nn.Module], int]) -> int | None:
    """count(network of the run); None if the network cannot be loaded."""
    try:
        return count(run.network)
    except UserError:
        return None


def adversarial_training(run: Run) -> str:
    """The mode of adversarial training and its ε, or no."""
    if run.config and not run.adversarial_mode:
        return "no"
    if not run.adversarial_mode:
        return UNKNOWN
    epsilon = run.setting("at_eps")
    return run.adversarial_mode + ("" if epsilon is None else f", ε = {epsilon:g}/255")


def versions(run: Run) -> str:
    """The versions of Python and torch that the run recorded."""
    found = {name: run.config.get(name) for name in ("python", "torch")}
    return ", ".join(f"{name} {v}" for name, v in found.items() if v) or UNKNOWN


ORIGIN: dict[str, Callable[[Run], str]] = {
    "network": lambda run: known(run.network_name),
    "adversarial training": adversarial_training,
    "data folder": lambda run: known(run.data.get("folder")),
    "classes": lambda run: known(run.data.get("classes")),
    "training images": lambda run: number(run.data.get("train")),
    "validation images": lambda run: number(run.data.get("val")),
    "data fingerprint": lambda run: known(run.data.get("fingerprint")),
    "command": lambda run: known(run.config.get("command")),
    "commit": lambda run: known(run.config.get("commit")),
    "device": lambda run: known(run.config.get("device")),
    "versions": versions,
    "run folder": lambda run: run.folder.name,
}
RESULTS: dict[str, Callable[[Run], str]] = {
    "best top-1": lambda run: percent(run.at(run.best_epoch, "top1_accuracy")),
    "… its top-5": lambda run: percent(run.at(run.best_epoch, "top5_accuracy")),
    "… its epoch": lambda run: str(run.best_epoch),
    "final top-1": lambda run: percent(run.at(run.last_epoch, "top1_accuracy")),
    "final top-5": lambda run: percent(run.at(run.last_epoch, "top5_accuracy")),
    "top-1, averaged with the mirror image": lambda run: percent(run.evaluation("mirrored_top1")),
    "top-1 under the default attack": lambda run: percent(run.evaluation("attacked_top1")),
    "epochs": lambda run: str(run.last_epoch),
    "wall time, h:mm:ss": lambda run: str(timedelta(seconds=round(run.seconds))),
    "training images per second": lambda run: number(run.mean("images_per_second"), digits=1),
    "peak memory": lambda run: number(run.largest("peak_memory_bytes"), " MB", scale=1e6),
    "parameters": lambda run: number(of_network(run, count_parameters)),
    "MFLOPs per image": lambda run: number(of_network(run, count_flops), digits=1, scale=1e6),
}


def table_of(runs: Sequence[Run], rows: dict[str, Callable[[Run], str]], **options) -> Table:
    """A table with one column per run; rows: name -> the text of a run."""
    body = [[name, *map(cell, runs)] for name, cell in rows.items()]
    return Table(["", *(run.label for run in runs)], body, **options)


def provenance(runs: Sequence[Run]) -> Section:
    """Which network, data and command each run has; a warning where the data differ."""
    warning = [Text(text, "warning") for text in [data_warning(runs)] if text]
    note = "A dash: the run folder does not record it."
    return Section("Runs", [*warning, table_of(runs, ORIGIN, caption=note, words=True)])


def data_warning(runs: Sequence[Run]) -> str:
    """A warning where runs were trained on different data, as far as recorded; else ''."""
    for key in ("fingerprint", "classes", "folder"):
        found = {run.label: run.data[key] for run in runs if run.data.get(key) is not None}
        if len(set(found.values())) > 1:
            what = "; ".join(f"{label}: {describe_data(run.data)}" for label, run in by_label(runs))
            return f"These runs have different data, so their accuracies do not compare. {what}."
    return ""


def by_label(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Pairs of label and run."""
    return [(run.label, run) for run in runs]


def describe_data(data: dict) -> str:
    """Folder, number of classes and number of training images, as far as recorded."""
    classes, train = data.get("classes"), data.get("train")
    parts = [
        known(data.get("folder")),
        *([f"{classes} classes"] if classes else []),
        *([f"{train:,} training images"] if isinstance(train, int) else []),
    ]
    return ", ".join(parts)


def summary(runs: Sequence[Run]) -> Section:
    """Accuracy, time, memory and size of each run, and the settings."""
    note = (
        "Accuracies on the validation set. Wall time: of the training processes, validation "
        "included. FLOPs: forward pass of one 128 × 128 image; a multiply-add counts as two."
    )
    return Section("Results", [table_of(runs, RESULTS, caption=note), *settings(runs)])


def settings(runs: Sequence[Run]) -> list[Table]:
    """The flags of the runs that recorded them."""
    recorded = [run for run in runs if run.config]
    if not recorded:
        return []
    rows = [[name, *(known(run.setting(name)) for run in recorded)] for name in SETTINGS]
    return [Table(["setting", *(run.label for run in recorded)], rows)]


def curves(runs: Sequence[Run], writer: FigureWriter) -> Section:
    """All curves in one figure on paper; one figure per panel, with hover values, on the page."""
    caption = (
        "Loss of single mini-batches (faint) and its moving average; accuracies after each epoch, "
        "on augmented training images and on the validation set."
    )
    blocks = [writer.add("curves", figures.learning_curves(runs), caption, media="paper")]
    for panel in figures.PANELS:
        drawing = figures.curve_panel(runs, panel)
        accuracy = panel in ("top1", "top5")
        x_name, unit = ("epoch", " %") if accuracy else ("iteration", "")
        hover = figures.curve_hover(drawing, figures.panel_series(runs, panel), x_name, unit)
        title = drawing.axes[0].get_title(loc="left")
        blocks.append(writer.add(f"curves_{panel}", drawing, title, hover=hover, media="html"))
    return Section("Learning curves", [*blocks, Text(caption, "note", media="html")])


def robustness(run: Run, writer: FigureWriter) -> Section | None:
    """The results of -a with attacks set by flags; None without any."""
    rows = [
        [e["attack"], percent(e["clean_top1"]), percent(e["attacked_top1"]), failed_checks(e)]
        for e in run.attacks()
    ]
    if not rows:
        return None
    head = ["attack", "clean top-1", "attacked top-1", "failed diagnostics"]
    note = (
        "A failed diagnostic means that the attack was probably too weak: robust accuracy is "
        "overestimated."
    )
    blocks = [Table(head, rows, note)]
    if e := run.sweep():
        caption = f"Accuracy of {run.label} under attack on {e['probed']} validation images."
        blocks.append(writer.add(f"sweep_{run.name}", figures.sweep(e["sweep"]), caption))
    return Section(f"Robustness: {run.label}", blocks)


def failed_checks(row: dict) -> str:
    """The names of the failed diagnostics of a row of -a; also of rows with the old key `warns`."""
    failed = [d["name"] for d in row["lights"] or [] if d.get("failed", d.get("warns"))]
    return ", ".join(failed) or "none"


def convolution(runs: Sequence[Run], benchmark: Path | None) -> Section | None:
    """CustomConv2d compared with nn.Conv2d; None where neither runs nor a benchmark compare them.

    benchmark: the .json of benchmarks/conv.py; else one in a run folder is taken.

    Raises:
        UserError: the benchmark cannot be read.
    """
    files = [run.folder / BENCHMARK for run in runs]
    file = benchmark or next((f for f in files if f.exists()), None)
    blocks = []
    pair = [next((run for run in runs if run.arch == arch), None) for arch in CONVOLUTIONS]
    if all(pair):
        note = "Speed and memory of the whole training, of the runs named."
        blocks.append(table_of(pair, {k: RESULTS[k] for k in COMPARED}, caption=note))
    if file:
        blocks += benchmark_tables(file)
    return Section("CustomConv2d and nn.Conv2d", blocks) if blocks else None


CONVOLUTIONS = "torch_conv", "custom_conv"
COMPARED = ("best top-1", "training images per second", "peak memory", "wall time, h:mm:ss")


def benchmark_tables(file: Path) -> list[Table | Text]:
    """The tables of results/conv_benchmark.json, one per training case.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not file.exists():
        raise UserError(f"there is no benchmark {file}: make it with python benchmarks/conv.py")
    found = read_json(file)
    head = ["ms per step", "relative to nn.Conv2d", "MB saved", "MB peak"]
    try:
        tables = [
            Table([case, *head], [benchmark_row(*way) for way in ways.items()])
            for case, ways in found["training"].items()
        ]
        made = f"{found['command']}, commit {found['commit']}, {found['date']}, {found['device']}"
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is damaged: {e!r}") from None
    note = (
        "Forward, backward and optimizer step of SimpleNet; saved: what the forward pass keeps "
        f"for the backward pass. Measured by {made}."
    )
    return [*tables, Text(note, "note")]


def benchmark_row(way: str, row: dict) -> list[str]:
    """The cells of one implementation; memory in MB."""
    memory = (number(row.get(name), scale=1e6) for name in ("saved_bytes", "peak_bytes"))
    return [way, number(row["ms"]), number(row["ratio"], digits=2), *memory]


# ---------------------------------------------------------------------------------------------
# From the networks and the images
# ---------------------------------------------------------------------------------------------


def classes(analyses: Sequence[RunAnalysis], writer: FigureWriter) -> Section:
    """Accuracy by class; runs on the same classes share a figure."""
    groups: dict[tuple[str, ...], dict[str, Predictions]] = {}
    for a in analyses:
        groups.setdefault(tuple(a.predictions.names), {})[a.run.label] = a.predictions
    blocks = []
    for n, group in enumerate(groups.values()):
        first = next(iter(group.values()))
        missing = len(first.names) - len(first.present)
        missing_note = (
            f" {missing} classes without validation images are left out." if missing else ""
        )
        caption = f"Accuracy on the validation images of each class.{missing_note}"
        blocks.append(writer.add(f"classes{n or ''}", figures.class_accuracy(group), caption))
    return Section("Accuracy by class", blocks)


def confusion(a: RunAnalysis, writer: FigureWriter) -> Section:
    """The most confused classes with names, the whole matrix with hover, the worst pairs."""
    p, run = a.predictions, a.run
    names, totals = p.names, p.confusion.sum(1)
    drawing, classes = figures.confusion_block(p), figures.block_classes(p)
    few = len(classes) == len(p.present)
    which = "all classes" if few else f"the {len(classes)} most confused classes"
    caption = f"Predictions of {run.label}, in per cent of the true class: {which}."
    hover = figures.cell_hover(drawing, p, classes)
    blocks = [writer.add(f"confusion_{run.name}", drawing, caption, hover=hover)]
    if not few:
        drawing = figures.confusion_matrix(p)
        caption = f"The confusion matrix of all {len(p.present)} classes: point at a cell."
        hover = figures.cell_hover(drawing, p, p.present)
        name = f"confusion_all_{run.name}"
        blocks.append(writer.add(name, drawing, caption, hover=hover, media="html"))
    pairs = p.most_confused(CONFUSED_PAIRS)
    title = f"Confusion: {run.label}"
    if not pairs:
        return Section(title, [*blocks, Text("Every image is classified correctly.")])
    rows = [[names[i], names[j], str(n), str(totals[i])] for i, j, n in pairs]
    head = ["most confused: true class", "predicted class", "images", "of"]
    return Section(
        title, [*blocks, Table(head, rows, words=True), *confused_pictures(a, pairs, writer)]
    )


def confused_pictures(a: RunAnalysis, pairs: Sequence[tuple], writer: FigureWriter) -> list:
    """Example images of the pairs (true class, predicted class, count), one row per pair."""
    p = a.predictions
    rows = []
    for i, j, _ in pairs:
        chosen = p.examples(i, j, EXAMPLES)
        predicted = [f"{p.names[j]} {100 * p.confidence[n]:.0f} %" for n in chosen]
        rows.append((p.names[i], pictures.pixels(a.images.images(chosen)[0]), predicted))
    caption = "Images of these pairs: the true class of each row, the prediction with each image."
    return writer.add_pictures(f"confused_{a.run.name}", rows, caption)


def explanations(a: RunAnalysis, writer: FigureWriter) -> Section:
    """Attack and saliency on correctly classified images, each of another class."""
    title = f"Attack and saliency: {a.run.label}"
    chosen = a.predictions.recognised(SHOWN)
    if not chosen:
        return Section(title, [Text("No image is classified correctly.")])
    x, _ = a.images.images(chosen)
    return Section(title, [*attack_pictures(a, x, writer), *saliency_pictures(a, x, writer)])


def attack_pictures(a: RunAnalysis, x: Tensor, writer: FigureWriter) -> list:
    """Images x (n, 3, H, W) before and after the default attack, and their difference."""
    x_adv = explorer.default_attack(a.run.network, x)
    clean, attacked = pictures.pixels(x), pictures.pixels(x_adv)
    budget = explorer.default_budget(clean, attacked)
    change = pictures.pixels(pictures.difference(x, x_adv, FACTOR))
    rows = [
        ("clean", clean, predictions_of(a, x)),
        (f"attacked, {budget}", attacked, predictions_of(a, x_adv)),
        (f"difference × {FACTOR}", change, [""] * len(x)),
    ]
    caption = (
        f"The default attack ({budget}) on images that {a.run.label} classifies correctly, each "
        "with its prediction. The difference is drawn around mid-grey."
    )
    return writer.add_pictures(f"attack_{a.run.name}", rows, caption)


def saliency_pictures(a: RunAnalysis, x: Tensor, writer: FigureWriter) -> list:
    """Images x (n, 3, H, W), and over them which pixels drive the prediction."""
    clean, blank = pictures.pixels(x), [""] * len(x)
    maps = {"gradient": saliency(a.run.network, x)[0], "Grad-CAM": grad_cam(a.run.network, x)}
    rows = [("clean", clean, predictions_of(a, x))]
    rows += [(name, pictures.overlay(clean, m), blank) for name, m in maps.items() if m is not None]
    caption = (
        "Which pixels drive the prediction: those whose change would change its loss most "
        "(gradient) and, in a convolutional network, those that the last layer responds to "
        "(Grad-CAM)."
    )
    return writer.add_pictures(f"saliency_{a.run.name}", rows, caption)


def predictions_of(a: RunAnalysis, x: Tensor) -> list[str]:
    """The predicted class and its probability for each image of x (n, 3, H, W)."""
    return pictures.format_predictions(a.logits(x), a.predictions.names)


def attack_explorer(a: RunAnalysis) -> Section | None:
    """The interactive explorer; None where no image is classified correctly."""
    data = explorer.explore(a)
    if data is None:
        return None
    fell, held = (sum(i["held"] is h for i in data["images"]) for h in (False, True))
    epsilon, steps = explorer.MIDDLE
    caption = (
        f"Images that {a.run.label} classifies correctly: {fell} that PGD with ε = {epsilon} and "
        f"{steps} steps changes, {held} that hold. ε in 8-bit intensity levels (l_inf). The "
        "network sees the attacked image rounded to 8 bits, as shown. The page explores the first "
        "run that report.py is given."
    )
    return Section(f"Explore attacks: {a.run.label}", [Explorer(data, caption)])
