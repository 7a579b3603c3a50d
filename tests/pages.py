"""The pages that people read, and their blocks, commands and links."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))] if DOCS.exists() else []
THEIRS = "python theirs"  # code of other libraries, which few have installed


def name(page: pathlib.Path) -> str:
    """Path of a page in the repository: what a failed test is called by."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """Fenced blocks whose fence says a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def prose(page: pathlib.Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)


def shell_commands(page: pathlib.Path) -> list[str]:
    """Calls of `ema-optax` in blocks of a shell, continued lines joined."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [
        call.split("ema-optax ", 1)[1]
        for line in lines
        for call in line.split("&&")
        if re.match(r"\s*(\S*/)?ema-optax ", call)
    ]


def inline_commands(page: pathlib.Path) -> list[str]:
    """Calls of `ema-optax` in sentences and tables."""
    return re.findall(r"`ema-optax ([a-z][^`]*)`", prose(page))


def links(page: pathlib.Path) -> list[tuple[str, str]]:
    """Links and pictures that stay in the repository: file, and anchor or nothing."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    inside = (target for target in targets if not re.match(r"[a-z]+:", target))
    return [(file, anchor) for file, _, anchor in (t.partition("#") for t in inside)]


def anchors(page: pathlib.Path) -> set[str]:
    """What a link may name of a page: its headings, and the API's names on it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    names = re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    return {_slug(heading) for heading in headings} | set(names)


def _slug(heading: str) -> str:
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    plain = plain.encode("ascii", "ignore").decode().lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip())
