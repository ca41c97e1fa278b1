"""Every write, flush and rename of a conversion or a manifest as a place where the program may end."""

from __future__ import annotations

from dc_megatron.weights import durable_files

SEAM = ("write_all", "flush_file", "flush_folder", "rename")


class Killed(BaseException):
    """Stands for the end of the process: no ``except Exception`` tidies up after it."""


class StopPoints:
    """Counts the points, and at the one asked for (and at every later one) raises before anything is done.

    A dead process does nothing more; what runs on the way out (``finally``) may therefore not write either.
    """

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self._originals = {name: getattr(durable_files, name) for name in SEAM}
        self.passed: list[str] = []

    def stop_at(self, position: int | None) -> None:
        """``position`` counts from 0; None lets everything pass."""
        self.passed = []
        for name, original in self._originals.items():

            def point(*args, _name=name, _original=original):
                if position is not None and len(self.passed) >= position:
                    raise Killed(_name)
                self.passed.append(_name)
                return _original(*args)

            self._monkeypatch.setattr(durable_files, name, point)
