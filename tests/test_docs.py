"""The pages of the documentation: code runs, commands parse, links lead somewhere."""

import json
import re
import shlex

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from tests import older, pages, versions

pytestmark = pytest.mark.skipif(
    not pages.PAGES, reason="the pages travel with the source"
)

# Pages beside the README, which the site shows too.
PROJECT = [p for p in sorted(pages.ROOT.glob("*.md")) if p != pages.README]
WITH_CODE = [page for page in pages.PAGES if pages.blocks(page, "python")]
# Pages that go on with a run which a command of theirs has brought in.
AFTER_AN_IMPORT = ("docs/settings.md", "docs/in-and-out.md")
CALLS = [
    pytest.param(command, id=f"{pages.name(page)}: {command}")
    for page in pages.PAGES
    for command in pages.shell_commands(page)
]
# What is not run here, and why.
NOT_RUN = {
    "demo": "takes 15 seconds, and has tests of its own",
    "import-tf": "needs TensorFlow, and has tests of its own",
    "import-torch": "needs PyTorch, and has tests of its own",
}


COMMANDS = {
    *("adopt", "choose", "completion", "demo", "export", "import-tf", "import-torch"),
    *("inspect", "merge", "profile", "reconstruct"),
}


@pytest.mark.once
@pytest.mark.skipif(older.LACKS_NNX, reason="pages show NNX modules")
@pytest.mark.parametrize("page", WITH_CODE, ids=pages.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace, in an empty folder; each assertion in them holds."""
    monkeypatch.chdir(tmp_path)
    if pages.name(page) in AFTER_AN_IMPORT:
        average, raw = {"w": jnp.full(3, 0.5)}, {"w": jnp.ones(3)}
        decay = ema_optax.warmup(0.9999)
        checkpoint.save_average("imported", average, params=raw, step=300, decay=decay)
    namespace = {"__name__": pages.name(page)}
    for block in pages.blocks(page, "python"):
        exec(compile(block, pages.name(page), "exec"), namespace)


def test_blocks_of_other_libraries_are_python():
    """They are compiled, not run: few have these libraries installed."""
    theirs = [b for page in pages.PAGES for b in pages.blocks(page, pages.THEIRS)]
    assert len(theirs) >= 15
    for block in theirs:
        compile(block, "theirs", "exec")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders and files that the pages' commands name."""
    root = tmp_path_factory.mktemp("shell")
    params = {"w": jnp.zeros(3)}
    transform = ema_optax.ema_params(0.9)
    for step in range(1, 11):
        checkpoint.save(root / "run", params, transform.init(params), step=step)
    with ocp.CheckpointManager(root / "old_run") as manager:
        theirs = {"params": params, "ema_params": params}
        manager.save(9, args=ocp.args.StandardSave(theirs))
    (root / "rules.json").write_text('[{"name": "fc.weight", "path": "w"}]')
    checkpoint.save(root / "imported", params, transform.init(params), step=1)
    (root / "evaluation.py").write_text("def loss(params): return params['w'].sum()")
    (root / "names.json").write_text(json.dumps({"w": "fc.weight"}))
    power = ema_optax.ema_params(
        {"short": ema_optax.power(0.05), "long": ema_optax.power(0.10)}
    )
    state = power.init(params)
    with ocp.CheckpointManager(root / "snapshots") as manager:
        for step in range(1, 17):
            _, state = power.update({"w": jnp.ones(3)}, state, params)
            manager.save(step, args=checkpoint.SnapshotSave(state))
    (root / "FOLDER").symlink_to(root / "snapshots")
    return root


@pytest.mark.parametrize("command", CALLS)
def test_commands_run(command, folders, monkeypatch, capsys):
    """As written, where what they read is there; all of them parse.

    `--like` names the layout of another program, which `old_run` does not have.
    """
    monkeypatch.chdir(folders)
    arguments = shlex.split(command)
    args = cli._parser().parse_args(arguments)
    assert args.name == arguments[0]
    if arguments[0] in NOT_RUN or "--like" in arguments:
        return
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out
    if "--out" in arguments and "--dry-run" not in arguments:
        assert (folders / arguments[arguments.index("--out") + 1]).exists()


def test_commands_in_sentences_parse():
    """Those with arguments; without them it is the name of a command."""
    inline = [c for page in pages.PAGES for c in pages.inline_commands(page)]
    assert len(inline) >= 3
    for command in map(shlex.split, inline):
        if len(command) == 1:
            assert command[0] in COMMANDS
        else:
            assert cli._parser().parse_args(command).name == command[0]


def test_the_pages_show_all_commands():
    """Each command of `ema-optax --help`, which `completion` completes too."""
    shown = {
        call.split()[0]
        for page in pages.PAGES
        for call in (*pages.shell_commands(page), *pages.inline_commands(page))
    }
    assert shown == COMMANDS


def test_scripts_are_there_and_know_their_options():
    """Each `python examples/…` or `python benchmarks/…` of a page."""
    text = "\n".join(page.read_text() for page in pages.PAGES)
    calls = re.findall(r"python ((?:examples|benchmarks)/\S+\.py)([^`'\n]*)", text)
    assert len(calls) >= 5
    for script, rest in calls:
        source = (pages.ROOT / script).read_text()
        for option in re.findall(r"--[a-z-]+", rest):
            assert f'"{option}"' in source, f"{script} has no {option}"


@pytest.mark.parametrize("page", [*pages.PAGES, *PROJECT], ids=pages.name)
def test_links_lead_somewhere(page):
    """To a file beside the page, and to a heading or a name on that file."""
    for file, anchor in pages.links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{file} is not there"
        if anchor:
            assert anchor in pages.anchors(target), f"{file}#{anchor} is not there"


@pytest.mark.parametrize("page", [*pages.PAGES, *PROJECT], ids=pages.name)
def test_a_page_is_read_alike_everywhere(page):
    """A list has an empty line above, and Markdown is not inside HTML.

    A block in a list is four columns in, else the site's Markdown ends the list there
    and counts from 1 again.
    """
    text = pages.prose(page)
    assert not re.findall(r"^(?!(?: {4})*`) +```", page.read_text(), re.M)
    assert "<details" not in text
    assert not re.findall(r"^(?!\s*[-*] |\s*$|  )[^\n]+\n[-*] ", text, re.M)


def test_every_page_is_in_the_navigation():
    navigation = (pages.ROOT / "mkdocs.yml").read_text()
    for page in sorted(pages.DOCS.rglob("*.md")):
        line = rf"^\s*- (.*: )?{re.escape(page.relative_to(pages.DOCS).as_posix())}$"
        assert re.search(line, navigation, re.M), page


def test_the_api_has_every_public_name_once():
    """Names as they were in an earlier version are in the table of versions.md."""
    table = (pages.ROOT / "tests" / "public_api.txt").read_text()
    public = set(re.findall(r"^(?:class )?(ema_optax\.[\w.]+)[(:]", table, re.M))
    shown = [
        name
        for page in sorted((pages.DOCS / "api").glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert len(shown) == len(set(shown))
    moved = (pages.DOCS / "versions.md").read_text()
    old = set(re.findall(r"^\| `(interop\.\w+)` \| `\w+\.\w+` \|$", moved, re.M))
    assert set(shown) == public - {f"ema_optax.{name}" for name in old}


def test_the_lowest_versions_are_the_declared_ones():
    """A new lower bound in pyproject.toml is a new row of the table."""
    page = (pages.DOCS / "versions.md").read_text()
    (row,) = re.findall(r"^\| lowest \| 3\.11 (.*) \|$", page, re.M)
    cells = row.removeprefix("| ").split(" | ")
    stated = dict(zip(versions.COLUMNS, cells, strict=True))
    for name, declared in versions.lowest().items():
        if name in stated:
            assert f"{stated[name]}.".startswith(f"{declared}."), name
