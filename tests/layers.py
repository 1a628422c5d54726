"""A picture of the package by floors, nbs/layers.svg, drawn from the imports of its modules."""
import ast
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PACKAGE, PICTURE = ROOT / "hybridvae", ROOT / "nbs" / "layers.svg"
WIDTH, HEIGHT, GAP_X, GAP_Y = 104, 26, 22, 34  # of a box, and between boxes, in pixels

Graph = dict[str, set[str]]  # module -> the modules that it imports


def imported_by(file: Path, modules: set[str]) -> set[str]:
    "The modules of the package that a module imports, inside functions too."
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            own = node.level == 1 or (node.module or "").split(".")[0] == "hybridvae"
            path = (node.module or "").removeprefix("hybridvae").strip(".")
            names |= {path} if own and path else {alias.name for alias in node.names} if own else set()
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("hybridvae.") for alias in node.names}
    return (names & modules) - {file.stem}


def import_graph(package: Path = PACKAGE) -> Graph:
    "All modules but those whose names begin with an underscore."
    files = {file.stem: file for file in sorted(package.glob("[!_]*.py"))}
    return {name: imported_by(file, set(files)) for name, file in files.items()}


def floors(graph: Graph) -> list[list[str]]:
    "Modules by floors: each imports only from floors below its own. Raises `ValueError` where imports form a circle."
    rest, done, result = dict(graph), set[str](), []
    while rest:
        floor = sorted(name for name, below in rest.items() if below <= done)
        if not floor:
            raise ValueError(f"imports in a circle: {', '.join(sorted(rest))}")
        result.append(floor)
        done |= set(floor)
        rest = {name: below for name, below in rest.items() if name not in done}
    return result


def direct(graph: Graph) -> Graph:
    "The imports that do not follow from others: without them a module would not be above the other."
    def above(name: str) -> set[str]:
        return graph[name].union(*(above(other) for other in graph[name]))
    return {name: below - set().union(*(above(other) for other in below)) for name, below in graph.items()}


def in_words(graph: Graph) -> str:
    "The picture as text."
    rows = floors(graph)
    return " ".join(f"Floor {number}: {', '.join(row)}." for number, row in enumerate(rows, 1))


def routes(graph: Graph) -> dict[tuple[str, str], list[str]]:
    """Each import -> the places that its line passes, one on every floor from the upper module to the lower one.

    Between the two the places are points of their own, named after the import, so that no line crosses a box.
    """
    level = {name: number for number, row in enumerate(floors(graph)) for name in row}
    return {(upper, lower): [upper, *(f"{upper}>{lower}" for _ in range(level[upper] - level[lower] - 1)), lower]
            for upper in graph for lower in sorted(graph[upper])}


def order_of(graph: Graph) -> list[list[str]]:
    "Modules and points by floors, from the bottom, each near those that its lines lead to."
    rows = floors(graph)
    level = {name: number for number, row in enumerate(rows) for name in row}
    neighbours: list[dict[str, list[tuple[int, str]]]] = [{name: [] for name in row} for row in rows]
    for (upper, _), route in routes(graph).items():
        for number, (a, b) in enumerate(zip(route, route[1:])):
            high = level[upper] - number
            neighbours[high].setdefault(a, []).append((high - 1, b))
            neighbours[high - 1].setdefault(b, []).append((high, a))
    place = {(number, name): float(i) for number, row in enumerate(neighbours) for i, name in enumerate(row)}
    for sweep in range(8):
        for number in range(len(rows))[::1 if sweep % 2 else -1]:
            mean = {name: sum(place[o] for o in near) / max(1, len(near)) for name, near in neighbours[number].items()}
            ordered = sorted(mean, key=lambda name: (mean[name], name))  # noqa: B023  used at once
            place |= {(number, name): i - (len(ordered) - 1) / 2 for i, name in enumerate(ordered)}
    return [sorted(row, key=lambda name: place[number, name]) for number, row in enumerate(neighbours)]


def svg(graph: Graph) -> str:
    "The picture: the lowest floor at the bottom, a line from each module to those that it rests on directly."
    edges = direct(graph)
    rows = order_of(edges)
    wide = lambda name: 0 if ">" in name else WIDTH
    spans = [sum(map(wide, row)) + GAP_X * (len(row) - 1) for row in rows]
    width, height = max(spans) + 2 * GAP_X, len(rows) * (HEIGHT + GAP_Y) + GAP_Y
    centre = {}
    for level, (row, span) in enumerate(zip(rows, spans)):
        left, top = (width - span) / 2, height - (level + 1) * (HEIGHT + GAP_Y)
        for name in row:
            centre[level, name] = left + wide(name) / 2, top + HEIGHT / 2
            left += wide(name) + GAP_X
    level = {name: number for number, name in centre if ">" not in name}
    lines = [line([centre[level[upper] - i, name] for i, name in enumerate(route)])
             for (upper, _), route in routes(edges).items()]
    boxes = [box(name, *centre[number, name]) for name, number in level.items()]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    about = f"<title>The modules of hybridvae by floors</title>\n<desc>{escape(in_words(graph))}</desc>"
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, about, ground, *lines, *boxes, "</svg>"]) + "\n"


def line(points: list[tuple[float, float]]) -> str:
    "A smooth line from the first centre to the last."
    (x, y), *rest = points
    path = f"M{x:g} {y:g}"
    for to_x, to_y in rest:
        middle = (y + to_y) / 2
        path += f" C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"
        x, y = to_x, to_y
    return f'<path d="{path}" fill="none" stroke="#8a94a6"/>'


def box(name: str, x: float, y: float) -> str:
    "A module's name in its box, by its centre."
    return (f'<rect x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
            f'fill="#eef3fa" stroke="#4a6fa5"/>\n'
            f'<text x="{x:g}" y="{y + 4:g}" text-anchor="middle" font-size="13" font-family="sans-serif" '
            f'fill="#1d2a3a">{escape(name)}</text>')
