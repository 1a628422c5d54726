"""The networks that look at images: what they are trained on, what they read, and how they are found."""
import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae.core import Draws, save_model
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.features import FeatureNetwork, degrade, gaussian_blur, hue_difference, load_features


def shapes(n, start=0):
    factors = shapes_factors(start + np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors), factors)


@pytest.fixture(scope="module")
def network():
    "Random weights see shapes, noise and blur well enough to test the distance."
    return randomised(FeatureNetwork(width=8, num_features=16), scale=0.2)


def test_blur_keeps_the_mean_and_spreads_a_point_like_a_gaussian():
    point = torch.zeros(1, 1, 31, 31)
    point[0, 0, 15, 15] = 1
    for sigma in (1.0, 1.5, 2.0):
        blurred, place = gaussian_blur(point, sigma)[0, 0], torch.arange(31.0) - 15
        assert blurred.sum().item() == pytest.approx(1, rel=1e-5)
        torch.testing.assert_close(blurred, blurred.T)
        # cutting at three deviations takes a little away
        assert (blurred.sum(dim=0) * place.square()).sum().item() == pytest.approx(sigma**2, rel=0.05)


def test_degradation_touches_half_of_the_images_each_way_and_says_how_much():
    x = torch.rand(400, 3, 32, 32, generator=generator()) * 2 - 1
    damaged, amount = degrade(x, Draws(0, 0))
    clean = (amount == 0).all(dim=1)
    assert amount.shape == (400, 2) and 0 <= amount.min() and amount.max() <= 1
    assert torch.equal(damaged[clean], x[clean]) and 60 < clean.sum() < 140  # a quarter
    for kind in (0, 1):
        only = (amount[:, kind] > 0.1) & (amount[:, 1 - kind] == 0)
        change = (damaged - x)[only].flatten(1).std(dim=1)
        assert 60 < only.sum() < 140 and np.corrcoef(change, amount[only, kind])[0, 1] > 0.8


def test_hues_are_compared_on_the_circle():
    a, b = torch.tensor([0.1, 0.95, 0.0, 0.25]), torch.tensor([0.3, 0.05, 0.5, 0.25])
    torch.testing.assert_close(hue_difference(a, b), torch.tensor([0.2, 0.1, 0.5, 0.0]))
    torch.testing.assert_close(hue_difference(b, a), hue_difference(a, b))


def test_the_networks_targets_say_what_the_factors_are():
    factors = torch.from_numpy(shapes_factors(np.arange(50)))
    targets = FeatureNetwork.factor_targets(factors)
    for column, name in ((0, 1), (2, 6)):  # hue and ground, on the circle
        angle = torch.atan2(targets[:, column + 1], targets[:, column]) / (2 * torch.pi) % 1
        torch.testing.assert_close(angle, factors[:, name], rtol=1e-4, atol=1e-5)
    for column, name in ((4, 2), (5, 3), (6, 4)):  # size and place, at a scale of order one
        assert np.corrcoef(targets[:, column], factors[:, name])[0, 1] == pytest.approx(1, abs=1e-5)
        assert targets[:, column].abs().max() < 3


def test_logits_are_read_off_the_features(network):
    images = shapes(5).tensor()
    logits = network.logits(images)
    torch.testing.assert_close(logits, network.class_head(network(images)))
    assert torch.equal(network.read(images)["class"], logits.argmax(dim=1)) and logits.shape == (5, network.classes)


def test_the_networks_loss_is_the_sum_of_its_terms_and_learns(network):
    data = shapes(32)
    x, y = data.tensor().float() / 127.5 - 1, torch.from_numpy(data.labels)
    torch.manual_seed(0)
    learner = FeatureNetwork(width=8, num_features=16)
    first = learner.training_loss(x, y, draws=Draws(0, 0))
    torch.testing.assert_close(first["loss"], sum(v for k, v in first.items() if k != "loss"))
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        learner.training_loss(x, y, draws=Draws(0, 0))["loss"].backward()
        optimizer.step()
    last = learner.training_loss(x, y, draws=Draws(0, 0))
    assert all(last[key] < 0.8 * first[key] for key in ("loss", "class", "factors"))


def test_labels_without_factors_are_classes():
    plain = FeatureNetwork(name="cifar", classes=10, factors=False, width=8, num_features=16)
    x, y = torch.rand(6, 3, 32, 32, generator=generator()) * 2 - 1, torch.arange(6, dtype=torch.uint8)
    assert set(plain.training_loss(x, y, draws=Draws(0, 0))) == {"loss", "class", "degradation"}
    assert set(plain.read(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))) == {"class"}


def test_shipped_networks_are_found_by_name(network, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_WEIGHTS", str(tmp_path))
    with complains("no shipped feature network 'faces'", "shapes"):
        load_features("faces")
    with complains(tmp_path / "shapes-features.safetensors", "give the path"):
        load_features("shapes")
    save_model(network, tmp_path / "shapes-features.safetensors")
    images = shapes(5).tensor()
    assert torch.equal(load_features("shapes")(images), network(images))


def test_the_shipped_network_for_shapes_reads_shapes():
    "The weights that ship: they must see what factors say, or all distances on Shapes mean nothing."
    data = shapes(300, 1_000_000_000)  # held out
    seen = load_features("shapes").read(data.tensor())
    factors = torch.from_numpy(data.labels)
    assert (seen["class"] == factors[:, 0]).double().mean() > 0.97
    assert hue_difference(seen["hue"], factors[:, 1]).mean() < 5 / 360
