"""Schedules, forward process, losses, posteriors and samplers against diffusers and brute force, in float64."""
import contextlib
import re
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import generator
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hybridvae.core import image_draws
from hybridvae.diffusion import (
    PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS, ForwardProcess, GaussianDiffusion, trailing_timesteps)
from hybridvae.vae import discretised_log_prob
from torch.distributions import Normal, kl_divergence

THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
THEIR_PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SHAPE = (3, 2, 4, 4)
TIGHT = dict(rtol=1e-9, atol=1e-9)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers


@contextlib.contextmanager
def double_precision():
    "diffusers casts to float32; within this block that name means float64, so that a thousand steps can be compared."
    with mock.patch("torch.float32", torch.float64), mock.patch("numpy.float32", np.float64):
        yield


def normal(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def network(x, t):
    "Cheap, nonlinear, mixes pixels, and depends on the time."
    return torch.tanh(0.7 * x.flip(-1) + 0.3 * torch.sin(t / 150.0)[:, None, None, None]) + 0.1 * x


def diffusers_sample(scheduler, noise, steps, generator=None, shift=0, **step_options):
    "The last step's predicted image; the network sees y + shift."
    with double_precision():
        scheduler = scheduler()
        scheduler.set_timesteps(steps)
        y = noise
        for t in scheduler.timesteps:
            t = t if isinstance(scheduler, DPMSolverMultistepScheduler) else int(t)
            out = network(y + shift, torch.full((len(y),), int(t)))
            step = scheduler.step(out, t, y, generator=generator, **step_options)
            y = step.prev_sample
    # With "trailing" spacing the last step starts above timestep 0, where DDPMScheduler still adds noise after its last
    # prediction; here, as in the paper's algorithm 2, the prediction itself is the image.
    return step.pred_original_sample if isinstance(scheduler, DDPMScheduler) else y


# --- schedules ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_diffusers(schedule):
    with double_precision():
        theirs = DDPMScheduler(beta_schedule=THEIR_SCHEDULE[schedule])
    ours = GaussianDiffusion(schedule)
    assert theirs.betas.dtype == torch.float64 and ours.betas.dtype == np.float64
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol=1e-13)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [100, 250])
def test_a_short_schedule_ends_as_noisy_as_the_long_one(schedule, timesteps):
    short, long = (GaussianDiffusion(schedule, timesteps=n).alphas_cumprod for n in (timesteps, 1000))
    assert len(short) == timesteps and (np.diff(short) < 0).all() and 0 < short[-1] < 1e-4 > long[-1]
    assert abs(short[timesteps // 2 - 1] - long[499]) < 0.01


@pytest.mark.parametrize("argument", [dict(schedule="quadratic"), dict(prediction="epsilon"), dict(weighting="snr")])
def test_unknown_choices_are_refused_and_the_known_ones_named(argument):
    (name, value), = argument.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}': choose from .*, "):
        GaussianDiffusion(**argument)


def test_unknown_samplers_and_step_counts_are_refused():
    diffusion = GaussianDiffusion()
    for options, words in ((dict(sampler="euler"), "choose from ancestral, ddim, dpmpp"),
                           (dict(variance="learned"), "small, large"), (dict(steps=0), "from 1 to 1000"),
                           (dict(steps=1001), "from 1 to 1000")):
        with pytest.raises(ValueError, match=words):
            diffusion.sample(network, normal(), **options)


# --- forward process and posterior by brute force -------------------------------------------------------------------

def chain(betas):
    """y_0, ..., y_T of the Markov chain y_t = √(1-β_t) y_{t-1} + √β_t e_t, written as A y_0 + N e, one row for each t.

    Row t + 1 belongs to timestep t, row 0 to the image. Steps are composed one after the other: no ᾱ is used.
    """
    a, noise = [1.0], [np.zeros(len(betas))]
    for t, beta in enumerate(betas):
        a.append(np.sqrt(1 - beta) * a[-1])
        row = np.sqrt(1 - beta) * noise[-1]
        row[t] = np.sqrt(beta)
        noise.append(row)
    return np.array(a), np.stack(noise)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shifted", [False, True], ids=["form 1", "form 2"])
def test_q_sample_jumps_where_the_chain_walks(schedule, shifted):
    diffusion = GaussianDiffusion(schedule, timesteps=50)
    a, noise = chain(diffusion.betas)
    x0, eps, shift = normal(0), normal(1), normal(2) if shifted else None
    for t in (0, 1, 30, 49):
        x_t = diffusion.q_sample(x0, torch.tensor([t, t, t]), eps, shift)
        deviation = np.linalg.norm(noise[t + 1])  # of a sum of independent normals
        want = a[t + 1] * x0 + deviation * eps + (shift if shifted else 0)
        torch.testing.assert_close(x_t, want, **TIGHT)


def test_q_sample_takes_each_images_own_timestep():
    diffusion, x0, eps = ForwardProcess(), normal(0), normal(1)
    together = diffusion.q_sample(x0, torch.tensor([3, 500, 999]), eps)
    apart = [diffusion.q_sample(x0[i:i + 1], torch.tensor([t]), eps[i:i + 1]) for i, t in enumerate((3, 500, 999))]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shifted", [False, True], ids=["form 1", "form 2"])
@pytest.mark.parametrize("t, s", [(1, 0), (20, 19), (49, 48), (20, 5), (49, 0), (30, 12), (0, -1), (20, -1)])
def test_the_posterior_is_the_conditional_of_the_joint_gaussian(schedule, shifted, t, s):
    diffusion = GaussianDiffusion(schedule, timesteps=50)
    a, noise = chain(diffusion.betas)
    x0, x_t, shift = normal(0), normal(1), normal(2) if shifted else torch.zeros(())
    pair = noise[[s + 1, t + 1]]
    cov = pair @ pair.T  # of (x_s, x_t) given x0
    gain = cov[0, 1] / cov[1, 1]
    mean = (a[s + 1] * x0 + shift) + gain * (x_t - (a[t + 1] * x0 + shift))
    var = cov[0, 0] - gain * cov[1, 0]
    found_mean, found_var = diffusion.posterior(x0, x_t, t, s, shift if shifted else None)
    torch.testing.assert_close(found_mean, mean, **TIGHT)
    assert found_var == pytest.approx(var, rel=1e-7, abs=1e-12)
    if s == t - 1:  # the default
        torch.testing.assert_close(diffusion.posterior(x0, x_t, t, shift=shift if shifted else None)[0], mean, **TIGHT)


def test_before_the_first_step_there_is_no_noise():
    diffusion = GaussianDiffusion()
    assert diffusion.alpha_bar(-1) == 1.0 and diffusion.alpha_bar(0) == 1 - diffusion.betas[0]
    assert diffusion.alpha_bar(999) == pytest.approx(np.prod(1 - diffusion.betas))


# --- predictions and losses -----------------------------------------------------------------------------------------

TIMES = torch.tensor([0, 400, 999])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_turned_back_into_the_image(schedule, prediction):
    diffusion, x0, eps = GaussianDiffusion(schedule, prediction=prediction), normal(0), normal(1)
    y = diffusion.q_sample(x0, TIMES, eps)
    # ε at ᾱ_T = 2e-9 loses digits: 1/√ᾱ = 2e4 times the rounding error
    torch.testing.assert_close(diffusion.to_x0(diffusion.target(x0, TIMES, eps), y, TIMES), x0, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_targets_are_those_of_diffusers(schedule):
    x0, eps = normal(0), normal(1)
    with double_precision():
        velocity = DDPMScheduler(beta_schedule=THEIR_SCHEDULE[schedule]).get_velocity(x0, eps, TIMES)
    want = {"eps": eps, "x0": x0, "v": velocity}
    for prediction in PREDICTIONS:
        found = GaussianDiffusion(schedule, prediction=prediction).target(x0, TIMES, eps)
        torch.testing.assert_close(found, want[prediction], **TIGHT)


def weight_of_x0(diffusion, weighting, gamma=5.0):
    snr = torch.tensor(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))
    kl = []
    for t in range(diffusion.timesteps):
        c1, variance = diffusion.posterior(torch.ones(()), torch.zeros(()), t)
        kl.append(c1.item() ** 2 / (2 * (variance or 1 - diffusion.alpha_bar(t))))
    return {"simple": snr, "min_snr": snr.clamp(max=gamma), "uniform": torch.ones_like(snr), "v": snr + 1,
            "truncated_snr": snr.clamp(min=1),
            "bound": diffusion.timesteps * torch.tensor(kl)}[weighting]


def claim(diffusion, x0, y, t):
    "The output, in this prediction, of a network that claims the image is `x0`."
    abar = torch.tensor(diffusion.alphas_cumprod)[t][:, None, None, None]
    eps = (y - abar.sqrt() * x0) / (1 - abar).sqrt()
    return {"eps": eps, "x0": x0, "v": (abar.sqrt() * y - x0) / (1 - abar).sqrt()}[diffusion.prediction]


@pytest.mark.parametrize("shifted", [False, True], ids=["form 1", "form 2"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_weighted_error_of_the_image_in_every_prediction(prediction, weighting, shifted):
    diffusion = GaussianDiffusion("linear", prediction=prediction, weighting=weighting)
    x0, eps, shift, t = normal(0), normal(1), normal(2) if shifted else None, torch.tensor([5, 400, 900])
    claimed = x0 + normal(3)

    def fixed(x_t, times):
        return claim(diffusion, claimed, x_t - (shift if shifted else 0), times)
    want = weight_of_x0(diffusion, weighting)[t] * (claimed - x0).square().mean(dim=(1, 2, 3))
    loss = diffusion.loss(fixed, x0, t, eps, shift)  # float32 inside
    torch.testing.assert_close(loss.double(), want, rtol=2e-4, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_the_min_snr_weight_is_capped_where_little_noise_is(gamma):
    capped, simple = (GaussianDiffusion(prediction="x0", weighting=w, gamma=gamma).loss_weight(torch.arange(1000))
                      for w in ("min_snr", "simple"))
    assert capped.max() == gamma < simple.max() and (capped == gamma).sum() > 10
    assert torch.equal(capped[simple < gamma], simple[simple < gamma]) and (simple < gamma).sum() > 10


def test_the_papers_loss_is_the_plain_error_of_the_noise():
    diffusion = GaussianDiffusion("linear", prediction="eps", weighting="simple")
    x0, eps = normal(0), normal(1)
    out = network(diffusion.q_sample(x0, TIMES, eps), TIMES)
    loss = diffusion.loss(network, x0, TIMES, eps)
    torch.testing.assert_close(loss.double(), (out - eps).square().mean(dim=(1, 2, 3)), rtol=1e-5, atol=0)


# --- samplers against diffusers -------------------------------------------------------------------------------------

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
clipped_or_not = pytest.mark.parametrize("clip", [True, False], ids=["clipped", "not clipped"])
STEPS = [1, 2, 3, 7, 10, 15, 20, 30, 50, 333]  # also counts that 1000 does not divide by


def their_options(schedule, prediction):
    return dict(beta_schedule=THEIR_SCHEDULE[schedule], prediction_type=THEIR_PREDICTION[prediction],
                timestep_spacing="trailing")


def agree(found, wanted):
    assert wanted.isfinite().all() and wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, **TIGHT)


@every_schedule
@every_prediction
@clipped_or_not
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_diffusers(schedule, prediction, clip, eta):
    options = dict(their_options(schedule, prediction), clip_sample=clip)
    # DDIMScheduler steps back by 1000 // steps whatever its timesteps are: only divisors of 1000 mean the same there.
    # Its default keeps the ε of the prediction that was clipped away; ours is the ε that belongs to the clipped image.
    for steps in (1, 2, 10, 20, 50, 250):
        found = GaussianDiffusion(schedule, prediction=prediction).sample(
            network, normal(), "ddim", steps, clip=clip, eta=eta, generator=generator(1))
        wanted = diffusers_sample(lambda: DDIMScheduler(**options), normal(), steps, generator(1), eta=eta,
                                  use_clipped_model_output=True)
        agree(found, wanted)


@every_schedule
@every_prediction
@clipped_or_not
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpmpp", 2)])
def test_dpm_solver_and_ddim_as_its_first_order_are_those_of_diffusers(schedule, prediction, clip, sampler, order):
    # their "thresholding" with a largest value of 1 is clipping
    options = dict(their_options(schedule, prediction), solver_order=order, thresholding=clip, sample_max_value=1.0,
                   algorithm_type="dpmsolver++", final_sigmas_type="zero", lower_order_final=True)
    for steps in STEPS:
        found = GaussianDiffusion(schedule, prediction=prediction).sample(network, normal(), sampler, steps, clip=clip)
        agree(found, diffusers_sample(lambda: DPMSolverMultistepScheduler(**options), normal(), steps))


@every_schedule
@every_prediction
@clipped_or_not
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_is_that_of_diffusers(schedule, prediction, clip, variance):
    options = dict(their_options(schedule, prediction), clip_sample=clip, variance_type=f"fixed_{variance}")
    for steps in STEPS:
        found = GaussianDiffusion(schedule, prediction=prediction).sample(
            network, normal(), "ancestral", steps, clip=clip, variance=variance, generator=generator(1))
        agree(found, diffusers_sample(lambda: DDPMScheduler(**options), normal(), steps, generator(1)))


@every_schedule
@pytest.mark.parametrize("variance", ["small", "large"])
def test_all_thousand_ancestral_steps_are_those_of_diffusers(schedule, variance):
    options = dict(their_options(schedule, "eps"), clip_sample=True, variance_type=f"fixed_{variance}")
    found = GaussianDiffusion(schedule, prediction="eps").sample(
        network, normal(), "ancestral", 1000, variance=variance, generator=generator(1))
    agree(found, diffusers_sample(lambda: DDPMScheduler(**options), normal(), 1000, generator(1)))


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 333, 999, 1000])
def test_the_network_is_asked_once_for_each_step_at_the_trailing_timesteps(steps):
    asked = []

    def counted(x, t):
        assert len(set(t.tolist())) == 1
        asked.append(t[0].item())
        return network(x, t)
    GaussianDiffusion().sample(counted, normal(), "ddim", steps)
    assert len(asked) == steps and asked[0] == 999 and asked == sorted(set(asked), reverse=True)
    assert asked == [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]


# --- samplers as samplers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_ideal_network_samples_the_data_it_knows(sampler):
    "For data N(m, s²) the best prediction is known in closed form: samples must have that mean and deviation."
    m, s, n = 0.3, 0.2, 20_000
    diffusion = GaussianDiffusion("linear", prediction="x0")
    abar = torch.tensor(diffusion.alphas_cumprod)

    def ideal(x, t):
        a = abar[t][:, None]
        return m + a.sqrt() * s**2 / (a * s**2 + 1 - a) * (x - a.sqrt() * m)
    x = diffusion.sample(ideal, normal(0, (n, 1)), sampler, 1000, generator=generator(1), clip=False)
    assert x.mean().item() == pytest.approx(m, abs=5 * s / np.sqrt(n))
    assert x.std().item() == pytest.approx(s, rel=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_generator_decides_the_noise_that_is_added(sampler):
    def draw(seed):
        return GaussianDiffusion().sample(network, normal(), sampler, 10, generator=generator(seed))
    assert torch.equal(draw(0), draw(0))
    assert torch.equal(draw(0), draw(1)) == (sampler != "ancestral")


# --- form 2 ---------------------------------------------------------------------------------------------------------

FORM_2 = {  # our sampler, its options; theirs, its options, and those of its steps
    "ancestral, small variance": (
        "ancestral", dict(variance="small"), DDPMScheduler, dict(variance_type="fixed_small"), {}),
    "ancestral, large variance": (
        "ancestral", dict(variance="large"), DDPMScheduler, dict(variance_type="fixed_large"), {}),
    "DDIM": ("ddim", {}, DDIMScheduler, {}, dict(use_clipped_model_output=True)),
    "DDIM, noisy": ("ddim", dict(eta=0.7), DDIMScheduler, {}, dict(eta=0.7, use_clipped_model_output=True)),
    "DPM-Solver++": ("dpmpp", {}, DPMSolverMultistepScheduler, dict(
        solver_order=2, thresholding=True, sample_max_value=1.0, final_sigmas_type="zero", lower_order_final=True), {})}


@every_prediction
@every_schedule
@pytest.mark.parametrize("case", FORM_2.values(), ids=FORM_2)
def test_every_sampler_of_form_2_is_that_of_diffusers_in_y_with_a_shifted_network(case, schedule, prediction):
    sampler, options, scheduler, their, step_options = case
    shift, their = normal(2), dict(their_options(schedule, prediction), **their)
    for steps in (1, 2, 10, 20, 50):
        found = GaussianDiffusion(schedule, prediction=prediction).sample(
            network, normal(), sampler, steps, shift=shift, generator=generator(1), **options)
        agree(found, diffusers_sample(lambda: scheduler(**their), normal(), steps, generator(1), shift, **step_options))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_all_thousand_ancestral_steps_of_form_2_are_those_of_diffusers(variance):
    options = dict(their_options("linear", "eps"), clip_sample=True, variance_type=f"fixed_{variance}")
    found = GaussianDiffusion("linear", prediction="eps").sample(
        network, normal(), "ancestral", 1000, shift=normal(2), variance=variance, generator=generator(1))
    agree(found, diffusers_sample(lambda: DDPMScheduler(**options), normal(), 1000, generator(1), normal(2)))


@every_prediction
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_form_2_is_form_1_of_the_network_that_sees_the_shifted_image(prediction, sampler):
    diffusion, shift = GaussianDiffusion(prediction=prediction), normal(2)
    options = dict(sampler=sampler, steps=20)
    shifted = diffusion.sample(network, normal(), shift=shift, generator=generator(1), **options)
    plain = diffusion.sample(lambda y, t: network(y + shift, t), normal(), generator=generator(1), **options)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=0)
    unshifted = diffusion.sample(network, normal(), generator=generator(1), **options)
    assert not torch.allclose(shifted, unshifted, atol=1e-3)


@pytest.mark.parametrize("steps", [10, 30, 1000])
def test_form_2_is_the_papers_process_written_in_x(steps):
    "Start N(x̂, I), mean c₁x₀ + c₂x_t + (1 - c₂)x̂; at the end x̂ is taken off again."
    diffusion, shift, noise = GaussianDiffusion("linear", prediction="eps"), normal(2), generator(1)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    x = shift + normal()
    for t, s in zip(times, [*times[1:], None]):
        now, then = abar[t], 1.0 if s is None else abar[s]
        alpha = now / then
        eps = network(x, torch.full((len(x),), t))
        x0 = ((x - shift - np.sqrt(1 - now) * eps) / np.sqrt(now)).clamp(-1, 1)
        c1, c2 = (1 - alpha) * np.sqrt(then) / (1 - now), np.sqrt(alpha) * (1 - then) / (1 - now)
        x = c1 * x0 + c2 * x + (1 - c2) * shift
        if s is not None:
            extra = torch.randn(SHAPE, generator=noise, dtype=torch.float64)
            x = x + np.sqrt((1 - alpha) * (1 - then) / (1 - now)) * extra
    found = diffusion.sample(network, normal(), "ancestral", steps, shift=shift, generator=generator(1))
    torch.testing.assert_close(found, x - shift, **TIGHT)


@pytest.mark.parametrize("shifted", [False, True], ids=["form 1", "form 2"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_network_returns_the_image_and_not_the_image_plus_the_shift(sampler, shifted):
    diffusion, x0, shift = GaussianDiffusion(prediction="v"), normal(0).clamp(-1, 1), normal(2) if shifted else None
    seen = []

    def perfect(x_t, t):
        seen.append(x_t)
        return claim(diffusion, x0, x_t - (shift if shifted else 0), t)
    found = diffusion.sample(perfect, normal(1), sampler, 12, shift=shift, generator=generator(3))
    torch.testing.assert_close(found, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[0], normal(1) + (shift if shifted else 0), rtol=0, atol=0)  # x_T ~ N(x̂, I)


# --- the last steps only --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_last_steps_go_on_where_the_first_ones_end(sampler, shifted):
    "One-step samplers have no memory: ten steps are the first four and, from what these leave, the last six."
    diffusion = GaussianDiffusion()
    noise, shift = torch.randn(2, 2, 3, 4, 4, generator=generator(), dtype=torch.float64).unbind(0)
    shift, visited, states = shift if shifted else None, [], {}

    def network(x_t, t):
        visited.append(t[0].item())
        y = x_t if shift is None else x_t - shift
        states[t[0].item()] = y.clone()
        return 0.3 * x_t.sin()
    whole = diffusion.sample(network, noise, sampler, 10, shift, generator(1))
    last, random = diffusion.timestep_grid(10)[4:], generator(1)
    for _ in range(4 if sampler == "ancestral" else 0):
        torch.randn(noise.shape, generator=random, dtype=noise.dtype)  # what the first four have drawn
    first, visited[:] = list(visited), []
    part = diffusion.sample(network, states[last[0]], sampler, last, shift, random)
    assert visited == first[4:] and [*visited, -1] == last
    torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_number_of_steps_is_the_list_of_their_timesteps(sampler):
    diffusion, noise = GaussianDiffusion(), torch.randn(1, 3, 4, 4, generator=generator())
    draw = lambda steps: diffusion.sample(lambda x_t, t: 0.3 * x_t, noise, sampler, steps, generator=generator(1))
    assert torch.equal(draw(5), draw(diffusion.timestep_grid(5))) and torch.equal(draw(5), draw(np.int64(5)))
    assert torch.equal(draw([999, 499, -1]), draw((999, 499, -1))) and not torch.equal(draw(5), draw([999, 499, -1]))


@pytest.mark.parametrize("steps", [[], [-1], [999, 499], [1000, 499, -1], [499, 999, -1], [499, 499, -1], [5, -1, -2]])
def test_timesteps_that_do_not_fall_to_the_image_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {re.escape(str(steps))}: give timesteps that fall from at most"):
        GaussianDiffusion().sample(network, normal(), steps=steps)


def test_a_grid_from_the_middle_is_evenly_spaced_and_has_so_many_steps():
    diffusion = GaussianDiffusion()
    assert diffusion.timestep_grid(4, start=0.4) == trailing_timesteps(1000, 4, 0.4) == [399, 299, 199, 99, -1]
    for start, words in ((0, "start is 0"), (1.2, "start is 1.2"), (0.001, "steps is 4: choose from 1 to 1")):
        with pytest.raises(ValueError, match=words):
            diffusion.timestep_grid(4, start)


# --- likelihood -----------------------------------------------------------------------------------------------------

def pixels(shape=SHAPE):
    return torch.randint(256, shape, generator=generator(4)).double() / 127.5 - 1


def all_timesteps(diffusion):
    "The diffusion with every timestep in its bound, each once."
    diffusion.bound_timesteps = lambda u: (torch.arange(1, diffusion.timesteps).repeat(len(u), 1),
                                           torch.ones(len(u), diffusion.timesteps - 1, dtype=torch.float64))
    return diffusion


@every_schedule
@every_prediction
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("shifted", [False, True], ids=["form 1", "form 2"])
def test_the_bound_is_the_sum_of_the_kls_between_the_steps_of_diffusers(schedule, prediction, variance, shifted):
    "Means and variances are those of `DDPMScheduler`, KLs those of `torch.distributions`; form 2 is in y."
    T, x0, shift = 30, pixels(), normal(2) if shifted else torch.zeros(())
    ours = all_timesteps(GaussianDiffusion(schedule, timesteps=T, prediction=prediction))
    options = dict(shift=shift if shifted else None, variance=variance)
    found = ours.likelihood_bound(network, x0, image_draws(7, 0, len(x0)), **options)
    draws = image_draws(7, 0, len(x0))
    draws.rand(len(x0), 20)
    options = dict(trained_betas=ours.betas, num_train_timesteps=T, clip_sample=False,
                   prediction_type=THEIR_PREDICTION[prediction])
    want = {"diffusion": 0.0}
    with double_precision():
        theirs = DDPMScheduler(**options)
        for t in range(T):
            eps, times = draws.randn(*x0.shape).double(), torch.full((len(x0),), t)
            y = theirs.add_noise(x0, eps, times)
            output = network(y + shift, times)
            right = {"eps": eps, "x0": x0, "v": theirs.get_velocity(x0, eps, times)}[prediction]
            guess, truth = (theirs.step(out, t, y, generator=generator(5)) for out in (output, right))  # the same noise
            if t == 0:
                decoder = -discretised_log_prob(x0, guess.pred_original_sample, ours.betas[0] ** 0.5)
            else:
                q_scale, p_scale = (float(theirs._get_variance(t, variance_type=f"fixed_{kind}")) ** 0.5
                                    for kind in ("small", variance))
                kl = kl_divergence(Normal(truth.prev_sample, q_scale), Normal(guess.prev_sample, p_scale))
                want["diffusion"] = want["diffusion"] + kl.flatten(1).sum(dim=1)
        end = theirs.alphas_cumprod[-1]
    want["noise"] = kl_divergence(Normal(end.sqrt() * x0, (1 - end).sqrt()), Normal(0.0, 1.0)).flatten(1).sum(dim=1)
    want["decoder"] = decoder.flatten(1).sum(dim=1)
    assert set(found) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("schedule, timesteps", [("cosine", 12), ("linear", 40)])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_weighted_sum_over_a_few_timesteps_is_on_average_the_sum_over_all(schedule, timesteps, k):
    "On average over uniform numbers, here the middles of a million pieces, for a function of t that these resolve."
    diffusion = GaussianDiffusion(schedule, timesteps=timesteps)
    middles = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    t, weight = diffusion.bound_timesteps(middles[:, None].expand(-1, k))
    assert t.min() == 1 and t.max() == timesteps - 1
    function = normal(0, (timesteps,)) * torch.tensor(diffusion.alphas_cumprod)
    torch.testing.assert_close((weight * function[t]).sum(dim=1).mean(), function[1:].sum(), rtol=0, atol=1e-3)


def test_the_mean_of_many_bounds_is_the_one_over_all_timesteps_and_varies_less_than_with_plain_draws():
    diffusion, x0 = GaussianDiffusion(timesteps=50), pixels((1, 1, 2, 2)).expand(4_000, -1, -1, -1)
    found = diffusion.likelihood_bound(network, x0, image_draws(0, 0, 4_000), timesteps=5)["diffusion"]
    plain = GaussianDiffusion(timesteps=50)
    weight = lambda u: torch.full(u.shape, 49 / u.shape[1], dtype=torch.float64)
    plain.bound_timesteps = lambda u: (1 + (49 * u.double()).long(), weight(u))
    spread = plain.likelihood_bound(network, x0, image_draws(0, 0, 4_000), timesteps=5)["diffusion"].std()
    whole = all_timesteps(diffusion).likelihood_bound(network, x0, image_draws(1, 0, 4_000))["diffusion"]
    error = ((found.var() + whole.var()) / 4_000).sqrt()
    assert abs(found.mean() - whole.mean()) < 4 * error and found.std() < 0.5 * spread


@every_schedule
@every_prediction
def test_for_normal_pixels_the_large_variance_gives_the_entropy_between_first_and_last_step(schedule, prediction):
    "With x₀ ~ N(0, 1) and the ideal network p is q itself: entropies remain, half the log of variances' ratio."
    diffusion, x0 = GaussianDiffusion(schedule, prediction=prediction), normal(0, (4_000, 1, 1, 1))
    abar = torch.tensor(diffusion.alphas_cumprod)

    def ideal(y, t):
        return claim(diffusion, abar[t].sqrt()[:, None, None, None] * y, y, t)
    found = diffusion.likelihood_bound(ideal, x0, image_draws(0, 0, 4_000))["diffusion"]
    want = 0.5 * torch.log((1 - abar[-1]) / (1 - abar[0]))
    assert abs(found.mean() - want) < 4 * found.std() / 4_000**0.5 < 0.15
    small = diffusion.likelihood_bound(ideal, x0, image_draws(0, 0, 4_000), variance="small")["diffusion"]
    assert small.mean() > want + 0.2


def test_with_more_steps_the_ideal_networks_bound_comes_down_to_the_entropy_of_whole_levels():
    "One pixel with one of nine levels, unequally often; the small variance is right where x_t tells the level."
    p = torch.tensor([8, 1, 4, 2, 16, 1, 4, 8, 20], dtype=torch.float64) / 64
    levels = torch.tensor([0, 1, 2, 90, 91, 92, 140, 200, 255], dtype=torch.float64) / 127.5 - 1
    which = torch.arange(9).repeat_interleave((64 * p).long()).repeat(60)  # as often as p says
    x0, entropy, gaps = levels[which][:, None, None, None], -(p * p.log()).sum(), []
    for T in (400, 3_200, 25_600):
        diffusion = GaussianDiffusion(timesteps=T, prediction="x0")
        abar = torch.tensor(diffusion.alphas_cumprod)

        def ideal(y, t, abar=abar):
            a = abar[t][:, None]
            posterior = (p.log() - (y.flatten(1) - a.sqrt() * levels).square() / (2 * (1 - a))).softmax(dim=1)
            return (posterior @ levels)[:, None, None, None]
        parts = diffusion.likelihood_bound(ideal, x0, image_draws(0, 0, len(x0)), timesteps=60, variance="small")
        gaps.append((sum(parts.values()).mean() - entropy).item())
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0 and gaps[2] < 0.03 * entropy, (gaps, entropy)


@pytest.mark.parametrize("shifted", [False, True], ids=["form 1", "form 2"])
def test_the_same_function_has_the_same_bound_whatever_it_predicts(shifted):
    x0, shift, found = pixels(), normal(2) if shifted else None, []
    for prediction in PREDICTIONS:
        diffusion = GaussianDiffusion("linear", prediction=prediction)

        def output(x_t, t, diffusion=diffusion):
            y = x_t - (shift if shifted else 0)
            return claim(diffusion, torch.tanh(y).flip(-1), y, t)
        found.append(diffusion.likelihood_bound(output, x0, image_draws(0, 0, len(x0)), shift=shift))
    for other in found[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=1e-4, atol=0)


def test_the_bound_of_an_image_is_the_same_in_every_batch():
    diffusion, x0 = GaussianDiffusion(), pixels((5, 2, 4, 4))
    whole = diffusion.likelihood_bound(network, x0, image_draws(0, 0, 5))
    parts = [diffusion.likelihood_bound(network, x0[a:b], image_draws(0, a, b)) for a, b in ((0, 2), (2, 5))]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=1e-6, atol=0)
    other = diffusion.likelihood_bound(network, x0, image_draws(1, 0, 5))
    assert not torch.isclose(other["diffusion"], whole["diffusion"]).any()
