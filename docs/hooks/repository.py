"""A hook of MkDocs: what lies outside of docs/, and the links of the repository, in the site.

All pages are written for readers of the repository too, so their links are paths in it. Here they become links of the
site: to the pages that are made of files outside of docs/, or to copies of source files.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.ipynb"))
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "tests/ptx_emulator/README.md": "emulator.md",
    "benchmarks/results": "measurements.md",  # made by measurements.py
} | {name: name.replace(".ipynb", ".md") for name in NOTEBOOKS}
SOURCES = {page: name for name, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(#[^)\s]*)?(?=\))")
ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def notebook_page(name):
    """The cells of a notebook as Markdown, and where the notebook is."""
    parts = []
    for cell in json.loads((ROOT / name).read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, *rest = parts
    return "\n\n".join([title, f"This page is the notebook [{name}]({posixpath.basename(name)}).", *rest])


def on_files(files, config):
    for name, page in PAGES.items():
        if (ROOT / name).is_file():
            content = notebook_page(name) if name in NOTEBOOKS else (ROOT / name).read_text()
            files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def in_the_site(link):
        path, anchor = link[1], link[2] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        uri = target.removeprefix("docs/")
        if target in PAGES and not (target == source and target in NOTEBOOKS):
            uri = PAGES[target]
        elif uri == target:
            if not (ROOT / target).is_file():
                return link[0]
            if not files.get_file_from_path(target):
                files.append(File(target, str(ROOT), config.site_dir, config.use_directory_urls))
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + anchor

    return LINK.sub(in_the_site, markdown)


def on_post_page(output, page, config):
    """Refuses pages that a reader without a network would see parts of."""
    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri}: got {found[0]}, wanted nothing that is loaded from elsewhere")
    return output
