"""What the site takes from elsewhere: the README, the benchmarks, and examples of docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site whose text stands elsewhere.
SOURCES = {"index.md": ROOT / "README.md", "benchmarks.md": ROOT / "benchmarks" / "README.md"}
WIDE = {"benchmarks.md"}  # whose tables need the room of the table of contents
PICTURES = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    for name, source in SOURCES.items():
        head = "---\nhide: [toc]\n---\n" * (name in WIDE)
        files.append(File.generated(config, name, content=head + _linked(source)))
    for picture in PICTURES.glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """What GitHub reads, as this parser wants it; links to files of the source tree are text."""
    tree = "python|tests|csrc|kernels|benchmarks|examples"
    markdown = re.sub(rf"\[([^]]+)\]\(\.\./(?:{tree})[^)]*\)", r"\1", markdown)
    markdown = re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), markdown)
    return re.sub(r"^  - ", "    - ", markdown, flags=re.MULTILINE)


class Examples(griffe.Extension):
    """Fences the doctests of docstrings: without, Markdown reads `>>>` as quotes of quotes."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            found = re.sub(r"(?m)^>>> .*(?:\n.+)*", r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = found


def _linked(source: Path) -> str:
    """The page with the links that lead to other pages of the site."""
    text = source.read_text()
    text = text.replace("](docs/", "](").replace("](benchmarks/README.md)", "](benchmarks.md)")
    # Files of the source tree.
    return re.sub(r"\[([^]]+)\]\((?:benchmarks/)?(?:results/\w+\.md|[A-Z]+\.md)\)", r"\1", text)
