"""kill -9 at random points: the run ends bitwise as if nothing had happened."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import helpers
from tests.resumable import EVERY

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("SHAMPOO_OPTAX_KILLS", "8"))
# Changed at every kill: what one mesh saved, another opens.
DEVICES = (8, 4, 1, 8, 2, 3, 5, 6)
STEPS_A_LIFE, PAUSE = 12, 0.02


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of the killed, apart: one may be killed while it writes."""
    return tmp_path_factory.mktemp("cache")


def _start(
    folder: Path, steps: int, devices: int, cache: Path, *flags: str
) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = ["-m", "tests.resumable", str(folder), str(steps), str(devices)]
    return subprocess.Popen(
        [sys.executable, *command, str(PAUSE), *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ends(run: subprocess.Popen) -> tuple[int, list[str]]:
    """Where a run began, and the digests it ended with."""
    out, error = run.communicate(timeout=300)
    assert run.returncode == 0, error[-2000:]
    lines = out.splitlines()
    return int(lines[0].split()[1]), lines[-1].split()[1:]


def test_kill_and_resume_is_bitwise(tmp_path: Path, cache: Path) -> None:
    steps = KILLS * STEPS_A_LIFE
    chance = random.Random(0)
    _, wanted = _ends(_start(tmp_path / "straight", steps, 8, cache))
    done, killed = 0, 0
    for life in range(KILLS):
        folder, devices = tmp_path / "killed", DEVICES[life % len(DEVICES)]
        run = _start(folder, steps, devices, cache)
        assert run.stdout is not None
        first = int(run.stdout.readline().split()[1])
        # Behind by what was under way: a save that had not ended, and the steps since.
        assert first >= done - 2 * EVERY, (first, done)
        last = first + chance.randrange(1, STEPS_A_LIFE)
        for line in run.stdout:
            if line.startswith("at "):
                done = int(line.split()[1])
            if done >= min(last, steps):
                break
        time.sleep(chance.uniform(0.0, 0.1))
        run.kill()
        run.communicate()
        killed += run.returncode == -9
    assert killed == KILLS
    first, found = _ends(_start(tmp_path / "killed", steps, 8, cache))
    assert first > 0
    assert found == wanted
    helpers.record("kill", f"{killed} of {KILLS} bitwise")


def test_a_save_that_is_waited_for_loses_one_interval_at_most(
    tmp_path: Path, cache: Path
) -> None:
    """However short the interval is: without the wait, one under way is lost, too."""
    kills, chance = max(3, KILLS // 5), random.Random(1)
    done, lost = 0, []
    for life in range(kills + 1):
        devices = DEVICES[life % len(DEVICES)]
        run = _start(tmp_path / "killed", 10_000, devices, cache, "wait")
        assert run.stdout is not None
        first = int(run.stdout.readline().split()[1])
        lost.append(done - first)
        last = first + chance.randrange(1, STEPS_A_LIFE)
        for line in run.stdout:
            done = int(line.split()[1])
            if done >= last:
                break
        time.sleep(chance.uniform(0.0, 0.1))
        run.kill()
        steps = [line for line in run.communicate()[0].splitlines() if "at " in line]
        done = int(steps[-1].split()[1]) if steps else done
    assert max(lost) <= EVERY, lost
    helpers.record("lost", f"{max(lost)} steps at most, saved every {EVERY}th")
