"""README.md from nbs/index.ipynb: the same text, with links as seen from the top folder; and the picture in it."""
import re
from pathlib import Path

from layers import PICTURE, import_graph, svg
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def readme(index=ROOT / "nbs" / "index.ipynb"):
    "The text of README.md. On the site, Quarto turns the same links into links to pages."
    text, _ = MarkdownExporter().from_filename(str(index))
    text = re.sub(r"\]\((?![a-z]+:|#|/)", "](nbs/", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    PICTURE.write_text(svg(import_graph()), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
