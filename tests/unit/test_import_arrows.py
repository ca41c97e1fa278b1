"""Who may import whom (DESIGN.md, section 2). Imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dc_megatron"
TOOLS = sorted((ROOT / "tools").glob("*.py"))

# Packages that are slow to import or not always there. What is not listed here may be imported by everyone.
HEAVY = (
    "torch",
    "megatron.core",
    "megatron.training",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "datasets",
    "PIL",
    "matplotlib",
    "tensorboard",
    "nvidia.dali",
    "av",
    "transformer_engine",
    "flash_attn",
    "apex",
    "peft",
    "skimage",
)
EVERYTHING = frozenset(HEAVY)
# Packages that one file of the data room keeps to itself, and what messages call them.
ONE_FILE = {"nvidia.dali": ("image_dali.py", "DALI"), "av": ("video.py", "av")}


@dataclass(frozen=True)
class Room:
    """Rooms and heavy packages that may be imported; ``in_functions``: packages allowed there and only there."""

    rooms: frozenset[str] = frozenset()
    heavy: frozenset[str] = frozenset()
    in_functions: frozenset[str] = frozenset()


def room(rooms: str = "", heavy: str = "", in_functions: str = "") -> Room:
    return Room(frozenset(rooms.split()), frozenset(heavy.split()), frozenset(in_functions.split()))


BELOW_TRAINING = "config planner runtime weights model data reference inference"
NO_ENGINE = " ".join(EVERYTHING - {"megatron.training", "av"})
# errors may be imported by all. "root" is what lies beside the rooms: the package itself and pretrain.py.
ROOMS = {
    "errors": room(),
    "config": room(),
    "planner": room("config"),
    "runtime": room("", "torch", "megatron.core megatron.training"),
    "weights": room("config", "torch safetensors"),
    "model": room("config runtime", "torch megatron.core transformers flash_attn"),
    "data": room("config", "torch transformers tokenizers sentencepiece datasets PIL nvidia.dali", "av"),
    "reference": room("config data", "torch transformers"),
    "inference": room("config runtime model weights data", "torch transformers megatron.core"),
    "training": room(
        "config runtime model weights data planner inference",
        "torch megatron.core megatron.training",
        "tensorboard PIL",
    ),
    "evaluation": room(BELOW_TRAINING, NO_ENGINE),
    "reports": room(BELOW_TRAINING + " evaluation", NO_ENGINE),
    "benchmark": room(BELOW_TRAINING + " training evaluation reports", NO_ENGINE),
    "root": room(BELOW_TRAINING + " training", "", "torch megatron.core megatron.training"),
}


def room_of(path: Path, package: Path = PACKAGE) -> str:
    parts = path.relative_to(package).parts
    name = parts[0] if len(parts) > 1 else path.stem
    return name if len(parts) > 1 or name in ROOMS else "root"


def imports(tree: ast.AST, package: list[str]):
    """(dotted name, is inside a function, line) of every import. ``package`` is that of the file, for leading dots."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in names:
            yield name, id(node) in inside, node.lineno


def heavy_package(name: str) -> str | None:
    return next((h for h in HEAVY if name == h or name.startswith(h + ".")), None)


def violations(source: str, own_room: str, package: list[str], file_name: str = "") -> list[str]:
    allowed = ROOMS[own_room]
    found = []
    for name, in_function, line in imports(ast.parse(source), package):
        parts = name.split(".")
        if parts[0] == "dc_megatron":
            target = parts[1] if len(parts) > 1 else own_room
            if target in ("errors", own_room) or target.startswith("__"):
                continue
            if target not in allowed.rooms:
                found.append(f"line {line}: room {own_room} imports {name}")
        elif (heavy := heavy_package(name)) is not None:
            only_file, package_name = ONE_FILE.get(heavy, (file_name, ""))
            if own_room == "data" and file_name != only_file:
                found.append(f"line {line}: only {only_file} imports {package_name}")
            elif heavy not in allowed.heavy and not (in_function and heavy in allowed.in_functions):
                found.append(f"line {line}: room {own_room} imports {name}")
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(PACKAGE)) for p in MODULES])
def test_module_keeps_to_its_arrows(path):
    own_room = room_of(path)
    assert own_room in ROOMS, f"{own_room}: a new room; give it a row in DESIGN.md section 2 and here"
    package = ["dc_megatron", *path.relative_to(PACKAGE).parts[:-1]]
    assert violations(path.read_text(encoding="utf-8"), own_room, package, path.name) == []


@pytest.mark.parametrize(
    ("own_room", "source"),
    [
        ("model", "from dc_megatron.weights import rules"),
        ("data", "def f():\n    from dc_megatron.model.attention import x"),
        ("weights", "from dc_megatron import data"),
        ("inference", "import dc_megatron.training.argv"),
        ("reports", "def f():\n    import dc_megatron.training"),
        ("config", "import torch"),
        ("planner", "def f():\n    import torch.distributed"),
        ("runtime", "from megatron.core import parallel_state"),
        ("model", "def f():\n    from megatron.training import get_args"),
        ("model", "from ..weights import rules"),
        ("data", "from nvidia.dali import fn"),
        ("data", "def f():\n    import av"),
        ("weights", "import importlib\nimportlib.import_module('dc_megatron.model')"),
    ],
)
def test_a_wrong_arrow_is_found(own_room, source):
    assert violations(source, own_room, ["dc_megatron", own_room])


@pytest.mark.parametrize(
    ("own_room", "source"),
    [
        ("model", "from dc_megatron.errors import UserError\nfrom dc_megatron.runtime.device import device"),
        ("runtime", "def f():\n    from megatron.training import initialize"),
        ("weights", "from . import rules\nimport safetensors.torch"),
    ],
)
def test_a_right_arrow_passes(own_room, source):
    assert violations(source, own_room, ["dc_megatron", own_room]) == []


@pytest.mark.parametrize("path", TOOLS, ids=[p.name for p in TOOLS])
def test_tools_use_public_names_and_start_light(path):
    for name, in_function, line in imports(ast.parse(path.read_text(encoding="utf-8")), []):
        where = f"{path.name}, line {line}: {name}"
        assert not any(part.startswith("_") and part != "__future__" for part in name.split(".")), f"{where} is private"
        assert in_function or heavy_package(name) is None, f"{where} makes --help slow: import it where it is used"


_RUN = """
import runpy, sys, time
sys.argv = sys.argv[1:]
try:
    {action}
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [m for m in ("torch", "megatron", "transformers", "datasets") if m in sys.modules]
assert not heavy, heavy
seconds = time.process_time()
assert seconds < 1, f"{{seconds:.2f}} s of CPU time"
"""


def run_light(action: str, *argv: str) -> str:
    """Standard output of ``action`` in a fresh Python, which fails if it takes a second or imports torch."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN.format(action=action), *argv], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_light():
    run_light("import dc_megatron, dc_megatron.config, dc_megatron.errors", "x")


@pytest.mark.parametrize("path", TOOLS, ids=[p.name for p in TOOLS])
def test_help_of_a_tool_is_light_and_has_an_example(path):
    page = run_light("runpy.run_path(sys.argv[0], run_name='__main__')", str(path), "--help")
    assert "example" in page.lower()
    assert path.name in page


COMMANDS = [m for m in ("pretrain", "training/check_argv") if (PACKAGE / f"{m}.py").exists()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_training_is_light(command):
    module = "dc_megatron." + command.replace("/", ".")
    page = run_light(f"runpy.run_module({module!r}, run_name='__main__')", module, "--help")
    assert "--mm_dense_connector_type" in page
