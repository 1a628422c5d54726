"""Every metric against another implementation or a closed form, and its order under noise, blur and dropped modes."""
import hashlib
import json
import math
import pickle
import re
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import complains, inception_stand_in, generator, randomised
from hybridvae.core import HybridVAEError, count_flops
from hybridvae.data import SCENE_FACTORS, ImageData, draw_scenes, draw_shapes, factor_targets, load_data, shapes_factors
from hybridvae.features import FeatureNetwork, gaussian_blur, load_features
from hybridvae.metrics import (DEGRADATIONS, INCEPTION_FILE, ImageStatistics, compare, confidence, degraded,
                               density_coverage, describe, distance_floors, distance_scale, diversity, extract,
                               frechet_deviation, frechet_distance, high_frequency_power, inception_score,
                               kernel_distance, linear_readout, load_inception, measure, metric_name, paired,
                               paired_family, paired_line, paired_table, path_length, power_spectrum, precision_recall,
                               score_splits, slerp, texture, texture_distance)
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.noise import batch_slerp_any



def shapes(n, start=0):
    factors = shapes_factors(start + np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors), factors)


@pytest.fixture(scope="module")
def network():
    "Random weights see shapes, noise and blur well enough to test the distance."
    return randomised(FeatureNetwork(width=8, num_features=16), scale=0.2)


@pytest.fixture(scope="module")
def shipped():
    return load_features("shapes")


def cloud(n, dim=6, seed=0, shift=0.0):
    return torch.randn(n, dim, generator=generator(seed)) + shift


# --- one look at each image ------------------------------------------------------------------------------------------


def test_images_are_let_go_as_soon_as_they_are_seen(network):
    "Of ten batches never more than two exist: the one just seen, and the next one."
    alive = []

    def batches():
        for start in range(0, 100, 10):
            assert sum(ref() is not None for ref in alive) <= 1, "an earlier batch is still in memory"
            batch = shapes(10, start).tensor().clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    seen = describe(network, batches())
    assert len(seen) == 100 and not any(ref() is not None for ref in alive)


def test_statistics_are_what_the_network_says_of_each_image_alone(network):
    data = shapes(30)
    images = data.tensor()
    for found in (describe(network, data, 7), describe(network, images, 11), describe(network, iter(images.split(4)))):
        assert len(found) == 30 and found.features.dtype == torch.float32 and not found.features.requires_grad
        for name, each in (("features", network), ("logits", network.logits), ("high_frequency", high_frequency_power)):
            want = torch.cat([each(image[None]) for image in images])
            torch.testing.assert_close(getattr(found, name), want, rtol=1e-4, atol=1e-5)


def test_the_network_looks_once_at_each_image(network):
    seen = []
    hook = network.body.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    describe(network, shapes(50), 20)
    hook.remove()
    assert seen == [20, 20, 10]


class Plain(torch.nn.Module):
    "A feature network with features alone: the mean colour and its square."
    name, num_features = "plain", 6

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255))

    def forward(self, images):
        colour = images.float().mean(dim=(2, 3)) * self.scale
        return torch.cat([colour, colour.square()], dim=1)


class WithClasses(Plain):
    def logits(self, images):
        return 5 * self(images)[:, :3]


def test_a_network_needs_only_features_and_where_it_has_classes_logits():
    images = shapes(20).tensor()
    assert describe(Plain(), images).logits is None
    torch.testing.assert_close(describe(WithClasses(), images).logits, 5 * images.float().mean(dim=(2, 3)) / 255)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
                                    torch.zeros(3, 8, 8, dtype=torch.uint8)], ids=["float", "grey", "one image"])
def test_only_bytes_in_colour_are_measured(network, images):
    with complains("uint8", tuple(images.shape)):
        ImageStatistics(network).add(images)


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
    reference, features = describe(network, test), extract(network, train.tensor())
    scale = distance_scale(network, train, test, n=150)
    assert scale.keys() == DEGRADATIONS.keys()
    half = train.first(150).tensor()
    for name, damage in DEGRADATIONS.items():
        damaged = torch.cat(list(degraded(train, name, np.arange(150))))
        assert damaged.dtype == torch.uint8 and damaged.shape == half.shape and not torch.equal(damaged, half)
        assert "texture" in name or torch.equal(damaged, damage(half))
        seen = describe(network, damaged)
        assert scale[name] == pytest.approx({
            "FD (shapes)": frechet_distance(seen.features, reference.features),
            "texture distance": texture_distance(seen.texture, reference.texture),
            "high-frequency power": (seen.high_frequency.mean() / reference.high_frequency.mean()).item()}, rel=1e-5)
    for less, more in (("noise, 5 of 255", "noise, 20 of 255"), ("blur, 0.5 pixels", "blur, 1 pixel")):
        assert scale[less]["FD (shapes)"] < scale[more]["FD (shapes)"]
    floors = distance_floors(network, train, test, n=150)
    halves, held_out = (frechet_distance(features[:150], other) for other in (features[150:], reference.features))
    assert floors["n"] == 150 and "groups" not in floors
    assert floors["train half to train half"]["FD (shapes)"] == pytest.approx(halves, rel=1e-5)
    assert floors["train to held-out"]["FD (shapes)"] == pytest.approx(held_out, rel=1e-5)


def test_images_without_texture_are_the_same_images(network):
    data = shapes(40)
    plain, half = (torch.cat(list(degraded(data, name, np.arange(40)))) for name in ("no texture", "half the texture"))
    assert torch.equal(plain, torch.from_numpy(draw_shapes(data.labels, texture=0.0)).permute(0, 3, 1, 2))
    far = lambda x: (x.float() - data.tensor().float()).abs().mean()
    assert 0 < far(half) < far(plain) < 20


def test_scenes_without_texture_are_drawn_again(network):
    factors = shapes_factors(np.arange(10), SCENE_FACTORS)
    data = ImageData("scenes", "train", draw_scenes(factors), factors)
    (plain,) = degraded(data, "no texture", np.arange(10))
    assert torch.equal(plain, torch.from_numpy(draw_scenes(factors, texture=0.0)).permute(0, 3, 1, 2))


def test_smoothing_photographs_takes_texture_and_leaves_edges():
    "A step of 200 levels stays; noise of 10 levels goes."
    step = torch.full((1, 3, 32, 32), 20.0)
    step[..., 16:] = 220
    images = (step + 10 * torch.randn(step.shape, generator=generator(0))).round().clamp(0, 255).to(torch.uint8)
    data = ImageData("folder", "train", images.permute(0, 2, 3, 1).numpy())
    smooth = next(degraded(data, "no texture", np.arange(1))).float()
    assert (smooth - step).std() < 0.4 * (images.float() - step).std()
    assert (smooth[..., 16] - smooth[..., 15]).mean() > 180
    flat = ImageData("folder", "train", np.full((2, 8, 8, 3), 77, np.uint8))
    assert torch.equal(next(degraded(flat, "half the texture", np.arange(2))), flat.tensor())


# --- texture ---------------------------------------------------------------------------------------------------------


def test_the_wavelet_energies_are_those_of_haar_filters():
    "Against convolutions with the filters of a level, written out, of the luminance's and the colours' means."
    images = torch.randint(0, 256, (5, 3, 16, 24), generator=generator(0), dtype=torch.uint8)
    red, green, blue = images.double().unbind(1)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = torch.stack([y, 0.564 * (blue - y), 0.713 * (red - y)], dim=1) / 255
    want = []
    for level in range(3):
        size = 2**level
        ones = torch.ones(size, size, dtype=torch.float64)
        for signs in ([[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]):
            kernel = torch.kron(torch.tensor(signs, dtype=torch.float64), ones) / (2 * size**2)
            band = F.conv2d(channels.reshape(-1, 1, 16, 24), kernel[None, None], stride=2 * size)
            want.append(band.reshape(5, 3, -1).square().mean(dim=2))
    torch.testing.assert_close(texture(images).double(), (torch.cat(want, dim=1) + 1e-6).log(), rtol=0, atol=0.02)


def test_a_flat_image_has_no_more_energy_than_rounding():
    flat = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    torch.testing.assert_close(texture(flat), torch.full((2, 27), np.log(1e-6).item()), rtol=0, atol=1e-3)
    with complains("7 x 8", "at least 8"):
        texture(torch.zeros(1, 3, 7, 8, dtype=torch.uint8))


def test_the_texture_distance_has_the_units_of_the_reference():
    "A shift of every energy by one deviation of the reference is a distance of 27."
    reference = torch.randn(400, 27, generator=generator(0)) * torch.linspace(0.1, 5, 27) + 3
    deviation = reference.std(dim=0)
    assert texture_distance(reference + deviation, reference) == pytest.approx(27, rel=1e-4)
    assert abs(texture_distance(reference, reference)) < 1e-6


@pytest.fixture(scope="module")
def seen_by_both(shipped):
    """Distances to held-out images of 2,000 images each, as in the tables.

    Of damaged images, and of the real ones of five disjoint sets.
    """
    train, reference = load_data("shapes", "train"), describe(shipped, load_data("shapes", "test"))

    def distances(batches):
        seen = describe(shipped, batches)
        return {"FD": frechet_distance(seen.features, reference.features),
                "texture": texture_distance(seen.texture, reference.texture)}

    real = [distances(ImageData("shapes", "train", train.images[i:i + 2_000])) for i in range(0, 10_000, 2_000)]
    damaged = {name: distances(degraded(train, name, np.arange(2_000))) for name in DEGRADATIONS}
    values = {kind: [r[kind] for r in real] for kind in ("FD", "texture")}
    floor = {kind: (np.mean(v), np.std(v, ddof=1)) for kind, v in values.items()}
    return floor, damaged


CHAINS = [("half the texture", "no texture"), ("blur, 0.5 pixels", "blur, 1 pixel"),
          ("noise, 5 of 255", "noise, 20 of 255"),
          ("JPEG 90", "JPEG 75")]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain[1])
def test_the_texture_distance_orders_every_damage(seen_by_both, chain):
    "Each step by more than three deviations of the floor."
    floor, damaged = seen_by_both
    mean, deviation = floor["texture"]
    less, more = (damaged[name]["texture"] for name in chain)
    assert mean + 3 * deviation < less < more - 3 * deviation


def test_a_generator_without_texture_is_caught(seen_by_both):
    "Real shapes without grain: what FD alone takes for real is beyond five deviations of the floor."
    floor, damaged = seen_by_both
    far = {kind: (damaged["no texture"][kind] - mean) / deviation for kind, (mean, deviation) in floor.items()}
    assert far["texture"] > 5 and damaged["no texture"]["FD"] < damaged["blur, 0.5 pixels"]["FD"]


# --- how sure is a distance ------------------------------------------------------------------------------------------


def test_the_bootstraps_distances_are_frechet_distances(monkeypatch):
    "Draws that leave the set as it is: its distance, twice, without spread; and known draws have the spread of theirs."
    x, y = cloud(300, shift=0.5), cloud(400, seed=1)
    real = torch.randint
    monkeypatch.setattr(torch, "randint", lambda high, size, generator=None: real(high, size, generator=generator))
    parts = torch.Generator().manual_seed(5)
    want = [frechet_distance(x[real(300, (300,), generator=parts)], y) for _ in range(4)]
    assert frechet_deviation(x, y, draws=4, seed=5) == pytest.approx(np.std(want, ddof=1), rel=1e-5)
    monkeypatch.setattr(torch, "randint", lambda high, size, generator=None: torch.arange(*size))
    assert frechet_deviation(x, y, draws=3) < 1e-9


def test_long_features_have_no_bootstrap():
    x = torch.randn(20, 600, generator=generator(0))
    assert frechet_deviation(x, x) is None


# --- paired runs -----------------------------------------------------------------------------------------------------


def by_seed(*values):
    return dict(enumerate(values))


def test_a_paired_difference_is_students():
    "Mean, interval, p value and bound from the formulas; t quantiles of four degrees of freedom from tables."
    a, b = by_seed(3.1, 2.2, 4.0, 3.3, 2.9), by_seed(3.9, 3.4, 4.1, 4.5, 3.2)
    d = np.subtract(list(a.values()), list(b.values()))
    error = d.std(ddof=1) / np.sqrt(5)
    found = paired(a, b)
    assert found.n == 5 and found.difference == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((d.mean() - 2.7764 * error, d.mean() + 2.7764 * error), rel=1e-3)
    assert found.bound == pytest.approx(2.1318 * error - d.mean(), rel=1e-3)
    back = paired(b, a)
    assert (back.low, back.high, back.p, back.bound) == pytest.approx((-found.high, -found.low, found.p, found.bound))
    assert found.verdict == "lower" and back.verdict == "higher" and "lower" in str(found)


def test_only_common_seeds_are_compared_and_fewer_than_three_claim_nothing():
    a, b = {0: 1.0, 1: 2.0, 2: 3.0, 7: 99.0}, {2: 3.5, 1: 2.4, 0: 1.6, 5: -99.0}
    assert paired(a, b).n == 3 and paired(a, b).difference == pytest.approx(-0.5)
    assert paired({0: 1.0, 1: 2.0}, b) is None and paired({}, b) is None


def test_a_line_of_one_comparison_has_its_interval_and_a_bound_only_where_the_interval_holds_zero():
    a, b, c = by_seed(1.0, 2.0, 3.5), by_seed(2.0, 3.1, 4.4), by_seed(1.4, 1.8, 3.3)
    apart, open_ = paired(a, b), paired(a, c)
    assert paired_line("a - b", a, b) == f"a - b: -1.00 [{apart.low:+.2f}, {apart.high:+.2f}], 3 seeds"
    assert apart.high < 0 and open_.low < 0 < open_.high
    assert paired_line("a - c", a, c, digits=3) == (
        f"a - c: +0.000 [{open_.low:+.3f}, {open_.high:+.3f}], within ±{open_.bound:.3f}, 3 seeds")
    assert paired_line("few", {0: 1.0, 1: 2.0}, b) == "few: fewer than three common seeds, no claim"


def test_differences_without_spread_need_no_t():
    same, less = paired(by_seed(1, 2, 3), by_seed(1, 2, 3)), paired(by_seed(1, 2, 3), by_seed(2, 3, 4))
    assert same.verdict == "not told apart" and same.bound == 0 and less.verdict == "lower" and less.difference == -1


def test_a_family_is_corrected_by_holm():
    "The smallest p times the size of the family, the next times one less, never falling; and fewer verdicts for it."
    rng = np.random.default_rng(0)
    base = {seed: 0.0 for seed in range(4)}
    family = {str(k): (dict(enumerate(rng.normal(shift, 1, 4))), base) for k, shift in enumerate((2.5, 4.0, 0.0, 1.5))}
    alone, found = {name: paired(*pair) for name, pair in family.items()}, paired_family(family | {"few": ({}, base)})
    assert found.keys() == alone.keys()
    order, highest = sorted(alone, key=lambda name: alone[name].p), 0.0
    for rank, name in enumerate(order):
        highest = max(highest, min(1.0, (4 - rank) * alone[name].p))
        assert found[name].p == pytest.approx(highest) and found[name].low == alone[name].low
    table = paired_table(found)
    assert list(table.index) == list(found) and list(table["verdict"]) == [r.verdict for r in found.values()]
    assert paired_family({}) == {}


@pytest.fixture(scope="module")
def floored(network):
    train, test = shapes(300), shapes(200, 10_000)
    return train, test, distance_floors(network, train, test, n=120, groups={"squares": train.labels[:, 0] == 0,
                                                                             "evens": np.arange(0, 300, 2)})


def test_every_metric_has_its_floor(network, floored):
    train, test, floors = floored
    half, other, held_out = (describe(network, part.tensor()) for part in (train.first(120), shapes(120, 120), test))
    for pair, against in (("train half to train half", other), ("train to held-out", held_out)):
        want = {metric_name(kind, network): value for kind, value in measure(half, against).items()}
        assert floors[pair] == pytest.approx(want, rel=1e-4) and {"FD (shapes)", "texture distance"} < want.keys()


def test_floors_of_a_group_are_those_of_its_images_alone(network, floored):
    train, test, floors = floored
    assert floors["groups"].keys() == {"squares", "evens"} and floors["groups"]["evens"]["n"] == 75
    squares = ImageData("shapes", "train", train.images[train.labels[:, 0] == 0])
    assert floors["groups"]["squares"] == distance_floors(network, squares, test, n=120)
    evens = ImageData("shapes", "train", train.images[::2])
    assert floors["groups"]["evens"] == distance_floors(network, evens, test, n=120)


# --- kernel distance -------------------------------------------------------------------------------------------------


def test_the_kernel_distance_is_that_of_torch_fidelity():
    "Subsets as large as the sets: then both packages take all images, in whatever order."
    a, b = cloud(80, shift=0.3), cloud(80, seed=1)
    want = kid_features_to_metric(a.double(), b.double(), kid_subsets=2, kid_subset_size=80, verbose=False)
    expected = pytest.approx(want["kernel_inception_distance_mean"], rel=1e-9)
    assert kernel_distance(a, b, subsets=2, subset_size=80) == expected


def test_the_kernel_distance_is_the_double_sum_of_the_kernel():
    a, b = cloud(12, shift=0.5).double(), cloud(12, seed=1).double()
    k = lambda x, y: float((x @ y / 6 + 1) ** 3)
    within = sum(k(x[i], x[j]) for x in (a, b) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    between = sum(k(x, y) for x in a for y in b) / 12**2
    assert kernel_distance(a, b, subsets=1) == pytest.approx(within - 2 * between, rel=1e-9)


def test_the_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    pairs = [(cloud(40, seed=2 * s), cloud(40, seed=2 * s + 1)) for s in range(60)]
    kernel = np.array([kernel_distance(a, b, subsets=1) for a, b in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / math.sqrt(60) and kernel.min() < 0
    assert min(frechet_distance(a, b) for a, b in pairs) > 0


@pytest.mark.parametrize("metric", [lambda: kernel_distance(cloud(50), cloud(60, seed=1), subsets=5, subset_size=20),
                                    lambda: inception_score(cloud(570)),
                                    lambda: diversity(cloud(20), cloud(20, seed=1))])
def test_random_subsets_are_the_same_every_time_and_the_global_generator_is_left_alone(metric):
    torch.manual_seed(1)
    first, state = metric(), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    assert metric() == first


# --- class score -----------------------------------------------------------------------------------------------------


def test_the_class_score_is_that_of_torch_fidelity():
    logits = 3 * cloud(200, dim=5)
    want = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits, splits=1) == pytest.approx(want, rel=1e-9)
    many = logits.repeat_interleave(50, dim=0)  # shuffled in another order, split into ten
    want = isc_features_to_metric(many, splits=10)["inception_score_mean"]
    assert inception_score(many) == pytest.approx(want, rel=0.01)


def test_the_class_score_goes_from_one_to_the_number_of_classes():
    sure = 800.0 * torch.nn.functional.one_hot(torch.arange(60) % 4).float()  # as far as exp underflows
    assert inception_score(torch.zeros(100, 4)) == pytest.approx(1)
    assert inception_score(sure, splits=1) == pytest.approx(4)
    assert inception_score(sure[:1].repeat(100, 1)) == pytest.approx(1)


def test_a_class_score_belongs_to_its_parts_and_few_images_have_none(network):
    "Images of three classes in equal numbers, each surely of its own, have the score 3 for any n that has one."
    perfect = lambda n: 50.0 * torch.nn.functional.one_hot(torch.arange(n) % 3).float()
    for n in (1, 6, 60, 99):
        with complains(f"{n} images are too few", "class score", "at least 100"):
            inception_score(perfect(n))
    with complains("too few"):
        inception_score(perfect(19), splits=10)  # a part of one image would have the score 1
    assert inception_score(perfect(60), splits=1) == pytest.approx(3)
    for n in (100, 250, 999, 1_000, 5_000):
        assert inception_score(perfect(n)) == pytest.approx(3, rel=0.03), n
    assert [score_splits(n) for n in (99, 100, 250, 999, 1_000, 50_000)] == [0, 1, 2, 9, 10, 10]
    few, enough = (compare(describe(network, shapes(n)), {"held-out": describe(network, shapes(20, 500))}, network)
                   for n in (99, 100))
    assert "class score (shapes)" not in few and "confidence (shapes)" in few
    assert {"n": 100, "splits": 1}.items() <= enough["class score (shapes)"].items()


OF_SETS = [frechet_distance, texture_distance, frechet_deviation, kernel_distance, diversity, precision_recall,
           density_coverage, lambda a, b: confidence(a), lambda a, b: inception_score(a, splits=1)]


@pytest.mark.parametrize("metric", OF_SETS)
@pytest.mark.parametrize("swapped", [False, True])
def test_of_few_images_or_equal_ones_a_metric_is_a_finite_number_or_a_sentence(metric, swapped):
    "Sets smaller than the metric's k, of equal images on either side or both, and features that are not numbers."
    equal, unsound = torch.ones(20, 6), cloud(20).index_fill(0, torch.tensor([3]), math.nan)
    in_order = lambda few, other: (other, few) if swapped else (few, other)
    for few in (*(cloud(n) for n in range(7)), equal, unsound):
        for other in (cloud(50, seed=1), equal):
            try:
                found = metric(*in_order(few, other))
            except HybridVAEError as error:
                assert re.search(r"too few|not finite|give images that differ", str(error))
                continue
            values = list(found.values()) if isinstance(found, dict) else [found]
            assert all(map(math.isfinite, values)), (len(few), values)


def test_images_of_reference_without_detail_get_a_sentence(network):
    flat = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    with complains("give images that differ"):
        compare(describe(network, shapes(20)), {"held-out": describe(network, flat)}, network)
    found = compare(describe(network, flat), {"held-out": describe(network, shapes(20))}, network)
    assert found["diversity (shapes)"]["value"] == found["high-frequency power"]["value"] == 0
    with complains("same one"):
        linear_readout(cloud(30), np.zeros((30, 8)), cloud(30), np.zeros((30, 8)))


# --- neighbours -------------------------------------------------------------------------------------------------------


def radii(points, k):
    distances, _ = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(points).kneighbors(points)
    return distances[:, k]


def brute(a, b, k):
    "Precision, recall, density and coverage from all differences, in float64."
    a, b = a.double().numpy(), b.double().numpy()
    distance = np.linalg.norm(a[:, None] - b[None], axis=2)
    return {"precision": (distance <= radii(b, k)).any(axis=1).mean(),
            "recall": (distance <= radii(a, k)[:, None]).any(axis=0).mean(),
            "density": (distance < radii(b, k)).sum() / (k * len(a)),
            "coverage": (distance < radii(b, k)).any(axis=0).mean()}


@pytest.mark.parametrize("n, m, k", [(60, 60, 3), (70, 40, 5), (1_100, 1_050, 3)])  # also several chunks
def test_neighbour_metrics_are_those_of_scikit_learn(n, m, k):
    a, b = 1.2 * cloud(n, shift=1.2), cloud(m, seed=1)
    want = brute(a, b, k)
    assert 0.01 < min(want.values()) and max(want[name] for name in ("precision", "recall", "coverage")) < 1
    assert precision_recall(a, b, k) | density_coverage(a, b, k) == pytest.approx(want, abs=1e-6)


def test_precision_and_recall_are_those_of_torch_fidelity():
    a, b = cloud(150, shift=0.5), 1.5 * cloud(150, seed=1)
    want = prc_features_to_metric(a, b, prc_neighborhood=3, verbose=False)
    assert precision_recall(a, b) == pytest.approx({key: want[key] for key in ("precision", "recall")}, abs=1e-6)


def test_neighbours_survive_features_far_from_zero():
    "On a grid the shift is exact, so nothing may change; |a|² + |b|² - 2ab would lose all digits here."
    grid = lambda x: (x * 64).round() / 64
    a, b = grid(cloud(200, shift=0.5)), grid(1.5 * cloud(200, seed=1))
    for metric in (precision_recall, density_coverage):
        assert metric(a + 8192, b + 8192) == metric(a, b)


def test_too_few_images_for_neighbours_are_refused():
    with complains("3 images", "6"):
        density_coverage(cloud(3), cloud(3))


def test_copies_of_the_reference_are_precise_and_cover_it():
    real = cloud(100)
    assert precision_recall(real, real) == {"precision": 1, "recall": 1}
    assert density_coverage(real, real)["coverage"] == 1
    one = real[:1].repeat(100, 1)  # one image again and again: precise, without recall
    assert precision_recall(one, real) == {"precision": 1, "recall": pytest.approx(0.01)}


def test_diversity_is_the_mean_distance_of_pairs():
    a, b = cloud(300), 2 * cloud(200, seed=1)
    assert diversity(3 * b + 5, b) == pytest.approx(3, rel=1e-5) and diversity(a[:1].repeat(9, 1), b) == 0
    want = torch.pdist(a).mean() / torch.pdist(b).mean()
    assert diversity(a, b, pairs=200_000) == pytest.approx(want.item(), rel=0.01)


# --- frequencies -----------------------------------------------------------------------------------------------------


def wave(cycles, size=32, amplitude=100, axis=3):
    "A grey wave with so many cycles per image."
    x = 127 + amplitude * torch.cos(2 * math.pi * cycles * torch.arange(size) / size)
    return x.round().to(torch.uint8).reshape([-1 if i == axis else 1 for i in range(4)]).expand(1, 3, size, size)


def test_the_spectrum_is_that_of_numpy():
    images = shapes(3).tensor()
    grey = (images.double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1).numpy() / 255
    power = np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True)))**2 / 32**2
    index = np.minimum(np.arange(32), 32 - np.arange(32))
    cycles = np.sqrt(index[:, None]**2 + index**2)
    np.testing.assert_allclose(high_frequency_power(images), power[:, cycles > 8].mean(axis=1), rtol=1e-3)
    rings = [power[:, (cycles >= r - 0.5) & (cycles < r + 0.5)].mean() for r in range(1, 17)]
    np.testing.assert_allclose(power_spectrum(images), rings, rtol=1e-3)


def test_a_wave_has_its_power_where_its_frequency_is():
    for cycles in (3, 12):
        assert power_spectrum(wave(cycles)).argmax() == cycles - 1
        assert torch.allclose(high_frequency_power(wave(cycles)), high_frequency_power(wave(cycles, axis=2)), rtol=1e-4)
    assert high_frequency_power(wave(3)) < 1e-4 * high_frequency_power(wave(12))
    assert high_frequency_power(wave(0)) < 1e-12  # brightness alone has none


def test_the_power_of_white_noise_is_its_variance():
    noise = (127 + 20 * torch.randn(50, 1, 32, 32, generator=generator())).round().to(torch.uint8).expand(-1, 3, -1, -1)
    assert high_frequency_power(noise).mean().item() == pytest.approx((20 / 255)**2, rel=0.03)
    assert power_spectrum(noise).mean().item() == pytest.approx((20 / 255)**2, rel=0.1)


# --- latent space ----------------------------------------------------------------------------------------------------


def test_spherical_interpolation_is_that_of_torch_fidelity():
    a, b = cloud(20, dim=9), cloud(20, dim=9, seed=1)
    for t in (0.0, 0.2, 1.0):
        torch.testing.assert_close(slerp(a, b, t), batch_slerp_any(a, b, t), rtol=1e-4, atol=1e-5)
    t = torch.linspace(0, 1, 20)
    one_by_one = torch.cat([slerp(a[i:i + 1], b[i:i + 1], t[i].item()) for i in range(20)])
    torch.testing.assert_close(slerp(a, b, t), one_by_one)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    maps = lambda x: x.reshape(20, 1, 3, 3)
    torch.testing.assert_close(slerp(maps(a), maps(b), t), maps(slerp(a, b, t)))


class Linear(torch.nn.Module):
    "Features that are a fixed linear map of the pixels."

    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, images):
        return images.float().flatten(1) @ self.matrix


def test_the_path_length_of_a_linear_generator_is_known():
    "On a sphere of radius r an arc of angle ω has speed r ω; pixels scale it by 127.5 and an orthogonal map keeps it."
    a, b = (0.5 * torch.nn.functional.normalize(cloud(400, dim=12, seed=s), dim=1) for s in (0, 1))
    omega = torch.acos(torch.nn.functional.cosine_similarity(a.double(), b.double()))
    orthogonal, _ = torch.linalg.qr(cloud(12, dim=12, seed=2))
    network, draw = Linear(orthogonal), lambda z: z.reshape(-1, 3, 2, 2)
    squares = (127.5 * 0.5 * omega).square().sort().values
    want = squares.mean().item()
    assert path_length(draw, a, b, network, batch_size=150, trim=0) == pytest.approx(want, rel=1e-3)
    trimmed = squares[4:-4].mean().item()  # a hundredth of 400 at either end
    assert path_length(draw, a, b, network) == pytest.approx(trimmed, rel=1e-3) and abs(trimmed / want - 1) > 2e-3
    rounded = lambda z: draw(z).mul(127.5).round().div(127.5)
    assert path_length(rounded, a, b, network) > 1.1 * want  # what rounding to bytes would add


def test_the_path_length_sees_jumps_and_repeats_itself(shipped):
    smooth = lambda z: torch.tanh(z[:, :3, None, None]).expand(-1, 3, 32, 32)
    jumps = lambda z: torch.tanh(4 * z[:, :3]).mul(2).round().div(2)[:, :, None, None].expand(-1, 3, 32, 32)
    a, b = cloud(100), cloud(100, seed=1)
    gradual, sudden = (path_length(function, a, b, shipped) for function in (smooth, jumps))
    assert path_length(smooth, a, a, shipped) < 1e-3 < gradual < sudden
    first, again, other = (path_length(smooth, a, b, shipped, generator=g) for g in (None, generator(0), generator(1)))
    assert first == again != other


def test_factors_written_into_the_code_are_read_and_others_are_not():
    factors = shapes_factors(np.arange(600))
    shape, hue, size = factors[:, 0], 2 * np.pi * factors[:, 1], factors[:, 2]
    noise = cloud(600, dim=3).numpy()
    code = np.stack([np.cos(hue), np.sin(hue), size, shape == 0, shape == 1, *noise.T], axis=1)
    code = torch.from_numpy(code @ np.random.default_rng(0).normal(size=(8, 8))).float()
    found = linear_readout(code[:400], factors[:400], code[400:], factors[400:])
    assert found["shape"] == 1 and min(found["hue"], found["size"]) > 0.999
    assert max(abs(found[name]) for name in ("x", "y", "rotation", "ground", "grain")) < 0.1


def test_the_readout_is_the_share_of_variance_that_least_squares_explains():
    factors = shapes_factors(np.arange(800))
    code = torch.from_numpy(factors[:, [2, 3, 6]]) + 0.03 * cloud(800, dim=3)
    found = linear_readout(code[:500], factors[:500], code[500:], torch.from_numpy(factors[500:]))
    design = np.concatenate([code.double().numpy(), np.ones((800, 1))], axis=1)
    for name, target in (("size", factors[:, 2:3]), ("x", factors[:, 3:4]),
                         ("ground", np.stack([f(2 * np.pi * factors[:, 6]) for f in (np.cos, np.sin)], axis=1))):
        weights = np.linalg.lstsq(design[:500], target[:500], rcond=None)[0]
        total = ((target[500:] - target[500:].mean(axis=0))**2).sum()
        left = ((target[500:] - design[500:] @ weights)**2).sum() / total
        assert 0.1 < 1 - left < 0.99 and found[name] == pytest.approx(1 - left, rel=1e-6), name


def test_scenes_factors_are_read_as_their_targets():
    factors = shapes_factors(np.arange(600), SCENE_FACTORS)
    wanted = factor_targets(torch.from_numpy(factors))
    code = torch.cat([wanted["direction"], wanted["behind_hue"], wanted["difficulty"], cloud(600, dim=2)], dim=1)
    found = linear_readout(code[:400], factors[:400], code[400:], factors[400:])
    assert list(found) == list(SCENE_FACTORS)
    assert min(found[name] for name in ("direction", "behind_hue", "difficulty")) > 0.999 and found["period"] < 0.1


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, network, reference, want", [
    ("FD", "cifar", "held-out", "FD (cifar)"), ("FD", "cifar", "training set", "FD (cifar) to training set"),
    ("KID", "faces", "held-out", "KID (faces)"), ("class score", "cifar", None, "class score (cifar)"),
    ("FD", "inception", "training set", "FID"), ("FD", "inception", "held-out", "FID to held-out"),
    ("FD", "inception", None, "FID"), ("KID", "inception", "held-out", "KID"), ("class score", "inception", None, "IS"),
    ("precision", "inception", "held-out", "precision (inception)"),
    ("FD", "inception-1a2b3c4d", None, "FD (inception-1a2b3c4d)"),
    ("high-frequency power", "cifar", "held-out", "high-frequency power"),
    ("texture distance", "inception", "training set", "texture distance to training set"),
    ("recall", Plain(), None, "recall (plain)")])
def test_only_inception_measures_fid_and_is(kind, network, reference, want):
    assert metric_name(kind, network, reference) == want


def test_a_comparison_says_what_was_compared_with_what():
    network = WithClasses()
    held_out_images = shapes(60, 1000).tensor().clone()
    # the last twenty are unlike the first forty, which alone count for precision and the like
    held_out_images[:40] //= 2
    sampled, held_out, train = (describe(network, x) for x in (shapes(40), held_out_images, shapes(90, 5000)))
    for metric in (precision_recall, density_coverage):
        few, all_of_them = metric(sampled.features, held_out.features[:40]), metric(sampled.features, held_out.features)
        assert all(few[name] != all_of_them[name] for name in few)
    found = compare(sampled, {"held-out": held_out, "training set": train}, network)
    features = lambda n: (sampled.features[:n], held_out.features[:n])
    want = {
        "FD (plain)": (frechet_distance(sampled.features, held_out.features), "held-out, 60 images"),
        "FD (plain) to training set": (frechet_distance(sampled.features, train.features), "training set, 90 images"),
        "texture distance": (texture_distance(sampled.texture, held_out.texture), "held-out, 60 images"),
        "texture distance to training set":
            (texture_distance(sampled.texture, train.texture), "training set, 90 images"),
        "KID (plain)": (kernel_distance(sampled.features, held_out.features), "held-out, 60 images"),
        "confidence (plain)": (sampled.logits.double().exp().div(sampled.logits.double().exp().sum(dim=1, keepdim=True))
                               .max(dim=1).values.mean().item(), None),
        **{f"{name} (plain)": (value, "held-out, 40 images") for name, value in
           {**precision_recall(*features(40)), **density_coverage(*features(40))}.items()},
        "diversity (plain)": (diversity(sampled.features, held_out.features), "held-out, 60 images"),
        "high-frequency power": ((high_frequency_power(shapes(40).tensor()).mean()
                                  / high_frequency_power(held_out_images).mean()).item(), "held-out, 60 images")}
    assert found.keys() == want.keys() and json.loads(json.dumps(found, allow_nan=False)) == found
    unit = held_out.texture.double().std(dim=0)
    deviations = {"FD (plain)": frechet_deviation(sampled.features, held_out.features),
                  "texture distance": frechet_deviation(sampled.texture / unit, held_out.texture / unit)}
    for name, (value, reference) in want.items():
        free = name.startswith(("high-frequency power", "texture distance"))
        seen = (None, None) if free else ("plain", found["FD (plain)"]["hash"])
        sure = {"deviation": pytest.approx(deviations[name], rel=1e-4)} if name in deviations else {}
        assert found[name] == {"value": pytest.approx(value, rel=1e-4), "reference": reference,
                               "feature_network": seen[0], "hash": seen[1]} | sure, name
    with torch.no_grad():
        network.scale.mul_(2)
    assert compare(sampled, {"held-out": held_out}, network)["FD (plain)"]["hash"] != found["FD (plain)"]["hash"]


def test_a_comparison_without_held_out_images_names_what_it_used(network):
    sampled, train = (describe(network, shapes(20, start)) for start in (0, 1000))
    names = compare(sampled, {"training set": train}, network).keys()
    assert {"FD (shapes) to training set", "KID (shapes) to training set", "confidence (shapes)"} <= names
    assert all(name.endswith("training set") for name in names if not name.startswith(("class score", "confidence")))


def test_sets_that_are_too_small_are_refused(network):
    empty, few = ImageStatistics(network), describe(network, shapes(5))
    many = describe(network, shapes(30))
    for sampled, reference in ((empty, few), (few, many), (many, few)):
        with complains(f"{len(sampled)} images", "six"):
            measure(sampled, reference)


@pytest.fixture(scope="module")
def held_out(shipped):
    return describe(shipped, shapes(400, 10_000))


def measured(images, network, held_out):
    return measure(describe(network, images.to(torch.uint8)), held_out)


def rising(levels, kind):
    values = [level[kind] for level in levels]
    return all(b > a for a, b in zip(values, values[1:]))


def falling(levels, kind):
    return rising(levels[::-1], kind)


@pytest.fixture(scope="module")
def clean(shipped, held_out):
    return measured(shapes(300).tensor(), shipped, held_out)


def test_noise_costs_fidelity_and_adds_high_frequencies(shipped, held_out, clean):
    images, noise = shapes(300).tensor().float(), torch.randn(300, 3, 32, 32, generator=generator())
    noisy = ((images + std * noise).round().clamp(0, 255) for std in (10, 20, 40))
    levels = [clean, *(measured(x, shipped, held_out) for x in noisy)]
    assert all(rising(levels, kind) for kind in ("FD", "KID", "high-frequency power")), levels
    assert all(falling(levels, kind) for kind in ("precision", "density", "coverage")), levels


def test_blur_costs_fidelity_and_high_frequencies(shipped, held_out, clean):
    images = shapes(300).tensor().float()
    levels = [clean, *(measured(gaussian_blur(images, sigma).round(), shipped, held_out) for sigma in (0.7, 1.2, 2.0))]
    assert all(rising(levels, kind) for kind in ("FD", "KID")), levels
    assert all(falling(levels, kind) for kind in ("precision", "density", "coverage", "high-frequency power")), levels


def test_dropped_modes_cost_recall_coverage_class_score_and_diversity_but_not_precision(shipped, held_out, clean):
    pool = shapes(2_200)
    without = lambda keep: torch.from_numpy(pool.images[keep][:300]).permute(0, 3, 1, 2)
    shape, hue = pool.labels[:, 0], pool.labels[:, 1]
    kept = (shape < 2, shape < 1, (shape < 1) & (hue < 0.4))
    assert all(len(without(keep)) == 300 for keep in kept)
    levels = [clean, *(measured(without(keep), shipped, held_out) for keep in kept)]
    assert all(falling(levels, kind) for kind in ("recall", "coverage", "diversity")), levels
    assert falling(levels[:3], "class score") and levels[2]["class score"] == pytest.approx(1, abs=0.02)
    assert all(rising(levels, kind) for kind in ("FD", "KID")) and levels[-1]["precision"] > 0.9, levels


# --- Inception --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Random weights in the layout of the published file."
    return inception_stand_in(tmp_path_factory.mktemp("inception") / INCEPTION_FILE)


def test_inception_measures_what_torch_fidelity_measures(weights, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)  # instead of 299: an eighth of the work
    sets = [shapes(24).tensor(), shapes(24, 1000).tensor()]
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    (a, logits), (b, _) = (theirs(images) for images in sets)
    network = load_inception(weights)
    sampled, reference = (describe(network, images, 12) for images in sets)
    torch.testing.assert_close(sampled.features, a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampled.logits, logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(network.logits(sets[0][:3]), logits[:3], rtol=1e-3, atol=1e-3)
    assert (network.num_features, network.classes) == (a.shape[1], logits.shape[1])
    score = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert score > 1.1 and inception_score(sampled.logits, splits=1) == pytest.approx(score, rel=1e-3)
    kernel = kid_features_to_metric(a.double(), b.double(), kid_subsets=1, kid_subset_size=24, verbose=False)
    found = kernel_distance(sampled.features, reference.features, subsets=1)
    assert found == pytest.approx(kernel["kernel_inception_distance_mean"], rel=1e-3)
    part = slice(0, 256)  # the eigenvalues of all 2,048 columns would take most of this file's time
    statistics = [fid_features_to_statistics(f[:, part].double()) for f in (a, b)]
    want = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(sampled.features[:, part], reference.features[:, part]) == pytest.approx(want, rel=1e-3)
    with complains("uint8"):
        network(sets[0].float())


def test_only_the_published_weights_are_named_inception(weights, monkeypatch):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setenv("HYBRIDVAE_INCEPTION", str(weights))
    assert load_inception().name == f"inception-{digest[:8]}"
    monkeypatch.setattr("hybridvae.metrics.INCEPTION_SHA256", digest)
    assert load_inception().name == "inception"


def test_with_inception_the_names_and_references_are_the_published_ones():
    network = WithClasses()
    network.name = "inception"
    sets = {name: describe(network, shapes(30, start)) for name, start in (("held-out", 1000), ("training set", 5000))}
    found = compare(describe(network, shapes(100)), sets, network)
    references = {name: (m["reference"] or "").partition(",")[0] for name, m in found.items()}
    assert references == {"FID": "training set", "FID to held-out": "held-out", "KID": "held-out", "IS": "",
                          "confidence (inception)": "", **{
        f"{name} (inception)": "held-out" for name in ("precision", "recall", "density", "coverage", "diversity")},
        "high-frequency power": "held-out", "texture distance": "held-out",
        "texture distance to training set": "training set"}


def test_weights_that_cannot_be_had_or_used_are_one_sentence(weights, tmp_path, monkeypatch):
    with complains(tmp_path / "none.pth", INCEPTION_FILE, "HYBRIDVAE_INCEPTION"):
        load_inception(tmp_path / "none.pth")
    whole, damaged = weights.read_bytes(), tmp_path / "damaged.pth"
    for content in (whole[:len(whole) // 2], b"", b"<html>not found</html>"):
        damaged.write_bytes(content)
        with complains(damaged, INCEPTION_FILE):
            load_inception(damaged)
    for state in ({"fc.weight": torch.zeros(3)}, [1, 2], shapes):
        torch.save(state, damaged) if state is not shapes else damaged.write_bytes(pickle.dumps(Plain, protocol=2))
        with complains(damaged, INCEPTION_FILE):
            load_inception(damaged)


def test_without_a_network_or_torch_fidelity_the_sentence_says_what_to_do(tmp_path, monkeypatch):
    from urllib.error import URLError

    monkeypatch.delenv("HYBRIDVAE_INCEPTION", raising=False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with complains("weights-inception-2015-12-05-6726825d.pth", "HYBRIDVAE_INCEPTION", "could not be downloaded"):
        load_inception()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with complains("torch-fidelity", "pip install"):
        load_inception()


# --- work ----------------------------------------------------------------------------------------------------


def test_operations_are_counted_as_two_for_each_multiply_add():
    layer, convolution = torch.nn.Linear(7, 5), torch.nn.Conv2d(3, 4, 3, padding=1)
    assert count_flops(layer, torch.zeros(2, 7)) == 2 * 2 * 7 * 5
    assert count_flops(convolution, torch.zeros(1, 3, 8, 8)) == 2 * 64 * 4 * 27


@pytest.mark.parametrize("measure", [high_frequency_power, texture, power_spectrum])
def test_what_is_measured_of_images_is_the_same_within_autocast(measure):
    "Studies run within it; in half precision the values are others, and a GPU's Fourier transform fails."
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = measure(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(measure(images), plain) and plain.dtype == torch.float32
