"""The Fréchet distance against its closed form and torch-fidelity, what it does on damaged images, and the network."""
import numpy as np
import pytest
import torch
from conftest import complains, generator, randomised
from hybridvae.core import Draws, save_model
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.metrics import (DEGRADATIONS, FeatureNetwork, count_flops, degrade, distance_floors, distance_scale,
                               extract, frechet_distance, gaussian_blur, hue_difference, load_features)
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric


def shapes(n, start=0):
    factors = shapes_factors(start + np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors), factors)


@pytest.fixture(scope="module")
def network():
    "Random weights see shapes, noise and blur well enough to test the distance."
    return randomised(FeatureNetwork(width=8, num_features=16), scale=0.2)


# --- Fréchet distance -----------------------------------------------------------------------------------------------

def sample_with(mean, cov, n=400, seed=0):
    "n points whose sample mean and sample covariance are exactly these."
    x = torch.randn(n, len(mean), generator=generator(seed), dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.atleast_2d(x.T.cov())), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def covariance(dim, seed):
    a = torch.randn(dim, dim, generator=generator(seed), dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(dim, dtype=torch.float64)


def closed_form(m1, c1, m2, c2):
    "|m₁ - m₂|² + tr(C₁ + C₂ - 2 (√C₁ C₂ √C₁)^½), square roots by eigenvalues."
    def root(c):
        values, vectors = torch.linalg.eigh(c)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    cross = root(root(c1) @ c2 @ root(c1))
    return ((m1 - m2).square().sum() + (c1 + c2 - 2 * cross).trace()).item()


@pytest.mark.parametrize("dim", [1, 3, 16])
def test_the_distance_is_the_closed_form_for_normal_distributions(dim):
    m1, m2 = (torch.randn(dim, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    c1, c2 = covariance(dim, 3), covariance(dim, 4)
    found = frechet_distance(sample_with(m1, c1, seed=5), sample_with(m2, c2, n=300, seed=6))
    assert found == pytest.approx(closed_form(m1, c1, m2, c2), rel=1e-9)


def test_the_distance_of_spheres_can_be_worked_out_by_hand():
    eye, zero = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    found = frechet_distance(sample_with(zero + 3, 4 * eye), sample_with(zero, eye))
    assert found == pytest.approx(4 * 3**2 + 4 * (2 - 1) ** 2)


def test_a_set_has_no_distance_to_itself_and_the_same_distance_both_ways(network):
    a, b = (extract(network, shapes(100, start).tensor()) for start in (0, 500))
    size = a.double().T.cov().trace().item()
    assert abs(frechet_distance(a, a)) < 1e-6 * size < frechet_distance(a, b)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


@pytest.mark.parametrize("n", [200, 12])  # also fewer images than features: covariances without full rank
def test_the_distance_is_that_of_torch_fidelity_on_the_same_features(network, n):
    a, b = (extract(network, shapes(n, start).tensor()) for start in (0, 5000))
    statistics = [fid_features_to_statistics(f.double()) for f in (a, b)]
    want = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert want > 0 and frechet_distance(a, b) == pytest.approx(want, rel=1e-5)


def test_it_is_computed_in_double_precision():
    "A mean far from zero swallows the variance in single precision."
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(sample_with(zero + 1e4, eye), sample_with(zero + 1e4, 4 * eye))
    assert found == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("damage", [
    lambda x, amount: (x + 40 * amount * torch.randn(x.shape, generator=generator())).round().clamp(0, 255),
    lambda x, amount: gaussian_blur(x, 2.0 * amount).round() if amount else x], ids=["noise", "blur"])
def test_the_distance_rises_with_the_damage(damage):
    network = load_features("shapes")
    reference, images = extract(network, shapes(600, 10_000).tensor()), shapes(600).tensor().float()
    damaged = [damage(images, amount).to(torch.uint8) for amount in (0, 0.25, 0.5, 1)]
    rising = [frechet_distance(extract(network, each), reference) for each in damaged]
    assert all(b > 1.05 * a for a, b in zip(rising, rising[1:])), rising


def test_features_do_not_depend_on_the_batch_they_are_made_in(network):
    images = shapes(50).tensor()
    whole = extract(network, images)
    assert whole.shape == (50, network.num_features) and not whole.requires_grad
    torch.testing.assert_close(extract(network, images, batch_size=7), whole, rtol=1e-4, atol=1e-4)


def test_scale_and_floors_are_the_distances_they_name(network):
    train, test = shapes(300), shapes(200, 10_000)
    reference, features = extract(network, test.tensor()), extract(network, train.tensor())
    scale = distance_scale(network, train, test, n=150)
    assert scale.keys() == DEGRADATIONS.keys()
    half = train.first(150).tensor()
    for name, damage in DEGRADATIONS.items():
        damaged = damage(half)
        assert damaged.dtype == torch.uint8 and damaged.shape == half.shape and not torch.equal(damaged, half)
        assert scale[name] == pytest.approx(frechet_distance(extract(network, damaged), reference), rel=1e-6)
    assert scale["noise, 20 of 255"] > scale["noise, 5 of 255"] and scale["blur, 1 pixel"] > scale["blur, 0.5 pixels"]
    floors = distance_floors(network, train, test, n=150)
    halves, held_out = (frechet_distance(features[:150], other) for other in (features[150:], reference))
    assert floors == {"n": 150, "train half to train half": pytest.approx(halves, rel=1e-5),
                      "train to held-out": pytest.approx(held_out, rel=1e-5)}


# --- the feature network --------------------------------------------------------------------------------------------

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


def test_operations_are_counted_as_two_for_each_multiply_add():
    layer, convolution = torch.nn.Linear(7, 5), torch.nn.Conv2d(3, 4, 3, padding=1)
    assert count_flops(layer, torch.zeros(2, 7)) == 2 * 2 * 7 * 5
    assert count_flops(convolution, torch.zeros(1, 3, 8, 8)) == 2 * 64 * 4 * 27
