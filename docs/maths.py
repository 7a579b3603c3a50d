"""Turns the formulas of notebooks into MathML, which browsers draw without a script."""

import html
import re

import latex2mathml.converter

# Code, pictures and outputs have dollars of their own.
CODE = re.compile(r"(<(pre|code|script|style|svg)\b.*?</\2>)", re.S)
FORMULA = re.compile(r"(\$\$)(.+?)\$\$|\$([^$\n]+)\$", re.S)


def on_page_content(content, page, config, files):
    """Looks at the pages that were notebooks: no other has formulas."""
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    parts = CODE.split(content)
    # Of three neighbours the first is text, the second a block, the third its tag.
    return "".join(
        FORMULA.sub(_mathml, part) if place % 3 == 0 else part
        for place, part in enumerate(parts)
        if place % 3 < 2
    )


def _mathml(formula):
    """Returns one formula, between `$$` as a block of its own."""
    text = html.unescape(formula[2] or formula[3])
    display = "block" if formula[1] else "inline"
    return latex2mathml.converter.convert(text, display=display)
