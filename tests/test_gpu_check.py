"""bench/gpu_check.py, which elsewhere runs unattended on a machine that is at hand for minutes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "gen_fast",
    "kernels",
    "training",
    "csrc",
    "bench",
    "tests",
)


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_step_names_files_that_exist(tmp_path):
    """A dry run takes smaller steps, with other files."""
    script = """
import sys
from pathlib import Path

sys.path.insert(0, "bench")
import gpu_check

folder = gpu_check.Folder(Path(sys.argv[1]))
for step in gpu_check.SHARES.keys() - {"build"}:
    for command in gpu_check.commands(step, folder, dry=False).values():
        print(*command, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [line for line in done.stdout.splitlines() if line.endswith(".py")]
    assert len(files) > 20
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(["build", "swiglu"], id="few"),
        pytest.param([], id="all", marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_writes_below_its_folder_only(tmp_path, steps):
    copy, out, home = (tmp_path / name for name in ("copy", "out", "home"))
    home.mkdir()
    copy.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    before = files_of(copy)
    # An installed gen_fast is hidden: it must come from the build, as on a machine that has none.
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    )
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(hidden)}
    for name in ("XDG_CACHE_HOME", "TMPDIR", "OUT", "TRITON_INTERPRET"):
        environment.pop(name, None)
    command = [sys.executable, "bench/gpu_check.py", "--dry-run", "--out", str(out)]
    command += ["--seconds", "1500", *(["--steps", *steps] if steps else [])]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert files_of(copy) == before
    assert files_of(home) == set()
    (report,) = out.glob("gpu_*.json")
    ran = json.loads(report.read_text())["steps"]
    assert all(result["exit"] == 0 and result["in_time"] for result in ran.values())
    assert set(steps) <= set(ran)
    assert {path.stem for path in (out / "logs").iterdir()} == set(ran)
