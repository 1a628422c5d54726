"""Every exercise of a lesson: its stub fails with the check's own sentence, its solution passes, wrong answers fail.

An exercise is a stub and a check, flagged `#| exercise`, and a folded solution. Only those cells of its notebook run
that define, directly or not, a name which the three use; training, which changes what a name stands for, does not.
"""
import ast
import builtins
import contextlib
import importlib
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pytest
from hybridvae.core import exercise
from test_site import cells, code, default_exp, directives, exported, only_imports, parsed, source

matplotlib.use("Agg")
NBS = Path(__file__).parents[1] / "nbs"

COUPLING = """def my_coupling(z, scale_and_shift):
    z_a, z_b = z.chunk(2, dim=1)
    s, t = scale_and_shift(z_a)
    return torch.cat([z_a, z_b * s.exp() + t], dim=1), {}
"""
INVERSE = """def my_inverse(u, scale_and_shift):
    u_a, u_b = u.chunk(2, dim=1)
    s, t = scale_and_shift(u_a)
    return torch.cat([u_a, {}], dim=1)
"""

MY_LOSS = """def my_loss(network, x0, t, eps, process):
    a, s = process.scales(t, x0)
    return (network(a * x0 + s * eps, t) - ({})){}
"""

CAPPED = """class Capped(Balance):
    name = "capped"

    def strength(self, kimg, reconstruction, diffusion):
        return {}
"""
DRAW = """def draw_certain(n, share, generator):
    z = vae.prior.sample(200, generator)
    kept = z[certain.rank(model.vae.decode(z), z) <= share]
    {}
"""

# (notebook, number of the exercise) -> answers that a reader may give, each of which the check must refuse
WRONG = {
    ("00a_core", 1): ["colliding_pairs = lambda: ((0, 1), (0, 1))", "colliding_pairs = lambda: ((0, 1), (1, 1))"],
    ("00c_priors", 1): ["length = 8", "length = 0", "length = 4"],
    ("00c_priors", 2): [
        COUPLING.format("s.exp().sum(dim=1)") + INVERSE.format("(u_b - t) * (-s).exp()"),
        COUPLING.format("s.sum()") + INVERSE.format("(u_b - t) * (-s).exp()"),
        COUPLING.format("s.sum(dim=1)") + INVERSE.format("u_b * (-s).exp() - t"),
        "my_coupling, my_inverse = lambda z, f: (z, z.new_zeros(len(z))), lambda u, f: u"],
    ("00c_priors", 3): ["my_prior = lambda codes: StandardNormal(2)", "my_prior = lambda codes: fit_mixture(codes, 2)"],
    ("00d_vae", 1): ["collapsed = images.median(dim=0).values", "collapsed = images[0]", "collapsed = 0 * images[0]"],
    ("00d_vae", 2): [
        "tighter_bound = lambda q, z: (Normal(z, s).log_prob(x) + prior.log_prob(z) - q.log_prob(z)).mean()",
        "tighter_bound = lambda q, z: (Normal(z, s).log_prob(x) + prior.log_prob(z) - q.log_prob(z)).logsumexp(0)",
        "tighter_bound = lambda q, z: Normal(z, s).log_prob(x).logsumexp(0) - math.log(len(z))"],
    ("00d_vae", 3): ["train_vae = lambda beta: VAE(**PRESETS['shapes']['vae'], beta=beta).eval()"],
    ("00e_diffusion", 1): ["prediction = 1", "prediction = -1"],
    ("00e_diffusion", 2): [
        "mean_in_x = lambda x_t, x0, x_hat, t: diffusion.posterior(x0, x_t, t)[0]",
        "mean_in_x = lambda x_t, x0, x_hat, t: diffusion.posterior(x0, x_t, t)[0] + x_hat",
        "mean_in_x = lambda x_t, x0, x_hat, t: diffusion.posterior(x0 + x_hat, x_t, t)[0]"],
    ("00e_diffusion", 3): [
        "my_ddim = lambda x0, y, t, s: ancestral_step(diffusion, x0, y, t, s)",
        "my_ddim = lambda x0, y, t, s: diffusion.posterior(x0, y, t, s)[0]",
        "my_ddim = lambda x0, y, t, s: diffusion.alpha_bar(s)**0.5 * x0 + (1 - diffusion.alpha_bar(s))**0.5 * y"],
    ("00e_diffusion", 4): [
        "deviation = lambda eta, steps, network=ideal_network: "
        "diffusion.sample(network, noise, 'ddim', steps, clip=False).std().item()",
        "deviation = lambda eta, steps, network=0: diffusion.sample(ideal_network, noise, 'ddim', steps, eta=eta, "
        "clip=False, generator=torch.Generator().manual_seed(1)).std().item()"],
    ("00f_unet", 1): ["first_loss = 0", "first_loss = 2", "first_loss = 0.5"],
    ("00f_unet", 2): [
        "published_unet = lambda: UNet(width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(8,), cond_channels=3)",
        "published_unet = lambda: UNet(width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,))",
        "published_unet = lambda: UNet(width=128, cond_channels=3)"],
    ("00f_unet", 3): [
        MY_LOSS.format("a * eps - s * x0", ".square().mean(dim=1)"),
        MY_LOSS.format("a * x0 - s * eps", ".square().mean()"),
        MY_LOSS.format("eps", ".square().mean()"),
        MY_LOSS.format("a * eps - s * x0", ".square().sum()")],
    ("00f_unet", 4): [
        "trained_with = lambda prediction: DDPM(PRESETS['shapes']['unet'], {'prediction': prediction})",
        "trained_with = lambda prediction: DDPM(PRESETS['shapes']['unet'], {'prediction': 'v'})"],
    ("01_diffusevae", 1): ["stronger = 'noise'"],
    ("01_diffusevae", 2): [
        "without_concatenation = lambda: DiffuseVAE(vae.config, preset['unet'], form=1, concat=False)",
        "without_concatenation = lambda: DiffuseVAE(vae.config, preset['unet'], form=2)"],
    ("01_diffusevae", 3): [
        "guidance = lambda alone, given, weight: given + weight * (given - alone)",
        "guidance = lambda alone, given, weight: weight * given",
        "guidance = lambda alone, given, weight: given + weight * (alone - given)"],
    ("01_diffusevae", 4): [
        "painted = lambda: torch.randint(256, (1, 3, 32, 32))", "painted = lambda: torch.zeros(1, 3, 32, 32)",
        "painted = lambda: torch.rand(32, 32, 3)"],
    ("02_joint_training", 1): ["ratio = 100", "ratio = 10"],
    ("02_joint_training", 2): [CAPPED.format("self.value"), CAPPED.format("reconstruction / diffusion"),
                               CAPPED.format("(diffusion / reconstruction).clamp(max=self.value)")],
    ("02_joint_training", 3): [
        "only_code = lambda x_hat, z: (x_hat, z)", "only_code = lambda x_hat, z: (x_hat, z.detach())",
        "only_code = lambda x_hat, z: ScaledGradient.apply(x_hat, z, lambda a, b: (a, 0 * b))",
        "only_code = lambda x_hat, z: (0 * x_hat, z)"],
    ("03_adaptive_conditioning", 1): [
        "sensitivity = lambda x_hat, z: torch.ones(len(z))", "sensitivity = lambda x_hat, z: torch.rand(len(z))",
        "sensitivity = lambda x_hat, z: x_hat.square().mean(dim=(1, 2, 3))"],
    ("03_adaptive_conditioning", 2): [
        DRAW.format("one = kept[:1].repeat(n, 1)\n    return model.vae.decode(one), one"),
        DRAW.format("return model.vae.decode(kept[:n]), vae.prior.sample(n, generator)"),
        "def draw_certain(n, share, generator):\n    z = vae.prior.sample(n, generator)\n"
        "    return model.vae.decode(z), z"],
    ("04_latent_diffusion", 1): [
        "halves = lambda vae, a, b: vae.reconstruct(a)",
        "halves = lambda vae, a, b: vae.decode(torch.cat([vae.encode(a)[0].chunk(2, 1)[0], "
        "vae.encode(b)[0].chunk(2, 1)[1]], 1))"],
    ("04_latent_diffusion", 2): ["affordable = lambda hybrid, pixel, steps: steps", "affordable = lambda *models: 1"],
    ("05a_quantization", 1): [
        "simulated = lambda weight: weight", "simulated = lambda weight: int8_weight(weight)[0].float()",
        "simulated = lambda weight: (weight / weight.abs().max() * 127).round() * weight.abs().max() / 127"],
    ("05a_quantization", 2): ["best_share = lambda weight, shares: 1.0", "best_share = lambda weight, shares: 0.5"],
    ("05a_quantization", 3): ["most_sensitive = lambda model, ranges, names, x, t: names[0]",
                              "most_sensitive = lambda model, ranges, names, x, t: names[-1]"],
    ("05b_distillation", 1): ["share = 0.5", "share = 2 / 3", "share = 40"],
    ("05b_distillation", 2): [
        "three_steps = lambda process, x1, x2, x3, *timesteps: (x1 + x2 + x3) / 3",
        "three_steps = lambda process, x1, x2, x3, *timesteps: x3",
        "def three_steps(process, x1, x2, x3, t, m, n, s):\n    w = second_weight(process, t, m, s)\n"
        "    return w * x3 + (1 - w) * x1"],
    ("05b_distillation", 3): [
        "moved = lambda error=0.01: dict.fromkeys(('eps', 'v', 'x0'), error)",
        "moved = lambda error=0.01: {'eps': 1 * error, 'v': 157 * error, 'x0': error}"],
    ("05c_pca_guidance", 1): ["without = lambda pca, z, i: pca.project(z, i)",
                              "without = lambda pca, z, i: z * (torch.arange(z.shape[1]) != i)",
                              "without = lambda pca, z, i: z - (z @ pca.components[i])[:, None] * pca.components[i]"],
    ("05c_pca_guidance", 2): ["needed = lambda pca, share: int((pca.share() < share).sum())",
                              "needed = lambda pca, share: max(1, round(share * len(pca.mean)))"],
    ("05c_pca_guidance", 3): ["safe_scores = lambda pca, least=0.1: scores(1, pca, True)",
                              "safe_scores = lambda pca, least=0.1: scores(1, pca)"],
}


# --- the exercises of a notebook ------------------------------------------------------------------------------------

class Exercise(NamedTuple):
    number: int
    stub: str
    check: str
    solution: str
    before: list  # the notebook's code cells above the stub


def number_of(cell):
    "The number in the check of an exercise, None in other cells."
    found = re.search(r"^with exercise\((\d+)\):", source(cell), flags=re.M)
    return int(found[1]) if found and "exercise" in directives(cell) else None


def exercises(nb):
    "The exercises of a notebook. Raises `ValueError` where stub, check and solution do not follow each other."
    all_cells = cells(nb, "code")
    kinds = ["check" if number_of(c) else "stub" if "exercise" in directives(c) else
             "solution" if directives(c).get("code-summary") == '"Solution"' else "" for c in all_cells]
    places = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in ("stub", "check", "solution")}
    if [k for k in kinds if k] != ["stub", "check", "solution"] * len(places["stub"]):
        raise ValueError(f"not stub, check and solution in turn: {[k for k in kinds if k]}")
    return [Exercise(number_of(all_cells[c]), *(source(all_cells[i]) for i in (s, c, t)), all_cells[:s])
            for s, c, t in zip(*places.values())]


class Names(ast.NodeVisitor):
    "The names that statements store, and those that they read before they store them."

    def __init__(self, known=()):
        self.stored, self.read = set(known), set()

    def visit_in_order(self, *nodes):
        for node in nodes:
            self.visit(node)

    def visit_inside(self, own, nodes):
        "Statements with names of their own: what they store is not seen outside."
        inner = Names(self.stored | set(own))
        inner.visit_in_order(*nodes)
        self.read |= inner.read

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.stored.add(node.id)
        elif node.id not in self.stored:
            self.read.add(node.id)

    def visit_Assign(self, node):
        self.visit_in_order(node.value, *node.targets)

    def visit_AugAssign(self, node):
        self.visit_in_order(node.value, ast.copy_location(ast.Name(ast.unparse(node.target), ast.Load()), node))

    def visit_For(self, node):
        self.visit_in_order(node.iter, node.target, *node.body, *node.orelse)

    def visit_FunctionDef(self, node):
        self.stored.add(node.name)
        self.visit_in_order(*node.decorator_list, *node.args.defaults)
        self.visit_inside([arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)], node.body)

    def visit_Lambda(self, node):
        self.visit_inside([arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)], [node.body])

    def visit_ClassDef(self, node):
        self.stored.add(node.name)
        self.visit_in_order(*node.bases)
        self.visit_inside([], node.body)

    def visit_comprehension_of(self, node):
        parts = [part for loop in node.generators for part in (loop.iter, loop.target, *loop.ifs)]
        self.visit_inside([], [*parts, *([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])])

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_comprehension_of


def names(text):
    "The names that a cell stores at its top level, and those that it needs from above."
    found = Names()
    found.visit(ast.parse(text))
    return found.stored, found.read - set(vars(builtins))


def needed(before, texts):
    "Of the cells above an exercise those that define what these texts read, in order; imports and exports left out."
    live, found = names("\n".join(texts))[1], []
    for cell in reversed(before):
        if exported(cell) or "exercise" in directives(cell) or only_imports(cell):
            continue
        stored, read = names(ast.unparse(parsed(cell)))
        if stored & live:
            found.append(source(cell))
            live = (live - stored) | read
    return found[::-1]


def namespace(nb, item):
    "What a reader has when the exercise begins: the notebook's module, its imports, and the cells that it needs."
    module = default_exp(nb)
    there = {**vars(importlib.import_module(module))} if module else {}
    for cell in item.before:
        if only_imports(cell) and not exported(cell):
            exec(source(cell), there)
    for text in needed(item.before, [item.stub, item.solution, item.check]):
        exec(text, there)
    return there


def verdict(item, answer, there):
    "What the check prints of an answer."
    there, printed = dict(there), io.StringIO()
    exec(answer, there)
    with contextlib.redirect_stdout(printed):
        exec(item.check, there)
    plt.close("all")
    return printed.getvalue()


def faults(item, there, wrong):
    "What is wrong with an exercise."
    refused = rf"Exercise {item.number}: not yet\. \S.{{15,}}"
    stub, solution = (verdict(item, answer, there) for answer in (item.stub, f"{item.stub}\n{item.solution}"))
    found = [] if re.match(refused, stub) else [f"the stub gets {stub!r}"]
    found += [] if solution == f"Exercise {item.number}: passed.\n" else [f"the solution gets {solution!r}"]
    found += [] if wrong else ["no wrong answer is listed"]
    verdicts = [(answer, verdict(item, f"{item.stub}\n{answer}", there)) for answer in wrong]
    return found + [f"{answer!r} gets {text!r}" for answer, text in verdicts if not re.match(refused, text)]


LESSONS = sorted({notebook for notebook, _ in WRONG})
LATER = {"00b_data", "00g_training", "00h_features", "00h_metrics",
         "00h_profiling", "00i_entries", "06_evaluation",
         "89_bench", "90_campaign", "91_cli"}  # their checks are bare asserts


@pytest.mark.parametrize("stem", LESSONS)
def test_stub_fails_solution_passes_wrong_answers_fail(stem, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_BUDGET", "0.02")
    nb = json.loads((NBS / f"{stem}.ipynb").read_text())
    items = exercises(nb)
    assert [item.number for item in items] == [number for notebook, number in WRONG if notebook == stem]
    found = {item.number: faults(item, namespace(nb, item), WRONG[stem, item.number]) for item in items}
    assert not any(found.values()), found


def test_every_notebook_with_exercises_is_tested():
    with_exercises = {path.stem for path in NBS.glob("[!_]*.ipynb")
                      if any("exercise" in directives(cell) for cell in cells(json.loads(path.read_text()), "code"))}
    assert with_exercises - LATER == set(LESSONS)


# --- each part on a small notebook ----------------------------------------------------------------------------------

SOLUTION = '#| code-fold: true\n#| code-summary: "Solution"\n'
CHECK = ("#| exercise\nwith exercise(1):\n    assert double(2) is not None, 'the stub returns nothing.'\n"
         "    assert double(two) == 4, f'found {double(two)}, expected 4.'")
SMALL = {"cells": [
    code("#| code-fold: true\nfrom hybridvae.core import exercise"),
    code("two = 1 + 1"),
    code("raise RuntimeError('an hour of training')\nmodel = None"),
    code("#| exercise\ndef double(x):\n    ..."),
    code(CHECK),
    code(SOLUTION + "def double(x):\n    return 2 * x"),
]}


def small(index=None, text=""):
    planted = {"cells": [code(text) if i == index else cell for i, cell in enumerate(SMALL["cells"])]}
    [item] = exercises(planted)
    return item, namespace(planted, item)


def test_only_needed_cells_run_and_a_good_exercise_has_no_fault():
    item, there = small()
    assert needed(item.before, [item.check]) == ["two = 1 + 1"] and there["two"] == 2
    assert faults(item, there, ["double = lambda x: x", "double = lambda x: 2"]) == []


@pytest.mark.parametrize("index, text, wrong, says", [
    (3, "#| exercise\ndef double(x):\n    return 4", ["double = abs"], "the stub gets 'Exercise 1: passed"),
    (5, SOLUTION + "def double(x):\n    return x", ["double = abs"], "the solution gets 'Exercise 1: not yet"),
    (4, CHECK.replace("double(two) == 4", "double(two) > 1"), ["double = abs"], "'double = abs' gets 'Exercise 1: pas"),
    (4, "#| exercise\nwith exercise(1):\n    assert double(2) == 4", ["double = abs"], "the stub gets"),
    (None, "", [], "no wrong answer is listed"),
], ids=["stub", "solution", "weak check", "no message", "no wrong answer"])
def test_a_planted_fault_is_found(index, text, wrong, says):
    found = faults(*small(index, text), wrong)
    assert says in found[0]


@pytest.mark.parametrize("text, stored, read", [
    ("a = b\nc = a", "ac", "b"), ("a = a + 1", "a", "a"), ("a += b", "", "ab"), ("[a for a in b if c]", "", "bc"),
    ("{a: b for a in c}", "", "bc"), ("for a in b:\n    c = a", "ac", "b"), ("a = lambda b: b + c", "a", "c"),
    ("def a(b=d):\n    c = b + e\n    return c", "a", "de"), ("class a(b):\n    c = d", "a", "bd"),
    ("with a as b:\n    b", "b", "a"), ("a[0] = b", "", "ab"), ("a = len(b)", "a", "b")])
def test_names_are_needed_where_they_are_read_before_they_are_stored(text, stored, read):
    assert names(text) == (set(stored), set(read))


def test_an_exercise_without_solution_is_found():
    with pytest.raises(ValueError, match="not stub, check and solution in turn"):
        exercises({"cells": SMALL["cells"][:-1]})


def test_a_check_says_what_it_found_and_lets_other_errors_through(capsys):
    with exercise(3):
        pass
    with exercise(4):
        raise AssertionError("found 1, expected 2")
    assert capsys.readouterr().out == "Exercise 3: passed.\nExercise 4: not yet. found 1, expected 2\n"
    with pytest.raises(ZeroDivisionError), exercise(5):
        _ = 1 / 0
