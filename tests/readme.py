"""README.md from nbs/index.ipynb: the same text, with links as seen from the top folder; and the pictures in it.

What the records have to say is written into the index first: one cell, and the picture of samples.
"""
import base64
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from layers import PICTURE, import_graph, svg
from nbconvert import MarkdownExporter

from hybridvae.findings import PICTURE as PAIRS
from hybridvae.findings import first_page, pictured, show_pairs

ROOT = Path(__file__).parents[1]


def readme(index=ROOT / "nbs" / "index.ipynb"):
    "The text of README.md. On the site, Quarto turns the same links into links to pages."
    text, _ = MarkdownExporter().from_filename(str(index))
    text = re.sub(r"\]\((?![a-z]+:|#|/)", "](nbs/", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


FOUND = "found-00"  # the cell of the index that the records write


def write_found(index=ROOT / "nbs" / "index.ipynb"):
    "Bring that cell, and the picture in it, in step with the records."
    nb = json.loads(index.read_text(encoding="utf-8"))
    [cell] = [cell for cell in nb["cells"] if cell["id"] == FOUND]
    cell["source"] = first_page().splitlines(keepends=True)
    index.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figure = show_pairs(pictured())
    if figure:
        figure.savefig(index.parent / PAIRS, dpi=100, pil_kwargs={"quality": 88})


def tour_pictures(tour=ROOT / "nbs" / "00_tour.ipynb"):
    "The figures of the tour that the home page shows: path -> PNG, as the notebook stores them."
    figures = {}
    for cell in json.loads(tour.read_text())["cells"]:
        for name in re.findall(r"^#\| label: fig-(\w+)$", "".join(cell["source"]), flags=re.M):
            [png] = [out["data"]["image/png"] for out in cell["outputs"] if "image/png" in out.get("data", {})]
            figures[tour.parent / f"tour-{name}.png"] = base64.b64decode(png)
    return figures


if __name__ == "__main__":
    write_found()
    for path, png in tour_pictures().items():
        path.write_bytes(png)
    PICTURE.write_text(svg(import_graph()), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
