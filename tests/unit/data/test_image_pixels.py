"""DALI's pixels against the reference's over pictures of every kind and size: the whole of what must hold."""

import pytest

from dc_megatron.benchmark.picture_files import KINDS, SMALL_KINDS, varied_pictures
from dc_megatron.benchmark.pixels import ASPECT_RATIOS, LIMIT, differences, summary, tower

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

# What DALI decodes; the rest is PIL's.
PLAIN = {kind for kind in KINDS | SMALL_KINDS if kind.startswith("JPEG")} - {"JPEG CMYK", "JPEG coded as RGB"}
PLAIN |= {"PNG", "PNG grey"}


def check(entries):
    for entry in entries:
        picture = entry["picture"]
        where = (picture.kind, picture.width, picture.height, entry["family"], entry["aspect_ratio"])
        assert entry["plain"] == (picture.kind in PLAIN), where
        assert entry["mean"] <= (LIMIT if entry["plain"] else 0), where
    assert {entry["picture"].kind for entry in entries} == set(KINDS | SMALL_KINDS)
    assert all(limit["holds"] for limit in summary(entries)["limits"])


def test_pictures_of_every_kind_are_near_the_reference_or_equal_to_it():
    kinds = len(KINDS | SMALL_KINDS)
    # Small tiles: many sizes on both sides of them in little time.
    check(differences(varied_pictures(4 * kinds, 7, (800, 600)), [tower("clip", 56), tower("siglip", 56)]))
    check(differences(varied_pictures(kinds, 8, (1600, 1200)), [tower("clip")], ["pad", "square"]))


@pytest.mark.long
def test_500_pictures_of_all_sizes_are_near_the_reference_or_equal_to_it():
    entries = differences(varied_pictures(500, 1), [tower("clip"), tower("siglip")])
    assert len(entries) == 500 * 2 * len(ASPECT_RATIOS)
    sizes = {(entry["picture"].width, entry["picture"].height) for entry in entries}
    assert {(1, 1), (4000, 3000)} <= sizes
    check(entries)
