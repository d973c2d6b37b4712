"""The example that hands AdamW's state to Shampoo runs and reports."""

import json

import pytest

from examples import switch_from_adam
from examples.lm import data

SMALL = "--context=16 --width=16 --heads=2 --layers=1 --hidden=16 --batch=4"


@pytest.fixture
def switch(monkeypatch, tmp_path, capsys):
    """Runs the example on a small corpus; gives its figures and what was printed."""
    root = tmp_path / "library"
    root.mkdir()
    for number in range(40):
        text = f"def f{number}(x):\n    return x + {number}\n" * 20
        (root / f"module{number}.py").write_text(text)
    corpus = data.load_corpus(root)
    monkeypatch.setattr(switch_from_adam, "load_corpus", lambda: corpus)
    monkeypatch.setenv("CI", "true")

    def run(*flags):
        paths = [f"--picture={tmp_path / 'a.png'}", f"--json={tmp_path / 'a.json'}"]
        assert switch_from_adam.main([*SMALL.split(), *paths, *flags]) == 0
        assert (tmp_path / "a.png").stat().st_size > 10_000
        return json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out

    return run


def test_the_switch_and_its_report(switch):
    flags = ("--steps=24", "--switch=8", "--eval-every=4")
    figures, text = switch(*flags, "--warm-up=0")
    assert "largest difference" in text
    curves = figures["evaluations"]
    assert [row["step"] for row in curves["shampoo"]] == [4, 8, 12, 16, 20, 24]
    losses = [[row["loss"] for row in curve] for curve in curves.values()]
    # Refresh(10) begins at the tenth step after the switch: AdamW's steps before.
    assert losses[0][:2] == losses[1][:2]
    assert losses[1][2:4] == pytest.approx(losses[0][2:4], rel=1e-5)
    assert losses[1][4] != pytest.approx(losses[0][4], rel=1e-5)

    warm, _ = switch(*flags, "--warm-up=10")
    assert warm["evaluations"]["adamw"][-1]["loss"] == losses[0][-1]
    first = [curve[2]["loss"] for curve in warm["evaluations"].values()]
    assert first[0] != pytest.approx(first[1], rel=1e-5)  # Shampoo's from the first on


def test_a_switch_after_the_end_is_refused(switch, capsys):
    with pytest.raises(SystemExit):
        switch("--steps=4", "--switch=4")
    assert "is not before --steps" in capsys.readouterr().err
