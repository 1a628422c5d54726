"""Timing in turns, peers of equal shape, the machine's own convolutions, growth, times of all models, and profiles."""
import dataclasses
import importlib.util
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import complains, randomised
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybridvae import adaptive, bench, records
from hybridvae.bench import (TINY, TINY_BASE, TINY_GROWTH, Convolution, Timing, compare_evaluation, compare_input,
                             compare_peers, computation,
                             convolution_call, convolutions, cost_growth, diffusers_unet, gflop, goals, in_turns,
                             levels, lucidrains_unet, our_variant,
                             profile_entry, rate, rate_table, read_bench, sampling_call, show_growth, show_rates,
                             start_up, time_models,
                             timed_evaluations, training_call, variants, write_bench)
from hybridvae.campaign import queue
from hybridvae.core import Draws, build_model, count_flops, derive_seed, project_root, weights_hash, write_json
from hybridvae.data import load_data
from hybridvae.diffusion import GaussianDiffusion
from hybridvae.entries import Entry
from hybridvae.records import results_folder, sampling_times, time_of
from hybridvae.unet import UNet

CPU, SMALL = torch.device("cpu"), TINY.shape
VAE = {"model": "VAE", "image_size": 32, "z_dim": 4, "width": 4, "multipliers": [1, 2], "patch": 4}
UNET = {"image_size": 32, "width": 8, "multipliers": [1], "attention": [], "patch": 4}
TRAIN = {"kimg": 0.032, "batch_size": 8}
FEW, TEN = {"sampler": "dpmpp", "steps": 3, "n": 8}, {"sampler": "ddim", "steps": 10, "n": 4}
HYBRID_MODEL = {"model": "DiffuseVAE", "vae": {k: v for k, v in VAE.items() if k != "model"}, "unet": UNET}


def entry(name="ddpm", seed=0, **changes):
    return Entry(name, "shapes", **{"model": {"model": "DDPM", "unet": UNET}, "train": TRAIN, "seed": seed,
                                    "evaluations": (FEW, TEN), **changes})


HYBRID = entry("hybrid-full", model=HYBRID_MODEL)


# --- in turns ---------------------------------------------------------------------------------------------------------

def test_calls_take_turns_and_each_round_begins_with_another():
    done = []
    found = in_turns({name: lambda name=name: done.append(name) for name in "abc"}, rounds=3)
    assert "".join(done) == "abc" + "abc" + "bca" + "cab"
    assert list(found) == ["a", "b", "c"] and all(len(t.seconds) == 3 for t in found.values())
    assert in_turns({}, rounds=2) == {}


def test_the_first_call_is_kept_apart_and_the_rest_is_summed_up_by_its_quartiles(monkeypatch):
    lengths = iter([9.0, 4.0, 1.0, 2.0])
    clock = iter([t for i, length in enumerate(lengths) for t in (100.0 * i, 100.0 * i + length)])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    timing = in_turns({"a": lambda: None}, rounds=3)["a"]
    assert timing == Timing(9.0, [4.0, 1.0, 2.0])
    assert rate(timing, 12) == {"images_per_second": 6.0, "quartiles": [4.0, 8.0], "warm_up_seconds": 9.0, "rounds": 3}


# --- networks ---------------------------------------------------------------------------------------------------------

def test_all_networks_have_the_shape_asked_for():
    assert levels(SMALL) == [(16, 32, False), (8, 32, True)]
    x, t = torch.zeros(2, 3, 16, 16), torch.tensor([1, 7])
    ours = our_variant(SMALL, CPU).network
    for network in (ours, diffusers_unet(SMALL)):
        assert network(x, t).shape == x.shape
        assert gflop(network, 16) == pytest.approx(gflop(ours, 16), rel=0.1)
    assert gflop(ours, 16) == count_flops(UNet(**SMALL), x[:1], t[:1]) / 1e9


def test_the_full_shape_costs_about_as_much_in_diffusers_and_has_its_attention():
    with torch.device("meta"):
        ours, theirs = UNet(**bench.SHAPE), diffusers_unet(bench.SHAPE)
        x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
        assert count_flops(theirs, x, t) == pytest.approx(count_flops(ours, x, t), rel=0.1)
    attentions = [len(block.attentions) for block in theirs.network.down_blocks if hasattr(block, "attentions")]
    assert attentions == [2]  # both blocks of the second level


@pytest.mark.skipif(not importlib.util.find_spec("denoising_diffusion_pytorch"),
                    reason="needs denoising-diffusion-pytorch")
def test_lucidrains_unet_is_as_near_as_it_allows():
    x = torch.zeros(2, 3, 16, 16)
    assert lucidrains_unet(SMALL)(x, torch.tensor([1, 7])).shape == x.shape


def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch):
    found, missing = variants(SMALL, CPU, compiled=False)
    assert [(v.name, v.mode) for v in found][:2] == [("hybridvae", "eager"), ("diffusers", "eager")]
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "compiler_works", lambda kind: False)
    found, missing = variants(SMALL, CPU)
    assert [(v.name, v.mode) for v in found] == [("hybridvae", "eager")]
    assert (
        "compiler" in missing[0]
        and "pip install diffusers" in missing[1]
        and "pip install denoising-diffusion-pytorch" in missing[2]
    )


def test_ours_is_compiled_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(bench, "compiler_works", lambda kind: True)
    assert [v.mode for v in variants(SMALL, CPU)[0]][:3] == ["compiled", "eager", "eager"]


def test_a_training_call_is_the_step_of_the_diffusion_loss_with_clipping():
    variant = our_variant(SMALL, CPU)
    randomised(variant.network, 1.0)
    twin, diffusion = UNet(**SMALL), GaussianDiffusion()
    twin.load_state_dict(variant.network.state_dict())
    torch.manual_seed(3)
    step = training_call(variant, SMALL, 4)
    torch.manual_seed(3)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-6)
    for i in range(2):
        step()
        draws = Draws(0, i)
        t = draws.randint(1000, 4)
        diffusion.loss(twin, x, t, draws.randn(4, 3, 16, 16)).mean().backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), 1.0) > 1  # clipping does something
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(variant.network.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-7)
    assert all(p.grad is None for p in variant.network.parameters())


def test_a_sampling_call_takes_the_steps_asked_for():
    seen = []
    network = nn.Conv2d(3, 3, 1)
    network.forward = lambda x, t: seen.append(int(t[0])) or 0 * x
    x = sampling_call(bench.Variant("it", "eager", network), SMALL, 2, steps=4)()
    assert x.shape == (2, 3, 16, 16) and seen == GaussianDiffusion().timestep_grid(4)[:-1]


# --- convolutions -----------------------------------------------------------------------------------------------------

def test_every_convolution_is_met_with_its_shape_and_layout():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1),
                            nn.Conv2d(4, 8, 3, stride=2, padding=1))
    network.to(memory_format=torch.channels_last)
    forward = network.forward
    network.forward = lambda x, t: forward(x)
    found = convolutions(network, torch.zeros(2, 3, 8, 8).contiguous(memory_format=torch.channels_last), None)
    assert found == Counter({Convolution((2, 3, 8, 8), 4, 3, 1, 1, True, False): 1,
                             Convolution((2, 4, 8, 8), 4, 1, 1, 0, True, True): 2,
                             Convolution((2, 4, 8, 8), 8, 3, 2, 1, True, True): 1})
    assert not network[0]._forward_pre_hooks


def test_the_convolutions_alone_do_the_operations_that_are_counted():
    ours = our_variant(SMALL, CPU)
    x = torch.zeros(2, 3, 16, 16).contiguous(memory_format=ours.layout)
    found = convolutions(ours.network, x, torch.zeros(2))
    assert sum(found.values()) == sum(isinstance(m, nn.Conv2d) for m in ours.network.modules())
    assert all(c.channels_last for c in found) and sum(n for c, n in found.items() if not c.passes_gradient) == 1
    call = convolution_call(found)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == sum(c.flop * n for c, n in found.items())
    convolution_call(found, "bf16")()


# --- around the network -----------------------------------------------------------------------------------------------

def test_torch_fidelity_finds_the_same_distance_with_the_same_network():
    images, reference = load_data("shapes", "test", 80).tensor().split(40)
    ours, theirs = compare_evaluation(images, reference, rounds=1)
    assert (ours["name"], theirs["name"]) == ("hybridvae", "torch-fidelity")
    assert ours["distance"] == pytest.approx(theirs["distance"], rel=1e-3) and ours["distance"] > 1


def test_input_is_compared_on_the_same_number_of_images():
    ours, theirs = compare_input(70, batch=16, rounds=1)
    assert (ours["name"], theirs["name"]) == ("hybridvae", "DataLoader") and ours["images_per_second"] > 0
    x = bench._Pictures(np.full((1, 4, 4, 3), 255, np.uint8))[0]
    assert x.shape == (3, 4, 4) and x.min() == 1


def test_the_start_of_this_very_package_is_timed(monkeypatch):
    monkeypatch.setattr(
        bench,
        "STARTS",
        {
            "where": [
                "-c",
                "import hybridvae; "
                f"assert hybridvae.__file__ == {project_root().as_posix()!r} + '/hybridvae/__init__.py'",
            ]
        },
    )
    [row] = start_up(rounds=2)
    assert row["name"] == "where" and 0 < row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1]


# --- all together -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def peers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STARTS", {"python": ["-c", "pass"]})
        return compare_peers(dataclasses.replace(TINY, rounds=2, images=20, inputs=128), cpu=True)


def test_the_comparison_has_every_part_and_can_be_written(peers):
    json.dumps(peers, allow_nan=False)
    assert {"commit", "device", "versions", "batch", "shape", "training", "sampling", "convolutions", "evaluation",
            "input", "start_up", "goals"} <= set(peers)
    assert "torch-fidelity" in peers["peers"] and {"hybridvae", "diffusers"} <= {r["name"] for r in peers["training"]}
    for part in ("training", "sampling"):
        for row in peers[part]:
            base = next(r for r in peers[part] if (r["name"], r["precision"]) == ("diffusers", row["precision"]))
            assert row["against_diffusers"] == row["images_per_second"] / base["images_per_second"]
            single = next(r for r in peers[part] if (r["name"], r["precision"]) == ("diffusers", "fp32"))
            assert row["against_diffusers_fp32"] == row["images_per_second"] / single["images_per_second"]
    ours = gflop(our_variant(SMALL, CPU).network, 16)
    assert peers["training"][0]["gflop_per_image"] == 3 * ours and peers["sampling"][0]["gflop_per_image"] == 2 * ours
    for row in peers["convolutions"]:
        assert row["share"] == row["seconds"] / row["step_seconds"] and row["mode"] == "eager"


def test_tables_and_bars_show_every_row(peers):
    assert len(rate_table(peers["training"])) == len(peers["training"]) and len(rate_table(peers["start_up"])) == 1
    ax = show_rates(peers["sampling"])
    assert sorted(p.get_width() for p in ax.patches) == sorted(r["images_per_second"] for r in peers["sampling"])


def test_goals_are_met_missed_or_not_measured():
    row = {"name": "hybridvae", "mode": "compiled", "precision": "fp32", "against_diffusers": 1.3,
           "against_diffusers_fp32": 1.3}
    found = {"training": [row, row | {"name": "diffusers", "against_diffusers": 9}], "sampling": [row], "convolutions":
             [{"mode": "eager", "precision": "fp32", "share": 0.9},
              {"mode": "compiled", "precision": "fp32", "share": 0.45}]}
    met = {g["goal"]: (g["reached"], g["met"]) for g in goals(found)}
    assert met["training, fp32: times diffusers"] == (1.3, True) and met["sampling, fp32: times diffusers"] == (
        1.3,
        False,
    )
    assert met["training, fp32: share of convolutions"] == (0.45, True) and met["training, bf16: times diffusers"] == (
        None,
        None,
    )


# --- growth -----------------------------------------------------------------------------------------------------------

def test_growth_varies_one_factor_at_a_time_and_counts_per_image(monkeypatch):
    monkeypatch.setattr(bench, "in_turns", lambda calls, *rest: {k: [call() for call in [calls[k]]]
                                                                 and Timing(0, [6.0]) for k in calls})
    found = cost_growth(TINY_GROWTH, TINY_BASE, SMALL, rounds=1, cpu=True)
    assert [(r["factor"], r["image_size"], r["width"], r["batch"]) for r in found["rows"]] == [
        ("image_size", 8, 32, 1),
        ("image_size", 16, 32, 1),
        ("width", 16, 16, 1),
        ("width", 16, 32, 1),
        ("batch", 16, 32, 1),
        ("batch", 16, 32, 2),
    ]
    assert [r["training_seconds_per_image"] for r in found["rows"]] == [6.0] * 5 + [3.0]
    assert found["rows"][1]["gflop_per_call"] == gflop(our_variant(SMALL, CPU).network,
                                                       16) > 3 * found["rows"][0]["gflop_per_call"]
    assert found["rows"][5]["training_memory_bytes"] > 1.3 * found["rows"][4]["training_memory_bytes"] > 0
    json.dumps(found, allow_nan=False)
    axes = show_growth(found["rows"])
    assert [ax.get_xlabel() for ax in axes] == ["image size", "width", "batch"]


# --- times of all models ----------------------------------------------------------------------------------------------

def test_models_that_differ_in_training_alone_are_the_same_computation():
    of = {e.experiment: computation(e.model) for e in queue("shapes") if e.evaluations}
    assert of["diffusevae-form1"] == of["joint-10"] == of["joint-b8-two-stage"] == of["joint-uncertainty"]
    assert len({of[name] for name in ("ddpm", "vae", "diffusevae-form1", "diffusevae-form1-z", "diffusevae-form2",
                                      "diffusevae-form2-noconcat", "flow-form1",
                                      "adaptive-normal", "adaptive-film", "latent", "latent-mlp",
                                      "latent-hybrid")}) == 12
    assert of["latent"] == of["latent-long"]


def test_the_same_computation_means_the_same_samples(tmp_path):
    entries = {e.experiment: e for e in queue("shapes") if e.seed == 0}
    one, two = (build_model(entries[name].model).eval() for name in ("diffusevae-form1", "joint-uncertainty"))
    two.load_state_dict({k: v for k, v in one.state_dict().items()}, strict=False)
    samples = [m.sample(2, steps=2, generator=torch.Generator().manual_seed(0)) for m in (one, two)]
    assert torch.equal(*samples)


def test_what_is_timed_of_whom():
    prior, long = FEW | {"prior": "ex-pde"}, {"sampler": "ancestral", "steps": 1000, "n": 4}
    entries = [entry(evaluations=(FEW, FEW | {"n": 99}, TEN, prior, long)), entry(seed=1), entry("joint-10"),
               entry("latent-hybrid"), entry("features", evaluations=())]
    steps = lambda *options, **more: [(e.experiment, asked["sampler"], asked["steps"])
                                      for e, asked in timed_evaluations(*options, **more)]
    assert steps(entries) == [("ddpm", "dpmpp", 3), ("ddpm", "ddim", 10), ("ddpm", "dpmpp", 3),
                              ("joint-10", "dpmpp", 3),
                              ("latent-hybrid", "dpmpp", 3), ("latent-hybrid", "ddim", 10)]
    assert ("ddpm", "ancestral", 1000) in steps(entries, every=True)
    assert [asked.get("prior") for _, asked in timed_evaluations(entries)] == [None, None, "ex-pde", None, None, None]
    assert all("n" not in asked for _, asked in timed_evaluations(entries))


def test_another_prior_is_other_work_only_in_place_of_a_diffusion_of_codes():
    hybrid, latent = (entry(name, model={"model": kind, "vae": VAE})
                      for name, kind in (("h", "DiffuseVAE"), ("l", "LatentDiffusion")))
    plain, fitted = {"sampler": "dpmpp", "steps": 3}, {"sampler": "dpmpp", "steps": 3, "prior": "ex-pde"}
    assert bench._group(hybrid, plain) == bench._group(hybrid, fitted) and bench._group(latent, plain) != bench._group(
        latent, fitted
    )
    assert bench._group(latent, fitted) == bench._group(latent, fitted | {"prior": "own"})


def test_times_are_per_image_and_shared_by_the_same_computation(monkeypatch):
    inner, timed = bench.in_turns, []
    monkeypatch.setattr(bench, "in_turns", lambda calls, *rest: timed.append(len(calls)) or inner(calls, *rest))
    twin = entry("twin", model={"model": "DDPM", "unet": UNET | {"dropout": 0.3}})
    found = time_models([entry(), twin, entry("wide", model={"model": "DDPM", "unet": UNET | {"width": 16}}),
                         entry("vae", model=VAE, evaluations=(
        {"sampler": None, "steps": 1, "n": 5},))], batch=4, rounds=2, cpu=True)
    json.dumps(found, allow_nan=False)
    rows = {(r["experiment"], r["evaluation"]["steps"]): r for r in found["rows"]}
    assert timed == [4] and set(rows) == {("ddpm", 3), ("ddpm", 10), ("twin", 3), ("wide", 3), ("vae", 1)}
    assert (
        rows["twin", 3]["timed_as"] == "ddpm"
        and rows["twin", 3]["seconds_per_image"] == rows["ddpm", 3]["seconds_per_image"]
    )
    assert [rows[key]["nfe"] for key in (("ddpm", 3), ("ddpm", 10), ("vae", 1))] == [3, 10, 0]
    assert (found["batch"], found["rounds"], found["compiled"],
            found["dataset"]) == (4, 2, False, "shapes") and found["device"] and found["commit"]
    monkeypatch.setattr(bench, "in_turns", lambda calls, *rest: dict.fromkeys(calls, Timing(9.0, [2.0, 4.0, 6.0])))
    assert {r["seconds_per_image"] for r in time_models([entry()], batch=4, cpu=True)["rows"]} == {1.0}


def test_an_adaptive_model_is_timed_with_its_options_and_says_its_own_evaluations(monkeypatch):
    asked = (
        {"sampler": "dpmpp", "steps": 4, "n": 8, "start": [0.5, 0.5]},
        {"sampler": "dpmpp", "steps": 4, "n": 8, "strength": [0.0, 1.0], "uncertainty": "cycle"},
    )
    found = time_models([entry("adaptive-it", model=HYBRID_MODEL | {"model": adaptive.AdaptiveDiffuseVAE.__name__},
                               evaluations=asked)], batch=4, rounds=1, cpu=True)
    assert [r["nfe"] for r in found["rows"]] == [2.0, 4.0] and found["rows"][0]["evaluation"]["start"] == [0.5, 0.5]


def test_nothing_to_time_is_said():
    with complains("none of these experiments", "ddpm"):
        time_models([entry(evaluations=())])


# --- times in tables --------------------------------------------------------------------------------------------------

@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "record_roots", lambda: [tmp_path / "committed", tmp_path / "own"])
    row = {"experiment": "a", "evaluation": {"sampler": "dpmpp", "steps": 20}, "seconds_per_image": 0.5,
           "quartiles": [0.4, 0.6], "nfe": 20}
    write_json(tmp_path / "committed" / "shapes" / "times.json",
               {"rows": [row, row | {"evaluation": row["evaluation"] | {"start": [0.2, 0.6]},
                                     "seconds_per_image": 0.3}]})
    return tmp_path, row


def test_a_time_is_found_by_exactly_its_options_and_your_own_file_comes_first(two_folders):
    folder, row = two_folders
    assert time_of("shapes", "a", sampler="dpmpp", steps=20) == time_of("shapes", "a", sampler="dpmpp", steps=20,
                                                                        n=2_000) == 0.5
    assert time_of("shapes", "a", sampler="dpmpp", steps=20, start=(0.2, 0.6)) == 0.3
    for name, asked in (("b", dict(sampler="dpmpp", steps=20)), ("a", dict(sampler="dpmpp", steps=10)),
                        ("a", dict(sampler="dpmpp", steps=20, prior="own"))):
        assert time_of("shapes", name, **asked) is None
    assert sampling_times("cifar10") == [] and len(sampling_times("shapes")) == 2
    write_json(folder / "own" / "shapes" / "times.json", {"rows": [row | {"seconds_per_image": 0.1}]})
    assert time_of("shapes", "a", sampler="dpmpp", steps=20) == 0.1 and len(sampling_times("shapes")) == 1


def test_a_damaged_file_of_times_is_named(two_folders):
    folder, _ = two_folders
    path = folder / "committed" / "shapes" / "times.json"
    path.write_text("[]")
    with complains(path, "damaged"):
        sampling_times("shapes")


# --- profiles ---------------------------------------------------------------------------------------------------------

def test_a_profile_of_an_entry_has_its_sizes_and_its_initial_weights(tmp_path, monkeypatch):
    seen, inner = {}, bench.profile_model

    def profile_model(model, batch, train_batch, sampler, steps, *rest):
        seen.update(hash=weights_hash(model), batch=batch, train_batch=train_batch, sampler=sampler, steps=steps)
        return inner(model, batch, train_batch, sampler, steps, *rest)
    monkeypatch.setattr(bench, "profile_model", profile_model)
    e = dataclasses.replace(HYBRID, batch=6)
    profiles, row = profile_entry(e, steps=2, traces=tmp_path, cpu=True)
    torch.manual_seed(derive_seed("init", 0))
    model = build_model(e.model)
    assert seen == {"hash": weights_hash(model), "batch": 6, "train_batch": 8, "sampler": "dpmpp", "steps": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hybrid-full-sampling.json.gz",
                                                          "hybrid-full-training-step.json.gz"]
    assert row["sampling: ms per image"] == pytest.approx(1000 * profiles["sampling"].seconds / 6)
    assert row["training step: ms per image"] == pytest.approx(1000 * profiles["training step"].seconds / 8)
    assert (
        row["training step: peak MiB"] == pytest.approx(profiles["training step"].peak_memory_bytes / 2**20)
        and row["sampling: peak MiB"] > 0
    )
    assert row["GFLOP per sample"] == pytest.approx(count_flops(lambda: model.sample(1, steps=2)) / 1e9)
    profile_entry(e, batch=3, sampler="ddim", steps=1, cpu=True)
    assert (seen["batch"], seen["sampler"], seen["steps"]) == (3, "ddim", 1)


def test_an_entry_that_trains_nothing_is_profiled_in_sampling_alone():
    profiles, row = profile_entry(dataclasses.replace(HYBRID, train=None, batch=2), steps=1, cpu=True)
    assert list(profiles) == ["sampling"] and not [name for name in row if "training" in name]


# --- files ------------------------------------------------------------------------------------------------------------

def test_one_part_of_a_file_leaves_the_other(tmp_path):
    path = tmp_path / "bench.json"
    assert read_bench(path) == {}
    for part, content in (("peers", {"a": 1}), ("growth", {"b": 2}), ("peers", {"a": 3})):
        write_bench(path, part, content)
    assert json.loads(path.read_text()) == {"peers": {"a": 3}, "growth": {"b": 2}}
    for key in ("x", "y"):
        write_bench(path, "int8", {"c": 4}, key)
    assert json.loads(path.read_text())["int8"] == {"x": {"c": 4}, "y": {"c": 4}}


@pytest.mark.parametrize("text", ["nothing", "[1]", '{"experiment": "ddpm"}'])
def test_a_file_that_holds_something_else_is_not_overwritten(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with complains(path, "choose another file"):
        write_bench(path, "peers", {})
    assert path.read_text() == text
    with complains("folder"):
        read_bench(tmp_path)


def test_the_committed_measurements_have_what_the_lesson_shows():
    found = json.loads((results_folder() / "bench.json").read_text())
    assert set(found) == {"peers", "growth", "int8"} and {r["factor"] for r in found["growth"]["rows"]} == {
        "image_size",
        "width",
        "batch",
    }
    assert time_of("shapes", "ddpm", sampler="dpmpp", steps=20) > time_of("shapes", "vae", sampler=None, steps=1) > 0


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "cl"))), reason="needs a C++ compiler")
def test_the_compiled_network_is_compared_too():
    found = bench.compare_networks(dataclasses.replace(TINY, compiled=True, rounds=1))
    row = next(r for r in found["training"] if (r["name"], r["mode"]) == ("hybridvae", "compiled"))
    eager = next(r for r in found["training"] if (r["name"], r["mode"]) == ("hybridvae", "eager"))
    assert row["gflop_per_image"] == eager["gflop_per_image"] and row["warm_up_seconds"] > eager["warm_up_seconds"]
