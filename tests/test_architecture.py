"""The architecture page: its files exist, and its picture is the house's table."""

import pathlib
import re

import pytest

import ema_optax
from tests.test_house import EVERYWHERE, FACES, HOUSE

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(ema_optax.__file__).parent
PAGE = ROOT / "ARCHITECTURE.md"

if not PAGE.exists():
    pytest.skip("the page travels with the source", allow_module_level=True)

TEXT = PAGE.read_text()


def _rows(picture):
    """Returns the rooms of each row; a row without a name goes on with the last."""
    rows = []
    for line in picture.splitlines():
        name, rooms = line[:14].strip(), line[14:].replace("/", "").split()
        if name:
            rows.append(rooms)
        elif rooms != ["|"]:
            rows[-1] += rooms
    return rows


def test_every_file_it_names_exists():
    """Of the package as it is installed, and of the folder that the page is in."""
    named = set(re.findall(r"`([\w./]+\.(?:py|md|txt))`", TEXT)) - {"__init__.py"}
    assert len(named) > 30
    for name in sorted(named):
        inside = name.removeprefix("ema_optax/")
        assert (PACKAGE / inside if inside != name else ROOT / name).is_file(), name


def test_every_room_is_in_the_picture_once():
    """A new room needs a place there; a folder has a slash."""
    (picture,) = re.findall(r"```\n(.*?)```", TEXT, re.S)
    rooms = [room for row in _rows(picture) for room in row]
    assert sorted(rooms) == sorted(HOUSE)
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"(\w+)/", picture)) == folders


def test_every_room_is_in_the_table_with_the_module_that_shows_it():
    """A reader of a public module finds its room, and the other way round."""
    listed, shown = [], {}
    for row in re.findall(r"^\| (`_.*) \| .* \| (.*)\|$", TEXT, re.M):
        rooms, faces = (re.findall(r"`(\w+)`", column) for column in row)
        listed += rooms
        if len(rooms) == 1:  # else one each
            rooms *= len(faces)
        shown |= dict(zip(faces, rooms, strict=bool(faces)))
    assert sorted(listed) == sorted(set(HOUSE) - {"__main__", "_version"})
    shown.pop("ema_optax")
    assert shown == FACES


def test_rooms_import_rows_below():
    """The table of imports never leads up, or to a room of the same row."""
    (picture,) = re.findall(r"```\n(.*?)```", TEXT, re.S)
    row_of = {room: i for i, row in enumerate(_rows(picture)) for room in row}
    for room, imported in HOUSE.items():
        for other in {FACES.get(name, name) for name in imported} - EVERYWHERE:
            assert row_of[other] > row_of[room], f"{room} imports {other}"


def test_it_is_one_page():
    """A map that needs a map is none."""
    assert len(TEXT.splitlines()) <= 130
