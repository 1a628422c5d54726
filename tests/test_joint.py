"""Joint training: which gradient reaches what, how λ is found, what stops a collapse, and the entries."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import randomised
from hybridvae.core import Draws, build_model, image_draws, load_model, save_model
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.diffusevae import DiffuseVAE
from hybridvae.diffusion import GaussianDiffusion
from hybridvae.experiments import entries_of
from hybridvae.joint import BALANCES, Balance, JointDiffuseVAE, code_use
from hybridvae.training import TrainConfig, latest_checkpoint, train
from hybridvae.vae import reparameterize
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

NBS = Path(__file__).parents[1] / "nbs"
VAE_CONFIG = dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2), beta=0.7)
UNET = dict(image_size=16, width=8, multipliers=(1, 2), attention=(8,))
VARIANTS = pytest.mark.parametrize("form, z_guidance", [(1, False), (1, True), (2, False), (2, True)])


pytestmark = pytest.mark.usefixtures("double_precision")


def model(**options):
    return randomised(JointDiffuseVAE(VAE_CONFIG, UNET, **options), scale=0.3).train()


def images(n=8, seed=1):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gradients(m, loss, parts=("vae.encoder", "vae.decoder", "unet")):
    "The gradient of a loss, flat, for each part of the model."
    m.zero_grad()
    loss.backward()
    return {part: torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                             for p in m.get_submodule(part).parameters()]) for part in parts}


def in_two_parts(m, x, weights=None):
    "-ELBO, and the diffusion loss under other weights: written out again, no gradient scaled."
    draws = Draws(0, 0)
    mu, logvar = m.vae.encode(x)
    z = reparameterize(mu, logvar, draws.randn(*mu.shape))
    x_hat, t, eps = m.vae.decode(z), draws.randint(1000, len(x)), draws.randn(*x.shape)
    nll = -Normal(x_hat, m.vae.sigma).log_prob(x).mean()
    kl = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(dim=1).mean() / x[0].numel()
    x_t = m.diffusion.q_sample(x, t, eps, x_hat if m.form == 2 else None)
    output = m.unet(x_t, t, cond=x_hat, z=z if m.z_guidance else None)
    error = (output - m.diffusion.target(x, t, eps)).square().mean(dim=(1, 2, 3))
    return nll + m.vae.beta * kl, ((weights or m.diffusion.loss_weight)(t) * error).mean()


@VARIANTS
def test_the_vae_gets_the_elbo_and_lambda_times_the_diffusion_loss_and_the_unet_the_latter_alone(form, z_guidance):
    m, x = model(form=form, z_guidance=z_guidance, balance={"name": "fixed", "value": 2.5}), images()
    found = gradients(m, m.training_loss(x, draws=Draws(0, 0))["loss"])
    elbo, diffusion = in_two_parts(m, x)
    expected = gradients(m, elbo + 2.5 * diffusion)
    torch.testing.assert_close(found["vae.encoder"], expected["vae.encoder"])
    torch.testing.assert_close(found["vae.decoder"], expected["vae.decoder"])
    torch.testing.assert_close(2.5 * found["unet"], expected["unet"])


@VARIANTS
def test_the_weight_of_timesteps_in_the_vaes_gradient_is_not_the_unets(form, z_guidance):
    m, x = model(form=form, z_guidance=z_guidance, vae_weighting="uniform"), images(16)
    found = gradients(m, m.training_loss(x, draws=Draws(0, 0))["loss"])

    def of_x0(t):  # its squared error; in v it is (1 + SNR) times as large
        snr = torch.tensor(m.diffusion.alphas_cumprod / (1 - m.diffusion.alphas_cumprod))[t]
        return 1 / (1 + snr)
    elbo, diffusion = in_two_parts(m, x, of_x0)
    expected = gradients(m, elbo + diffusion)
    torch.testing.assert_close(found["vae.encoder"], expected["vae.encoder"])
    torch.testing.assert_close(found["vae.decoder"], expected["vae.decoder"])
    torch.testing.assert_close(found["unet"], gradients(m, in_two_parts(m, x)[1])["unet"])


@VARIANTS
def test_without_the_gradient_both_parts_are_trained_as_in_two_stages(form, z_guidance):
    m, x = model(form=form, z_guidance=z_guidance, gradient_to="none"), images()
    found = gradients(m, m.training_loss(x, draws=Draws(0, 0))["loss"])
    two_stage = DiffuseVAE(VAE_CONFIG, UNET, form=form, z_guidance=z_guidance)
    two_stage.load_state_dict(m.state_dict())
    loss = two_stage.training_loss(x, draws=Draws(0, 0))["loss"]
    torch.testing.assert_close(found["unet"], gradients(two_stage, loss, ["unet"])["unet"])
    alone = two_stage.vae.requires_grad_(True)
    vae = gradients(alone, alone.training_loss(x, draws=Draws(0, 0))["loss"], ["encoder", "decoder"])
    torch.testing.assert_close(found["vae.encoder"], vae["encoder"])
    torch.testing.assert_close(found["vae.decoder"], vae["decoder"])


def test_the_bound_weighs_an_error_by_the_kl_of_the_posteriors_times_the_number_of_steps():
    diffusion, t = GaussianDiffusion("cosine", timesteps=50, prediction="x0"), torch.arange(50)
    weight = diffusion.loss_weight(t, "bound")
    x0, wrong, x_t = torch.tensor(0.3), torch.tensor(0.5), torch.tensor(-0.2)
    for step in range(50):
        mean, variance = diffusion.posterior(x0, x_t, step)
        other, _ = diffusion.posterior(wrong, x_t, step)
        if step == 0:  # the last step has no posterior left: the image is told apart with the noise's own variance
            variance = 1 - diffusion.alpha_bar(0)
        kl = kl_divergence(Normal(mean, variance**0.5), Normal(other, variance**0.5))
        assert weight[step].item() * (x0 - wrong).square().item() == pytest.approx(50 * kl.item(), rel=1e-5)


def test_annealing_counts_images_and_reaches_its_value():
    for shape, half in (("linear", 1.0), ("cosine", 1.0)):
        balance = BALANCES["annealed"](2.0, kimg=0.032, shape=shape)
        strengths = balance.strength(torch.tensor([0.0, 0.016, 0.032, 1.0]), None, None)
        assert strengths.tolist() == pytest.approx([0.0, half, 2.0, 2.0])
    cosine = BALANCES["annealed"](1.0, kimg=1.0, shape="cosine")
    quarter = cosine.strength(torch.tensor(0.25), None, None).item()
    assert quarter == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 4))
    m = model(balance={"name": "annealed", "value": 2.0, "kimg": 0.032})
    seen = []
    for step in range(6):
        m.training_loss(images(), draws=Draws(0, step))["loss"].backward()
        seen.append(m.last[2].item())
    assert seen == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0])  # 0, 8, 16, ... of 32 images


def test_uncertainty_learns_the_mean_squared_errors():
    balance = BALANCES["uncertainty"]()
    terms, diffusion = {"mse": torch.tensor(0.04), "reconstruction": torch.tensor(9.0)}, torch.tensor(0.3)
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        balance.reconstruction(terms, diffusion).backward()
        optimizer.step()
    torch.testing.assert_close(balance.log_variance.detach().exp(), torch.tensor([0.04, 0.3]), rtol=1e-3, atol=0)
    assert balance.strength(0.0, None, None).item() == pytest.approx(1 / (2 * 0.3), rel=1e-3)


def test_gradient_norms_are_balanced_at_the_decoders_output():
    m, x = model(balance={"name": "gradient-norm", "value": 0.5}), images()
    m.training_loss(x, draws=Draws(0, 0))["loss"].backward()
    draws = Draws(0, 0)
    mu, logvar = m.vae.encode(x)
    x_hat = m.vae.decode(reparameterize(mu, logvar, draws.randn(*mu.shape))).detach().requires_grad_(True)
    t, eps = draws.randint(1000, len(x)), draws.randn(*x.shape)
    of_reconstruction, = torch.autograd.grad(-Normal(x_hat, m.vae.sigma).log_prob(x).mean(), x_hat)
    loss = m.diffusion.loss(lambda x_t, t: m.unet(x_t, t, cond=x_hat), x, t, eps).mean()
    of_diffusion, = torch.autograd.grad(loss, x_hat)
    assert m.last.tolist() == pytest.approx([of_reconstruction.norm().item(), of_diffusion.norm().item(),
                                             0.5 * of_reconstruction.norm().item() / of_diffusion.norm().item()])


def test_code_use_counts_the_dimensions_that_vary_and_orders_their_kl():
    mu = torch.randn(512, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.0, 0.05, 1.0, 2.0, 3.0])
    logvar = torch.zeros(512, 5)
    found = code_use(mu, logvar)
    assert found["active_units"] == 3
    expected = kl_divergence(Normal(mu, 1.0), Normal(0.0, 1.0)).mean(dim=0).sort().values
    assert [found[f"kl_q{q}"].item() for q in (0, 25, 50, 75, 100)] == pytest.approx(expected.tolist())


def points(*values, key="active_units", held_out=True):
    "A history in which one of the watched numbers takes these values."
    name = f"heldout_{key}" if held_out else key
    return [{"kimg": 1.0 * i, "active_units": 4, "explained": 0.9, name: v} for i, v in enumerate(values)]


def test_a_collapse_is_two_bad_points_in_a_row_after_the_first_fifth():
    m = JointDiffuseVAE({**VAE_CONFIG, "z_dim": 20}, UNET)
    assert m.stop_reason([]) is None
    assert m.stop_reason(points(*[1] * 3)) is None  # the fifth is over, but it is one point only
    assert "active_units" in m.stop_reason(points(*[1] * 4))
    assert m.stop_reason(points(*[1] * 3, 2)) is None
    assert m.stop_reason(points(*[20] * 8, 1)) is None
    assert "explained" in m.stop_reason(points(*[0.9] * 8, 0.05, 0.01, key="explained"))
    assert "explained" in m.stop_reason(points(*[0.9] * 8, 0.05, 0.01, key="explained", held_out=False))


def shapes(n, size=16):
    factors = shapes_factors(range(n))
    return ImageData("shapes", "train", draw_shapes(factors, size), factors)


class Dead(JointDiffuseVAE):
    "A model whose code is dead."

    def training_loss(self, x, y=None, *, draws=None):
        terms = super().training_loss(x, y, draws=draws)
        return terms | {"active_units": torch.zeros(())}


class Endless(JointDiffuseVAE):
    "A model that is never stopped."

    def stop_reason(self, history):
        return None


def small(cls=Endless, **options):
    torch.manual_seed(0)
    return cls({**VAE_CONFIG, "z_dim": 4}, UNET, **options)


def test_training_stops_where_the_code_collapses_says_why_and_does_not_go_on(tmp_path):
    config, data = TrainConfig(kimg=0.4, batch_size=8), shapes(64)
    result = train(small(Dead), data, config, tmp_path, heldout=data, cpu=True, progress=False)
    assert result.finished and "active_units" in result.stopped
    assert result.step == 4 * 5  # 10 points in 50 steps: the fourth
    assert latest_checkpoint(tmp_path).name == "checkpoint-20"
    again = train(small(Dead), data, config, tmp_path, heldout=data, cpu=True, progress=False)
    assert again.stopped == result.stopped and again.step == 20


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    "The images counted and the last norms are part of a checkpoint."
    options = dict(balance={"name": "annealed", "value": 3.0, "kimg": 0.05})
    config, data = TrainConfig(kimg=0.064, batch_size=8), shapes(64)
    whole = small(**options)
    train(whole, data, config, tmp_path / "a", heldout=data, cpu=True, progress=False)
    first = train(small(**options), data, config, tmp_path / "b", heldout=data, minutes=0, cpu=True, progress=False)
    assert not first.finished
    second = small(**options)
    train(second, data, config, tmp_path / "b", heldout=data, cpu=True, progress=False)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0)
    state = load_file(latest_checkpoint(tmp_path / "b") / "state.safetensors")
    assert state["buffer/images_seen"] == 64


def test_a_saved_model_comes_back_without_what_only_training_needs(tmp_path):
    m = model(balance={"name": "uncertainty"}).eval()
    other = load_model(save_model(m, tmp_path / "m.safetensors"))
    assert isinstance(other, JointDiffuseVAE) and other.config == m.config
    assert not {"images_seen", "last"} & load_file(tmp_path / "m.safetensors").keys()
    assert all(p.requires_grad for p in other.vae.parameters())


def test_another_balance_takes_a_few_lines():
    class ByImages(Balance):
        name = "by-images"

        def strength(self, kimg, reconstruction, diffusion):
            return self.value + kimg
    m = model(balance={"name": "by-images", "value": 2.0})
    for step in range(2):
        m.training_loss(images(), draws=Draws(0, step))["loss"].backward()
    assert m.last[2].item() == pytest.approx(2.008) and build_model(m.config).balance.value == 2
    del BALANCES["by-images"]


@VARIANTS
def test_the_bound_on_the_likelihood_is_that_of_the_pair_with_its_weights(form, z_guidance):
    m, x = model(form=form, z_guidance=z_guidance).eval(), (127.5 * (images(3) + 1)).round() / 127.5 - 1
    pair = DiffuseVAE(VAE_CONFIG, UNET, form=form, z_guidance=z_guidance).eval()
    pair.load_state_dict(m.state_dict(), strict=False)
    found, want = (each.likelihood_bound(x, image_draws(0, 0, 3), timesteps=2) for each in (m, pair))
    for name, value in want.items():
        assert torch.equal(found[name], value)


def test_unknown_choices_are_refused():
    for bad in ({"gradient_to": "decoder"}, {"balance": {"name": "luck"}}, {"vae_weighting": "none"},
                {"cond_dropout": 0.1}):
        with pytest.raises(ValueError, match=list(bad)[0]):
            JointDiffuseVAE(VAE_CONFIG, UNET, **bad)


@pytest.mark.parametrize("dataset", ["shapes", "cifar10", "celeba64"])
def test_entries_that_are_compared_start_alike_and_see_equally_many_images(dataset):
    of_size = [e for e in entries_of(dataset, "joint") if not e.experiment.endswith("-cpu")]
    entries = {(e.experiment, e.seed): e for e in of_size}
    assert len(entries) == len(of_size)  # no name twice
    configs = [str(e.config) for e in entries.values() if e.seed == 0]
    assert len(set(configs)) == len(configs)  # nor one config under two names
    control = entries["joint-none", 0]
    for (_, seed), entry in entries.items():
        if seed == 0 and entry.model["model"] == "JointDiffuseVAE":
            assert entry.config | {"model": None} == control.config | {"model": None}
            assert entry.evaluations[:2] == control.evaluations[:2]
    with_seeds = {name for name, seed in entries if seed == 2}
    assert with_seeds == {name for name, seed in entries if seed == 1}
    small = {"joint-frozen-time", "joint-b16-10"} if dataset == "shapes" else set()
    assert with_seeds == {"joint-none", "joint-b8-vae", "joint-b8-two-stage"} | small
    for e in entries.values():
        assert all(name in ("vae", "diffusevae-form1") or (name, e.seed) in entries for name in e.depends_on.values())
    if dataset == "shapes":
        assert entries["joint-frozen-time", 0].train["kimg"] == 1.5 * control.train["kimg"]


def test_only_the_controls_let_no_gradient_pass():
    for entry in entries_of("shapes", "joint"):
        blocked = entry.model["model"] == "DiffuseVAE" or entry.model.get("gradient_to") == "none"
        controls = ("none", "frozen-time", "vae", "two-stage")
        assert (blocked or entry.model["model"] == "VAE") == entry.experiment.endswith(controls)


# --- what the lesson says of its records ------------------------------------------------------------------------------

def lesson_tables():
    "The tables among the lesson's stored outputs, as rows of cells (the first: the columns)."
    nb = json.loads((NBS / "02_joint_training.ipynb").read_text())
    outputs = [o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", ())]
    html = ("".join(data["text/html"]) for data in outputs if "text/html" in data)
    for table in html:
        rows = re.findall(r"<tr.*?</tr>", table, flags=re.S)
        yield [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in rows]


def test_the_lesson_claims_no_more_than_its_intervals():
    "A difference is told apart only where its interval leaves out 0, and only of settings chosen on none of its seeds."
    families = [rows for rows in lesson_tables() if "95 % interval" in rows[0]]
    assert len(families) == 2  # on Scenes, and on Shapes
    for name, difference, interval, _, verdict, bound, seeds in families[0][1:] + families[1][1:]:
        low, high = map(float, interval.strip("[]").split(", "))
        assert low <= float(difference) <= high and int(seeds) >= 3
        assert {"lower": high <= 0, "higher": low >= 0, "not told apart": float(bound) >= 0}[verdict], name
        assert "b16" not in name and "b8" not in name


def test_the_lesson_shows_no_distance_of_few_images():
    shown = [rows for rows in lesson_tables() if any(column.startswith("FD (") for column in rows[0])]
    assert len(shown) >= 3
    for head, *rows in shown:
        assert "sharpness: high-frequency power" in head
        place = head.index("n") - len(head)
        assert all(int(row[place].replace(",", "")) >= 1_000 for row in rows)
