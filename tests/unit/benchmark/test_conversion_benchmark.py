"""The benchmark of conversions: its statistics, and a whole run with a stand-in for the converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dc_megatron.benchmark import conversion, machine, work_folder
from dc_megatron.benchmark.child_process import Measurement
from dc_megatron.benchmark.conversion import BASELINE, Turn, benchmark_conversion, conversion_steps, in_turn
from dc_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
GB = 10**9

CONVERTER = """
import shutil, sys
print(sys.argv[1])
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if sys.argv[1] != "verify":
    shutil.copytree(flags.get("--hf") or flags["--load"], flags["--save"])
"""


@pytest.fixture
def converter(tmp_path) -> tuple[str, ...]:
    path = tmp_path / "converter.py"
    path.write_text(CONVERTER)
    return sys.executable, "-S", str(path)


def turn(seconds: float, cpu: float = 1.0, anonymous: float = 0.1, resident: float = 0.2) -> Turn:
    return Turn(Measurement(seconds, cpu, int(anonymous * GB), int(resident * GB), GB, ""), 0.5, 3 * GB)


def test_median_time_and_worst_of_the_rest():
    turns = {
        BASELINE: [turn(10.0), turn(30.0), turn(20.0)],
        "import": [turn(22.0, cpu=8.0), turn(100.0, cpu=9.0, anonymous=1.2), turn(21.0, resident=1.4)],
    }
    steps = conversion.summary(turns, 2 * GB)
    assert steps[BASELINE]["ratio"] == 1.0
    found = steps["import"]
    assert found["seconds"] == [22.0, 100.0, 21.0]
    assert (found["median_seconds"], found["ratio"]) == (22.0, 1.1)
    assert found["gb_per_second"] == pytest.approx(2 / 22)
    assert found["cpu_seconds_per_gb"] == 4.5
    assert (found["peak_anonymous_gb"], found["peak_resident_gb"]) == (1.2, 1.4)
    held = {(entry["step"], entry["quantity"]): entry["holds"] for entry in conversion.against_limits(steps)}
    assert held == {
        ("import", "ratio"): True,
        ("import", "peak_anonymous_gb"): False,
        ("import", "peak_resident_gb"): True,
        ("import", "cpu_seconds_per_gb"): True,
    }


def test_without_a_baseline_there_is_no_ratio():
    steps = conversion.summary({"import": [turn(10.0)]}, GB)
    assert steps["import"]["ratio"] is None
    assert "ratio" not in {entry["quantity"] for entry in conversion.against_limits(steps)}


def test_the_baseline_takes_every_place_and_export_follows_import():
    steps = conversion_steps(["convert"], verify=False)
    places = []
    for number in range(4):
        names = [step.name for step in in_turn(steps, number)]
        places.append(names.index(BASELINE))
        assert names.index("import") < names.index("export")
    assert places == [0, 1, 2, 0]
    without = conversion_steps(["convert"], verify=True, baseline=False)
    assert [step.name for step in in_turn(without, 1)] == ["import", "verify", "export"]


def test_a_whole_run(converter, tmp_path):
    lines = []
    result = benchmark_conversion(
        "tiny", str(tmp_path / "disk"), runs=2, verify=True, converter=converter, whole_cache=False, report=lines.append
    )
    assert os.listdir(tmp_path / "disk") == []
    assert len(lines) == 8
    assert set(result["steps"]) == {BASELINE, "import", "verify", "export"}
    assert all(len(step["seconds"]) == 2 for step in result["steps"].values())
    assert result["steps"]["export"]["gb_made"] >= result["checkpoint"]["gb"]
    assert result["steps"][BASELINE]["command"] == "cp -r {source} {copy} && sync"
    assert result["steps"]["import"]["command"].endswith("import --hf {source} --save {tree}")
    assert {"filesystem", "cores", "memory_gb"} <= set(result["machine"])
    assert result["versions"]["megatron-core"]
    text = conversion.as_text(json.loads(json.dumps(result)))
    assert "tiny shape, 2 of 2 layers" in text
    assert "import, wall time / median of cp + sync" in text


def test_a_kept_source_is_used_again_and_leftovers_are_removed(converter, tmp_path):
    benchmark_conversion("tiny", str(tmp_path), runs=1, keep=True, converter=converter, whole_cache=False)
    work = tmp_path / "dc-benchmark-tiny"
    assert os.listdir(work) == ["source"]
    (work / "tree.partial").mkdir()
    os.utime(work / "source" / "config.json", (1, 1))
    with work_folder.WorkFolder(str(tmp_path), "tiny", None, keep=True):
        assert os.listdir(work) == ["source"]
        assert (work / "source" / "config.json").stat().st_mtime == 1
    # Another number of layers is another source.
    with work_folder.WorkFolder(str(tmp_path), "tiny", 1) as other:
        assert (work / "source" / "config.json").stat().st_mtime != 1
        assert other.inside("source") == str(work / "source")
    assert not work.exists()


def test_two_benchmarks_do_not_share_a_folder(tmp_path):
    with work_folder.WorkFolder(str(tmp_path), "tiny", None) as first:
        for shape in ("tiny", "7b"):
            with pytest.raises(UserError, match="another benchmark is at work"):
                work_folder.WorkFolder(str(tmp_path), shape, None).__enter__()
        assert os.listdir(first.path) == ["source"]
    with work_folder.WorkFolder(str(tmp_path), "tiny", None):
        pass


def test_a_step_that_fails_ends_the_run_and_leaves_nothing(converter, tmp_path):
    broken = (*converter[:2], "-c", "import sys; sys.exit('no such thing')")
    with pytest.raises(UserError, match="no such thing"):
        benchmark_conversion("tiny", str(tmp_path / "disk"), runs=1, converter=broken, whole_cache=False)
    lazy = (*converter[:2], "-c", "pass")
    with pytest.raises(UserError, match="made no tree"):
        benchmark_conversion("tiny", str(tmp_path / "disk"), runs=1, converter=lazy, whole_cache=False)
    assert os.listdir(tmp_path / "disk") == []


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(work_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=20 * GB))
    with pytest.raises(UserError, match=r"needs 41\.2 GB and the disk has 20\.0 GB free; give --layers"):
        benchmark_conversion("7b", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_page_cache_is_emptied_without_being_root(tmp_path, monkeypatch):
    """Without the right to drop all of it, the files themselves are let go of."""
    (tmp_path / "file").write_bytes(b"x" * 4096)
    real = open

    def refuse(path, *arguments, **more):
        if path == "/proc/sys/vm/drop_caches":
            raise PermissionError
        return real(path, *arguments, **more)

    monkeypatch.setattr(machine, "open", refuse, raising=False)
    advised = []
    monkeypatch.setattr(machine.os, "posix_fadvise", lambda *arguments: advised.append(arguments[1:]))
    assert machine.empty_page_cache([str(tmp_path)]).startswith("posix_fadvise")
    assert advised == [(0, 0, os.POSIX_FADV_DONTNEED)]


@pytest.mark.long
def test_the_command_with_the_real_converter(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "conversion", "--shape", "tiny", "--runs", "1"]
    command += ["--page-cache", "files", "--include", "verify", "--folder", str(tmp_path / "disk")]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["command"].startswith("python tools/benchmark.py conversion --shape tiny --runs 1")
    for name in ("import", "export"):
        step = result["steps"][name]
        assert step["command"].startswith(f"python tools/convert.py {name}")
        assert step["gb_made"] >= result["checkpoint"]["gb"]
        # What it wrote is on the disk when it ends.
        assert step["sync_seconds_afterwards"] < 1
        # Bounds at any size of model; the ratio means nothing at this one.
        assert step["peak_anonymous_gb"] < 1
        assert step["peak_resident_gb"] < 1.5
    assert result["steps"]["verify"]["median_seconds"] > 0
    assert "run 1 of 1, import:" in done.stderr
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conversion", "--shape", "7B", "--folder", "{tmp}"], "--shape 7B: unknown"),
        (["conversion", "--shape", "tiny", "--folder", "{tmp}", "--runs", "0"], "--runs 0"),
        (["direct-load", "--shape", "tiny", "--folder", "{tmp}", "--tensor-parallel", "3"], "does not divide"),
        (["conversion", "--shape", "tiny", "--folder", "{tmp}", "--output", "{tmp}/no/x.json"], "--output"),
        (["speed"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_use_exits_with_2(words, message, tmp_path):
    words = [word.format(tmp=tmp_path) for word in words]
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert os.listdir(tmp_path) == []
