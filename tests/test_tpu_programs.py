"""Reading what a TPU program does: small programs whose traffic is known by hand."""

import pathlib

import pytest

from tests import scripts

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "tpu_programs.py"
if not SCRIPT.exists():
    pytest.skip("no benchmarks beside these tests", allow_module_level=True)
tpu_programs = scripts.loaded(SCRIPT)

FUSED = """
%fused (p.0: f32[8,128], p.1: f32[8,128]) -> f32[8,128] {
  %p.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  ROOT %add.0 = f32[8,128]{1,0:T(8,128)} add(%p.0, %p.1)
}
"""
TREE = 8 * 128 * 4  # bytes of f32[8,128]


def _program(*lines, before=FUSED):
    """Returns a scheduled program of these instructions, of two params in HBM."""
    head = [
        "ENTRY %main (x.1: f32[8,128], y.1: f32[8,128]) -> f32[8,128] {",
        "  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)",
        '  %y.1 = f32[8,128]{1,0:T(8,128)} parameter(1), metadata={op_name="y"}',
    ]
    name = "HloModule jit_step, is_scheduled=true"
    return "\n".join([name, before, *head, *(f"  {line}" for line in lines), "}"])


def _same(text):
    """Returns the one count of a program that always does the same."""
    due, otherwise = tpu_programs.work(text)
    assert due == otherwise
    return {key: count for key, count in due.items() if count}


def test_a_fusion_reads_its_operands_and_writes_its_results():
    """Each array once; scalars are no traffic, and a tuple has several results."""
    text = _program(
        "%c.1 = f32[]{:T(128)} constant(1)",
        "%c.2 = f32[]{:T(128)S(6)} add(%c.1, %c.1)",
        "%f.1 = (f32[8,128]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) "
        "fusion(%x.1, %c.1, /*index=2*/%y.1), kind=kLoop, "
        'calls=%fused, metadata={op_name="f(%x.1)"}',
        "ROOT %g.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%f.1), index=0",
    )
    assert _same(text) == {"kernels": 1, "hbm": 3.5 * TREE}


def test_a_fusion_that_only_cuts_an_operand_reads_the_piece():
    """As where params are whole and shadows split; used elsewhere, it reads it all."""
    text = _program(
        "ROOT %f.1 = f32[2,128]{1,0:T(2,128)} fusion(%x.1, %y.1), kind=kLoop, "
        "calls=%fused",
        before="""
%fused (p.0: f32[8,128], p.1: f32[8,128]) -> f32[2,128] {
  %p.0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %s.0 = f32[2,128]{1,0:T(2,128)} slice(%p.0), slice={[0:2], [0:128]}
  %s.1 = f32[2,128]{1,0:T(2,128)} slice(%p.1), slice={[0:2], [0:128]}
  %n.1 = f32[8,128]{1,0:T(8,128)} negate(%p.1)
  %z.0 = s32[] constant(0)
  %b.0 = f32[2,128]{1,0:T(2,128)} broadcast(%z.0), dimensions={}
  ROOT %add.0 = f32[2,128]{1,0:T(2,128)} add(%s.0, %s.1)
}
""",
    )
    assert _same(text) == {"kernels": 1, "hbm": TREE / 4 + TREE + TREE / 4}


def test_a_prefetch_counts_once():
    """Fetched in two slices and used in VMEM: one read, and the kernel's own rest."""
    slices = [
        f"%s.{i} = ((f32[8,128]{{1,0:T(8,128)}}), f32[4,128]{{1,0:T(4,128)S(1)}}, "
        f"s32[]{{:S(2)}}) slice-start(%x.1), slice={{[{4 * i}:{4 * i + 4}], [0:128]}}"
        for i in (0, 1)
    ]
    done = [
        f"%d.{i} = f32[4,128]{{1,0:T(4,128)S(1)}} slice-done(%s.{i})" for i in (0, 1)
    ]
    text = _program(
        *slices,
        *done,
        "%b.1 = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%d.0, %d.1), "
        'custom_call_target="ConcatBitcast"',
        "ROOT %f.1 = f32[8,128]{1,0:T(8,128)} fusion(%b.1, %y.1), kind=kLoop, "
        "calls=%fused",
    )
    found = _same(text)
    assert found.pop("vmem") == 2 * TREE  # written by the fetch, read by the kernel
    assert found == {"kernels": 1, "hbm": 3 * TREE}


def test_the_host_counts_apart():
    """In from the host's memory, S(5), by way of HBM, and back."""
    there = "f32[8,128]{1,0:T(8,128)S(5)}"
    here = "f32[8,128]{1,0:T(8,128)}"
    text = _program(
        f"%h.1 = {there} parameter(2)",
        f"%i.1 = ({here}, {there}, u32[]{{:S(2)}}) copy-start(%h.1)",
        f"%i.2 = {here} copy-done(%i.1)",
        f"%f.1 = {here} fusion(%x.1, %i.2), kind=kLoop, calls=%fused",
        f"%o.1 = ({there}, {here}, u32[]{{:S(2)}}) copy-start(%f.1)",
        f"ROOT %o.2 = {there} copy-done(%o.1)",
    )
    assert _same(text) == {"kernels": 1, "hbm": 5 * TREE, "host": 2 * TREE}


def test_of_a_conditional_the_dearest_and_the_cheapest_branch():
    """The fold in one, nothing in the other."""
    branches = f"""{FUSED}
%fold (t.0: (f32[8,128], f32[8,128])) -> f32[8,128] {{
  %t.0 = (f32[8,128]{{1,0:T(8,128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %l.0 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%t.0), index=0
  %r.0 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%t.0), index=1
  ROOT %f.0 = f32[8,128]{{1,0:T(8,128)}} fusion(%l.0, %r.0), kind=kLoop, calls=%fused
}}

%keep (t.9: (f32[8,128], f32[8,128])) -> f32[8,128] {{
  %t.9 = (f32[8,128]{{1,0:T(8,128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  ROOT %l.9 = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%t.9), index=0
}}
"""
    for names in (
        "branch_computations={%keep, %fold}",
        "true_computation=%fold, false_computation=%keep",
    ):
        due, otherwise = tpu_programs.work(
            _program(
                "%a.1 = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) "
                "tuple(%x.1, %y.1)",
                "%n.1 = s32[]{:T(128)} constant(1)",
                "ROOT %z.1 = f32[8,128]{1,0:T(8,128)} conditional(%n.1, %a.1, %a.1), "
                + names,
                before=branches,
            )
        )
        assert due == {"kernels": 1, "hbm": 3 * TREE}
        assert not otherwise


@pytest.mark.parametrize(
    ("config", "rounds"),
    [
        ('backend_config={"known_trip_count":{"n":"5"}}', (5, 5)),
        ("metadata={}", (1, 0)),
    ],
)
def test_a_loop_runs_as_often_as_is_known(config, rounds):
    """Or once and not at all: a loop of 0 or 1 rounds stands for a conditional."""
    body = f"""{FUSED}
%more (b.0: f32[8,128]) -> pred[] {{
  %b.0 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %yes.0 = pred[]{{:T(512)}} constant(true)
}}

%body (b.1: f32[8,128]) -> f32[8,128] {{
  %b.1 = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %f.0 = f32[8,128]{{1,0:T(8,128)}} fusion(%b.1, %b.1), kind=kLoop, calls=%fused
}}
"""
    text = _program(
        "ROOT %w.1 = f32[8,128]{1,0:T(8,128)} while(%x.1), condition=%more, "
        f"body=%body, {config}",
        before=body,
    )
    assert [c["hbm"] for c in tpu_programs.work(text)] == [3 * TREE * n for n in rounds]


def test_collectives_count_wherever_they_are():
    """Alone, in two halves, and inside a fusion."""
    fused = FUSED.replace("add(%p.0, %p.1)", "all-gather(%p.0), dimensions={0}")
    text = _program(
        "%a.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%x.1), to_apply=%sum",
        "%a.2 = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) "
        "all-gather-start(%a.1), dimensions={0}",
        "%a.3 = f32[8,128]{1,0:T(8,128)} all-gather-done(%a.2)",
        "ROOT %f.1 = f32[8,128]{1,0:T(8,128)} fusion(%a.3, %y.1), kind=kCustom, "
        "calls=%fused",
        before=f"%sum (s.0: f32[]) -> f32[] {{\n  %s.0 = f32[] parameter(0)\n}}{fused}",
    )
    found = _same(text)
    assert (found["all-reduce"], found["all-gather"]) == (1, 2)
    assert found["hbm"] == 7 * TREE
