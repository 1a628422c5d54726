"""Profiles: operators counted and ordered, memory that adds up, times without the profiler."""
import gzip
import json

import pytest
import torch
from conftest import complains, disk_full, files_below, randomised
from hybridvae.profiling import Profile, operator_table, profile_call, profile_model, show_memory

from hybridvae.unet import DDPM
from hybridvae.vae import VAE

MIB = 2**20


def mebibytes(n):
    return torch.empty(n * MIB, dtype=torch.uint8).fill_(0)


def small_ddpm():
    return randomised(DDPM(unet=dict(image_size=16, width=16, multipliers=(1,), attention=(), patch=2)))


@pytest.mark.parametrize("times", [1, 4])
def test_a_profile_counts_the_operators_of_one_call_and_no_other(times):
    layer, x = torch.nn.Linear(64, 64), torch.zeros(32, 64)

    def function():
        for _ in range(times):
            layer(x)
    profile = profile_call(function)
    counts = {row["operator"]: row["calls"] for row in profile.operators}
    assert counts["aten::addmm"] == counts["aten::linear"] == times


def test_operators_are_sorted_by_their_own_time_which_is_at_most_that_of_the_call():
    a = torch.rand(400, 400)

    def function():
        a @ a @ a
        torch.zeros(3)
    profile = profile_call(function)
    spent = [row["milliseconds"] for row in profile.operators]
    assert spent == sorted(spent, reverse=True) and 0 < sum(spent) <= 1000 * profile.profiled_seconds
    assert sum(row["share"] for row in profile.operators) == pytest.approx(1)
    assert profile.operators[0]["operator"] == "aten::mm"  # not matmul, which only calls it
    assert all(row["share"] == pytest.approx(row["milliseconds"] / sum(spent)) for row in profile.operators)
    table = operator_table(profile, n=2)
    assert list(table.index) == [row["operator"] for row in profile.operators[:2]] and table.calls.iloc[0] == 2
    assert not any("profiled call" in row["operator"] or row["operator"] == "[memory]" for row in profile.operators)


@pytest.mark.parametrize("lengths, median", [
    ([100.0, 2.0, 5.0], 2.0),  # a long call is timed once
    ([100.0, 0.5, 0.75, 5.0], 0.625), ([100.0, 0.125, 0.25, 0.125, 0.0625, 0.125, 5.0], 0.125)])
def test_the_time_is_the_median_of_calls_after_the_first_and_without_the_profiler(lengths, median, monkeypatch):
    from hybridvae import profiling

    now, left = [0.0], iter(lengths)

    def function():
        now[0] += next(left)
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])
    profile = profile_call(function)
    assert (profile.seconds, profile.profiled_seconds) == (median, 5.0) and not list(left)


def test_memory_that_is_held_together_adds_up_and_memory_in_turn_does_not():
    def together():
        a, b = mebibytes(8), mebibytes(8)
        del a, b

    def in_turn():
        for _ in range(2):
            mebibytes(8)
    for function, peak in ((together, 16), (in_turn, 8)):
        profile = profile_call(function)
        assert profile.peak_memory_bytes == pytest.approx(peak * MIB, abs=10_000)
        times, held = zip(*profile.timeline)
        assert times[0] == held[0] == 0 and list(times) == sorted(times)
        assert times[-1] <= 1100 * profile.profiled_seconds + 5
        assert held[-1] == 0 and sum(b - a == 8 * MIB for a, b in zip(held, held[1:])) == 2


def test_what_was_there_before_is_not_in_the_timeline_and_what_stays_remains():
    kept = [mebibytes(4) for _ in range(3)]
    assert profile_call(lambda: kept[0].add_(1)).peak_memory_bytes < 1000
    staying = profile_call(lambda: kept.append(mebibytes(4)))
    assert staying.timeline[-1][1] == staying.peak_memory_bytes == 4 * MIB


def test_a_call_without_memory_has_a_timeline_of_one_point_and_no_peak():
    profile = profile_call(lambda: None)
    assert profile.timeline == [(0.0, 0)] and profile.peak_memory_bytes == 0 and profile.operators == []
    assert len(operator_table(profile)) == 0


def test_the_trace_is_kept_whole_as_compressed_json_without_stacks_and_shapes(tmp_path):
    layer = torch.nn.Linear(64, 64)
    profile = profile_call(lambda: layer(torch.zeros(32, 64)), trace=tmp_path / "below" / "x.json.gz")
    assert files_below(tmp_path) == ["below", "below/x.json.gz"]
    with gzip.open(tmp_path / "below" / "x.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(e["name"] == "aten::addmm" for e in events) == 1
    assert len(profile.timeline) == 1 + sum(e["name"] == "[memory]" for e in events)
    assert not any(word in json.dumps(events) for word in ("Input Dims", "Call stack", "Python"))


def test_a_trace_that_cannot_be_written_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    called = []
    with complains("x.json", ".json.gz"):
        profile_call(lambda: called.append(1), trace=tmp_path / "x.json")
    assert not called
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", disk_full)
    with complains("x.json.gz", "No space left"):
        profile_call(lambda: None, trace=tmp_path / "x.json.gz")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("model", [small_ddpm(), VAE(image_size=16, z_dim=4, width=8, multipliers=(1,))],
                         ids=["ddpm", "one shot"])
def test_profiling_a_model_leaves_it_and_the_generators_as_they_were(model, tmp_path):
    model.eval()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = profile_model(model, batch=2, train_batch=4, steps=2, traces=tmp_path, name="it")
    assert list(found) == ["training step", "sampling"]
    assert files_below(tmp_path) == ["it-sampling.json.gz", "it-training-step.json.gz"]
    assert not model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_only_the_training_step_goes_backward_and_sampling_takes_as_many_networks_as_steps():
    model = small_ddpm()
    once = [row for row in profile_call(lambda: model.unet(torch.zeros(2, 3, 16, 16), torch.zeros(2))).operators]
    calls = lambda rows: next(row["calls"] for row in rows if row["operator"] == "aten::convolution")
    found = profile_model(model, batch=2, train_batch=4, steps=3)
    backward = {what: any("backward" in row["operator"].lower() for row in part.operators)
                for what, part in found.items()}
    assert backward == {"training step": True, "sampling": False}
    assert calls(found["sampling"].operators) == 3 * calls(once) == 3 * calls(found["training step"].operators) > 0
    assert any("adamw" in row["operator"] for row in found["training step"].operators)
    assert list(profile_model(model, batch=2, train_batch=None, steps=3)) == ["sampling"]


def test_the_memory_figure_has_a_line_in_mebibytes_for_each_call():
    profiles = {name: Profile("cpu", 1.0, 1.0, [], [(0.0, 0), (2.0, size * MIB), (3.0, 0)])
                for name, size in (("one", 3), ("two", 5))}
    ax = show_memory(profiles)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    lines = [line.get_xydata().tolist() for line in ax.get_lines()]
    assert lines == [[[0, 0], [2, 3], [3, 0]], [[0, 0], [2, 5], [3, 0]]]
    assert "MiB" in ax.get_ylabel() and "milliseconds" in ax.get_xlabel()
