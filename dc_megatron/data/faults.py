"""Why one record cannot be trained on; such records are dropped and counted, they do not stop a run."""

from __future__ import annotations

_LONGEST_DETAIL = 500


class RecordFault(Exception):
    """``reason`` is one of a few short phrases that are counted; ``detail`` says what was seen in this record."""

    STRUCTURE = "bad structure"
    IMAGE_COUNT = "image count mismatch"
    MISSING_IMAGE = "missing image"
    CORRUPT_IMAGE = "corrupt image"
    UNSAFE_PATH = "unsafe path"
    CORRUPT_VIDEO = "corrupt video"
    NO_TARGET = "no target"

    def __init__(self, reason: str, detail: str):
        # What was seen may be as long as its record.
        detail = detail if len(detail) <= _LONGEST_DETAIL else f"{detail[:_LONGEST_DETAIL]}..."
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
