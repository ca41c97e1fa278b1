"""Real photographs for the quickstart: the public-domain ones that the scikit-image wheel carries.

Licences as stated in the docstrings of ``skimage.data`` (scikit-image 0.26): each picture named here is CC0 or has no
known copyright restriction. Only files inside the wheel are listed, so nothing is downloaded.
"""

from __future__ import annotations

import random

from PIL import Image
from skimage import data

QUESTION = "What does the photograph show?"
# name in skimage.data -> caption; the source and terms stand beside each.
CAPTIONS = {
    "astronaut": "an astronaut",  # NASA Great Images, public domain
    "camera": "a photographer",  # Lav Varshney, CC0
    "cat": "a cat",  # Stefan van der Walt, CC0
    "coffee": "a cup of coffee",  # Rachel Michetti, CC0
    "rocket": "a rocket",  # SpaceX, released into the public domain
    "hubble_deep_field": "distant galaxies",  # NASA, free use in the public domain
    "retina": "the back of an eye",  # Wikimedia Commons, CC0
    "brick": "a brick wall",  # CC0Textures, CC0
    "grass": "grass",  # linolafett, CC0
    "gravel": "gravel",  # CC0Textures, CC0
}
LONGEST_SIDE = 128  # pixels of a stored crop


def describe(caption: str) -> str:
    """A photograph in words."""
    return f"A photograph of {caption}."


def load(name: str) -> Image.Image:
    """The photograph ``name`` of CAPTIONS as RGB."""
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def crop(photograph: Image.Image, rng: random.Random) -> Image.Image:
    """A random crop that keeps 75-95 % of each side, reduced to LONGEST_SIDE."""
    width, height = (int(side * rng.uniform(0.75, 0.95)) for side in photograph.size)
    left = rng.randint(0, photograph.width - width)
    top = rng.randint(0, photograph.height - height)
    part = photograph.crop((left, top, left + width, top + height))
    part.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
    return part
