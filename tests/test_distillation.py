"""Progressive distillation: two DDIM steps in one, students of every teacher, ladders, and `hybridvae distill`."""
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae.cli import app
from hybridvae.core import Draws, build_model, image_draws, load_model, save_model, weights_hash
from hybridvae.data import ImageData, draw_shapes, load_data, shapes_factors
from hybridvae.diffusevae import DiffuseVAE, convert_form, guide
from hybridvae.diffusion import PREDICTIONS, GaussianDiffusion, ddim_step
from hybridvae.distillation import (STUDENTS, AdversarialDiffuseVAE, CompressedDiffuseVAE, DistilledDDPM,
                                    GuidedDiffuseVAE, TwoSteps, ladder, second_weight, student_of)
from hybridvae.entries import Entry
from hybridvae.experiments import entries_of
from hybridvae.generators import checked_options
from hybridvae.joint import JointDiffuseVAE
from hybridvae.latent import LatentDiffusion
from hybridvae.runs import run_entry
from hybridvae.training import Average, TrainConfig, adamw, train
from hybridvae.unet import DDPM
from typer.testing import CliRunner

UNET = dict(image_size=16, width=8, multipliers=(1, 2), attention=(8,))
FLAT = dict(image_size=32, width=8, multipliers=(1,), attention=(), patch=4)
VAE = dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2))
COSINE = {"schedule": "cosine", "prediction": "v", "weighting": "min_snr"}
pytestmark = pytest.mark.usefixtures("float32")


def ddpm(prediction="v", **unet):
    return randomised(DDPM(UNET | unet, COSINE | {"prediction": prediction}))


def hybrid(form=1, z_guidance=False, **options):
    return randomised(DiffuseVAE(VAE, UNET, COSINE, form=form, z_guidance=z_guidance, **options))


TEACHERS = {"ddpm": ddpm, "form 1": hybrid, "form 1, z": lambda: hybrid(z_guidance=True), "form 2": lambda: hybrid(2),
            "form 2, z": lambda: hybrid(2, True), "form 2, no concat": lambda: hybrid(2, concat=False)}
teachers = pytest.mark.parametrize("kind", TEACHERS)


def images(n=8, seed=1, dtype=None):
    return torch.rand(n, 3, 16, 16, generator=generator(seed), dtype=dtype) * 2 - 1


def shapes(n=64, split="train"):
    factors = shapes_factors(np.arange(n))
    return ImageData("shapes", split, draw_shapes(factors, 16), factors)


class Linear(torch.nn.Module):
    "A denoiser that is linear at each timestep: output = c_t x_t."

    def __init__(self, timesteps=1000):
        super().__init__()
        numbers = torch.rand(timesteps, generator=generator(3), dtype=torch.float64)
        self.c = torch.nn.Parameter(numbers - 0.5)

    def forward(self, x, t, **given):
        return self.c[t][:, None, None, None] * x


# --- two steps in one -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 5, 16, 32])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_one_step_with_the_target_ends_where_two_steps_of_the_teacher_end(schedule, steps, double_precision):
    process, teacher = GaussianDiffusion(schedule, prediction="v"), Linear()
    predict = lambda y, t: process.to_x0(teacher(y, t), y, t).detach()
    two, y = TwoSteps(process, steps), torch.randn(2, 3, 4, 4, generator=generator())
    ends = [*two.t.tolist()[1:], -1]
    for step, (t, middle, end) in enumerate(zip(two.t.tolist(), two.middle.tolist(), ends)):
        x1 = predict(y, torch.full((2,), t))
        y_m = ddim_step(process, x1, y, t, middle)
        want = ddim_step(process, predict(y_m, torch.full((2,), middle)), y_m, middle, end)
        found = ddim_step(process, two.target(predict, y, torch.full((2,), step)), y, t, end)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_trained_linear_student_does_in_one_step_what_its_linear_teacher_does_in_two(prediction, double_precision):
    # of a linear teacher two steps are linear, too: the student can reach a loss of 0, and must then be the same map
    student = DistilledDDPM(UNET, COSINE | {"prediction": prediction, "weighting": "truncated_snr"}, steps=4)
    student.unet = Linear()
    teacher = copy.deepcopy(student.unet)
    student.keep_start()
    predict = lambda y, t: student.diffusion.to_x0(teacher(y, t), y, t)
    student.teach = lambda given, shift: predict  # nothing clipped: clipping is not linear
    optimiser = torch.optim.LBFGS(student.unet.parameters(), max_iter=60, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure():
        optimiser.zero_grad()
        loss = student.training_loss(images(64), draws=Draws(0, 0))["loss"]
        loss.backward()
        return loss

    begin = closure().item()
    optimiser.step(closure)
    assert closure().item() < 1e-10 * begin
    noise = torch.randn(5, 3, 16, 16, generator=generator())
    sample = lambda network, steps: student.diffusion.sample(network, noise, "ddim", steps, clip=False)
    with torch.no_grad():
        torch.testing.assert_close(sample(student.unet, 4), sample(teacher, 8), rtol=1e-5, atol=1e-5)
        assert (sample(teacher, 4) - sample(teacher, 8)).abs().max() > 1e-2  # four steps of the teacher do not


def test_the_target_lies_between_the_two_predictions():
    process = GaussianDiffusion("cosine")
    for steps in (1, 3, 8, 64):
        weights = TwoSteps(process, steps).weights
        assert ((weights > 0) & (weights <= 1)).all() and weights[-1] == 1  # the last step ends at its prediction
        assert (weights[:-1] < 1).all()
    assert second_weight(process, 999, 499, -1) == 1


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 32])
def test_the_steps_of_a_student_are_every_other_step_of_its_teacher(steps):
    process = GaussianDiffusion("cosine")
    two, fine = TwoSteps(process, steps), process.timestep_grid(2 * steps)
    assert [v for pair in zip(two.t.tolist(), two.middle.tolist()) for v in pair] == fine[:-1]
    assert two.t.tolist() == process.timestep_grid(steps)[:-1]


def test_where_numbers_are_rounded_grids_differ_by_one_timestep_at_most():
    process = GaussianDiffusion("cosine")
    for steps in range(1, 501):
        two, fine = TwoSteps(process, steps), process.timestep_grid(2 * steps)
        pairs = [v for pair in zip(two.t.tolist(), two.middle.tolist()) for v in pair]
        assert max(abs(a - b) for a, b in zip(pairs, fine)) <= 1 and len(pairs) == 2 * steps
        assert all(a > b for a, b in zip(pairs, pairs[1:]))
    with pytest.raises(ValueError, match="steps is 1002"):
        TwoSteps(process, 501)


# --- the loss -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_truncated_error_of_the_image(prediction):
    student, x = student_of(ddpm("v"), 4), images()
    student.diffusion = GaussianDiffusion("cosine", prediction=prediction, weighting="truncated_snr")
    student.two_steps, student.taught = TwoSteps(student.diffusion, 4), student.diffusion
    student.keep_start()
    student.unet = randomised(copy.deepcopy(student.unet), 0.1, seed=5)
    loss = student.training_loss(x, draws=Draws(0, 0))["loss"]
    draws = Draws(0, 0)
    step, eps = draws.randint(4, 8), draws.randn(*x.shape)
    t = student.two_steps.t[step]
    y = student.diffusion.q_sample(x, t, eps)
    with torch.no_grad():
        target = student.two_steps.target(student.teach({}, None), y, step)
        error = (student.diffusion.to_x0(student.unet(y, t), y, t) - target).square().mean(dim=(1, 2, 3))
    snr = torch.tensor(student.diffusion.alphas_cumprod / (1 - student.diffusion.alphas_cumprod))[t]
    torch.testing.assert_close(loss.item(), (snr.clamp(min=1) * error).mean().item(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("z_guidance", [False, True])
def test_both_forms_have_the_same_loss_where_their_weights_are_converted(z_guidance):
    one = hybrid(1, z_guidance)
    students = [student_of(teacher, 2) for teacher in (one, convert_form(one))]
    for student in students:
        student.keep_start()
        scale = 1.1  # another network than the teacher
        student.unet.head[-1].weight.data *= scale
    a, b = (student.training_loss(images(), draws=Draws(0, 0))["loss"].item() for student in students)
    assert a > 0 and a == pytest.approx(b, rel=1e-4)


@teachers
def test_the_teacher_does_not_learn_and_the_student_and_nothing_else_does(kind):
    teacher = TEACHERS[kind]()
    student = student_of(teacher, 2)
    student.keep_start()
    student.train()
    student.training_loss(images(), draws=Draws(0, 0))["loss"].backward()
    [frozen] = student.teacher
    assert not frozen.training and not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    assert sum(p.grad.abs().sum() for p in student.unet.parameters() if p.grad is not None) > 0
    if hasattr(student, "vae"):
        assert not student.vae.training and not any(p.requires_grad for p in student.vae.parameters())
    own = {id(p) for p in student.unet.parameters()}
    assert {id(p) for group in adamw(student, 1e-3, 0).param_groups for p in group["params"]} == own
    assert {id(p) for p in Average(student).source.values()} == own
    assert student.state_dict().keys() == teacher.state_dict().keys()


# --- students -------------------------------------------------------------------------------------------------------

@teachers
def test_a_student_starts_as_its_teacher_and_its_weights_are_a_model_of_their_own(kind, tmp_path):
    teacher = TEACHERS[kind]()
    student = student_of(teacher, 4)
    draw = lambda model, **options: model.sample(3, generator=image_draws(0, 0, 3), **options)
    assert torch.equal(draw(student), draw(teacher, sampler="ddim", steps=4)) and student.nfe(student.steps) == 4
    assert torch.equal(draw(student, sampler="dpmpp", steps=3), draw(teacher, sampler="dpmpp", steps=3))
    assert checked_options(student) == {"sampler": "ddim", "steps": 4}
    assert checked_options(teacher) == {"sampler": "dpmpp", "steps": 20}
    student.keep_start()
    again = load_model(save_model(student, tmp_path / "student.safetensors"))
    assert type(again) is STUDENTS[type(teacher).__name__] and again.steps == 4 and again.teacher == ()
    assert torch.equal(draw(again), draw(student)) and weights_hash(again) == weights_hash(student)
    json.dumps(again.config)


def test_a_student_of_a_student_takes_half_its_steps():
    first = student_of(hybrid(), 8)
    second = student_of(first, 4)
    assert second.config == first.config | {"steps": 4}
    assert second.two_steps.t.tolist() == first.two_steps.t.tolist()[::2]
    for steps in (8, 3, 2):
        with complains("takes 8 steps", f"{steps} cannot"):
            student_of(first, steps)


def test_a_teacher_of_the_noise_gets_a_student_of_v():
    teacher = ddpm("eps")
    student = student_of(teacher, 4)
    assert student.diffusion.prediction == "v" and student.config["teacher_prediction"] == "eps"
    student.keep_start()
    y, t = torch.randn(4, 3, 16, 16, generator=generator()), torch.tensor([50, 200, 400, 700])
    with torch.no_grad():
        want = teacher.diffusion.to_x0(teacher.unet(y, t), y, t).clamp(-1, 1)
        assert torch.equal(student.teach({}, None)(y, t), want)
    assert "teacher_prediction" not in student_of(student, 2).config  # a student of v
    assert "teacher_prediction" not in student_of(ddpm("x0"), 4).config
    assert student_of(ddpm("x0"), 4).diffusion.prediction == "x0"


def test_what_can_be_distilled():
    joint = randomised(JointDiffuseVAE(VAE, UNET, COSINE, balance={"name": "uncertainty"}))
    student = student_of(joint, 2)
    assert weights_hash(student.unet) == weights_hash(joint.unet) and not student.vae.encoder.training
    assert student_of(ddpm(dropout=0.3), 2).unet.config["dropout"] == 0
    with complains("a LatentDiffusion cannot be distilled", "DiffuseVAE"):
        student_of(LatentDiffusion(VAE, {"width": 8, "blocks": 1}), 2)


def test_ladders():
    assert ladder(64) == [32, 16, 8, 4, 2, 1] and ladder(16, 4) == [8, 4] and ladder(12, 3) == [6, 3]
    for start, last in ((4, 4), (10, 4), (12, 4), (2, 4)):
        with complains(f"from {start} steps to {last}"):
            ladder(start, last)


# --- variants -------------------------------------------------------------------------------------------------------

def taught(cls, teacher, **options):
    "A student of this class with its teacher's weights, and the teacher loaded."
    student = build_model({**teacher.config, "model": cls.__name__, "teacher": teacher.config, **options})
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.teacher.load_state_dict(teacher.state_dict())
    student.keep_start()
    return student.train()


KINDS = pytest.mark.parametrize("kind", ["form 1, z", "form 2", "form 2, z", "form 2, no concat"])


@KINDS
def test_a_compressed_student_learns_what_its_teacher_predicts(kind):
    teacher = TEACHERS[kind]()
    student = taught(CompressedDiffuseVAE, teacher)
    assert student.training_loss(images(), draws=Draws(0, 0))["loss"] < 1e-8  # the teacher's own weights
    student.unet.head[-1].weight.data *= 1.1
    loss = student.training_loss(images(), draws=Draws(0, 0))["loss"]
    loss.backward()
    draws, x = Draws(0, 0), images()
    x_hat, z = student.draw_coarse(x, draws)
    t = draws.randint(1000, len(x))
    x_t = student.diffusion.q_sample(x, t, draws.randn(*x.shape), student.shift(x_hat))
    error = (student.denoiser(x_hat, z)(x_t, t) - teacher.denoiser(x_hat, z)(x_t, t)).square().mean(dim=(1, 2, 3))
    weight = student.diffusion.loss_weight(t)
    torch.testing.assert_close(loss.item(), (weight * error).mean().item(), rtol=2e-3, atol=0)
    assert all(p.grad is None for p in student.teacher.parameters()) and not student.teacher.training


def test_the_teacher_of_a_smaller_student_is_in_no_file(tmp_path):
    teacher = hybrid()
    student = taught(CompressedDiffuseVAE, teacher)
    assert student.state_dict().keys() == teacher.state_dict().keys()
    small = build_model(student.config | {"unet": {**student.config["unet"], "width": 4}})
    assert small.teacher.unet.width == 8 and small.unet.width == 4
    again = load_model(save_model(student, tmp_path / "student.safetensors"))
    assert type(again) is CompressedDiffuseVAE and weights_hash(again) == weights_hash(student)
    own = {id(p) for p in student.unet.parameters()}
    assert {id(p) for group in adamw(student, 1e-3, 0).param_groups for p in group["params"]} == own


@KINDS
def test_a_guided_student_begins_as_its_teacher_and_learns_its_guided_prediction(kind):
    options = {"concat": "no concat" not in kind, "z_guidance": ", z" in kind}
    teacher = hybrid(2 if "2" in kind else 1, cond_dropout=0.2, **options)
    student = taught(GuidedDiffuseVAE, teacher, most=3.0)
    draw = lambda model, **options: model.sample(2, steps=2, generator=image_draws(0, 0, 2), **options)
    assert torch.equal(draw(student, guidance_weight=2.5), draw(teacher))  # the weight's network ends in zeros
    x_hat, z = student.draw_coarse(images(), Draws(0, 0))
    draws = Draws(0, 1)
    weight = 1 + 2 * Draws(0, 1).rand(8)
    _, guided = student.networks_at(x_hat, z, draws)
    x_t, t = images(seed=3), torch.arange(8) * 100
    wanted = [guide(teacher, *parts[:2], w)(*parts[2:]) for w, *parts in zip(
        weight.tolist(), *(v.split(1) for v in (x_hat, z, x_t, t)))]
    torch.testing.assert_close(guided(x_t, t), torch.cat(wanted), rtol=1e-4, atol=1e-5)
    student.training_loss(images(), draws=Draws(0, 0))["loss"].backward()
    assert student.weight_mlp[-1].weight.grad.abs().sum() > 0
    randomised(student.weight_mlp, 0.3)
    assert not torch.equal(draw(student, guidance_weight=2.5), draw(student, guidance_weight=1.5))


def test_a_guided_student_takes_one_call_a_step_at_weights_that_it_was_taught():
    student = taught(GuidedDiffuseVAE, hybrid(cond_dropout=0.2), most=3.0)
    assert student.nfe(5, 2.0) == 5 and hybrid(cond_dropout=0.2).nfe(5, 2.0) == 10
    for weight in (0.5, 3.5):
        with pytest.raises(ValueError, match=f"guidance_weight is {weight:g}: choose from 1 to 3"):
            student.sample(1, steps=1, guidance_weight=weight)
    with pytest.raises(ValueError, match="trained without cond_dropout"):
        taught(GuidedDiffuseVAE, hybrid()).training_loss(images(), draws=Draws(0, 0))


def test_an_adversarial_student_and_its_discriminator_learn_apart(tmp_path):
    teacher = randomised(DiffuseVAE(VAE | {"image_size": 32}, FLAT, COSINE))
    plain = student_of(teacher, 2)
    student = build_model({**plain.config, "model": "AdversarialDiffuseVAE", "features": "shapes",
                           "adversarial_weight": 0.5})
    student.load_state_dict(teacher.state_dict(), strict=False)
    for each in (plain, student):
        each.keep_start()
    x = torch.rand(4, 3, 32, 32, generator=generator()) * 2 - 1
    losses = student.training_loss(x, draws=Draws(0, 0))
    alone = plain.training_loss(x, draws=Draws(0, 0))["loss"].item()
    total = alone + 0.5 * losses["adversarial"].item() + losses["discriminator"].item()
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)
    of = lambda term, part: torch.autograd.grad(losses[term], [*part.parameters()], allow_unused=True,
                                                retain_graph=True)
    assert all(g is None for g in of("adversarial", student.discriminator))
    assert sum(g.abs().sum() for g in of("adversarial", student.unet) if g is not None) > 0
    assert all(g is None for g in of("discriminator", student.unet))
    assert sum(g.abs().sum() for g in of("discriminator", student.discriminator)) > 0
    again = load_model(save_model(student, tmp_path / "student.safetensors"))
    assert type(again) is AdversarialDiffuseVAE and again.steps == 2 and again.feature_network == ()
    assert {k.partition(".")[0] for k in again.state_dict()} == {"vae", "unet", "discriminator"}


# --- training -------------------------------------------------------------------------------------------------------

SHORT = TrainConfig(kimg=0.16, batch_size=16, lr=2e-3)


def trained(teacher, folder, seed=0, **options):
    student = student_of(teacher, 2)
    return student, train(student, shapes(), SHORT, folder, seed, progress=False, cpu=True, **options)


def test_a_stopped_distillation_goes_on_with_the_teacher_that_it_began_with(tmp_path):
    teacher = hybrid()
    parts, result = trained(teacher, tmp_path / "parts", minutes=0)
    assert not result.finished
    parts, result = trained(teacher, tmp_path / "parts")
    whole, _ = trained(teacher, tmp_path / "whole")
    other, _ = trained(teacher, tmp_path / "other", seed=1)
    assert result.finished and weights_hash(parts) == weights_hash(whole) != weights_hash(other)
    assert weights_hash(parts.teacher[0]) == weights_hash(teacher.unet) != weights_hash(whole.unet)
    assert weights_hash(whole.vae) == weights_hash(teacher.vae)


def test_training_brings_a_student_nearer_to_two_steps_of_its_teacher(tmp_path):
    torch.manual_seed(0)
    teacher = DDPM(UNET | {"patch": 2, "attention": ()}, COSINE)
    train(teacher, shapes(), TrainConfig(kimg=1.6, batch_size=16, lr=1e-2), tmp_path / "a", progress=False, cpu=True)
    student = student_of(teacher, 2)
    train(student, shapes(), TrainConfig(kimg=1.6, batch_size=16, lr=1e-2), tmp_path / "b", progress=False, cpu=True)
    draw = lambda model, steps: model.sample(16, generator=image_draws(0, 0, 16), sampler="ddim", steps=steps)
    far = lambda x: (x - draw(teacher, 4)).square().mean().item()
    assert far(draw(student, 2)) < 0.75 * far(draw(teacher, 2))


def test_an_entry_starts_from_its_teachers_weights_and_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridvae.data.SHAPES_SIZES", {"train": 64, "test": 32})
    options = dict(dataset="shapes", train={"kimg": 0.064, "batch_size": 16}, subset=32, batch=4)
    teacher = DDPM(FLAT, COSINE)
    entries = [Entry("ddpm", model=teacher.config, **options),
               Entry("distill-ddpm-2", model=student_of(teacher, 2).config, depends_on={"unet": "ddpm"},
                     evaluations=({"sampler": "ddim", "steps": 2, "n": 4},), **options)]
    record = run_entry(entries[1], entries, tmp_path, cpu=True, progress=False)
    assert record["evaluations"][0]["nfe"] == 2 and record["flops_per_image"] > 0
    student, start = (load_model(e.folder(tmp_path) / "model.safetensors") for e in (entries[1], entries[0]))
    assert record["depends_on"] == {"ddpm": weights_hash(start)} and record["weights_hash"] == weights_hash(student)
    alone = student_of(start, 2)  # the same by hand
    settings = TrainConfig(**options["train"])
    train(alone, load_data("shapes", "train", 32), settings, tmp_path / "alone", 0, progress=False, cpu=True)
    assert weights_hash(alone) == weights_hash(student)


def test_an_entry_loads_the_teacher_that_its_smaller_student_learns_from(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridvae.data.SHAPES_SIZES", {"train": 64, "test": 32})
    options = dict(dataset="shapes", train={"kimg": 0.032, "batch_size": 16}, subset=32, batch=4)
    teacher = DiffuseVAE(VAE | {"image_size": 32}, FLAT, COSINE)
    small = teacher.config | {"model": "CompressedDiffuseVAE", "unet": FLAT | {"width": 4}, "teacher": teacher.config}
    entries = [Entry("whole", model=teacher.config, **options),
               Entry("small", model=small, depends_on={"vae": "whole", "teacher": "whole"}, **options,
                     evaluations=({"sampler": "dpmpp", "steps": 2, "n": 4},))]
    record = run_entry(entries[1], entries, tmp_path, cpu=True, progress=False)
    student, whole = (load_model(e.folder(tmp_path) / "model.safetensors") for e in entries[::-1])
    assert record["depends_on"] == {"whole": weights_hash(whole)} and student.unet.width == 4
    assert weights_hash(student.vae) == weights_hash(whole.vae)


# --- entries --------------------------------------------------------------------------------------------------------

LADDERS = [e for e in entries_of(stage="distillation") if e.model["model"].startswith("Distilled")]


@pytest.mark.parametrize("entry", [e for e in LADDERS if e.seed == 0], ids=lambda e: f"{e.dataset}-{e.experiment}")
def test_every_rung_starts_from_a_teacher_of_twice_the_steps(entry):
    everything = {(e.dataset, e.experiment): e for e in entries_of(entry.dataset) if e.seed == 0}
    [parent] = {everything[entry.dataset, name].experiment for name in entry.depends_on.values()}
    model = everything[entry.dataset, parent].model
    assert entry.model == student_config_of(model, entry.model["steps"]) and entry.train
    assert all(e["sampler"] == "ddim" and e["steps"] == entry.model["steps"] for e in entry.evaluations)
    assert {"vae", "unet"} & entry.model.keys() == set(entry.depends_on)
    assert str(entry.model["steps"]) in entry.experiment.split("-")


def student_config_of(model, steps):
    "The part of the student's config that an entry names."
    config = student_of(build_model(model), steps).config
    small = {k: config[k] for k in model if k not in ("vae", "unet", "diffusion")}
    diffusion = {k: config["diffusion"][k] for k in model["diffusion"]}
    return {**small, **{k: model[k] for k in ("vae", "unet") if k in model}, "diffusion": diffusion,
            "model": config["model"], "steps": steps}


def test_students_and_plain_samplers_are_measured_alike():
    entries = {e.experiment: e for e in entries_of("scenes", "distillation") if e.seed == 0}
    for family in ("form1", "form2", "ddpm"):
        alone = [{k: v for k, v in e.items()} for e in entries[f"distill-{family}"].evaluations]
        for steps in (8, 4, 2, 1):
            [own] = entries[f"distill-{family}-{steps}"].evaluations
            assert own in alone and own["n"] >= 1_000
            assert steps == 1 or own | {"sampler": "dpmpp"} in alone  # one step is the same for both


# --- the command ----------------------------------------------------------------------------------------------------

def distill(*words):
    answer = CliRunner().invoke(app, ["distill", *map(str, words)])
    if answer.exception and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    assert answer.exit_code == 0, answer.output
    return answer.output


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "A small DDPM of Shapes, in a file."
    monkeypatch.setattr("hybridvae.data.SHAPES_SIZES", {"train": 64, "test": 32})
    return save_model(randomised(DDPM(FLAT, COSINE)), tmp_path / "teacher.safetensors")


def test_one_command_climbs_down_the_ladder_and_goes_on_where_it_was_stopped(weights, tmp_path):
    words = ("--dataset", "shapes", "--start", 8, "--steps", 2, "--kimg", 0.064, "--batch-size", 16, "--cpu")
    out = tmp_path / "few"
    assert "the same command continues" in distill("--weights", weights, *words, "--out", out, "--minutes", 0)
    assert not list(out.glob("*/model.safetensors"))
    said = distill("--weights", weights, *words, "--out", out)
    whole = distill("--weights", weights, *words, "--out", tmp_path / "whole")
    assert "8 steps -> 4" in said and "4 steps -> 2" in whole
    last = [load_model(folder / "2" / "model.safetensors") for folder in (out, tmp_path / "whole")]
    assert weights_hash(last[0]) == weights_hash(last[1]) and last[0].steps == 2
    assert load_model(out / "4" / "model.safetensors").steps == 4 and (out / "2" / "samples.png").exists()
    teacher = json.loads((out / "2" / "training.json").read_text())["teacher"]
    rung = load_model(out / "4" / "model.safetensors")
    assert teacher == weights_hash(student_of(rung, 2))
    words = re.search(r"next: hybridvae (.*)", said)[1].split()
    answer = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "more.png"), "--cpu"])
    assert answer.exit_code == 0 and Path(tmp_path / "more.png").exists()


def test_another_teacher_does_not_go_on_in_the_same_folder(weights, tmp_path):
    words = ("--dataset", "shapes", "--start", 4, "--steps", 2, "--kimg", 0.032, "--batch-size", 16, "--cpu", "--out",
             tmp_path / "few")
    distill("--weights", weights, *words)
    other = save_model(randomised(load_model(weights), seed=9), tmp_path / "other.safetensors")
    with complains("another config or seed"):
        distill("--weights", other, *words)


def test_mistakes_get_a_sentence(weights, tmp_path):
    for words, says in ((("--steps", 3), "from 64 steps to 3"), (("--steps", 8, "--start", 8), "from 8 steps to 8")):
        with complains(says):
            distill("--weights", weights, "--dataset", "shapes", *words, "--out", tmp_path / "x", "--cpu")
    with complains("cannot be distilled"):
        distill("--weights", "scenes-latent", "--dataset", "scenes", "--out", tmp_path / "x", "--cpu")
    assert not (tmp_path / "x").exists()
