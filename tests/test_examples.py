"""The examples and the notebook run, stop, resume and report."""

import json
import signal
import sys
from pathlib import Path

import jax
import nbformat
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import get_kernel_spec
from nbclient import NotebookClient

from examples import sweep_lm, train_digits, train_lm
from examples.lm import data
from examples.training import command
from examples.training.progress import new_console, progress
from examples.training.report import first_at_or_below
from examples.training.spread import MODES
from examples.training.task import Record, Schedule

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
SMALL = "--context=16 --width=16 --heads=2 --layers=1 --hidden=16 --batch=4"


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    """A library of forty files, so that no test reads ten megabytes."""
    root = tmp_path_factory.mktemp("library")
    for number in range(40):
        text = f"def f{number}(x):\n    return x + {number}\n" * 20
        (root / f"module{number}.py").write_text(text)
    return data.load_corpus(root)


@pytest.fixture
def train(monkeypatch, small_corpus, capsys):
    """Runs train_lm on the small corpus; gives the exit code and what was printed."""
    monkeypatch.setattr(train_lm, "load_corpus", lambda: small_corpus)
    monkeypatch.setattr(train_lm, "LARGEST", 16)  # one shape of block: quick to compile
    monkeypatch.setenv("CI", "true")

    def run(directory, *flags, on_step=lambda step: None):
        argv = [*SMALL.split(), f"--steps={STEPS}", "--eval-every=4", *flags]
        code = train_lm.main([*argv, "--run-dir", str(directory)], on_step)
        return code, capsys.readouterr().out

    return run


def parameters(directory):
    """Reads back the parameters after the last step."""
    with ocp.CheckpointManager(directory.resolve()) as manager:
        assert manager.latest_step() == STEPS
        items = ocp.args.Composite(params=ocp.args.StandardRestore())
        return jax.tree.leaves(manager.restore(STEPS, args=items)["params"])


def losses(directory):
    """Lists the validation losses of a finished run."""
    results = json.loads((directory / "results.json").read_text())
    return [row["loss"] for row in results["shampoo"]["record"]["evaluations"]]


def press_ctrl_c(at):
    """Makes a hook that does what a terminal does on Ctrl-C."""
    return lambda step: signal.raise_signal(signal.SIGINT) if step == at else None


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_interrupted_and_resumed_is_bitwise_the_uninterrupted_run(
    train, tmp_path, monkeypatch
):
    # Timing compiles the optimizer once more; the test of the digits has it done.
    monkeypatch.setattr(command, "optimizer_milliseconds", lambda *_, **__: 1.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    only = ("--optimizers", "shampoo", "--save-every", "3")
    code, _ = train(whole, *only)
    assert code == 0

    code, text = train(parts, *only, on_step=press_ctrl_c(at=5))
    assert code == 130
    assert text.endswith("stopped at step 5; run the same command to resume\n")
    code, text = train(parts, *only)
    assert code == 0
    assert "resumes after step 5" in text

    expected, actual = parameters(whole / "shampoo"), parameters(parts / "shampoo")
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(one, other)
    assert losses(whole) == losses(parts)
    with pytest.raises(SystemExit, match=r"batch is 4 there and 8 here.*--fresh"):
        train(parts, *only, "--batch", "8")


@pytest.fixture(scope="module")
def one_device():
    """The validation losses of the run on one device, once there is one."""
    return []


# A run goes on on other devices, in another mode.
ELSEWHERE = {
    "zero1": (),
    "fsdp": ("--devices", "2", "--mode", "zero1"),
    "hsdp": ("--devices", "2", "--mode", "fsdp"),
}


@pytest.mark.parametrize("mode", MODES)
def test_several_devices_learn_the_same_and_resume(
    mode, train, tmp_path, monkeypatch, one_device
):
    monkeypatch.setattr(command, "optimizer_milliseconds", lambda *_, **__: 1.0)
    only = ("--optimizers", "shampoo")
    if not one_device:
        assert train(tmp_path / "one", *only)[0] == 0
        one_device.extend(losses(tmp_path / "one"))

    spread = (*only, "--devices", "4", "--mode", mode)
    assert train(tmp_path, *spread, on_step=press_ctrl_c(at=5))[0] == 130
    code, text = train(tmp_path, *only, *ELSEWHERE[mode])
    assert code == 0
    assert "resumes after step 5" in text
    np.testing.assert_allclose(losses(tmp_path), one_device, rtol=1e-4)


def test_devices_that_do_not_come_out_even_are_refused(train, tmp_path):
    for flags, words in (
        (["--devices=3"], "batch of 4 cannot be split over 3"),
        (["--devices=3", "--mode=hsdp"], "two halves"),
        (["--devices=64", "--batch=64"], "there are 8 here"),
    ):
        with pytest.raises(SystemExit, match=words):
            train(tmp_path, *flags)


def test_ctrl_c_before_the_first_checkpoint_says_so(train, tmp_path, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.training.loop.compile_step", pressed)
    code, text = train(tmp_path)
    assert code == 130
    assert "run the same command" in text


def test_digits_learns_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(train_digits, "LARGEST", 16)
    assert train_digits.main(["--steps", "60", "--run-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for row in ("validation loss", "steps to AdamW's final loss", "compile seconds"):
        assert row in text
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("adamw", "shampoo"):
        assert results[name]["record"]["evaluations"][-1]["accuracy"] > 0.9
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_the_split_is_by_file_and_stable():
    names = [Path(f"package/module{number}.py") for number in range(2000)]
    share = sum(map(data.is_validation, names)) / len(names)
    assert 0.08 < share < 0.12
    assert data.is_validation(Path("argparse.py")) is False
    with pytest.raises(FileNotFoundError, match=r"too few \.py files"):
        data.load_corpus(Path("no such folder"))


def test_sources_leave_out_tests_and_installed_packages(tmp_path):
    for name in ("a.py", "b/c.py", "test/d.py", "site-packages/e.py", "b/f.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = [path.as_posix() for path in data.stdlib_sources(tmp_path)]
    assert found == ["a.py", "b/c.py"]


def test_batches_depend_on_seed_and_step_alone():
    text = np.arange(256, dtype=np.uint8)
    batch = data.train_batch(text, 0, 7, batch=4, context=8)
    assert batch.shape == (4, 9)
    np.testing.assert_array_equal(batch, data.train_batch(text, 0, 7, 4, 8))
    assert (batch != data.train_batch(text, 0, 8, 4, 8)).any()
    assert (batch != data.train_batch(text, 1, 7, 4, 8)).any()
    windows = data.validation_windows(text, 3, 8)
    assert windows[0, 0] == 0 and windows[-1, -1] == 255


@pytest.mark.parametrize("best", [2**-12, 2**-8, 2**-7.5, 2**-4])
def test_the_sweep_finds_the_bottom_of_a_bowl(best):
    looked = []

    def loss_at(rate):
        looked.append(rate)
        return abs(np.log2(rate / best))

    found = sweep_lm.search(loss_at)
    assert abs(np.log2(found / best)) <= 0.26
    assert len(looked) == len(set(looked)) <= 9


def test_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setenv("CI", "true")
    with progress(new_console(), "adamw", 0, 100) as show:
        for step in range(1, 101):
            show(step, loss=2.0, validation=3.0, speed=4.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "adamw 100/100  loss 2.000  validation 3.000  4.0 steps/s"
    monkeypatch.delenv("CI")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress(new_console(), "adamw", 0, 100) as show:
        show(100, loss=2.0, validation=3.0, speed=4.0)
    assert "100/100" in capsys.readouterr().out


def test_first_at_or_below():
    record = Record({})
    for step, loss in ((0, 3.0), (20, 2.0), (40, 1.0)):
        record.step = step
        record.add_evaluation({"loss": loss})
    assert first_at_or_below(record, 2.0)["step"] == 20
    assert first_at_or_below(record, 0.5) is None


def test_flags_are_refused_in_a_sentence(capsys):
    parser = command.new_parser(
        None, run_dir="runs", schedule=Schedule(1, 1, 1), learning_rates={"adamw": 1.0}
    )
    given = parser.parse_args(["--learning-rate", "adamw=0.5"])
    assert given.learning_rate == [("adamw", 0.5)]
    for flags in (["--optimizers", "sgd"], ["--learning-rate", "sgd=1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(flags)
        assert "adamw" in capsys.readouterr().err


def test_the_notebook_runs(monkeypatch, tmp_path):
    # Found before any kernel of this name that is installed: the one of this Python.
    write_kernel_spec(tmp_path / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    assert get_kernel_spec("python3").argv[0] == sys.executable
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 5
    assert not any(cell.outputs for cell in code), "commit it without outputs"
    where = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=where
    )
    client.execute()
    assert "image/png" in code[-1].outputs[-1].data
