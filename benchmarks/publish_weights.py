"""Write results/weights/: trained networks in float16 for --weights, with a table of where they
come from.

    python benchmarks/publish_weights.py DATA simplenet=RUN scene_net=RUN ...

DATA: a data folder with the categories that the networks were trained on, in the same order; the
files record them, so that a folder with other categories is refused.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from leaderboard import read_record
from results_file import ROOT, origin, origin_line

from custom_dataloader import MiniPlacesLoader, count_classes
from deepvision import checkpoint
from deepvision.config import OneLineParser
from deepvision.models.registry import NETWORK_NAMES, load_network
from deepvision.reporting.analysis import count_parameters
from deepvision.runtime.provenance import command_line

HEAD = (
    "| `--weights=` | network | parameters | top-1 / top-5 | mirrored | epoch | bytes | SHA-256 |"
)


def publish(name: str, run: Path, categories: list[str]) -> str:
    """Write one network's file; return its row of the table."""
    source = run / "models" / checkpoint.BEST
    ckpt = checkpoint.load(source)
    model, kind = load_network(ckpt, source, len(categories))
    state = {k: v.half() if v.is_floating_point() else v for k, v in ckpt["state_dict"].items()}
    kept = {k: ckpt[k] for k in ("epoch", "model_arch", "best_acc1", "shape") if ckpt.get(k)}
    path = checkpoint.WEIGHTS / f"{name}.pth.tar"
    path.parent.mkdir(exist_ok=True)
    checkpoint.save(path, {**kept, "kind": kind, "state_dict": state, "categories": categories})
    record, content = read_record(name), path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    accuracy = " | ".join(
        f"{record[f'{view}_top1']:.2f} / {record[f'{view}_top5']:.2f}"
        for view in ("plain", "mirrored")
    )
    return (
        f"| `{name}` | {NETWORK_NAMES[kind]} | {count_parameters(model) / 1e6:.1f} M | "
        f"{accuracy} | {ckpt['epoch']} | {len(content):,} | `{digest}` |"
    )


def main(argv: Sequence[str]) -> None:
    """Publish the networks that the command line names, and write the table."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help="holds train.txt and val.txt")
    parser.add_argument("runs", metavar="NAME=RUN", nargs="+", help="run folders")
    args = parser.parse_args(argv[1:])
    pairs = [word.split("=", 1) for word in args.runs]
    dataset = MiniPlacesLoader(args.data, num_classes=count_classes(args.data))
    categories = list(dataset.get_index_mapping().values())
    torch.manual_seed(0)
    rows = [publish(name, Path(run), categories) for name, run in pairs]
    commands = []
    for name, _ in pairs:
        record = read_record(name)
        commands.append(
            f"- `{name}`: `{record['command']}`, commit {record['commit']}, {record['device']}, "
            f"{record['date']}; {record['train']:,} training images of {record['data']}; accuracy "
            f"on {record['val']:,} validation images."
        )
    text = ["# Trained networks", "", "Each file loads by its name, in `code/`:", ""]
    text += ["    python main.py ../data --weights=scene_net -e -v        # evaluate it"]
    text += ["    python main.py ../data --weights=scene_net -a -v        # attack it"]
    text += ["    python main.py ../data --weights=scene_net --epochs=10  # train it further", ""]
    text += ["The weights are float16 and load as float32. Accuracies in per cent.", ""]
    text += [HEAD, "|---|---|---:|---:|---:|---:|---:|---|", *rows, "", *commands, ""]
    text += [
        "Licence: MIT, as the code. They were trained on MiniPlaces, whose images (of Places) "
    ]
    text[-1] += "are for research and education; no image is part of a file."
    text += ["", f"Made by {origin_line(origin(command_line(argv)))}"]
    (ROOT / "results" / "weights" / "README.md").write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    main(sys.argv)
