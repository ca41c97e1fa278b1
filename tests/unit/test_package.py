"""What is installed and what a wheel holds; the requirement files pin everything and name no place to fetch it from."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("dc_megatron", "pyproject.toml", "setup.py", "README.md", "LICENSE", "THIRD_PARTY.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = ("cu12.txt", "cu13.txt", "uv.txt")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, so that no build folder is left beside the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-3000:]
    (path,) = target.iterdir()
    assert path.name == f"dc_megatron-{PROJECT['version']}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_a_wheel_holds_every_module_and_the_flag_list_and_nothing_else(wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "dc_megatron").rglob("*.py")}
    expected.add("dc_megatron/training/megatron_flags.txt")
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == expected
    others = {name.split(".dist-info/")[1] for name in wheel.namelist() if ".dist-info/" in name}
    assert others == {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE", "licenses/THIRD_PARTY.md"}


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in (ROOT / "dc_megatron").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_a_wheel_says_what_the_project_says(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    text = wheel.read(name).decode()
    assert re.search(r"^License-Expression: Apache-2\.0$", text, re.MULTILINE)
    assert f"Version: {PROJECT['version']}\n" in text
    assert len(re.findall(r"^Requires-Dist: (?!.*extra)", text, re.MULTILINE)) == len(PROJECT["dependencies"])


def test_the_environment_holds_this_checkout_as_an_editable_package():
    installed = importlib.metadata.distribution("dc-megatron")
    assert installed.version == PROJECT["version"]
    assert set(installed.metadata.get_all("Provides-Extra")) == PROJECT["optional-dependencies"].keys()
    origin = json.loads(installed.read_text("direct_url.json"))
    assert origin["dir_info"] == {"editable": True}
    assert Path(origin["url"].removeprefix("file://")).resolve() == ROOT


def pins(name: str) -> dict[str, str]:
    """Package -> version of a locked file."""
    text = (ROOT / "requirements" / name).read_text()
    return {canonicalize_name(n): v for n, v in re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", text, re.M)}


@pytest.mark.parametrize("name", LOCKED)
def test_every_package_of_a_locked_file_is_pinned_with_hashes(name):
    text = re.sub(r"^\s*#.*$", "", (ROOT / "requirements" / name).read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines
    for line in lines:
        assert re.match(r"[A-Za-z0-9._-]+(\[[^]]*\])?==\S+", line), line
        assert "--hash=sha256:" in line, line


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").iterdir()), ids=lambda path: path.name)
def test_no_requirement_file_names_an_address(path):
    text = path.read_text()
    assert not re.search(r"[a-z]+://|--(extra-)?index-url|--find-links|--trusted-host|(^|\s)-[if]\s|@ file", text)


@pytest.mark.parametrize("name", ["cu12.txt", "cu13.txt"])
def test_pinned_versions_are_those_that_the_project_allows(name):
    pinned = pins(name)
    extra = name.removesuffix(".txt")
    wanted = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"][extra],
        *PROJECT["optional-dependencies"]["dev"],
    ]
    for requirement in map(Requirement, wanted):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(Version(version), prereleases=True), f"{requirement}: pinned {version}"
    assert (pinned["torch"], pinned["transformers"], pinned["megatron-core"]) == ("2.11.0", "5.17.0", "0.19.2")


def test_what_runs_is_what_is_pinned():
    pinned = {**pins("cu13.txt"), **pins("uv.txt")}
    for name in ("torch", "transformers", "megatron-core", "safetensors", "sentencepiece", "xxhash", "uv"):
        assert importlib.metadata.version(name).split("+")[0] == pinned[name], name
