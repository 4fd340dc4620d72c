"""mkdocs hooks: formulas become MathML, and links to the rest of the repository lead to copies inside the site."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# pages that stand at the repository's root, where their readers look first
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

TAG = re.compile(r"\\tag\{(\d+)\}\s*$")


def _relinked(text: str, folder: str, page: str, linked: set[str]) -> str:
    """The text of a page of `folder` with its links as they are from `page`; what they copy is added to `linked`."""

    def repair(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            goal = PAGES[path]
        elif path.startswith("docs/"):
            goal = path.removeprefix("docs/")
        elif (ROOT / path).is_file():
            goal = f"source/{path}"
            linked.add(path)
        else:
            return match[0]  # mkdocs reports it
        return f"{match[1]}{posixpath.relpath(goal, posixpath.dirname(page) or '.')}{match[3]}"

    return LINK.sub(repair, text)


def on_files(files, config):
    """Pages from the root, and every file of the repository that a page links to."""
    linked: set[str] = set()
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = _relinked((ROOT / name).read_text(), "", PAGES[name], linked)
        files.append(File.generated(config, PAGES[name], content=text))
    for file in files.documentation_pages():
        if file.generated_by is None:
            folder = posixpath.join("docs", posixpath.dirname(file.src_uri))
            _relinked(Path(file.abs_src_path).read_text(), folder, file.src_uri, linked)
    for path in sorted(linked):
        files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.generated_by is not None:
        return markdown
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    return _relinked(markdown, folder, page.file.src_uri, set())


def on_page_content(text, page, config, files):
    """Each formula as MathML, which browsers draw by themselves; one that cannot be read ends the build.

    A number (\\tag) stands at the right and is an anchor: maths.html#eq-5.
    """

    def render(match: re.Match[str]) -> str:
        formula = html.unescape(match[2]).strip()
        formula, *number = TAG.split(formula)
        try:
            drawn = convert(formula, display="block" if match[1] == "div" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: {formula!r}: {error}") from error
        if not number:
            return drawn
        return f'<div class="numbered" id="eq-{number[0]}">{drawn}<span>({number[0]})</span></div>'

    return FORMULA.sub(render, text)
