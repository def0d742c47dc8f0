"""The bundled task "signs": procedurally drawn scenes of coloured signs, and questions about them.

A scene holds two to four signs, each with a code (a letter and a two-digit number) from a fixed catalogue, and a few
coloured shapes. All signs of a scene are of one size, its difficulty:

    large   readable in the overview crop         (font of 34 to 42 pixels)
    medium  readable from four tiles on           (18 to 22 pixels)
    small   readable at twelve tiles only         (11 to 13 pixels)

Seven kinds of questions ask for different things of a model:

    shape     the colour of a shape               one glance at the overview crop
    read      the code on a sign                  resolution
    price     the catalogue's price of an item    knowledge learnt by heart (and resolution)
    origin    the town an item comes from         knowledge learnt by heart (and resolution)
    digits    the sum of a number's two digits    a step of arithmetic (and resolution)
    sum       the sum of two signs' last digits   look up twice, then arithmetic (and resolution)
    largest   the code with the largest number    comparison of all signs (and resolution)

Everything follows from integer seeds: nothing is stored, splits are fixed and share no image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 256, 192
LETTERS = "ACEFHKLPTX"
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (38, 142, 60),
    "blue": (36, 84, 208),
    "yellow": (240, 206, 40),
    "purple": (136, 56, 170),
    "orange": (242, 134, 30),
    "cyan": (40, 186, 200),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
TOWNS = (
    "amsterdam athens berlin bern cairo dakar delhi dublin geneva havana kyoto lima "
    "lisbon london madrid nairobi oslo paris prague quito rome seoul tokyo vienna"
).split()
FONT_SIZES = {"large": (34, 42), "medium": (18, 22), "small": (11, 13)}
DIFFICULTIES = tuple(FONT_SIZES)
NUM_SIGNS = {"large": (2, 3), "medium": (2, 4), "small": (2, 4)}
SIGN_MARGIN = {"large": 12.0, "medium": 6.0, "small": 4.0}
DIFFICULTY_SHARES = (0.5, 0.3, 0.2)
KINDS = ("shape", "read", "price", "origin", "digits", "sum", "largest")
KIND_SHARES = {
    "large": (0.05, 0.08, 0.20, 0.17, 0.14, 0.20, 0.16),
    "medium": (0.10, 0.32, 0.14, 0.12, 0.10, 0.12, 0.10),
    "small": (0.10, 0.32, 0.14, 0.12, 0.10, 0.12, 0.10),
}
PHRASES = {
    "shape": ("what colour is the {a}", "colour of the {a}"),
    "read": ("read the sign in {a}", "what is written on {a}"),
    "price": ("price of the item in {a}", "how much is {a}"),
    "origin": ("origin of the item in {a}", "where is it from {a}"),
    "digits": ("add the digits on {a}", "digit sum of {a}"),
    "sum": ("add the last digits of {a} and {b}", "last digits of {a} plus {b}"),
    "largest": ("read the sign with the largest number", "which sign has the largest number"),
}
CATALOGUE_SIZE = 240
_CATALOGUE_SEED = 20260


@dataclass(frozen=True)
class Sign:
    """A sign: its colour, its code, the boxes (x0, y0, x1, y1) of the plate and of each character in pixels."""

    colour: str
    code: str
    font_size: int
    box: tuple[float, float, float, float]
    char_boxes: tuple[tuple[float, float, float, float], ...]

    @property
    def number(self) -> int:
        return int(self.code[1:])


@dataclass(frozen=True)
class Shape:
    """A coloured shape in its box (x0, y0, x1, y1) in pixels."""

    name: str
    colour: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; `draw` paints it."""

    difficulty: str
    signs: tuple[Sign, ...]
    shapes: tuple[Shape, ...]
    seed: int


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


@lru_cache(maxsize=1)
def catalogue() -> dict[str, tuple[str, str]]:
    """Return the facts to be known by heart, the same for everybody: code -> (price of three digits, town)."""
    rng = np.random.default_rng(_CATALOGUE_SEED)
    codes = [f"{letter}{number:02d}" for letter in LETTERS for number in range(100)]
    chosen = sorted(rng.choice(len(codes), CATALOGUE_SIZE, replace=False))
    prices = rng.integers(100, 1000, CATALOGUE_SIZE)
    towns = rng.integers(0, len(TOWNS), CATALOGUE_SIZE)
    return {codes[c]: (str(p), TOWNS[t]) for c, p, t in zip(chosen, prices, towns, strict=True)}


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def make_scene(seed: int, difficulty: str | None = None) -> Scene:
    """Lay out a scene. The same seed gives the same scene, everywhere."""
    rng = np.random.default_rng(seed)
    drawn = DIFFICULTIES[rng.choice(len(DIFFICULTIES), p=DIFFICULTY_SHARES)]
    difficulty = difficulty or drawn
    low, high = NUM_SIGNS[difficulty]
    colours = rng.permutation(list(COLOURS))[: rng.integers(low, high + 1)]
    codes = _draw_codes(rng, len(colours))
    taken: list[tuple[float, float, float, float]] = []
    signs = []
    for colour, code in zip(colours, codes, strict=True):
        sign = _place_sign(rng, str(colour), code, difficulty, taken)
        if sign is not None:
            signs.append(sign)
            taken.append(sign.box)
    shapes = _place_shapes(rng, taken)
    return Scene(difficulty, tuple(signs), shapes, seed)


def _draw_codes(rng: np.random.Generator, count: int) -> list[str]:
    """Draw codes with distinct numbers, so that "the largest" is well defined."""
    codes: list[str] = []
    numbers: set[str] = set()
    everything = list(catalogue())
    while len(codes) < count:
        code = everything[rng.integers(len(everything))]
        if code[1:] not in numbers:
            numbers.add(code[1:])
            codes.append(code)
    return codes


def _place_sign(
    rng: np.random.Generator, colour: str, code: str, difficulty: str, taken: list[tuple[float, float, float, float]]
) -> Sign | None:
    low, high = FONT_SIZES[difficulty]
    for attempt in range(60):
        size = int(rng.integers(low, high + 1)) if attempt < 40 else low
        font = _font(size)
        advances = [font.getlength(c) for c in code]
        pad = max(2.0, 0.18 * size)
        width, height = sum(advances) + 2 * pad, 0.74 * size + 2 * pad
        x, y = rng.uniform(1, WIDTH - width - 1), rng.uniform(1, HEIGHT - height - 1)
        box = (x, y, x + width, y + height)
        if any(_overlap(box, other, SIGN_MARGIN[difficulty]) for other in taken):
            continue
        chars, left = [], x + pad
        for advance in advances:
            chars.append((left, y + pad, left + advance, y + pad + 0.74 * size))
            left += advance
        return Sign(colour, code, size, box, tuple(chars))
    return None


def _place_shapes(rng: np.random.Generator, taken: list[tuple[float, float, float, float]]) -> tuple[Shape, ...]:
    shapes = []
    boxes = list(taken)
    for name in rng.permutation(SHAPES)[: rng.integers(1, 4)]:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        for _ in range(30):
            size = rng.uniform(20, 34)
            x, y = rng.uniform(1, WIDTH - size - 1), rng.uniform(1, HEIGHT - size - 1)
            box = (x, y, x + size, y + size)
            if not any(_overlap(box, other, 2.0) for other in boxes):
                boxes.append(box)
                shapes.append(Shape(str(name), colour, box))
                break
    return tuple(shapes)


def _overlap(a: tuple[float, ...], b: tuple[float, ...], margin: float) -> bool:
    return a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin


def draw(scene: Scene) -> Image.Image:
    """Paint a scene, RGB 256 x 192."""
    rng = np.random.default_rng(scene.seed + 1)
    base = rng.uniform(120, 215) + rng.uniform(-18, 18, 3)
    slope = rng.uniform(-25, 25, 2)
    yy, xx = np.mgrid[0:HEIGHT, 0:WIDTH]
    shade = slope[0] * (xx / WIDTH - 0.5) + slope[1] * (yy / HEIGHT - 0.5)
    image = Image.fromarray(np.clip(base + shade[..., None], 0, 255).astype(np.uint8))
    painter = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw_shape(painter, shape)
    for sign in scene.signs:
        _draw_sign(painter, sign)
    noise = rng.normal(0, rng.uniform(1, 5), (HEIGHT, WIDTH, 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _draw_sign(painter: ImageDraw.ImageDraw, sign: Sign) -> None:
    radius = 0.2 * sign.font_size
    painter.rounded_rectangle(sign.box, radius, fill=COLOURS[sign.colour])
    ink = (16, 16, 20) if sign.colour in ("yellow", "cyan", "orange") else (250, 250, 250)
    for char, box in zip(sign.code, sign.char_boxes, strict=True):
        painter.text((box[0], box[3]), char, font=_font(sign.font_size), fill=ink, anchor="ls")


def _draw_shape(painter: ImageDraw.ImageDraw, shape: Shape) -> None:
    x0, y0, x1, y1 = shape.box
    fill, size = COLOURS[shape.colour], x1 - x0
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    if shape.name == "circle":
        painter.ellipse(shape.box, fill=fill)
    elif shape.name == "square":
        painter.rectangle(shape.box, fill=fill)
    elif shape.name == "triangle":
        painter.polygon([(cx, y0), (x1, y1), (x0, y1)], fill=fill)
    elif shape.name == "diamond":
        painter.polygon([(cx, y0), (x1, cy), (cx, y1), (x0, cy)], fill=fill)
    else:
        arm = size / 6
        painter.rectangle((cx - arm, y0, cx + arm, y1), fill=fill)
        painter.rectangle((x0, cy - arm, x1, cy + arm), fill=fill)


def possible_kinds(scene: Scene) -> tuple[str, ...]:
    """Return the kinds of questions that this scene can answer."""
    excluded = set()
    if not scene.shapes:
        excluded.add("shape")
    if len(scene.signs) < 2:
        excluded |= {"sum", "largest"}
    return tuple(kind for kind in KINDS if kind not in excluded)


def ask(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question:
    """Draw a question about a scene; its kind follows `KIND_SHARES` of the scene's difficulty unless it is given."""
    if kind is None:
        kinds = possible_kinds(scene)
        shares = np.array([KIND_SHARES[scene.difficulty][KINDS.index(k)] for k in kinds])
        kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    phrase = PHRASES[kind][rng.integers(len(PHRASES[kind]))]
    if kind == "shape":
        shape = scene.shapes[rng.integers(len(scene.shapes))]
        return Question(kind, phrase.format(a=shape.name), shape.colour)
    first, *others = (scene.signs[i] for i in rng.permutation(len(scene.signs)))
    if kind == "sum":
        total = first.number % 10 + others[0].number % 10
        return Question(kind, phrase.format(a=first.colour, b=others[0].colour), str(total))
    if kind == "largest":
        return Question(kind, phrase, max(scene.signs, key=lambda sign: sign.number).code)
    price, town = catalogue()[first.code]
    answers = {"read": first.code, "price": price, "origin": town, "digits": str(sum(map(int, first.code[1:])))}
    return Question(kind, phrase.format(a=first.colour), answers[kind])


def scene_seed(split: str, image: int) -> int:
    """Return a seed for image number ``image`` of a split; splits cannot meet."""
    digest = hashlib.sha256(f"signs/1/{split}/{image}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
