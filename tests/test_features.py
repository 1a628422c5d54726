"""The networks that look at images: what they are trained on, what they read, and how they are found."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from conftest import complains, generator, randomised
from hybridvae.core import Draws, build_model, count_flops, count_parameters, load_model, save_model
from hybridvae.data import ImageData, draw_shapes, shapes_factors
from hybridvae.features import (FEATURE_WEIGHTS, Classifier, FaceEncoder, FeatureNetwork, ResidualBlock, Whitening,
                                adjust_colour, crop, cut_out, degrade, effective_rank, feature_path,
                                gaussian_blur, hue_difference, load_features, random_view, read_targets,
                                retrieval_accuracy, shipped_features, vicreg)
from hybridvae.training import Average, TrainConfig, train


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
    targets = read_targets(factors)
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


def test_the_shipped_network_for_shapes_reads_shapes():
    "The weights that ship: they must see what factors say, or all distances on Shapes mean nothing."
    data = shapes(300, 1_000_000_000)  # held out
    seen = load_features("shapes").read(data.tensor())
    factors = torch.from_numpy(data.labels)
    assert (seen["class"] == factors[:, 0]).double().mean() > 0.97
    assert hue_difference(seen["hue"], factors[:, 1]).mean() < 5 / 360


# --- the contract of all networks -----------------------------------------------------------------------------------

NETWORKS = {
    "FeatureNetwork": lambda: FeatureNetwork(width=8, num_features=16),
    "Classifier": lambda: Classifier(channels=(8, 12)),
    "FaceEncoder": lambda: FaceEncoder(image_size=32, channels=(8, 12), blocks=1, projection=16),
    "FaceEncoder-256": lambda: FaceEncoder("faces-256", 256, (4, 8, 12), 1, stride=4, projection=16),
}


def seasoned(make):
    "A network in eval mode, after its batch normalisation has seen images: untouched statistics would be trivial."
    torch.manual_seed(0)
    model = make()
    draws = Draws(0, 0)
    model.train()
    for _ in range(5):
        model.training_loss(torch.rand(16, 3, *[model.config["image_size"]] * 2, generator=generator()) * 2 - 1,
                            torch.zeros(16, 8) if model.factors else torch.zeros(16), draws=draws)
    return model.eval()


@pytest.fixture(scope="module", params=list(NETWORKS))
def any_network(request):
    return seasoned(NETWORKS[request.param])


def images_for(model, n=6):
    size = model.config["image_size"]
    return torch.from_numpy(draw_shapes(shapes_factors(np.arange(n)), size)).permute(0, 3, 1, 2)


def test_every_network_keeps_the_contract(any_network):
    images = images_for(any_network)
    h = any_network(images)
    assert h.shape == (6, any_network.num_features) and h.dtype == torch.float32 and torch.isfinite(h).all()
    assert torch.equal(any_network(images.float()), h)  # values, not the type, count
    both_h, logits = any_network.both(images)
    assert torch.equal(both_h, h)
    if any_network.classes:
        assert logits.shape == (6, any_network.classes) and torch.equal(logits, any_network.logits(images))
        assert torch.equal(any_network.read(images)["class"], logits.argmax(dim=1))
    else:
        assert logits is None
        with complains(repr(any_network.name), "trained on labels"):
            any_network.logits(images)
    rebuilt = build_model(json.loads(json.dumps(any_network.config)))
    rebuilt.load_state_dict(any_network.state_dict())
    assert torch.equal(rebuilt.eval()(images), h)


def test_an_images_features_do_not_depend_on_its_company(any_network):
    images = images_for(any_network)
    alone = torch.cat([any_network(image[None]) for image in images])
    torch.testing.assert_close(alone, any_network(images), rtol=1e-4, atol=1e-5)


def test_blur_and_noise_move_the_features(any_network):
    "Further than a change that nobody sees: one grey level up."
    images = images_for(any_network, 20).float()
    moved = lambda other: (any_network(other) - any_network(images)).norm(dim=1).mean()
    unseen = moved(images + 1)
    assert moved(gaussian_blur(images, 1.0)) > 2 * unseen
    assert moved(images + 20 * torch.randn(images.shape, generator=generator())) > 2 * unseen


def test_all_randomness_comes_from_the_draws(any_network):
    x = images_for(any_network, 8).float() / 127.5 - 1
    y = torch.from_numpy(shapes_factors(np.arange(8))) if any_network.factors else torch.arange(8) % 2
    losses, before = [], torch.get_rng_state()
    for key in (0, 0, 1):
        model = build_model(any_network.config)
        model.load_state_dict(any_network.state_dict())
        torch.set_rng_state(before)
        model.train()
        losses.append(model.training_loss(x, y, draws=Draws(key, 0))["loss"].item())
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_weights_see_the_same(name, tmp_path):
    model = seasoned(NETWORKS[name])
    save_model(model, tmp_path / "half.safetensors", dtype=torch.float16)
    h, half = model(images_for(model)), load_model(tmp_path / "half.safetensors")(images_for(model))
    assert 0 < (half - h).norm() < 0.01 * (h - h.mean(dim=0)).norm()


def test_networks_are_small_enough_to_ship():
    "At most 2.5 million numbers for the classifier, 2 million for encoders without their heads; 256 and 128 features."
    faces_256 = FaceEncoder("faces-256", 256, (32, 64, 96, 128, 128), stride=4)
    assert count_parameters(Classifier()) < 2.5e6 and Classifier().num_features == 256
    for encoder in (FaceEncoder(), faces_256):
        slim = encoder.slim()
        assert count_parameters(slim) == count_parameters(encoder.body) < 2e6 and encoder.num_features == 128


def test_the_classifier_is_the_network_of_the_speed_runs():
    """Closed form: 3 x 3 convolutions, two in a group, batch norms, the whitening's bias, the last layer.

    An image costs 0.24 GFLOP.
    """
    convolutions, norms, width = 0, 0, 24
    for c in (64, 256, 256):
        convolutions, norms, width = convolutions + 9 * c * (width + c), norms + 4 * c, c
    classifier = Classifier().eval()
    assert count_parameters(classifier) == 24 + convolutions + norms + 256 * 10 + 10
    assert count_flops(classifier, torch.zeros(1, 3, 32, 32)) == pytest.approx(0.24e9, rel=0.03)


def test_whitened_patches_are_uncorrelated_and_equally_strong():
    x, layer = torch.randn(40, 3, 12, 12, generator=generator()), Whitening()
    x = 2 * gaussian_blur(x, 0.6) + 0.3  # neighbours depend on each other
    layer.measure(x)
    rows = layer(x).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(rows[:12], -rows[12:])
    torch.testing.assert_close(rows[:12].cov(), torch.eye(12, dtype=torch.float64), rtol=0, atol=0.02)
    assert [name for name, p in layer.named_parameters()] == ["bias"]  # the directions are not trained
    before = layer.weight.clone()
    Classifier(channels=(4, 4)).prepare(ImageData("x", "train", draw_shapes(shapes_factors(np.arange(9)))))
    assert torch.equal(layer.weight, before)


def test_the_whitening_is_measured_once_and_kept_by_checkpoints(tmp_path):
    data = ImageData("x", "train", shapes(64).images, (np.arange(64) % 3).astype(np.uint8))
    config = TrainConfig(kimg=0.064, batch_size=16, ema_kimg=0, n_slices=2)
    model = Classifier(channels=(4, 6))
    train(model, data, config, tmp_path, cpu=True, progress=False, minutes=0)
    again = Classifier(channels=(4, 6))
    train(again, data, config, tmp_path, cpu=True, progress=False)
    expected = Whitening()
    expected.measure(data.float())
    assert torch.equal(again.body[0].weight, expected.weight) and torch.equal(model.body[0].weight, expected.weight)


def test_a_residual_block_adds_to_its_input():
    x = torch.randn(4, 6, 8, 8, generator=generator())
    same, other = ResidualBlock(6, 6, 1), ResidualBlock(6, 8, 2)
    for block in (same, other):
        torch.nn.init.zeros_(block.conv2.weight)
    assert torch.equal(same(x), x)
    mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, correction=0)
    active = torch.relu((x - mean) / (variance + 1e-5).sqrt())
    expected = torch.einsum("oc,nchw->nohw", other.shortcut.weight[:, :, 0, 0], active[:, :, ::2, ::2])
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)


# --- augmentation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [5, 10])
def test_a_crop_is_a_slice_of_the_mirrored_image(size):
    x = torch.rand(81, 3, 12, 10, generator=generator())
    corner = torch.tensor([(top, left) for top in range(-4, 5) for left in range(-4, 5)])
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    for part, source, (top, left) in zip(crop(x, corner, size), padded, corner.tolist()):
        assert np.array_equal(part.numpy(), source[:, 4 + top:4 + top + size, 4 + left:4 + left + size])
    assert torch.equal(crop(x[..., :10, :], torch.zeros(81, 2, dtype=torch.int64), 10), x[..., :10, :])


@pytest.mark.parametrize("size", [1, 5, 6])
def test_cut_out_removes_its_square_and_nothing_else(size):
    x = torch.rand(80, 3, 8, 10, generator=generator()) + 1
    centre = torch.tensor([(r, c) for r in range(8) for c in range(10)])
    for hidden, image, (r, c) in zip(cut_out(x, centre, size), x, centre.tolist()):
        expected = image.clone()
        top, left = r - size // 2, c - size // 2
        expected[:, max(top, 0):top + size, max(left, 0):left + size] = 0
        assert torch.equal(hidden, expected)


def test_training_images_of_the_classifier_are_moved_and_hidden_by_all_amounts():
    "A dot in the middle of 16 x 16 pixels ends at any of 5 x 5 places; the square's centre may be at any pixel."
    x = torch.zeros(20_000, 1, 16, 16)
    x[:, :, 8, 8] = 1
    places = Classifier(cutout=0).augment(x, Draws(0, 0)).sum(dim=(0, 1)) / len(x)
    expected = torch.zeros(16, 16)
    expected[6:11, 6:11] = 1 / 25
    assert (places - expected).abs().max() < 0.005
    hidden = (Classifier(cutout=1).augment(torch.ones(20_000, 1, 16, 16), Draws(0, 0)) == 0).sum(dim=(0, 1)) / 20_000
    assert (hidden - 1 / 256).abs().max() < 0.002


def test_augmentation_is_for_training_only():
    model = seasoned(NETWORKS["Classifier"])
    x, y = images_for(model).float() / 127.5 - 1, torch.arange(6)
    found = model.training_loss(x, y, draws=None)
    torch.testing.assert_close(found["loss"], torch.nn.functional.cross_entropy(model.class_head(model.body(x)), y))
    assert found["error"] == (model.read(images_for(model))["class"] != y).float().mean()


def test_colours_change_as_in_torchvision():
    x = torch.rand(6, 3, 8, 8, generator=generator()) * 2 - 1
    factors = 0.6 + 0.8 * torch.rand(3, 6, generator=generator(1))
    factors[2, 0] = 0
    for found, image, (b, c, s) in zip(adjust_colour(x, *factors), x, factors.T.tolist()):
        u = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness((image + 1) / 2, b), c), s)
        torch.testing.assert_close(found, 2 * u - 1, rtol=0, atol=2e-3)  # its grey weights add up to 0.9999
    ones = torch.ones(6)
    torch.testing.assert_close(adjust_colour(x, ones, ones, ones), x)


def test_a_view_is_an_unresized_slice_perhaps_mirrored(monkeypatch):
    "Pixel for pixel: every view must be found in its image, and all corners and both directions occur."
    monkeypatch.setattr("hybridvae.features.adjust_colour", lambda x, *factors: x)
    x = torch.rand(400, 3, 16, 16, generator=generator())
    found = []
    for view, image in zip(random_view(x, Draws(0, 0)), x):
        assert view.shape == (3, 10, 10)
        parts = {(flip, r, c): part for r in range(7) for c in range(7)
                 for flip, part in enumerate((image[:, r:r + 10, c:c + 10], image[:, r:r + 10, c:c + 10].flip(-1)))}
        found += [key for key, part in parts.items() if torch.equal(view, part)]
    assert len(found) == 400 and {key[1:] for key in found} == {(r, c) for r in range(7) for c in range(7)}
    assert 150 < sum(key[0] for key in found) < 250


def test_some_views_are_grey():
    views = random_view(torch.rand(1_000, 3, 8, 8, generator=generator()) * 2 - 1, Draws(0, 0))
    assert 150 < ((views - views.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-3).sum() < 250


# --- the loss of the encoder, and what is measured of it -------------------------------------------------------------

def slow_vicreg(a, b):
    "Algorithm 1 of the paper, number by number."
    n, p = a.shape
    terms = {"invariance": sum((a[i, k] - b[i, k]) ** 2 for i in range(n) for k in range(p)) / (n * p), "variance": 0,
             "covariance": 0}
    for z in (a, b):
        mean = [sum(z[i, k] for i in range(n)) / n for k in range(p)]
        cov = [[sum((z[i, j] - mean[j]) * (z[i, k] - mean[k]) for i in range(n)) / (n - 1) for k in range(p)]
               for j in range(p)]
        terms["variance"] += sum(max(0, 1 - math.sqrt(cov[k][k] + 1e-4)) for k in range(p)) / p
        terms["covariance"] += sum(cov[j][k] ** 2 for j in range(p) for k in range(p) if j != k) / p
    return terms


def test_vicreg_is_the_papers():
    scale = torch.tensor([0.2, 0.5, 1.0, 2.0])
    a = (torch.randn(7, 4, generator=generator()) * scale).double()
    b = a + 0.3 * torch.randn(7, 4, generator=generator(1)).double()
    found, expected = vicreg(a, b), slow_vicreg(a.numpy(), b.numpy())
    assert found.keys() == expected.keys()
    for term, value in expected.items():
        assert value > 0.01 and found[term].item() == pytest.approx(value, rel=1e-6)


def test_the_encoders_loss_weighs_the_terms_as_the_paper_does():
    model = seasoned(NETWORKS["FaceEncoder"]).train()
    terms = model.training_loss(images_for(model, 8).float() / 127.5 - 1, draws=Draws(0, 0))
    torch.testing.assert_close(terms["loss"], 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"])
    assert min(value.item() for value in terms.values()) > 0
    with complains("'faces'", "projection"):
        model.slim().training_loss(torch.zeros(2, 3, 32, 32), draws=Draws(0, 0))


def test_both_views_of_an_image_are_damaged_alike(monkeypatch):
    "With views that are the images themselves, nothing but the damage could make the two differ."
    seen = []
    monkeypatch.setattr("hybridvae.features.random_view", lambda x, draws: seen.append(x) or x)
    x = torch.rand(8, 3, 32, 32, generator=generator()) * 2 - 1
    for damage in (False, True):
        encoder = FaceEncoder(image_size=32, channels=(4, 8), blocks=1, projection=8, damage=damage)
        encoder.training_loss(x, draws=Draws(0, 0))
    assert torch.equal(seen[0], x) and torch.equal(seen[1], x)
    assert torch.equal(seen[2], seen[3]) and torch.equal(seen[2], degrade(x, Draws(0, 0))[0])
    assert not torch.equal(seen[2], x)


def test_covariances_are_exact_under_autocast():
    "In bfloat16 the squares of many small covariances would be lost."
    model = seasoned(NETWORKS["FaceEncoder"]).train()
    x, seen = images_for(model, 8).float() / 127.5 - 1, []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr("hybridvae.features.vicreg", lambda a, b: seen.append((a @ b.T).dtype) or vicreg(a, b))
        model.training_loss(x, draws=Draws(0, 0))
    assert seen == [torch.float32]


def test_an_encoder_without_its_head_sees_the_same(tmp_path):
    model = seasoned(NETWORKS["FaceEncoder"])
    slim = model.slim()
    assert torch.equal(slim(images_for(model)), model(images_for(model)))
    save_model(slim, tmp_path / "slim.safetensors")
    assert torch.equal(load_model(tmp_path / "slim.safetensors")(images_for(model)), model(images_for(model)))


def test_effective_rank_counts_directions():
    x = torch.randn(50, 5, generator=generator())
    q = torch.linalg.qr(x - x.mean(dim=0))[0]  # orthonormal columns of mean zero
    for k in (1, 3, 5):
        assert effective_rank(torch.cat([q[:, :k], torch.zeros(50, 9 - k)], dim=1) + 7) == pytest.approx(k, abs=0.05)
    p = np.array([0.75, 0.25])  # two directions, one of them three times as long
    expected = math.exp(-(p * np.log(p)).sum())
    assert effective_rank(q[:, :2] * torch.tensor([3.0, 1.0])) == pytest.approx(expected, abs=0.01)


def test_retrieval_finds_partners_and_not_others():
    a = torch.randn(40, 8, generator=generator())
    assert retrieval_accuracy(a, 2 * a + 0.01) > 0.99  # the length does not count
    half = torch.cat([a[:20], a[20:].roll(1, dims=0)])
    assert retrieval_accuracy(a, half) == 0.5
    assert retrieval_accuracy(a, torch.randn(40, 8, generator=generator(1))) < 0.2


def test_measures_say_what_the_encoder_sees():
    data, model = shapes(120, 1_000_000_000), seasoned(NETWORKS["FaceEncoder"])
    first = model.measures(data, data, n=100)
    assert first == model.measures(data, data, n=100) and first["retrieval_n"] == 100
    features = model(data.first(100).tensor())
    assert first["feature_std"] == pytest.approx(features.std(dim=0).mean().item(), rel=1e-4)
    assert first["effective_rank"] == pytest.approx(effective_rank(features), rel=1e-3)
    assert 0 < first["retrieval_accuracy"] <= 1
    classifier = seasoned(NETWORKS["Classifier"])
    labelled = ImageData("x", "test", data.images, classifier.read(data.tensor())["class"].numpy().astype(np.uint8))
    labelled.labels[:30] = (labelled.labels[:30] + 1) % 10
    assert classifier.measures(labelled, labelled) == {"accuracy": pytest.approx(0.75)}


# --- training in the package's loop ----------------------------------------------------------------------------------

def test_without_averaging_the_trained_network_is_the_last_one(tmp_path):
    "ema_kimg=0: weights and running statistics of one and the same step."
    data = dataclasses.replace(shapes(64), labels=(np.arange(64) % 3).astype(np.uint8))
    config = TrainConfig(kimg=0.128, batch_size=32, ema_kimg=0, weight_decay=0.1, lr=1e-2, lr_decay="constant",
                         n_slices=2)
    model, last = NETWORKS["Classifier"](), []
    original = Average.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Average, "update", lambda self, decay: (
            original(self, decay), last.append({k: v.clone() for k, v in model.state_dict().items()})))
        train(model, data, config, tmp_path, cpu=True, progress=False)
    assert len(last) == 4 and all(torch.equal(v, last[-1][k]) for k, v in model.state_dict().items())
    assert not torch.equal(last[-1]["body.2.weight"], last[-2]["body.2.weight"])


def learn(model, data, config, folder):
    torch.manual_seed(0)
    train(model, data, TrainConfig(ema_kimg=0, n_slices=1, **config), folder, cpu=True, progress=False)
    return model


def test_a_classifier_learns_its_classes(tmp_path):
    data, test = (ImageData("x", "train", d.images[:, ::2, ::2], d.labels[:, 0].astype(np.uint8))
                  for d in (shapes(600), shapes(200, 1_000_000_000)))
    torch.manual_seed(0)
    model = Classifier(classes=3, image_size=16, channels=(8, 16), reach=1, cutout=4)
    learn(model, data, dict(kimg=5, batch_size=50, lr=1e-2, weight_decay=0.05, precision="fp32"), tmp_path)
    assert model.measures(data, test)["accuracy"] > 0.7  # a third by chance


def test_an_encoder_learns_to_find_views_and_does_not_collapse(tmp_path):
    data, test = shapes(500), shapes(200, 1_000_000_000)
    torch.manual_seed(0)
    model = FaceEncoder("x", 32, (8, 16), 1, projection=64)
    before = model.eval().measures(data, test)
    learn(model, data, dict(kimg=6, batch_size=50, lr=5e-3, precision="fp32"), tmp_path)
    after = model.measures(data, test)
    assert after["retrieval_accuracy"] > before["retrieval_accuracy"] + 0.05  # by chance 0.005
    assert after["effective_rank"] > 5 and after["feature_std"] > 0.1


# --- finding shipped networks ----------------------------------------------------------------------------------------

def test_shipped_networks_are_found_by_name(network, tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDVAE_WEIGHTS", str(tmp_path))
    for find in (load_features, shipped_features, feature_path):
        with complains("no feature network 'birds'", *FEATURE_WEIGHTS):
            find("birds")
    for name in FEATURE_WEIGHTS:
        assert not shipped_features(name) and feature_path(name).parent == tmp_path
        with complains(repr(name), "hybridvae run --dataset", feature_path(name)):
            load_features(name)
    save_model(network, tmp_path / "shapes-features.safetensors")
    images = shapes(5).tensor()
    assert shipped_features("shapes") and torch.equal(load_features("shapes")(images), network(images))
    feature_path("cifar").write_bytes(b"not weights")
    with complains(feature_path("cifar"), "train or download it again"):
        load_features("cifar")


def test_every_shipped_network_bears_the_name_it_is_found_by():
    for name in filter(shipped_features, FEATURE_WEIGHTS):
        assert load_features(name).name == name
