"""Drawn scenes: one coloured shape on a plain background, and the three questions that only the picture answers.

The same scene can be drawn (for the tower) or told in words (for the language model's first, text-only stage).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 214),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Centre of the shape in fractions of the picture's width and height.
PLACES = {
    "left": (0.24, 0.5),
    "right": (0.76, 0.5),
    "top": (0.5, 0.24),
    "bottom": (0.5, 0.76),
    "middle": (0.5, 0.5),
}
QUESTIONS = {
    "colour": "What colour is the shape?",
    "shape": "What shape is it?",
    "place": "Where is the shape?",
}
ANSWERS = {"colour": tuple(COLOURS), "shape": SHAPES, "place": tuple(PLACES)}
PICTURE_SIZE = 96  # pixels, both sides
# Phrases without an answer in them; they stand where a picture has background.
_FILLERS = ("The background is plain.", "It is a drawing.", "There is one shape.", "It is on paper.")


@dataclass(frozen=True)
class Scene:
    """What is in one picture; every field is one of ANSWERS."""

    colour: str
    shape: str
    place: str

    def answer(self, kind: str) -> str:
        """The one-word answer to QUESTIONS[kind]."""
        return getattr(self, kind)


def random_scene(rng: random.Random) -> Scene:
    """A scene with every answer drawn independently, so that no answer predicts another."""
    return Scene(**{kind: rng.choice(choices) for kind, choices in ANSWERS.items()})


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """An RGB picture of ``scene``; size, place, tint and background vary a little with ``rng``."""
    background = tuple(rng.randint(200, 250) for _ in range(3))
    image = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), background)
    colour = tuple(max(0, min(255, channel + rng.randint(-12, 12))) for channel in COLOURS[scene.colour])
    half = PICTURE_SIZE * rng.uniform(0.15, 0.2)
    x, y = (PICTURE_SIZE * (centre + rng.uniform(-0.04, 0.04)) for centre in PLACES[scene.place])
    _draw_shape(ImageDraw.Draw(image), scene.shape, x, y, half, colour)
    return image


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, half: float, colour: tuple) -> None:
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)
    else:
        bar = half / 3
        canvas.rectangle((x - half, y - bar, x + half, y + bar), fill=colour)
        canvas.rectangle((x - bar, y - half, x + bar, y + half), fill=colour)


def describe(scene: Scene, rng: random.Random) -> str:
    """``scene`` in words. Facts come in any order, some twice, between phrases that say nothing.

    A picture spreads what it shows over many positions in no fixed order; a language model that has learned to find
    a fact anywhere in such a text needs no change to find it among picture features.
    """
    facts = [f"It is {scene.colour}.", f"It is a {scene.shape}.", f"It is at the {scene.place}."]
    phrases = facts + rng.choices([*facts, *_FILLERS], k=rng.randint(0, 2))
    rng.shuffle(phrases)
    return " ".join(phrases)
