"""The one law of corridors: a room imports only from floors below it, and a few packages have one door each.

The floors, from the top: entrances > trainer > model > pipeline > utils > wan; `world` stands beside `utils`, knows
nothing of ours, and everyone above may use it. scripts/, benchmarks/ and tests/ may open every door.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRANCES = ("train", "inference", "demo")
MAY_IMPORT = {
    "wan": set(),
    "world": set(),
    "utils": {"wan", "world"},
    "pipeline": {"utils", "wan", "world"},
    "model": {"pipeline", "utils", "wan", "world"},
    "trainer": {"model", "pipeline", "utils", "wan", "world"},
}
ROOMS = set(MAY_IMPORT)
ONLY_IN = {
    "omegaconf": {"utils/config.py"},
    "wandb": {"utils/tracking.py"},
    "gradio": {"demo.py"},
    "av": {"utils/video.py"},
    "triton": {"wan/modules/triton_attention.py", "wan/modules/triton_blocks.py"},
}
BEHIND_ITS_PACKAGE = ONLY_IN["triton"]  # imported by who has seen that the package is there
OPTIONAL = ("gradio", "wandb", "av", "ftfy", "transformers", "diffusers", "triton")
OPTIONAL += ("flash_attn", "flash_attn_interface")


def files() -> list[Path]:
    rooms = [path for room in sorted(ROOMS) for path in (ROOT / room).rglob("*.py")]
    return [*rooms, *(ROOT / f"{name}.py" for name in ENTRANCES)]


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", files(), ids=relative)
def test_corridors_lead_down_only(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[room] | {room} if room in ROOMS else ROOMS
    upstairs = (imports(path) & (ROOMS | {*ENTRANCES, "tests", "scripts", "benchmarks"})) - allowed
    assert not upstairs, f"{relative(path)} imports {sorted(upstairs)} from a floor above it"


@pytest.mark.parametrize("path", files(), ids=relative)
def test_some_packages_have_one_door(path):
    name = relative(path)
    for package, doors in ONLY_IN.items():
        assert package not in imports(path) or name in doors, f"{package} belongs in {doors}, not in {name}"
    if name.split("/")[0] in ROOMS - {"world"}:
        assert "argparse" not in imports(path), f"{name}: command lines belong to the entrances"


@pytest.mark.parametrize("path", [path for path in files() if path.parent != ROOT], ids=relative)
def test_no_print_below_the_entrances(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if relative(path).startswith("world/"):  # `python -m world.x` prints in its main()
        tree.body = [node for node in tree.body if getattr(node, "name", "") != "main"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [call.lineno for call in calls if call.func.id == "print"], f"{relative(path)}: use logging"


def test_importing_needs_no_gpu_no_file_and_no_optional_package(tmp_path):
    names = sorted({relative(path) for path in files()} - BEHIND_ITS_PACKAGE)
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in names]
    program = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import torch
for module in {modules!r}:
    importlib.import_module(module)
assert not torch.cuda.is_initialized()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_readme_names_everything_at_the_top():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    top = {name.split("/")[0] + "/" * ("/" in name) for name in tracked} or {path.name for path in ROOT.glob("[!.]*")}
    missing = sorted(name for name in top if not name.startswith(".git") and name not in readme)
    assert not missing, f"README.md's tree lacks {missing}"
