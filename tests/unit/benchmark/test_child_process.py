"""What is measured of a program from outside, with programs whose needs are known."""

from __future__ import annotations

import os
import sys
import time

import pytest

from dc_megatron.benchmark import child_process
from dc_megatron.benchmark.child_process import measure
from dc_megatron.benchmark.machine import filesystem_of
from dc_megatron.errors import UserError

MEGABYTE = 1 << 20


def run(program: str):
    return measure([sys.executable, "-S", "-c", program])


def test_time_output_and_memory_that_was_held_for_a_while():
    measured = run("import time; x = bytearray(b'x') * (200 << 20); del x; time.sleep(0.4); print('done')")
    idle = run("pass")
    assert measured.output == "done\n"
    assert 0.4 < measured.seconds < 10
    # bytearray * n is filled in about a tenth of a second: sampled or not, VmHWM remembers it.
    assert 200 * MEGABYTE < measured.peak_resident < 260 * MEGABYTE
    assert idle.peak_resident < 60 * MEGABYTE


def test_peak_of_anonymous_memory():
    measured = run("import time; x = bytearray(b'x') * (200 << 20); time.sleep(0.3)")
    assert 200 * MEGABYTE < measured.peak_anonymous < 250 * MEGABYTE


def test_file_pages_are_resident_and_not_anonymous(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (100 * MEGABYTE))
    measured = run(
        f"import mmap, time; f = open({str(path)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
        " m[::4096]; time.sleep(0.3)"
    )
    assert measured.peak_anonymous < 50 * MEGABYTE
    assert measured.peak_resident > 100 * MEGABYTE


def test_what_comes_from_the_disk_is_counted(tmp_path):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(os.urandom(20 * MEGABYTE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if filesystem_of(str(tmp_path)) == "tmpfs":
        pytest.skip("no disk below the temporary folder")
    program = f"import time; open({str(path)!r}, 'rb').read(); time.sleep(0.3)"
    through_a_shell = measure(["sh", "-c", f"cat {path} > /dev/null; sleep 0.3"])
    assert 20 * MEGABYTE <= through_a_shell.disk_read < 40 * MEGABYTE
    assert run(program).disk_read < 10 * MEGABYTE


def test_children_count():
    child = "import time; x = bytearray(b'x') * (100 << 20); time.sleep(0.8)"
    program = (
        f"import subprocess, sys; c = [sys.executable, '-S', '-c', {child!r}];"
        " [p.wait() for p in [subprocess.Popen(c), subprocess.Popen(c, start_new_session=True)]]"
    )
    measured = run(program)
    assert 200 * MEGABYTE < measured.peak_anonymous < 280 * MEGABYTE
    assert measured.peak_resident > 200 * MEGABYTE


def test_cpu_time_of_children_counts_and_waiting_does_not():
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    program = f"import subprocess, sys, time; subprocess.run([sys.executable, '-S', '-c', {busy!r}]); time.sleep(0.5)"
    assert 0.5 < run(program).cpu_seconds < 0.95


def test_a_program_that_fails_is_reported_with_its_words():
    with pytest.raises(UserError, match=r"(?s)ended with 3.*no such weights"):
        run("import sys; print('no such weights'); sys.exit(3)")


def test_an_interrupted_measurement_leaves_no_process(monkeypatch, tmp_path):
    def interrupt(*arguments):
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(child_process.os, "wait4", interrupt)
    mark = tmp_path / "pid"
    program = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run(program)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_a_process_that_is_gone_has_no_fields():
    gone = 2**22 + 1  # above the largest process id
    assert child_process.status_fields(gone) == {}
    assert child_process.parent_and_session(gone) == (0, 0)
    assert child_process.parent_and_session(os.getpid())[0] == os.getppid()
    assert child_process.status_fields(os.getpid())["VmHWM"] > MEGABYTE
