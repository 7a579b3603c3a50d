"""Brings files of the repository into the site, and follows links to them.

Pages link as the repository lies, so that the links work where it is read: a page of
`docs/` writes `../benchmarks/gpu.md`. In the site everything lies below one root, and
this hook of mkdocs turns the link into `benchmarks/gpu.md`.
"""

import pathlib
import posixpath
import re

import mkdocs.plugins
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
SHOWN = ("*.md", "LICENSE", "benchmarks/*.md", "notebooks/*.ipynb")
# The README is the front page of the repository, and index.md that of the site.
LEFT_OUT = {"README.md"}
LINK = re.compile(r"(\]\(|src=\")(?![a-z]+:|#|/)([^)\s#\"]+)")


@mkdocs.plugins.event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    """Adds the repository's pages and notebooks, and each file that a page links to."""
    shown = (path for pattern in SHOWN for path in sorted(ROOT.glob(pattern)))
    names = {path.relative_to(ROOT).as_posix() for path in shown} - LEFT_OUT
    for name in names.copy():
        if name.endswith(".md"):
            names |= _linked(ROOT / name)
    for file in files.documentation_pages():
        names |= _linked(pathlib.Path(file.abs_src_path))
    for name in sorted(names):
        files.append(_file(name, config))
    return files


def _linked(page):
    """Returns the files that a page links to and that are in no folder of the site."""
    links = (page.parent / link[2] for link in LINK.finditer(page.read_text()))
    files = (link.resolve() for link in links)
    names = {f.relative_to(ROOT).as_posix() for f in files if f.is_file()}
    return {name for name in names - LEFT_OUT if not name.startswith("docs/")}


def _file(name, config):
    """Returns a file of the repository, at the same place in the site."""
    return File(name, str(ROOT), config.site_dir, config.use_directory_urls)


def on_page_markdown(markdown, page, config, files):
    """Rewrites links from where a page lies in the repository to its place here.

    Blocks of other libraries' code are marked by a second word, which this Markdown
    does not know.
    """
    markdown = markdown.replace("```python theirs\n", "```python\n")
    uri = page.file.src_uri
    source = pathlib.Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    return LINK.sub(lambda link: link[1] + _moved(link[2], source, uri), markdown)


def _moved(target, source, uri):
    """Returns a link of the repository's file `source` as one of the page `uri`."""
    name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    name = {"README.md": "docs/index.md"}.get(name, name).removeprefix("docs/")
    return posixpath.relpath(name, posixpath.dirname(uri) or ".")
