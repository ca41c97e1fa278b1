"""The documentation against the tree: commands, links, flags, paths. What it says must not rot."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dc_megatron.training.engine_flags import engine_flags
from dc_megatron.training.flag_table import FLAGS, flags_by_key
from tests.helpers import flag_tables

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RECIPES = tuple(
    sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.sh") if "#PYTHON" in path.read_text())
)
SHARED = ("examples/launch.sh", "examples/defaults.sh")
# Flags in the pages that belong to other programs.
FOREIGN = {
    *("--help", "--help-megatron", "--nproc-per-node", "--parent", "--check"),
    *("--all", "--gpu"),  # tests/run.sh, tools/setup_env.sh
    "--nodes",  # sbatch
    *("--freeze-LM", "--freeze-ViT"),  # Megatron-LM's own multimodal example
    *("--num_processes", "--model", "--model_args", "--tasks", "--output_path"),  # lmms-eval
}


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def bash_commands(page: Path) -> list[str]:
    """The commands of the page's bash blocks, without comments and with continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def run(words: list[str], **more: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    environment |= {"DC_DEVICE": "cpu", **more}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def tool_help(tool: str) -> str:
    """What ``--help`` prints, with that of every sub-command."""
    done = run([sys.executable, tool, "--help"])
    assert done.returncode == 0, done.stderr
    commands = (
        re.findall(r"^    ([a-z][a-z-]*)(?: {2,}|$)", done.stdout, re.MULTILINE) if "positional" in done.stdout else []
    )
    return done.stdout + "".join(run([sys.executable, tool, command, "--help"]).stdout for command in commands)


def without_launcher(words: list[str]) -> list[str]:
    """``words`` from the script on: what stands before is an interpreter or torchrun with its own flags."""
    start = next((n for n, word in enumerate(words) if word.endswith((".sh", ".py"))), None)
    assert start is not None, f"no script in {words}"
    return words[start:]


@pytest.mark.parametrize("command", bash_commands(README))
def test_readmes_commands_exist_and_take_their_flags(command):
    """Nothing is trained: recipes print their flags, tools their help. The end-to-end tests run the programs."""
    words = shlex.split(command, comments=True)
    variables = {}
    while re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    assert words[0] in ("bash", ".venv/bin/python", ".venv/bin/torchrun"), words[0]
    script, *flags = without_launcher(words)
    assert (ROOT / script).is_file(), script
    if script in RECIPES:
        done = run(["bash", script, *flags], **{"GPUS_PER_NODE": "8", **variables, "DC_PRINT_ARGV": "1"})
        assert done.returncode == 0, done.stderr
    elif script == "tests/run.sh":
        assert run(["bash", script, "--help"]).returncode == 0
    elif script.startswith("tools/"):
        page = tool_help(script)
        unknown = [f for f in flags if f.startswith("--") and not re.search(rf"{re.escape(f)}(?![\w-])", page)]
        assert not unknown, f"{script} does not know {unknown}"
    else:
        assert script == "examples/quickstart.sh", f"nothing here tests {script}"
        assert run(["bash", "-n", script]).returncode == 0


def test_readme_shows_the_two_commands():
    assert {"bash examples/quickstart.sh", "bash tests/run.sh"} <= set(bash_commands(README))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if "://" not in target and not target.startswith("#")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_paths_in_the_text_are_in_the_tree(page):
    """A path is what starts with one of our folders; those that a run writes are no such thing."""
    found = re.findall(
        r"`((?:dc_megatron|tests|tools|examples|docs|requirements|training|runtime|weights|model|inference)/[^`\s]*)`",
        page.read_text(encoding="utf-8"),
    )
    absent = [p for p in found if not list(ROOT.glob(p)) and not list((ROOT / "dc_megatron").glob(p))]
    assert absent == []


def known_flags() -> set[str]:
    """Every flag of training and of the tools, in both spellings, as typed on a command line."""
    keys = set(flags_by_key()) | set(engine_flags())
    tools = " ".join(tool_help(f"tools/{tool.name}") for tool in sorted((ROOT / "tools").glob("*.py")))
    keys |= {flag[2:].replace("-", "_") for flag in re.findall(r"--[a-z][\w-]*", tools)}
    return keys


@pytest.fixture(scope="module")
def known() -> set[str]:
    return known_flags() | {flag[2:].replace("-", "_") for flag in FOREIGN}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_flag_that_is_named_exists(page, known):
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text(encoding="utf-8")))
    assert {flag for flag in named if flag.replace("-", "_") not in known} == set()


def test_the_page_of_flags_is_the_table():
    """After a change of the table: python -m tests.helpers.flag_tables."""
    assert flag_tables.PAGE.read_text(encoding="utf-8") == flag_tables.page()
    names = {flag.name for flag in FLAGS}
    assert names.issuperset(flag_tables.OURS + flag_tables.MEGATRONS)


def test_readme_lists_the_variables_of_the_recipes():
    recipes = "".join((ROOT / name).read_text(encoding="utf-8") for name in (*RECIPES, *SHARED))
    read = set(re.findall(r"\$\{([A-Z][A-Z_0-9]+):[-?]", recipes))
    # What torchrun and the launcher set, and what is explained elsewhere.
    read -= set(shlex.split("LOCAL_RANK LOCAL_WORLD_SIZE WORLD_SIZE RANK DC_TORCHRUN_PYTHON DC_PRINT_ARGV PYTHONPATH"))
    read -= {"OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "SLURM_JOB_ID"}
    rows = re.findall(r"^\| ((?:`[A-Z_0-9]+`(?:, )?)+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    listed = set(re.findall(r"`([A-Z_0-9]+)`", " ".join(rows)))
    assert listed == read


def test_contributings_table_of_rooms_is_the_tested_one():
    rooms = runpy.run_path(str(ROOT / "tests/unit/test_import_arrows.py"))["ROOMS"]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| room | what it is | may import |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    shown = {name: {room for room in allowed.split(", ") if room} for name, _, allowed in rows}
    assert shown == {name: set(rooms[name].rooms) for name in shown}
    folders = {path.parent.name for path in (ROOT / "dc_megatron").glob("*/__init__.py")}
    assert set(shown) == folders | {"config"}


# Written in pieces, so that this file does not contain what it looks for.
MACHINE = re.compile(r"(?<![\w.$}])/(?:home|root|Users|work|opt)/" + r"\w")
ADDRESS = re.compile("|".join(("py" + r"pi\.org", "python" + "hosted", "artifact" + "ory", r"://\d+\." + r"\d+\.")))


def test_no_file_names_a_place_of_some_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files are tracked is not known")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".jpg"):
            text = path.read_text(encoding="utf-8")
            found += [f"{name}: {match.group()}" for pattern in (MACHINE, ADDRESS) for match in pattern.finditer(text)]
    assert found == []
