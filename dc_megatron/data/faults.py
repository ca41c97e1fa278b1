"""Why one record cannot be trained on; such records are dropped and counted, they do not stop a run."""


class RecordFault(Exception):
    """``reason`` is one of a few short phrases that are counted; ``detail`` says what was seen in this record."""

    STRUCTURE = "bad structure"
    IMAGE_COUNT = "image count mismatch"
    MISSING_IMAGE = "missing image"
    CORRUPT_IMAGE = "corrupt image"
    NO_TARGET = "no target"

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
