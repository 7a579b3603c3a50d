"""`ema-optax profile`: its figures, its drawings, and what it says to wrong decays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import plots
from ema_optax._cli import decay_text, sketch
from tests import reference

MODULE = [sys.executable, "-m", "ema_optax", "profile"]


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict]:
    assert cli.main(["profile", *arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)["profiles"]


def table(text: str) -> dict[str, list[str]]:
    """Returns the cells of the table's rows by the decay's name."""
    head, _ = text.split("\n\n", 1)
    rows = [line.split() for line in head.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["profile", *arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("ema-optax profile: error: ")
    assert line.isprintable()
    return line


@pytest.mark.parametrize(
    ("text", "kind", "arguments"),
    [
        ("0.9", "warmup", (0.9,)),
        ("constant:0.9", "constant", (0.9,)),
        ("debiased:decay=0.9", "debiased", (0.9,)),
        ("uniform", "uniform", ()),
        ("power:exponent=3", "power", (3.0,)),
        ("inverse_power", "inverse_power", (0.9999, 1.0, 2 / 3, 0.0)),
        ("inverse_power:0.9,2,power=0.75", "inverse_power", (0.9, 2.0, 0.75, 0.0)),
        ("ramp:0.9,20", "ramp", (0.9, 20.0)),
        ("cosine:0.5,1e2", "cosine", (0.5, 100)),
        ("half_life:7.5", "half_life", (7.5,)),
        ("fraction:0.1", "fraction", (0.1,)),
    ],
)
@pytest.mark.parametrize("every", [1, 10])
def test_figures_are_what_the_folds_do(text, kind, arguments, every, capsys):
    """Averaging one-hot params, one by one; 47 updates are no multiple of 10."""
    steps = 47
    one_hot = np.eye(steps + 1)  # column 0: the initial params
    weights = reference.average(
        one_hot[1:], reference.betas(kind, steps, *arguments), every, start=one_hot[0]
    )
    ages = steps - np.arange(steps + 1)
    mean = weights @ ages
    expected = {
        "width": np.sqrt(weights @ (ages - mean) ** 2) / steps,
        "mean_age": mean,
        "initial_weight": weights[0],
        "effective_size": 1 / np.sum(weights**2),
    }
    (found,) = figures(
        capsys, "--decay", text, "--steps", f"{steps}", "--every", f"{every}"
    ).values()
    del found["decay"]
    # A fold one step late moves the mean age by 2 %, far above these bounds.
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "decay"),
    [
        ("warmup:0.999,20", ema_optax.warmup(0.999, offset=20)),
        ("power:0.05", ema_optax.power(0.05)),
        (
            "start_after:inverse_power:0.99,1,0.7,1e3",
            ema_optax.start_after(ema_optax.inverse_power(0.99, 1, 0.7), 1000),
        ),
        ("start_after:0.9,step=5", ema_optax.start_after(0.9, 5)),
        (
            "scale_to_batch:start_after:constant:0.9,5,8",
            ema_optax.scale_to_batch(
                ema_optax.start_after(ema_optax.constant(0.9), 5), 8
            ),
        ),
    ],
)
def test_decays_in_one_word(text, decay, capsys):
    """Arguments by place or by name; an inner decay ends at the last comma."""
    found = figures(capsys, "--decay", text, "--steps", "3")
    assert ema_optax.Decay.from_json(found[text]["decay"]) == decay


def test_every_maker_can_be_said():
    """All decays that the library offers, and nothing else."""
    files = ("decays", "derived_decays", "windows")
    modules = {f"ema_optax._decays.{file}" for file in files}
    makers = {
        name
        for name in ema_optax.__all__
        if getattr(ema_optax, name).__module__ in modules
    }
    assert set(decay_text.FORMS) == makers


def test_a_constant_decay_in_closed_form(capsys: pytest.CaptureFixture[str]):
    """Mean age β/(1−β), β^t of the initial params, effective size (1+β)/(1−β)."""
    found = figures(capsys, "--decay", "constant:0.98", "--steps", "2000")
    run = found["constant:0.98"]
    assert run["mean_age"] == pytest.approx(49, rel=1e-9)
    assert run["effective_size"] == pytest.approx(99, rel=1e-9)
    assert run["initial_weight"] == pytest.approx(0.98**2000, rel=1e-9)


@pytest.mark.parametrize("every", ["1", "10", "100"])
def test_power_has_the_width_in_its_name(every, capsys):
    """Within .003 over 20,000 updates, however rarely it folds."""
    found = figures(
        capsys, "--decay", "power:0.05", "--steps", "20000", "--every", every
    )
    assert found["power:0.05"]["width"] == pytest.approx(0.05, abs=0.003)


def test_the_table(capsys: pytest.CaptureFixture[str]):
    """A row a decay, with the mean age in updates and as a share of the run."""
    decays = ["--decay", "0.9", "constant:0.99", "--decay", "uniform", "warmup:0.9"]
    assert cli.main(["profile", *decays, "--steps", "200"]) == 0
    text = capsys.readouterr().out
    rows = table(text)
    assert list(rows) == ["warmup:0.9", "constant:0.99", "uniform"]  # each once
    # 0.99^200 = 13.4 % of the initial params; Σ_k 0.99^k (k = 1 … 200) = 85.7355
    left = 0.99**200
    size = 1 / (0.01 / 1.99 * (1 - left**2) + left**2)
    assert rows["constant:0.99"][1:] == ["85.7", "42.87%", "0.134", f"{size:.1f}"]
    # √((n²−1)/12)/n of the numbers 1 … n
    assert rows["uniform"] == ["0.2887", "99.5", "49.75%", "0", "200.0"]
    assert "13.4% still on the initial params" in text
    assert text.count("Not drawn") == 1


def test_output_fits_80_columns(capsys: pytest.CaptureFixture[str]):
    """With every name as long as names get, and six digits of everything."""
    decays = ["start_after:inverse_power:0.9999,1,0.75,0.5,1000", "constant:0.999999"]
    for steps in ("1", "3", "63", "64", "65", "130", "1000000"):
        assert cli.main(["profile", "--decay", *decays, "--steps", steps]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert not any(line.endswith(" ") for line in lines)


def test_nothing_folded(capsys: pytest.CaptureFixture[str]):
    """A run shorter than `every` is told in words: there is nothing to draw."""
    assert cli.main(["profile", "--decay=0.9", "--steps=5", "--every=6"]) == 0
    text = capsys.readouterr().out
    assert table(text)["warmup:0.9"] == ["0.0000", "5.0", "100.00%", "1", "1.0"]
    assert "the shadow is the initial params" in text
    assert cli.main(["profile", "--decay=0.9", "--steps=6", "--every=6"]) == 0
    assert "A bar holds one update" in capsys.readouterr().out


@pytest.mark.parametrize(("every", "steps"), [(1, 1000), (10, 1000), (7, 100), (2, 5)])
@pytest.mark.parametrize("bins", [1, 5, 64])
def test_bars_hold_the_weights(every, steps, bins):
    """A fold's weight lies evenly on the updates that it folds; none is lost."""
    run = ema_optax.profile(ema_optax.power(0.2), steps, every)
    fine = np.zeros(steps * bins)  # `bins` pieces an update: edges fall between them
    for fold in range(every, steps + 1, every):
        piece = run.weights[fold - 1] / (every * bins)
        fine[(fold - every) * bins : fold * bins] = piece
    expected = fine.reshape(bins, steps).sum(axis=1)
    found = sketch.shares(run, every, bins)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


def test_a_drawing():
    """Bars as tall as their shares, the tallest full; the mark at the mean age."""
    run = ema_optax.profile(ema_optax.power(exponent=1.0), 16)
    *rows, axis, numbers = sketch.lines(run, 1, sketch.ASCII)
    assert rows[0].startswith(" 12.1% |")  # 1 − (15/16)²
    assert axis.startswith("    0% +")
    assert numbers.split() == ["0", "8", "16"]
    assert {len(line) for line in (rows[-1], axis, numbers)} == {8 + 64}
    # Thirds of a row: weight of update t is (2t−1)/256, the last one has all 18.
    levels = np.rint((2 * np.arange(1, 17) - 1) / 31 * 18)
    drawn = [
        sum(sketch.ASCII.levels.index(row.ljust(72)[8 + column]) for row in rows)
        for column in range(64)
    ]
    np.testing.assert_array_equal(drawn, np.repeat(levels, 4))
    # Mean of t is Σ t(2t−1)/256 = 2856/256 of 16: 44.6 of 64, within column 44.
    assert axis[8:].index("^") == 44


def test_rare_folds_draw_no_comb(capsys: pytest.CaptureFixture[str]):
    """A plain mean of 50 folds is flat over 64 columns: all rows are full."""
    command = ["profile", "--decay=uniform", "--steps=1000", "--every=20"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("█" * 64 + "\n") == 6


@pytest.mark.once
def test_a_terminal_without_unicode():
    """Where stdout cannot encode blocks the drawing is ASCII."""
    done = subprocess.run(
        [*MODULE, "--decay", "0.99", "constant:0.99", "--steps", "100"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert "####" in done.stdout.decode("ascii")
    assert sketch.characters("utf-8") is sketch.BLOCKS
    for encoding in ("latin-1", "cp1252", "no such encoding", None):
        assert sketch.characters(encoding) is sketch.ASCII


def test_help_has_examples(capsys: pytest.CaptureFixture[str]):
    """It is ASCII, at most 80 columns, and every example in it runs."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["profile", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    for form in decay_text.FORMS.values():
        assert form in text
    examples = [
        line.split()[1:] for line in text.splitlines() if line.startswith("  ema-optax")
    ]
    assert len(examples) == 4
    for arguments in examples:
        if "--out" not in arguments:
            assert cli.main(arguments) == 0
            capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("powr:0.05", "the nearest: power:WIDTH"),
        ("power(0.05)", "the nearest: power:WIDTH"),
        ("half-life:2000", "the nearest: half_life:STEPS"),
        ("nonsense", "one of constant, warmup, debiased, uniform, power"),
        ("schedule:3", "no decay"),
        ("__class__:3", "no decay"),
        ("", "no decay"),
        ("1", "[0, 1)"),
        ("-0.5", "[0, 1)"),
        ("nan", "[0, 1)"),
        ("٠.٩", "no decay"),
        ("power:0.3", "(0, 0.2887]"),
        ("power", "either a width or an exponent"),
        ("power:1e-320", "power:1e-320"),
        ("constant", "write constant:DECAY"),
        ("uniform:3", "write uniform"),
        ("warmup:0.9,10,3", "write warmup:DECAY[,OFFSET]"),
        ("warmup:0.9,,", "write warmup:DECAY[,OFFSET]"),
        ("warmup:offset=9,0.9", "write warmup:DECAY[,OFFSET]"),
        ("warmup:0.9,offset=9,offset=8", "out of place"),
        ("warmup:0.9,ofset=9", "write warmup:DECAY[,OFFSET]"),
        ("half_life:ten", "write half_life:STEPS"),
        ("half_life:\x1b[2J", "write half_life:STEPS"),
        ("start_after:uniform", "write start_after:INNER,STEP"),
        ("start_after:unifrom,10", "the nearest: uniform"),
        ("scale_to_batch:power:0.05,2", "relative to the length of the run"),
    ],
)
def test_what_is_no_decay(text, says, capsys):
    """Code 2 and one line, with the nearest names or the form that works."""
    line = refused(["--steps", "10", "--decay", "0.9", text], capsys)
    assert "argument --decay" in line
    assert says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: --decay, --steps"),
        (["--decay", "0.9"], "required: --steps"),
        (["--steps", "10"], "required: --decay"),
        (["--decay", "--steps", "10"], "--decay: expected at least one argument"),
        (["--decay", "0.9", "--steps", "0"], "--steps"),
        (["--decay", "0.9", "--steps", "10000001"], "from 1 to 10000000"),
        (["--decay", "0.9", "--steps", "9", "--every", "0"], "--every"),
        (["--decay", "0.9", "--steps", "9", "--out", "a.txt"], ".png, .svg, .pdf"),
        (["--decay", "0.9", "--steps", "9", "--out", ""], "needs a path"),
    ],
)
def test_wrong_arguments(arguments, says, capsys):
    """Code 2, and one line that names the option."""
    assert says in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("name", "magic"),
    [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")],
)
def test_a_picture(name, magic, tmp_path: Path, capsys):
    """`--out` writes the format that its name ends in, beside table or JSON."""
    out = tmp_path / name
    command = ["profile", "--decay", "0.9", "uniform", "--steps", "50", "--out"]
    assert cli.main([*command, str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"Picture: {out}\n")
    assert out.read_bytes().startswith(magic)
    assert cli.main([*command, str(out), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"steps", "every", "profiles"}


def test_the_picture_is_of_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its curves are the decays by their names, over this run, folded so rarely."""
    drawn = []
    draw = plots.profiles
    monkeypatch.setattr(
        plots,
        "profiles",
        lambda *args, **kw: drawn.append(draw(*args, **kw)) or drawn[0],
    )
    command = ["profile", "--decay", "0.9", "power:0.1", "--steps=60", "--every=20"]
    assert cli.main([*command, "--out", str(tmp_path / "a.png")]) == 0
    for line, name in zip(
        drawn[0].get_lines(), ("warmup:0.9", "power:0.1"), strict=True
    ):
        assert line.get_label().startswith(f"{name}: mean age ")
        np.testing.assert_array_equal(line.get_xdata(), [0, 20, 40, 60])


def test_a_picture_that_cannot_be_made(tmp_path: Path, capsys):
    """A missing folder, or too many curves: code 1, one line, nothing printed."""
    many = [f"0.{digit}" for digit in range(1, 8)]
    for decays, out, says in (
        (["0.9"], tmp_path / "none" / "a.png", str(tmp_path / "none")),
        (many, tmp_path / "a.png", "one to 6 decays"),
    ):
        command = ["profile", "--steps", "9", "--decay", *decays, "--out", str(out)]
        assert cli.main(command) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("ema-optax profile: error: ")
        assert says in line
    assert not any(tmp_path.iterdir())


@pytest.mark.long
def test_without_optional_packages(tmp_path: Path):
    """Table, drawing and JSON need none; a picture names the extra that draws it."""
    script = (
        "import sys\n"
        "for name in ('rich', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"  # what a failed import looks like
        "from ema_optax._cli import main\n"
        "command = ['profile', '--decay', '0.9', '--steps', '9']\n"
        "assert main(command) == main([*command, '--json']) == 0\n"
        "sys.exit(main([*command, '--out', 'a.png']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "'ema-optax profile' needs matplotlib, which is not installed. "
        "Run: pip install 'ema-optax[plots]'\n"
    )
