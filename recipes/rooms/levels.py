"""The levels of a WAD, read without the game: where one can stand, how far one sees and walks, what the walls are of.

Distances are in map units (a player is 56 high and 32 wide), angles in degrees, counter-clockwise from east.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

SKY = "F_SKY1"
PLAYER_HEIGHT, STEP = 56, 24
REACH = 2500  # how far rays look
# Things that nobody can stand at: teleport exits and the like have no place in the game, or one that is closed.
NO_PLACE = {14, 87, 88, 89}
DOORS = {1, 31, 117, 118}
# What a texture's name says of a wall; the first that fits.
MATERIALS = (
    ("brick", ("BRICK", "BIGBRIK", "BRIK", "BRNBIG", "BSTONE", "BRNSM", "BROVINE", "BROWN9")),
    ("wooden", ("WOOD", "PANEL", "PANCASE", "PANBOOK", "PANBORD", "CRATE", "LOG")),
    ("marble", ("MARB", "GSTONE", "SKIN", "SP_", "SKSPINE", "SKSNAKE")),
    ("rocky", ("ROCK", "ZIMMER", "TANROCK", "ASHWALL", "CEMENT", "MODWALL", "FIRE", "CRACKLE", "SLAD", "NUKE")),
    (
        "metal",
        ("METAL", "SHAWN", "SILVER", "SUPPORT", "TEK", "COMP", "PIPE", "BRONZE", "SPACEW", "LITE", "STARTAN", "STARG"),
    ),
    ("stone", ("STONE", "GRAY", "ICKWALL", "STUCCO", "STAR", "BROWN", "BRN", "TAN", "PLAT", "STEP", "DOOR", "BIGDOOR")),
)


@dataclass(frozen=True)
class View:
    """What rays from one place meet: one value an angle."""

    angles: np.ndarray
    walk: np.ndarray  # free way
    sight: np.ndarray  # distance of the wall that ends the view
    materials: list[str]  # of that wall; "" where the sky or nothing ends it
    outdoors: bool
    light: int
    height: int


@dataclass(frozen=True)
class Level:
    """One level's lines, sectors and places."""

    places: np.ndarray  # [P, 2]
    starts: np.ndarray  # [L, 2]
    ends: np.ndarray  # [L, 2]
    front: np.ndarray  # [L], sector in front
    back: np.ndarray  # [L], sector behind, -1 where there is none
    blocking: np.ndarray  # [L], nobody walks through
    closed: np.ndarray  # [L], nobody sees through
    special: np.ndarray  # [L]
    textures: list[tuple[str, str]]  # of a line's front: its middle and its upper part
    floors: np.ndarray
    ceilings: np.ndarray
    sky: np.ndarray
    lights: np.ndarray

    def view(self, x: float, y: float, angles: np.ndarray) -> View:
        """Cast a ray in every direction of `angles`."""
        near = np.flatnonzero(
            (np.maximum(self.starts, self.ends) > [x - REACH, y - REACH]).all(1)
            & (np.minimum(self.starts, self.ends) < [x + REACH, y + REACH]).all(1)
        )
        starts, ends = self.starts[near], self.ends[near]
        direction = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], 1)
        edge = ends - starts
        to_start = starts - np.array([x, y])
        denominator = direction[:, :1] * edge[:, 1] - direction[:, 1:] * edge[:, 0]
        denominator[np.abs(denominator) < 1e-9] = 1e-9
        along = (to_start[:, 0] * edge[:, 1] - to_start[:, 1] * edge[:, 0]) / denominator
        share = (to_start[:, 0] * direction[:, 1:] - to_start[:, 1] * direction[:, :1]) / denominator
        distance = np.where((share >= 0) & (share <= 1) & (along > 0.5), along, np.inf)
        walk = np.where(self.blocking[near], distance, np.inf).min(1)
        seen = np.where(self.closed[near], distance, np.inf)
        hit = seen.argmin(1)
        sight = seen[np.arange(len(angles)), hit]
        materials = [material(self.textures[near[i]][0]) if np.isfinite(d) else "" for i, d in zip(hit, sight)]
        # The nearest line of any kind is a border of the sector one stands in.
        ray = int(distance.min(1).argmin())
        line = int(distance[ray].argmin())
        side = edge[line, 0] * -to_start[line, 1] - edge[line, 1] * -to_start[line, 0]
        front, back = self.front[near[line]], self.back[near[line]]
        sector = int(front if side < 0 or back < 0 else back)
        return View(
            angles,
            walk,
            sight,
            materials,
            bool(self.sky[sector]),
            int(self.lights[sector]),
            int(self.ceilings[sector] - self.floors[sector]),
        )

    def doors(self) -> list[int]:
        """Lines that a use opens without a key."""
        return [int(i) for i in np.flatnonzero(np.isin(self.special, list(DOORS)) & (self.back >= 0))]


def material(texture: str) -> str:
    """A wall's material by its texture's name."""
    for word, starts in MATERIALS:
        if texture.startswith(starts):
            return word
    return "" if texture in ("-", "") else "stone"


def _name(raw: bytes) -> str:
    return raw.rstrip(b"\0").split(b"\0")[0].decode("ascii", "replace").upper()


@lru_cache(maxsize=2)
def _directory(wad: Path) -> tuple[bytes, list[tuple[str, int, int]]]:
    data = wad.read_bytes()
    count, offset = struct.unpack("<ii", data[4:12])
    return data, [
        (_name(raw), position, size)
        for position, size, raw in struct.iter_unpack("<ii8s", data[offset : offset + 16 * count])
    ]


@lru_cache(maxsize=40)
def read_level(wad: Path, name: str) -> Level:
    """Level `name`, such as MAP01, of a WAD in Doom's format."""
    data, lumps = _directory(wad)
    at = [lump for lump, _, _ in lumps].index(name)
    body = {lump: data[position : position + size] for lump, position, size in lumps[at + 1 : at + 11]}
    things = np.frombuffer(body["THINGS"], "<i2").reshape(-1, 5)
    vertices = np.frombuffer(body["VERTEXES"], "<i2").reshape(-1, 2).astype(float)
    lines = np.frombuffer(body["LINEDEFS"], "<u2").reshape(-1, 7)
    sides = list(struct.iter_unpack("<hh8s8s8sH", body["SIDEDEFS"]))
    sectors = list(struct.iter_unpack("<hh8s8shhh", body["SECTORS"]))
    floors, ceilings = (np.array([s[i] for s in sectors]) for i in (0, 1))
    front = np.array([sides[i][5] for i in lines[:, 5]])
    back = np.array([sides[i][5] if i != 0xFFFF else -1 for i in lines[:, 6]])
    opening = np.minimum(ceilings[front], ceilings[back]) - np.maximum(floors[front], floors[back])
    one_sided = back < 0
    closed = one_sided | (opening <= 0)
    blocking = one_sided | (opening < PLAYER_HEIGHT) | (np.abs(floors[front] - floors[back]) > STEP)
    return Level(
        places=things[~np.isin(things[:, 3], list(NO_PLACE)), :2].astype(float),
        starts=vertices[lines[:, 0]],
        ends=vertices[lines[:, 1]],
        front=front,
        back=back,
        blocking=blocking | (lines[:, 2] & 1 > 0),
        closed=closed,
        special=lines[:, 3].copy(),
        textures=[(_name(sides[i][4]), _name(sides[i][2])) for i in lines[:, 5]],
        floors=floors,
        ceilings=ceilings,
        sky=np.array([_name(s[3]) == SKY for s in sectors]),
        lights=np.array([s[4] for s in sectors]),
    )
