"""Every exercise of a lesson: its stub fails with the check's own sentence, its solution passes, wrong answers fail.

An exercise is a stub and a check, flagged `#| exercise`, and a folded solution. Hint, expectation and the output of the
solution are folded too, or they would answer the question. What is stored of the check, and so
published, is its answer to the stub, in every notebook. Of the notebook above it, and of the
solution, only those statements run that define, directly or not, a name which the check uses: no training, no pictures
(both run where the whole notebook is tested).
"""
import ast
import builtins
import contextlib
import functools
import importlib
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pytest
import yaml
from hybridvae import data
from hybridvae.core import exercise
from test_site import cells, code, default_exp, directives, exported, md, only_imports, parsed, source

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

ONE_TEACHER = """def one_step(start, images=160):
    for steps in ladder(start):
        student = student_of(teacher, steps)  # not of the student before
        with tempfile.TemporaryDirectory() as folder:
            train(student, data, TrainConfig(kimg=0.032, batch_size=16, lr=5e-4), folder, progress=False)
    return student
"""

# (notebook, number of the exercise) -> answers that a reader may give, each of which the check must refuse
WRONG = {
    ("00a_core", 1): ["colliding_pairs = lambda: ((0, 1), (0, 1))", "colliding_pairs = lambda: ((0, 1), (1, 1))"],
    ("00b_data", 1): [
        "ring = lambda u, v, size: abs(np.hypot(u, v) - 0.8 * size) - 0.15 * size",
        "ring = lambda u, v, size: abs(np.hypot(u, v) - 0.65 * size) - 0.3 * size",
        "ring = lambda u, v, size: abs(max(abs(u), abs(v)) - 0.65 * size) - 0.15 * size"],
    ("00b_data", 2): [
        "shrink = lambda image, k: image[::k, ::k]",
        "shrink = lambda image, k: image.reshape(k, image.shape[0] // k, k, -1).mean(axis=(0, 2))"],
    ("00c_priors", 1): ["length = 8", "length = 0", "length = 4"],
    ("00c_priors", 2): [
        COUPLING.format("s.exp().sum(dim=1)") + INVERSE.format("(u_b - t) * (-s).exp()"),
        COUPLING.format("s.sum()") + INVERSE.format("(u_b - t) * (-s).exp()"),
        COUPLING.format("s.sum(dim=1)") + INVERSE.format("u_b * (-s).exp() - t"),
        "my_coupling, my_inverse = lambda z, f: (z, z.new_zeros(len(z))), lambda u, f: u",
        "my_coupling = lambda z, f: z"],
    ("00c_priors", 3): ["my_prior = lambda codes: StandardNormal(2)", "my_prior = lambda codes: fit_mixture(codes, 2)"],
    ("00d_vae", 1): ["collapsed = images.median(dim=0).values", "collapsed = images[0]", "collapsed = 0 * images[0]"],
    ("00d_vae", 2): [
        "tighter_bound = lambda q, z: (Normal(z, s).log_prob(x) + prior.log_prob(z) - q.log_prob(z)).mean()",
        "tighter_bound = lambda q, z: (Normal(z, s).log_prob(x) + prior.log_prob(z) - q.log_prob(z)).logsumexp(0)",
        "tighter_bound = lambda q, z: Normal(z, s).log_prob(x).logsumexp(0) - math.log(len(z))",
        "tighter_bound = lambda q, z: Normal(z, s).log_prob(x) + prior.log_prob(z) - q.log_prob(z)"],
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
    ("00g_training", 1): ["images_to_forget = lambda halflife, share=0.99: halflife / (1 - share)",
                          "images_to_forget = lambda halflife, share=0.99: halflife * math.log(1 / (1 - share))"],
    ("00h_features", 1): [
        "best_without_variance = lambda: (torch.zeros(8, 4), torch.zeros(8, 4), 0.0)",
        "best_without_variance = lambda: (2 * torch.eye(8)[:, :4], 2 * torch.eye(8)[:, :4], 0.0)"],
    ("00h_features", 2): ["features_for = lambda excess, n, m: 4 * excess / (1 / n + 1 / m)",
                          "features_for = lambda excess, n, m: 4 * (excess * (n + m) - 1) - 1"],
    ("00h_metrics", 1): ["cheat = lambda images: images", "cheat = lambda images: 255 - images",
                         "cheat = lambda images: images.clone().index_fill_(2, torch.tensor([0]), 0)"],
    ("00h_metrics", 2): ["collapsed = lambda images: images", "collapsed = lambda images: 0 * images",
                         "collapsed = lambda images: images[:2].repeat(len(images) // 2, 1, 1, 1)"],
    ("00h_profiling", 1): ["largest_batch = lambda fixed, each, limit: (limit - fixed) // each",
                           "largest_batch = lambda fixed, each, limit: limit // each"],
    ("00i_entries", 1): [
        "same_hash_other_record = lambda entry: (entry, True, True)",
        "same_hash_other_record = lambda entry: (dataclasses.replace(entry, seed=1), False, False)",
        "same_hash_other_record = lambda entry: (dataclasses.replace(entry, subset=None), True, False)"],
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
    ("02_joint_training", 4): ["fine_tuned = lambda value, images=800: pair"],
    ("03_adaptive_conditioning", 1): ["lost = 'half'", "lost = 'more'"],
    ("03_adaptive_conditioning", 2): [
        "sensitivity = lambda x_hat, z: torch.ones(len(z))", "sensitivity = lambda x_hat, z: torch.rand(len(z))",
        "sensitivity = lambda x_hat, z: x_hat.square().mean(dim=(1, 2, 3))"],
    ("03_adaptive_conditioning", 3): [
        DRAW.format("one = kept[:1].repeat(n, 1)\n    return model.vae.decode(one), one"),
        DRAW.format("return model.vae.decode(kept[:n]), vae.prior.sample(n, generator)"),
        "def draw_certain(n, share, generator):\n    z = vae.prior.sample(n, generator)\n"
        "    return model.vae.decode(z), z"],
    ("03_adaptive_conditioning", 4): [
        "at_level = lambda x_hat, z, level: x_hat",
        "at_level = lambda x_hat, z, level: model.refine(x_hat, z, steps=3, "
        "generator=torch.Generator().manual_seed(0))"],
    ("04_latent_diffusion", 1): ["factor = 4", "factor = 64", "factor = 2"],
    ("04_latent_diffusion", 2): [
        "halves = lambda vae, a, b: vae.reconstruct(a)",
        "halves = lambda vae, a, b: vae.decode(torch.cat([vae.encode(a)[0].chunk(2, 1)[0], "
        "vae.encode(b)[0].chunk(2, 1)[1]], 1))"],
    ("04_latent_diffusion", 3): ["affordable = lambda hybrid, pixel, steps: steps", "affordable = lambda *models: 1"],
    ("04_latent_diffusion", 4): [
        "repaired = lambda z, start, steps=10: z",
        "repaired = lambda z, start, steps=10: z + start * torch.randn_like(z)",
        "repaired = lambda z, start, steps=10: latent.latent.sample(len(z), seeded())"],
    ("06_evaluation", 1): ["allowed = {'better', 'fewer shapes are wrong', 'less fine detail is right'}",
                           "allowed = {'fewer shapes are wrong', 'sharper'}", "allowed = {'fewer shapes are wrong'}"],
    ("06_evaluation", 2): ["on_front = lambda frame, cost, quality: [*frame['model']]",
                           "on_front = lambda frame, cost, quality: frame.sort_values(cost)['model'].head(2)",
                           "on_front = lambda frame, cost, quality: frame['model'][frame[quality] <= 2]"],
    ("06_evaluation", 3): ["half_width = lambda deviation, n: 1.96 * deviation / n**0.5",
                           "half_width = lambda deviation, n: deviation * t.ppf(0.975, n) / n**0.5",
                           "half_width = lambda deviation, n: deviation * t.ppf(0.95, n - 1) / n**0.5"],
    ("06_evaluation", 4): ["opposed = lambda: ('scenes', 'diffusevae-form1', 'vae')",
                           "opposed = lambda: ('scenes', 'ddpm', 'diffusevae-form2')"],
    ("89_bench", 1): ["wins = lambda a, b: float(sum(a.seconds) < sum(b.seconds))",
                      "wins = lambda a, b: float(np.mean(np.sort(a.seconds) < np.sort(b.seconds)))"],
    ("89_bench", 2): ["steps_to_earn = lambda rows, precision, batch: rows[1]['warm_up_seconds'] / 0.25",
                      "steps_to_earn = lambda rows, precision, batch: 30 / 100"],
    ("90_campaign", 1): [
        "to_run_again = lambda entries, **changes: [e.experiment for e in entries if changes]",
        "to_run_again = lambda entries, **changes: ['diffusevae-form1']"],
    ("91_cli", 1): ["command = ['train', '--model', 'ddpm', '--seed', '1', '--minutes', '5']",
                    "command = ['run', '--experiment', 'ddpm', '--minutes', '5']"],
    ("91_cli", 2): ["words = ['--steps', '50']", "words = ['--seed', '1']"],
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
    ("05b_distillation", 4): ["one_step = lambda start, images=160: student_of(teacher, 1)", ONE_TEACHER],
    ("05c_pca_guidance", 1): ["first = 'same'", "first = 'larger'"],
    ("05c_pca_guidance", 2): ["without = lambda pca, z, i: pca.project(z, i)",
                              "without = lambda pca, z, i: z * (torch.arange(z.shape[1]) != i)",
                              "without = lambda pca, z, i: z - (z @ pca.components[i])[:, None] * pca.components[i]"],
    ("05c_pca_guidance", 3): ["needed = lambda pca, share: int((pca.share() < share).sum())",
                              "needed = lambda pca, share: max(1, round(share * len(pca.mean)))"],
    ("05c_pca_guidance", 4): ["safe_scores = lambda pca, least=0.1: scores(1, pca, True)",
                              "safe_scores = lambda pca, least=0.1: scores(1, pca)"],
}


# --- the exercises of a notebook ------------------------------------------------------------------------------------

class Exercise(NamedTuple):
    number: int
    stub: str
    check: str
    stored: str  # what the check printed when the notebook was executed
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
    stored = lambda cell: "".join("".join(output.get("text", "")) for output in cell["outputs"])
    return [Exercise(number_of(all_cells[c]), source(all_cells[s]), source(all_cells[c]), stored(all_cells[c]),
                     source(all_cells[t]), all_cells[:s]) for s, c, t in zip(*places.values())]


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


def changed(statement):
    "The names whose objects a statement changes: `a[0] = b`, `a.b = c`, and calls such as `a.append(b)`, `a.b.eval()`."
    found = set()
    for node in ast.walk(statement):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            targets = [node.value.func]
        for target in targets:
            inside = isinstance(target, (ast.Attribute, ast.Subscript))
            while isinstance(target, (ast.Attribute, ast.Subscript)):
                target = target.value
            found |= {target.id} if inside and isinstance(target, ast.Name) else set()
    return found


def sliced(texts, live):
    "The statements of these texts that define or change what `live` names stand for, and the names that they need."
    found, branches = [], (ast.If, ast.For, ast.While, ast.Try)
    own = set().union(*(names(text)[0] for text in texts))  # not modules: `plt.plot(a)` changes nothing that is needed
    for statement in (s for text in reversed(texts) for s in reversed(ast.parse(text).body)):
        text = ast.unparse(statement)
        stored, read = names(text)
        if (stored | changed(statement) & own) & live or text.startswith("torch.manual_seed("):
            found.append(text)
            live = (live - (set() if isinstance(statement, branches) else stored)) | read
    return found[::-1], live


def needed(before, texts):
    "Of the cells above an exercise the statements that these texts need, in order; imports and exports left out."
    above = [ast.unparse(parsed(cell)) for cell in before
             if not (exported(cell) or "exercise" in directives(cell) or only_imports(cell))]
    return sliced(above, names("\n".join(texts))[1])[0]


def answer_of(item):
    "The solution without its picture: what the check looks at."
    return "\n".join(sliced([item.solution], names(item.check)[1])[0])


def namespace(nb, item):
    "What a reader has when the exercise begins: the notebook's module, its imports, and the cells that it needs."
    module = default_exp(nb)
    there = {**vars(importlib.import_module(module))} if module else {}
    for cell in item.before:
        if only_imports(cell) and not exported(cell):
            exec(source(cell), there)
    for text in needed(item.before, [item.stub, answer_of(item), item.check]):
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
    stub, solution = (verdict(item, answer, there) for answer in (item.stub, f"{item.stub}\n{answer_of(item)}"))
    found = [] if re.match(refused, stub) else [f"the stub gets {stub!r}"]
    found += [] if solution == f"Exercise {item.number}: passed.\n" else [f"the solution gets {solution!r}"]
    found += [] if wrong else ["no wrong answer is listed"]
    verdicts = [(answer, verdict(item, f"{item.stub}\n{answer}", there)) for answer in wrong]
    found += [f"{answer!r} gets {text!r}" for answer, text in verdicts if not re.match(refused, text)]
    return found if item.stored == stub else [*found, f"stored is {item.stored!r}, not {stub!r}"]


LESSONS = sorted({notebook for notebook, _ in WRONG})
# drawing 20,000 images takes seconds
DRAWN_ONCE = {name: functools.cache(data.DATASETS[name]) for name in ("shapes", "scenes")}


@pytest.mark.parametrize("stem", LESSONS)
def test_stub_fails_solution_passes_wrong_answers_fail(stem, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_BUDGET", "0.02")
    for name, drawn in DRAWN_ONCE.items():
        monkeypatch.setitem(data.DATASETS, name, drawn)
    nb = json.loads((NBS / f"{stem}.ipynb").read_text())
    items = exercises(nb)
    assert [item.number for item in items] == [number for notebook, number in WRONG if notebook == stem]
    found = {item.number: faults(item, namespace(nb, item), WRONG[stem, item.number]) for item in items}
    assert not any(found.values()), found


def test_every_notebook_with_exercises_is_tested():
    with_exercises = {path.stem for path in NBS.glob("[!_]*.ipynb")
                      if any("exercise" in directives(cell) for cell in cells(json.loads(path.read_text()), "code"))}
    assert with_exercises == set(LESSONS)


def given_away(nb):
    "What a reader of the exercises sees before asking for it: hints, expectations, outputs of solutions."
    found = [f"a hint in sight: {source(cell)[:60]!r}" for cell in cells(nb, "markdown")
             if re.search(r"\*(Hint|Expect)\*", source(cell))]
    hidden = {"source_hidden": True, "outputs_hidden": True}
    return found + [f"a solution in sight: {source(cell)[:60]!r}" for cell in cells(nb, "code")
                    if directives(cell).get("code-summary", "").startswith('"Solution')
                    and not cell["metadata"].get("jupyter", {}).items() >= hidden.items()]


@pytest.mark.parametrize("stem", LESSONS)
def test_no_exercise_gives_its_answer_away(stem):
    assert not given_away(json.loads((NBS / f"{stem}.ipynb").read_text()))


def test_the_site_folds_the_outputs_of_solutions():
    site = yaml.safe_load((NBS / "_quarto.yml").read_text())["format"]["html"]
    script = (NBS / site["include-after-body"]).read_text()
    assert all(part in script for part in ("<script>", '"Solution"', "details.code-fold", ".cell-output"))


# --- each part on a small notebook ----------------------------------------------------------------------------------

SOLUTION = '#| code-fold: true\n#| code-summary: "Solution"\n'
CHECK = ("#| exercise\nwith exercise(1):\n    assert double(2) is not None, 'the stub returns nothing.'\n"
         "    assert double(two) == 4, f'found {double(two)}, expected 4.'")
ANSWER = {"output_type": "stream", "name": "stdout", "text": ["Exercise 1: not yet. the stub returns nothing.\n"]}
SMALL = {"cells": [
    code("#| code-fold: true\nfrom hybridvae.core import exercise"),
    code("two = 1 + 1"),
    code("raise RuntimeError('an hour of training')\nmodel = None"),
    code("#| exercise\ndef double(x):\n    ..."),
    code(CHECK, **ANSWER),
    code(SOLUTION + "def double(x):\n    return 2 * x"),
]}


def small(index=None, text=""):
    planted = {"cells": [code(text) if i == index else cell for i, cell in enumerate(SMALL["cells"])]}
    [item] = exercises(planted)
    return item, namespace(planted, item)


def test_only_needed_statements_run_and_a_good_exercise_has_no_fault():
    item, there = small()
    assert needed(item.before, [item.check]) == ["two = 1 + 1"] and there["two"] == 2
    assert faults(item, there, ["double = lambda x: x", "double = lambda x: 2"]) == []


@pytest.mark.parametrize("index, text, wrong, says", [
    (3, "#| exercise\ndef double(x):\n    return 4", ["double = abs"], "the stub gets 'Exercise 1: passed"),
    (5, SOLUTION + "def double(x):\n    return x", ["double = abs"], "the solution gets 'Exercise 1: not yet"),
    (4, CHECK.replace("double(two) == 4", "double(two) > 1"), ["double = abs"], "'double = abs' gets 'Exercise 1: pas"),
    (4, "#| exercise\nwith exercise(1):\n    assert double(2) == 4", ["double = abs"], "the stub gets"),
    (4, CHECK, ["double = abs"], "stored is ''"),
    (None, "", [], "no wrong answer is listed"),
], ids=["stub", "solution", "weak check", "no message", "not stored", "no wrong answer"])
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


@pytest.mark.parametrize("text, kept", [
    ("a = 1\na = 2", ["a = 2"]), ("a = []\na.append(b)\nc.append(a)", ["a = []", "a.append(b)"]),
    ("b = 1\na, d = b, 2", ["b = 1", "a, d = (b, 2)"]), ("a = f()\na.b.c(2)\nprint(a)", ["a = f()", "a.b.c(2)"]),
    ("a = {}\nfor c in b:\n    a[c] = 1", ["a = {}", "for c in b:\n    a[c] = 1"]),
    ("a = 1\nif b:\n    a = 2", ["a = 1", "if b:\n    a = 2"]), ("train(a)\nplt.plot(a)", [])])
def test_statements_that_define_or_change_a_name_are_kept(text, kept):
    assert sliced([text], {"a"})[0] == kept


@pytest.mark.parametrize("jupyter", [{}, {"source_hidden": True}, {"source_hidden": True, "outputs_hidden": False}])
def test_a_solution_in_sight_is_found(jupyter):
    hidden = {"source_hidden": True, "outputs_hidden": True}
    planted = lambda flags: {"cells": [code(SOLUTION + "2") | {"metadata": {"jupyter": flags}}]}
    assert not given_away(planted(hidden))
    assert "a solution in sight" in given_away(planted(jupyter))[0]


@pytest.mark.parametrize("text", ["*Hint*: divide.", "Divide. *Expect* two."])
def test_a_hint_in_sight_is_found(text):
    assert "a hint in sight" in given_away({"cells": [md(text)]})[0]
    assert not given_away({"cells": [md("<details><summary>Hint</summary>\n\ndivide\n\n</details>")]})


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
