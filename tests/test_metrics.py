"""The Fréchet distance against its closed form and torch-fidelity, and what it does on damaged images."""
import numpy as np
import pytest
import torch
from conftest import generator, randomised
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.features import FeatureNetwork, gaussian_blur, load_features
from hybridvae.metrics import DEGRADATIONS, count_flops, distance_floors, distance_scale, extract, frechet_distance
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


# --- work ----------------------------------------------------------------------------------------------------


def test_operations_are_counted_as_two_for_each_multiply_add():
    layer, convolution = torch.nn.Linear(7, 5), torch.nn.Conv2d(3, 4, 3, padding=1)
    assert count_flops(layer, torch.zeros(2, 7)) == 2 * 2 * 7 * 5
    assert count_flops(convolution, torch.zeros(1, 3, 8, 8)) == 2 * 64 * 4 * 27
