"""evaluate.py: its tables and verdict."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

from reverse_toys import TINY, run

from reverse_attack import evaluate, protocol


def test_evaluate_writes_its_tables_and_verdict(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(protocol.PROTOCOLS, "quick", TINY)
    assert run(root, evaluate, f"--protocol quick --results {tmp_path}", 8) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "reverse_quick.json").read_text())
    text = (tmp_path / "reverse_quick.md").read_text()
    assert found["verdict"] in out and "Verdict" in text
    plain = ["clean", "PGD-CE", "PGD-margin", "APGD-CE", "Square"]
    plain += ["APGD-CE, torchattacks"] * bool(importlib.util.find_spec("torchattacks"))
    assert list(found["transfer"]) == plain
    rows = [row for columns in found["adaptive"].values() for row in columns.values()]
    assert len(rows) == len(plain) + 3 * 3 + 1
    for name in ("static", "defended"):  # no cell is below the worst case, and it is reached
        assert found["worst_case"][name] <= min(row[name] for row in rows)
        assert {row["n"] for row in rows} == {4} == {found["worst_case"]["n"]}
    aware = found["adaptive"]["PGD-CE"]
    steps, n_views, draws = 2, 2, 2
    assert aware["transfer"]["defence_forward_passes"] == steps * n_views
    assert aware["BPDA + EOT"]["attack_forward_passes"] == 2 * draws * (1 + steps * n_views)
    assert aware["aware, λ = 1"]["attack_forward_passes"] == 2 * (1 + n_views)
    assert str(root.parent) not in text and str(tmp_path.parent) not in text


def test_the_papers_preset_reaches_the_reversal_and_the_page(root, tmp_path, monkeypatch):
    monkeypatch.setitem(protocol.PROTOCOLS, "quick", dataclasses.replace(TINY, dlr=True))
    assert run(root, evaluate, f"--preset paper --results {tmp_path}", 4) == 0
    found = json.loads((tmp_path / "reverse_quick.json").read_text())
    assert "APGD-DLR" in found["transfer"] and found["min_crop"] == 0.08
    text = " ".join((tmp_path / "reverse_quick.md").read_text().split())
    assert "start: random, negatives: the batch, crops from 0.08" in text
