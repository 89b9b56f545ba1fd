"""Clips of rooms: ViZDoom renders Freedoom's levels along scripted camera moves, with captions from what was done.

A clip depends on its seed alone. Everything that could go wrong in a level (a lift, a teleporter, a wall that rays
miss) is met by looking at the result: a clip that does not show what its caption says is drawn again.
"""

from __future__ import annotations

import multiprocessing.util
import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

import photographs
from captions import caption
from levels import Level, View, read_level

FRAMES, SIZE, FPS = 33, 256, 12
TICS = 3  # of 35 a second, between frames
PHOTOGRAPH_SHARE = 0.12
# Seeds and levels of the three splits: nothing is shared but the textures and the photographs.
TUNING_SEED, HELD_OUT_SEED = 10_000_000, 20_000_000
HELD_OUT_LEVELS = ("MAP04", "MAP09", "MAP16", "MAP20", "MAP25", "MAP29")
TUNING_LEVELS = ("MAP06", "MAP13", "MAP22")
# MAP30 is one boss's room.
LEVELS = tuple(name for i in range(1, 33) if (name := f"MAP{i:02}") not in {*HELD_OUT_LEVELS, *TUNING_LEVELS, "MAP30"})
# What is done: the share of the room clips, a still camera in more than a quarter of them.
SCRIPTS = {
    "mover": 0.27,
    "door": 0.06,
    "empty": 0.02,
    "forward": 0.15,
    "backward": 0.06,
    "strafe": 0.12,
    "turn": 0.20,
    "forward and turn": 0.12,
}
# A mover's class in the game, the sprite of its walk, and how far ahead of the player it appears.
MOVERS = {
    "soldier": ("ZombieMan", "POSS", "ABCD", 56),
    "serpent": ("DoomImp", "TROO", "ABCD", 56),
    "worm": ("Demon", "SARG", "ABCD", 76),
    "knight": ("HellKnight", "BOS2", "ABCD", 64),
    "ghoul": ("Revenant", "SKEL", "ABCDEF", 56),
    "orb": ("Cacodemon", "HEAD", "A", 78),
}
FIELD = 37.0  # half of the picture's angle, degrees
GAMMA = 0.6  # Freedoom's rooms are dark
WARM_UP = 24  # tics until a walk is steady
RECORDED = (FRAMES - 1) * TICS


class Unfit(Exception):
    """This place or clip does not show what it should; another is drawn."""


def levels_of(seed: int) -> tuple[str, ...]:
    """The levels of the split that a seed belongs to."""
    return HELD_OUT_LEVELS if seed >= HELD_OUT_SEED else TUNING_LEVELS if seed >= TUNING_SEED else LEVELS


def actors() -> bytes:
    """The game's definition of movers that walk straight on, at a quarter of their first argument a tic."""
    text = ""
    for word, (base, sprite, frames, _) in MOVERS.items():
        walk = "".join(f * 6 for f in frames)
        text += (
            f"ACTOR Room{word.title()} : {base} {{ +NOBLOOD +DROPOFF -COUNTKILL +FRIENDLY\n States {{ Spawn:\n"
            f"  {sprite} {walk} 1 A_ChangeVelocity(args[0] / 4.0, 0, 0, CVF_RELATIVE | CVF_REPLACE)\n  Loop }} }}\n"
        )
    return text.encode()


@cache
def game_path() -> Path:
    import vizdoom

    return Path(vizdoom.__file__).parent / "freedoom2.wad"


class Game:
    """ViZDoom, wrapped down to a player that is put somewhere, acts, and is filmed."""

    def __init__(self) -> None:
        import vizdoom

        body = actors()
        self._folder = tempfile.TemporaryDirectory(prefix="rooms-")
        mod = Path(self._folder.name) / "movers.wad"
        entry = struct.pack("<ii8s", 12, len(body), b"DECORATE")
        mod.write_bytes(struct.pack("<4sii", b"PWAD", 1, 12 + len(body)) + body + entry)
        game = vizdoom.DoomGame()
        game.set_doom_game_path(str(game_path()))
        game.set_doom_scenario_path(str(mod))
        game.set_doom_config_path(str(Path(self._folder.name) / "game.ini"))
        game.set_doom_map("MAP01")
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_512X384)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for hide in ("hud", "crosshair", "messages", "corpses", "decals", "particles", "screen_flashes"):
            getattr(game, f"set_render_{hide}")(False)
        game.set_render_weapon(True)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_labels_buffer_enabled(True)
        button, variable = vizdoom.Button, vizdoom.GameVariable
        game.set_available_buttons(
            [button.MOVE_FORWARD_BACKWARD_DELTA, button.MOVE_LEFT_RIGHT_DELTA, button.TURN_LEFT_RIGHT_DELTA, button.USE]
        )
        game.set_available_game_variables(
            [variable.POSITION_X, variable.POSITION_Y, variable.ANGLE, variable.SELECTED_WEAPON]
        )
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_episode_timeout(0)
        game.set_doom_skill(3)
        game.add_game_args("+sv_cheats 1 +sv_nomonsters 1 -nomonsters +movebob 0 +stillbob 0")
        # The game leaves a folder of its own where it is started.
        here = os.getcwd()
        os.chdir(self._folder.name)
        try:
            game.init()
        finally:
            os.chdir(here)
        self.game = game
        # A process that ends without this leaves its game running, also in the pools of other stages.
        self._end = multiprocessing.util.Finalize(self, game.close, exitpriority=10)

    def close(self) -> None:
        self._end()
        self._folder.cleanup()

    def begin(self, level: str, seed: int, gun: bool) -> None:
        """A level from its beginning, the weapon raised, the player free to move."""
        self.game.set_doom_map(level)
        self.game.set_seed(seed)
        self.game.new_episode()
        self.game.send_game_command("god")
        if not gun:
            self.game.send_game_command("take pistol")
            self.game.send_game_command("take fist")
        self.act(tics=20)

    def act(self, forward: float = 0, right: float = 0, turn: float = 0, use: int = 0, tics: int = 1) -> None:
        """`turn` is in degrees a tic to the left, as angles are."""
        self.game.make_action([forward, right, -turn, use], tics)
        if self.game.is_episode_finished():
            raise Unfit("the level ended")

    def where(self) -> tuple[float, float, float, float]:
        """The player's x, y, angle, and the number of the weapon in hand."""
        return tuple(float(v) for v in self.game.get_state().game_variables)

    def put(self, x: float, y: float, angle: float) -> None:
        self.game.send_game_command(f"warp {x:.1f} {y:.1f}")
        self.act()
        self.act(turn=(angle - self.where()[2] + 180) % 360 - 180)
        if np.hypot(self.where()[0] - x, self.where()[1] - y) > 2:
            raise Unfit("nobody can stand there")

    def film(self, **action: float) -> tuple[np.ndarray, list[list]]:
        """FRAMES frames uint8 [FRAMES, SIZE, SIZE, 3] of one steady action, and the labels in each."""
        out, labels = [], []
        for index in range(FRAMES):
            if index:
                self.act(**action, tics=TICS)
            state = self.game.get_state()
            picture = Image.fromarray(state.screen_buffer)
            square = picture.resize((SIZE, SIZE), Image.Resampling.BOX, box=(64, 0, 448, 384))
            out.append(np.asarray(square.point(brightened())))
            labels.append(state.labels)
        return np.stack(out), labels


@cache
def brightened() -> list[int]:
    """What becomes of every value of red, of green and of blue."""
    return np.rint(255 * (np.arange(256) / 255) ** GAMMA).astype(int).tolist() * 3


@dataclass
class Place:
    """Where a clip begins, and what is to be seen from there."""

    x: float
    y: float
    angle: float
    view: View  # rays over the full circle

    def within(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        """Those of the rays' values that lie between two angles left of the camera's direction."""
        relative = (self.view.angles - self.angle + 180) % 360 - 180
        return values[(relative >= low) & (relative <= high)]

    def way(self, left: float) -> float:
        """Free way in a direction, degrees left of the camera's, for someone 40 units wide."""
        return float(self.within_around(self.view.walk, left, 6).min())

    def within_around(self, values: np.ndarray, left: float, half: float) -> np.ndarray:
        relative = (self.view.angles - self.angle - left + 180) % 360 - 180
        return values[np.abs(relative) <= half]


ANGLES = np.arange(0, 360, 3.0)


def pick_place(level: Level, rng: np.random.Generator) -> Place:
    """Somewhere between a thing of the level and a wall, well lit, not before a wall."""
    x, y = level.places[int(rng.integers(len(level.places)))] + rng.uniform(-8, 8, 2)
    heading = float(rng.uniform(0, 360))
    free = min(float(level.view(x, y, np.array([heading])).walk[0]) - 48, 600)
    need(free > 20, "a narrow place")
    step = rng.uniform(0, free) * np.array([np.cos(np.radians(heading)), np.sin(np.radians(heading))])
    x, y = x + step[0], y + step[1]
    few = level.view(x, y, ANGLES[::10])
    need(few.light >= 136 and float(few.walk.min()) > 28 and float(np.median(few.sight)) > 80, "dark or narrow")
    return Place(float(x), float(y), 0.0, level.view(x, y, ANGLES))


def turn_to_fit(place: Place, rng: np.random.Generator, fits: Callable[[], None]) -> None:
    """Look in the first of some directions in which `fits` raises nothing."""
    for turn in range(16):
        place.angle = float(rng.uniform(0, 360))
        try:
            return fits()
        except Unfit:
            if turn == 15:
                raise


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Unfit(what)


def look_at(place: Place, frames: np.ndarray, left: float, right: float) -> dict[str, str]:
    """Labels of a room: what it is built of by the rays, its colour and light by the first frame."""
    seen = [m for m in place.within(np.array(place.view.materials), right - FIELD, left + FIELD) if m]
    size = float(np.median(np.minimum(place.view.sight, 2000)))
    space = "yard" if place.view.outdoors else "corridor" if size < 110 else "room" if size < 260 else "hall"
    return {
        "material": max(sorted(set(seen)), key=seen.count) if seen else "none",
        "space": space,
        "colour": colour_of(frames[0]),
        "light": light_of(frames[0]),
    }


def light_of(frame: np.ndarray) -> str:
    level = float(frame.mean())
    return "dim" if level < 80 else "bright" if level > 120 else "none"


def colour_of(frame: np.ndarray) -> str:
    """The word for a frame's mean colour."""
    r, g, b = (float(v) for v in frame.reshape(-1, 3).mean(0))
    top, low = max(r, g, b), min(r, g, b)
    if (top - low) / (top + 1e-6) < 0.14:
        return "gray"
    if b >= r and b >= g:
        return "blue"
    if g >= r:
        return "green"
    if g - b < 0.25 * (r - b):
        return "red"
    return "tan" if top > 125 else "brown"


def mover_box(labels: list, name: str) -> tuple[float, float, float] | None:
    """A mover's middle, height and area in pixels of a clip, or None where it is not seen."""
    found = [label for label in labels if label.object_name == name]
    if not found:
        return None
    box = found[0]
    scale = SIZE / 384
    return (box.x + box.width / 2 - 64) * scale, box.height * scale, box.width * box.height * scale**2


def check_mover(labels: list[list], name: str, motion: str, still: bool) -> None:
    """The mover is in view, and with a still camera it moves as the caption will say."""
    boxes = [mover_box(labels[i], name) for i in (0, FRAMES // 2, FRAMES - 1)]
    shown = boxes if still else boxes[:2]
    need(all(box and -20 < box[0] < SIZE + 20 and box[2] > 500 for box in shown), "the mover is hidden")
    if not still:
        return
    (x0, h0, _), _, (x1, h1, _) = boxes
    if motion in ("left", "right"):
        need((x1 - x0) * (1 if motion == "right" else -1) > 24, "the mover was stopped")
    elif motion == "toward":
        need(h1 / h0 > 1.25, "the mover was stopped")
    elif motion == "away":
        need(h1 / h0 < 0.8, "the mover was stopped")


@dataclass
class Entry:
    """How a mover comes into the level: where the player stands for it, and what the game is told."""

    stand: tuple[float, float, float]
    command: str


def plan_mover(place: Place, level: Level, kind: str, motion: str, early: int, rng: np.random.Generator) -> Entry:
    """A free way for a mover that is to be on it when filming begins, `early` tics after it came."""
    for attempt in range(12):
        try:
            return _plan_mover(place, level, kind, motion, early, rng)
        except Unfit:
            if attempt == 11:
                raise
    raise AssertionError


def _plan_mover(place: Place, level: Level, kind: str, motion: str, early: int, rng: np.random.Generator) -> Entry:
    towards = {"left": 90.0, "right": -90.0, "toward": 180.0, "away": 0.0, "stands": float(rng.choice([180, 90, -90]))}
    if motion in ("left", "right"):
        depth = float(rng.uniform(130, 330))
        side = (-1 if motion == "left" else 1) * float(rng.uniform(0.1, 0.6)) * 0.75 * depth
        travel = float(rng.uniform(0.5, 1.0)) * 0.75 * depth
    elif motion == "toward":
        depth = float(rng.uniform(260, 420))
        side, travel = float(rng.uniform(-0.25, 0.25)) * depth, depth - float(rng.uniform(110, 170))
    elif motion == "away":
        depth = float(rng.uniform(110, 170))
        side, travel = float(rng.uniform(-0.25, 0.25)) * depth, float(rng.uniform(110, 260))
    else:
        depth = float(rng.uniform(110, 260))
        side, travel = float(rng.uniform(-0.45, 0.45)) * depth, 0.0
    pace = round(4 * travel / RECORDED)
    heading = place.angle + towards[motion] + (float(rng.uniform(-12, 12)) if motion != "stands" else 0)
    forward = np.array([np.cos(np.radians(place.angle)), np.sin(np.radians(place.angle))])
    left = np.array([-forward[1], forward[0]])
    ahead = np.array([np.cos(np.radians(heading)), np.sin(np.radians(heading))])
    at = np.array([place.x, place.y]) + depth * forward + -side * left - ahead * pace / 4 * early
    distance = float(np.hypot(*(at - [place.x, place.y])))
    bearing = float(np.degrees(np.arctan2(at[1] - place.y, at[0] - place.x)))
    way = level.view(place.x, place.y, bearing + np.array([-6.0, 0.0, 6.0]))
    need(float(way.walk.min()) > distance + 30, "something stands before the mover")
    path = level.view(at[0], at[1], heading + np.array([-8.0, 0.0, 8.0]))
    need(float(path.walk.min()) > travel + pace / 4 * early + 40, "no way for the mover")
    behind = at - MOVERS[kind][3] * forward
    # The game counts a newcomer's angle clockwise from the player's.
    turned = round(place.angle - heading) % 360
    return Entry((float(behind[0]), float(behind[1]), place.angle), f"summon Room{kind.title()} {turned} 0 0 {pace}")


def door_clip(game: Game, level: Level, name: str, rng, seed: int) -> tuple[np.ndarray, dict[str, str]]:
    """A still camera before a door that opens, or closes again."""
    doors = level.doors()
    need(bool(doors), "no door")
    line = doors[int(rng.integers(len(doors)))]
    middle = (level.starts[line] + level.ends[line]) / 2
    edge = level.ends[line] - level.starts[line]
    need(float(np.hypot(*edge)) >= 48, "a narrow door")
    outwards = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    angle = float(np.degrees(np.arctan2(-outwards[1], -outwards[0])))
    sector = level.back[line]
    around = np.unique(np.concatenate([level.front[level.back == sector], level.back[level.front == sector]]))
    around = around[(around >= 0) & (around != sector)]
    need(level.ceilings[sector] <= level.floors[sector] + 8 and len(around) > 0, "not a closed door")
    height = int(level.ceilings[around].min() - 4 - level.floors[sector])
    need(48 <= height <= 160, "a door too low or too high")
    free = float(level.view(*(middle + 24 * outwards), angle + 180 + np.array([-9.0, 0.0, 9.0])).walk.min())
    need(free > 130, "no place before the door")
    back = float(rng.uniform(110, min(free, 280)))
    at = middle + outwards * back
    place = Place(float(at[0]), float(at[1]), angle + float(rng.uniform(-14, 14)), level.view(at[0], at[1], ANGLES))
    need(place.view.light >= 128, "dark")
    closes = level.special[line] == 1 and rng.random() < 0.35
    gun = bool(rng.random() < 0.12)
    game.begin(name, seed, gun)
    game.put(*(middle + outwards * 40), angle)
    game.act(use=1)
    if closes:
        game.put(place.x, place.y, place.angle)
        game.act(tics=height // 2 + 150 - 14)
    else:
        game.put(place.x, place.y, place.angle)
    frames, _ = game.film()
    change = np.abs(frames[-1].astype(int) - frames[0]).max(-1) > 24
    need(0.03 < change.mean() < 0.7, "the door stayed as it was")
    labels = {"camera": "still", "mover": "door", "motion": "closes" if closes else "opens"}
    if gun:
        labels["gun"] = "gun"
    return frames, labels | look_at(place, frames, 0, 0)


def room_clip(game: Game, script: str, rng, seed: int) -> tuple[np.ndarray, dict[str, str]]:
    """One attempt at a clip of this script somewhere in the seed's levels."""
    names = levels_of(seed)
    name = names[int(rng.integers(len(names)))]
    level = read_level(game_path(), name)
    if script == "door":
        return door_clip(game, level, name, rng, seed)
    place = pick_place(level, rng)
    camera, action, left, right, speed = "still", {}, 0.0, 0.0, "none"
    side = str(rng.choice(["left", "right"]))
    sign = 1 if side == "left" else -1
    slow = bool(rng.random() < 0.4)
    travel = (205 if slow else 345) * 1.05
    early, rate, push = 0, 0.0, 6 if slow else 10
    ways: list[tuple[float, float]] = []  # directions, degrees left of the camera's, that must be free, and how far
    if script in ("forward", "backward", "strafe", "forward and turn"):
        early = WARM_UP
        if script == "strafe":
            camera, action, ways = f"strafe {side}", {"right": -sign * push}, [(sign * 90.0, travel + 40)]
        elif script == "forward and turn":
            rate = float(rng.uniform(0.3, 0.5)) * (1 if slow else 1.3)
            camera, action = f"forward {side}", {"forward": push, "turn": sign * rate}
            ways = [(sign * RECORDED * rate * share, 0.8 * travel + 60) for share in (0, 0.25, 0.5, 0.75)]
        elif script == "forward":
            camera, action, ways = script, {"forward": push}, [(0.0, travel + 90)]
        else:
            camera, action, ways = script, {"forward": -push}, [(180.0, travel + 40)]
    elif script == "turn":
        rate = float(rng.uniform(0.25, 0.45)) if slow else float(rng.uniform(0.65, 1.0))
        camera, action = f"turn {side}", {"turn": sign * rate}
    if camera != "still" and slow:
        speed = "slowly"
    left, right = (RECORDED * rate, 0.0) if sign > 0 else (0.0, -RECORDED * rate)

    def fits() -> None:
        for direction, length in ways:
            need(place.way(direction) > length, "no way")
        fan = place.within(place.view.sight, right - FIELD, left + FIELD)
        need(float(np.median(fan)) > 170 and float(fan.min()) > 56, "a wall is too near")

    turn_to_fit(place, rng, fits)
    mover = motion = "none"
    if script == "mover" or (script in ("turn", "forward", "strafe") and rng.random() < 0.3):
        mover = str(rng.choice(list(MOVERS)))
        choice = {"left": 0.34, "right": 0.34, "toward": 0.17, "away": 0.12, "stands": 0.03}
        if script != "mover":
            choice = {"left": 0.3, "right": 0.3, "toward": 0.2, "away": 0.0, "stands": 0.2}
        motion = str(rng.choice(list(choice), p=list(choice.values())))
    gun = bool(rng.random() < 0.15)
    entry = plan_mover(place, level, mover, motion, early, rng) if mover != "none" else None
    game.begin(name, seed, gun)
    if entry:
        game.put(*entry.stand)
        game.game.send_game_command(entry.command)
        game.act()
    game.put(place.x, place.y, place.angle)
    if early:
        # Up to speed before filming; turning begins with it.
        game.act(**{key: value for key, value in action.items() if key != "turn"}, tics=WARM_UP)
    before = game.where()
    frames, seen = game.film(**action)
    after = game.where()
    moved = float(np.hypot(after[0] - before[0], after[1] - before[1]))
    if early:
        expected = RECORDED * (1.85 if slow else 3.1)
        need(0.85 * expected < moved < 1.15 * expected, "the way was not free")
    else:
        need(moved < 1, "the player was moved")
    need(before[3] == after[3], "another weapon was found")
    check_frames(frames, still=camera == "still")
    if mover != "none":
        check_mover(seen, f"Room{mover.title()}", motion, camera == "still")
    labels = {"camera": camera, "speed": speed, "mover": mover, "motion": motion, "gun": "gun" if gun else "none"}
    return frames, labels | look_at(place, frames, left, right)


def check_frames(frames: np.ndarray, still: bool) -> None:
    """Neither dark nor blank, and as much change as a moving camera makes, or as little as a still one does."""
    values = frames[:: FRAMES // 4].astype(np.float32).mean(-1)
    need(float(values.mean((1, 2)).min()) > 48 and float(values.mean()) < 215, "dark or glaring")
    need(float(values.std((1, 2)).min()) > 14, "nothing to be seen")
    if still:
        steady = (np.abs(values - values[0]).max(0) < 4).mean()
        need(float(steady) > 0.5, "the light flickers")


class World:
    """Makes clips; one a process, for it holds a game."""

    def __init__(self) -> None:
        self._game: Game | None = None
        self.attempts = 0

    def clip(self, seed: int) -> tuple[np.ndarray, dict[str, str], str]:
        """The frames uint8 [FRAMES, SIZE, SIZE, 3], labels and caption of a seed."""
        rng = np.random.default_rng([seed, 7])
        if rng.random() < PHOTOGRAPH_SHARE:
            frames, labels = photographs.clip(rng, FRAMES, SIZE)
            return frames, labels, caption(labels)
        script = str(rng.choice(list(SCRIPTS), p=np.array(list(SCRIPTS.values())) / sum(SCRIPTS.values())))
        if self._game is None:
            self._game = Game()
        for attempt in range(3000):
            self.attempts += 1
            # Where a script is hard to fit in, a turn is not.
            try:
                frames, labels = room_clip(self._game, script if attempt < 2000 else "turn", rng, seed % 2**31)
            except Unfit:
                continue
            return frames, labels, caption(labels)
        raise RuntimeError(f"no clip was found for seed {seed}")

    def close(self) -> None:
        if self._game is not None:
            self._game.close()
            self._game = None
