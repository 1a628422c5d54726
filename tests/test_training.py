"""The training loop: memorising, exact resumption after a kill, averaged weights, bad losses, logs, several processes.

Run as a script it is the other process of its own tests: `python test_training.py kill <folder>` kills itself.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import hybridvae
import numpy as np
import pytest
import torch
from conftest import complains, disk_full, files_below, generator
from hybridvae import core, training
from hybridvae.core import Draws, load_model
from hybridvae.data import Batches, ImageData, draw_shapes, shapes_factors
from hybridvae.training import POINTS, Average, TrainConfig, heldout_losses, latest_checkpoint, train, training_step
from hybridvae.unet import DDPM
from hybridvae.vae import VAE
from safetensors.torch import load_file

KILLED_IN, CHECKPOINTS_EVERY = 13, 5  # steps: 10, 11 and 12 are done after the last checkpoint, and lost


def few(n=20, start=0):
    factors = shapes_factors(start + np.arange(n))
    return ImageData("shapes", "train", draw_shapes(factors, 16), factors)


def small_vae(seed=0, **options):
    torch.manual_seed(seed)
    return VAE(**{**dict(image_size=16, z_dim=4, width=8, multipliers=(1, 2)), **options})


def small_ddpm(seed=0, dropout=0.3):
    torch.manual_seed(seed)
    return DDPM(unet=dict(image_size=16, width=16, multipliers=(1, 2), attention=(8,), dropout=dropout))


def settings(steps=24, batch_size=8, **options):
    length = dict(kimg=steps * batch_size / 1000, batch_size=batch_size)
    return TrainConfig(**{**length, "n_slices": 2, "precision": "fp32", **options})


def quietly(model, folder, config, data=None, **options):
    "Train on few images, without a bar."
    return train(model, data or few(), config, folder, **{**dict(progress=False, cpu=True), **options})


def before_each_loss(model, function):
    "Call `function(step)` before every training loss of this model, held-out losses left out."
    original, steps = model.training_loss, iter(range(10**9))

    def loss(x, y=None, *, draws=None):
        if torch.is_grad_enabled():
            function(next(steps))
        return original(x, y, draws=draws)
    model.training_loss = loss
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def progress(folder):
    return json.loads((latest_checkpoint(folder) / "progress.json").read_text())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the other processes --------------------------------------------------------------------------------------------

def long_run(folder, kill_in=None):
    "Dropout, flips, averaged weights, ten epochs. A log beside the folder gets a line for each step that is begun."
    def begin(step):
        with open(f"{folder}.log", "a") as log:
            log.write(f"{step}\n")
        if step == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
    model = before_each_loss(small_ddpm(), begin)
    return quietly(model, folder, settings(flip=True), heldout=few(8, start=100),
                   checkpoint_kimg=CHECKPOINTS_EVERY * 8 / 1000)


def held_run(folder):
    "As `long_run`, but waits after its second checkpoint until a file FOLDER.go is there."
    def begin(step):
        if step == KILLED_IN:
            Path(f"{folder}.waits").touch()
            while not Path(f"{folder}.go").exists():
                time.sleep(0.02)
    quietly(before_each_loss(small_ddpm(), begin), folder, settings(flip=True), checkpoint_kimg=0.04)


def shared_run(folder):
    "Without dropout, which is drawn by each process for itself."
    model = small_vae()
    result = quietly(model, folder, settings(steps=12, flip=True, n_slices=4), heldout=few(8, start=100))
    return model, result


def limited_run(folder):
    "Two processes, and the clock of the second reaches the limit in minutes while it does the fourth step."
    rank, steps, now = int(os.environ["RANK"]), [], time.monotonic
    training.time = SimpleNamespace(process_time=time.process_time,
                                    monotonic=lambda: now() + (1e6 if rank and len(steps) > 3 else 0))
    result = quietly(before_each_loss(small_vae(), steps.append), folder, settings(steps=12), minutes=60)
    Path(f"{folder}-{rank}.json").write_text(json.dumps([result.finished, result.step]))


def as_a_process(*arguments, launcher=(), background=False):
    "Run this file as a script."
    paths = [str(Path(hybridvae.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, *launcher, __file__, *map(str, arguments)]
    if background:
        return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    return subprocess.run(words, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    what, where = sys.argv[1:]
    {"kill": lambda: long_run(where, KILLED_IN), "continue": lambda: long_run(where), "hold": lambda: held_run(where),
     "share": lambda: (shared_run(where), limited_run(f"{where}-limited"))}[what]()
    sys.exit()


# --- learning by heart ----------------------------------------------------------------------------------------------

def test_a_vae_learns_sixteen_images_by_heart(tmp_path):
    images = few(16)
    vae = small_vae(z_dim=16, width=16, sigma=0.1, beta=0.1)
    x = images.tensor().float() / 127.5 - 1
    before = (vae.reconstruct(x) - x).square().mean()
    result = quietly(vae, tmp_path, settings(steps=200, batch_size=16, lr=4e-3), images)
    after = (vae.reconstruct(x) - x).square().mean()
    assert before > 0.2 and after < 0.01 and result.finished
    assert result.history[-1]["loss"] < -1.0  # nats per dimension


def test_a_ddpm_learns_more_of_sixteen_images_than_any_guess_pixel_by_pixel(tmp_path):
    images = few(16)
    x = images.tensor().double() / 127.5 - 1
    torch.manual_seed(0)
    unet = dict(image_size=16, width=16, multipliers=(1, 2), attention=(), patch=2)
    ddpm = DDPM(unet=unet, diffusion=dict(weighting="v"))
    abar, variance = torch.tensor(ddpm.diffusion.alphas_cumprod)[:, None], x.var(dim=0, correction=0).flatten()
    # the best prediction from each pixel's mean and variance: weight 1/(1-ᾱ) times what it leaves of the variance
    guess = (variance / (abar * variance + 1 - abar)).mean()
    quietly(ddpm, tmp_path, settings(steps=300, batch_size=16, lr=8e-3), images)
    assert heldout_losses(ddpm, images, precision="fp32")["loss"] < 0.75 * guess


# --- stop, kill, continue -------------------------------------------------------------------------------------------

def test_a_killed_run_continues_bit_for_bit(tmp_path):
    long_run(tmp_path / "whole")
    killed = as_a_process("kill", tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    begun = (tmp_path / "killed.log").read_text().split()
    assert latest_checkpoint(tmp_path / "killed").name == "checkpoint-10"
    assert begun == [str(s) for s in range(KILLED_IN + 1)]  # so steps 10 to 12 were done, and are lost
    continued = as_a_process("continue", tmp_path / "killed")
    assert continued.returncode == 0, continued.stderr
    again = (tmp_path / "killed.log").read_text().split()[len(begun):]
    assert len(again) == 14  # from step 10 on, not from the start
    for name in ("model.safetensors", "state.safetensors"):
        whole, halves = (tmp_path / run / "checkpoint-24" / name for run in ("whole", "killed"))
        assert whole.read_bytes() == halves.read_bytes(), name
    whole, halves = (progress(tmp_path / run)["history"] for run in ("whole", "killed"))
    assert [p["kimg"] for p in whole] == [p["kimg"] for p in halves] and whole[-1] == halves[-1]


def test_the_run_above_depends_on_what_it_is_meant_to_test(tmp_path):
    "Dropout and flips are on: without them the same run ends with other weights."
    def end(name, dropout, flip):
        model = small_ddpm(dropout=dropout)
        quietly(model, tmp_path / name, settings(steps=3, flip=flip))
        return weights(model)
    full = end("full", 0.3, True)
    assert same(full, end("again", 0.3, True))
    assert not same(full, end("no dropout", 0.0, True)) and not same(full, end("no flips", 0.3, False))


def test_a_limit_in_minutes_stops_with_a_checkpoint_and_any_number_of_stops_changes_nothing(tmp_path):
    whole = small_ddpm()
    quietly(whole, tmp_path / "whole", settings(steps=4))
    for step in (1, 2, 3):
        model = small_ddpm(seed=step)  # what it starts with is replaced by the checkpoint
        if step == 1:
            model = small_ddpm()
        result = quietly(model, tmp_path / "parts", settings(steps=4), minutes=0)
        assert (result.finished, result.step) == (False, step)
        assert latest_checkpoint(tmp_path / "parts").name == f"checkpoint-{step}"
    result = quietly(model := small_ddpm(seed=9), tmp_path / "parts", settings(steps=4), minutes=0)
    assert (result.finished, result.step) == (True, 4) and same(weights(model), weights(whole))


def test_a_limit_that_is_not_reached_changes_nothing(tmp_path):
    model, limited = small_vae(), small_vae()
    quietly(model, tmp_path / "a", settings(steps=4))
    result = quietly(limited, tmp_path / "b", settings(steps=4), minutes=60)
    assert result.finished and same(weights(model), weights(limited))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, steps = small_vae(), []
    quietly(first, tmp_path, settings(steps=4))
    second = before_each_loss(small_vae(seed=1), steps.append)
    result = quietly(second, tmp_path, settings(steps=4))
    assert result.finished and steps == [] and same(weights(first), weights(second)) and not second.training


@pytest.mark.parametrize("config, seed, beta", [
    (settings(steps=5), 0, 1.0), (settings(steps=4, lr=2e-3), 0, 1.0), (settings(steps=4), 1, 1.0),
    (settings(steps=4), 0, 2.0)],
    ids=["longer", "faster", "other seed", "other model"])
def test_a_folder_with_another_run_is_refused_and_left_alone(tmp_path, config, seed, beta):
    quietly(small_vae(beta=1.0), tmp_path, settings(steps=4), seed=0)
    before = files_below(tmp_path)
    with complains(tmp_path, "another config or seed", "choose another folder or remove it"):
        quietly(small_vae(beta=beta), tmp_path, config, seed=seed)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "{}"])
def test_a_damaged_checkpoint_is_named(tmp_path, text):
    quietly(small_vae(), tmp_path, settings(steps=4))
    (tmp_path / "checkpoint-4" / "progress.json").write_text(text)
    with complains(tmp_path / "checkpoint-4", "is damaged", "remove it"):
        quietly(small_vae(), tmp_path, settings(steps=4))


def test_what_a_kill_left_of_a_checkpoint_is_not_taken_for_one(tmp_path):
    (tmp_path / ".checkpoint-9-abc" / "checkpoint-9").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None
    quietly(small_vae(), tmp_path, settings(steps=12), checkpoint_kimg=0.008)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_the_step_under_way_and_the_run_goes_on_bit_for_bit(tmp_path, number):
    class Ended(BaseException):
        pass

    def handler(*about):
        raise Ended
    before = signal.signal(number, handler)
    try:
        model = before_each_loss(small_vae(), lambda step: signal.raise_signal(number) if step == KILLED_IN else None)
        with pytest.raises(Ended):
            quietly(model, tmp_path / "stopped", settings(flip=True), checkpoint_kimg=0.04)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert progress(tmp_path / "stopped")["step"] == KILLED_IN + 1
    assert [p.name for p in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{KILLED_IN + 1}"]
    for name in ("stopped", "whole"):
        quietly(small_vae(), tmp_path / name, settings(flip=True), checkpoint_kimg=0.04)
    stopped, whole = (load_file(tmp_path / x / "checkpoint-24" / "state.safetensors") for x in ("stopped", "whole"))
    assert same(stopped, whole)


def test_a_second_signal_stops_at_once(tmp_path):
    "As somebody expects who presses Ctrl-C again."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    twice = before_each_loss(small_vae(), lambda step: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    try:
        with pytest.raises(KeyboardInterrupt):
            quietly(twice, tmp_path, settings())
    finally:
        signal.signal(signal.SIGINT, before)
    assert not latest_checkpoint(tmp_path)


def test_an_ignored_signal_stays_ignored(tmp_path):
    "A command that a shell runs in the background goes on where somebody presses Ctrl-C."
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = quietly(before_each_loss(small_vae(), lambda step: signal.raise_signal(signal.SIGINT)), tmp_path,
                         settings(steps=4))
        assert result.finished and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_training_in_a_folder_is_refused_and_the_first_goes_on_as_if_alone(tmp_path):
    first = as_a_process("hold", tmp_path / "two", background=True)
    try:
        while not (tmp_path / "two.waits").exists() and first.poll() is None:
            time.sleep(0.02)
        before = files_below(tmp_path / "two")
        assert "checkpoint-10/state.safetensors" in before, first.stderr.read() if first.poll() else before
        with complains(tmp_path / "two", "in use by another process"):
            quietly(small_ddpm(), tmp_path / "two", settings(flip=True), checkpoint_kimg=0.04)
        assert files_below(tmp_path / "two") == before
    finally:
        (tmp_path / "two.go").touch()
        assert first.wait() == 0, first.stderr.read()
    quietly(small_ddpm(), tmp_path / "alone", settings(flip=True), checkpoint_kimg=0.04)
    two, alone = (load_file(tmp_path / name / "checkpoint-24" / "state.safetensors") for name in ("two", "alone"))
    assert same(two, alone)


def test_of_two_checkpoints_the_one_with_more_steps_counts(tmp_path):
    "A kill after the new one is there, and before the old one is removed; as text, 9 comes after 12."
    for step in (9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-12"


def test_a_disk_that_is_full_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real = core.os.replace

    def limited(source, target):
        return disk_full() if str(target).endswith("checkpoint-6") else real(source, target)
    monkeypatch.setattr(core.os, "replace", limited)
    with complains(tmp_path / "checkpoint-6", "No space left", "free some disk space"):
        quietly(small_vae(), tmp_path, settings(steps=9), checkpoint_kimg=0.024)
    monkeypatch.setattr(core.os, "replace", real)
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("tensorboard", ".lock")] == ["checkpoint-3"]
    continued, whole = small_vae(seed=1), small_vae()
    quietly(continued, tmp_path, settings(steps=9), checkpoint_kimg=0.024)
    quietly(whole, tmp_path / "whole", settings(steps=9))
    assert same(weights(continued), weights(whole))


# --- averaged weights -----------------------------------------------------------------------------------------------

def test_the_saved_model_has_the_averaged_weights(tmp_path):
    raw, steps, batch = [], 40, 8
    config = settings(steps=steps, batch_size=batch, ema_kimg=0.01, lr=1e-2)
    model = small_vae()
    before_each_loss(model, lambda step: raw.append(weights(model)))
    quietly(model, tmp_path, config)
    state = load_file(tmp_path / "checkpoint-40" / "state.safetensors")
    raw.append({name: state[f"weight/{name}"] for name in raw[0]})  # after the last step
    average = {name: value.double() for name, value in raw[0].items()}
    for step, now in enumerate(raw[1:]):
        halflife = min(10, 0.05 * (step + 1) * batch)  # images: 10 at most, a twentieth of those seen at the start
        decay = 0.5 ** (batch / halflife)
        average = {name: decay * average[name] + (1 - decay) * now[name].double() for name in average}
    saved = load_model(tmp_path / "checkpoint-40" / "model.safetensors").state_dict()
    close = dict(rtol=1e-5, atol=1e-6)
    for name, value in average.items():
        torch.testing.assert_close(saved[name].double(), value, **close)
        assert not torch.allclose(saved[name], raw[-1][name], **close), name
    assert same(weights(model), saved) and not model.training  # what `train` leaves in the model is the same


def test_a_long_average_stays_behind_and_one_of_no_length_keeps_up(tmp_path):
    distance = {}
    for ema_kimg in (0.0, 0.05, 100.0):
        model, start = small_vae(), weights(small_vae())
        quietly(model, tmp_path / str(ema_kimg), settings(steps=10, ema_kimg=ema_kimg))
        raw = load_file(latest_checkpoint(tmp_path / str(ema_kimg)) / "state.safetensors")
        distance[ema_kimg] = sum((v - raw[f"weight/{k}"]).square().sum().item() for k, v in model.state_dict().items())
        assert not same(weights(model), start)
    assert distance[0.0] == 0 < distance[0.05] <= distance[100.0]


def test_the_average_leaves_frozen_parameters_alone():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    layers[0].requires_grad_(False)
    assert sorted(Average(layers).values) == ["1.bias", "1.weight"]


def test_the_average_is_put_in_and_taken_out_again_even_after_an_error():
    layer = torch.nn.Linear(3, 3)
    average, start = Average(layer), weights(layer)
    layer.weight.data += 1
    average.update(0.75)
    now = weights(layer)
    with pytest.raises(KeyboardInterrupt), average.applied():
        torch.testing.assert_close(layer.weight.data, start["weight"] + 0.25)
        raise KeyboardInterrupt
    assert same(weights(layer), now)


# --- bad losses -----------------------------------------------------------------------------------------------------

def breaks(model, step, value):
    "From this step on the loss is `value`, and its gradient with it."
    factor = [1.0]
    before_each_loss(model, lambda now: factor.__setitem__(0, value if now >= step else 1.0))
    original = model.training_loss
    model.training_loss = lambda *a, **k: {n: v * factor[0] if n == "loss" else v for n, v in original(*a, **k).items()}
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at_once", [True, False], ids=["checked at each step", "checked later, as on a GPU"])
def test_a_loss_that_is_not_finite_names_step_terms_and_the_last_good_checkpoint(tmp_path, monkeypatch, value, at_once):
    if not at_once:
        note = training._Run.note
        monkeypatch.setattr(training._Run, "note", lambda self, losses, check: note(self, losses, check=False))
    with complains("not finite at step 7 ", f"loss = {value}", "kl = ", "gradient_norm = ", tmp_path / "checkpoint-6",
                   "lower the learning rate"):
        quietly(breaks(small_vae(), 7, value), tmp_path, settings(steps=12), checkpoint_kimg=0.024)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]  # 9 would have held the bad weights
    assert all(v.isfinite().all() for v in load_file(tmp_path / "checkpoint-6" / "state.safetensors").values())
    continued, whole = small_vae(seed=1), small_vae()  # it is a good one: once the cause is mended the run goes on
    quietly(continued, tmp_path, settings(steps=12), checkpoint_kimg=0.024)
    quietly(whole, tmp_path / "whole", settings(steps=12))
    assert same(weights(continued), weights(whole))


def test_a_bad_loss_before_the_first_checkpoint_says_that_there_is_none(tmp_path):
    with complains("not finite at step 0 ", "none yet"):
        quietly(breaks(small_vae(), 0, math.nan), tmp_path, settings(steps=12))
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_finite_loss_with_a_bad_gradient_is_stopped_as_well(tmp_path):
    model = small_vae()
    original = model.training_loss

    def loss(*args, **kwargs):
        terms = original(*args, **kwargs)
        root = (0 * next(model.parameters()).sum()).sqrt()  # 0, whose slope is infinite
        return {**terms, "loss": terms["loss"] + root}
    model.training_loss = loss
    with complains("not finite at step 0 ", "gradient_norm = nan"):
        quietly(model, tmp_path, settings(steps=12))


# --- optimisation ---------------------------------------------------------------------------------------------------

def test_the_learning_rate_warms_up_and_decays_and_is_what_the_optimiser_uses(tmp_path, monkeypatch):
    used = []

    class Optimizer(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            used.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)
    monkeypatch.setattr(training.torch.optim, "AdamW", Optimizer)
    quietly(small_vae(), tmp_path, settings(steps=40, lr=1e-3, warmup_kimg=0.080))  # warm-up over 10 steps of 8
    rise, fall = used[:11], used[10:]
    np.testing.assert_allclose(rise, 1e-3 * np.arange(1, 12) / 11)
    np.testing.assert_allclose(fall, 1e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(30) / 30)), rtol=1e-9)


def test_a_constant_learning_rate_stays_and_no_warm_up_starts_at_the_peak():
    constant = settings(steps=40, lr=1e-3, lr_decay="constant", warmup_kimg=0)
    assert [constant.lr_at(step) for step in range(40)] == [1e-3] * 40


def test_warm_up_and_average_follow_the_length_of_the_run():
    short, long = TrainConfig(kimg=100), TrainConfig(kimg=50_000)
    assert (short.warmup_kimg, short.ema_kimg) == (5, 5) and (long.warmup_kimg, long.ema_kimg) == (640, 500)


@pytest.mark.parametrize("options, words", [
    (dict(kimg=0), "kimg is 0"), (dict(batch_size=-1), "batch_size is -1"), (dict(lr=math.nan), "lr is nan"),
    (dict(clip=math.inf), "clip is inf"), (dict(n_slices=0), "n_slices is 0"),
    (dict(lr_decay="step"), "'step' must be cosine or constant"), (dict(precision="fp16"), "'fp16'")])
def test_impossible_settings_are_refused(options, words):
    with complains(words):
        TrainConfig(**options)


def test_half_precision_is_for_the_networks_and_not_for_the_weights(tmp_path):
    model, seen = small_vae(), []
    model.encoder.net[0].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    result = quietly(model, tmp_path, settings(steps=2, precision="bf16"))
    assert result.precision == "bf16" and set(seen) == {torch.bfloat16}
    assert {v.dtype for v in load_file(tmp_path / "checkpoint-2" / "state.safetensors").values()} == {torch.float32}


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path, monkeypatch):
    norms = []

    class Optimizer(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            norms.append(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm().item())
            return super().step(*args, **kwargs)
    monkeypatch.setattr(training.torch.optim, "AdamW", Optimizer)
    quietly(small_vae(), tmp_path, settings(steps=5, clip=0.01))
    assert norms == pytest.approx([0.01] * 5, rel=1e-3)


def test_heldout_losses_use_the_same_noise_every_time_and_leave_the_mode_as_it_was():
    model, data = small_ddpm().train(), few(40)
    first = heldout_losses(model, data, batch_size=16, precision="fp32")
    torch.manual_seed(5)  # dropout would see this
    assert first == heldout_losses(model, data, batch_size=16, precision="fp32") and model.training
    assert first != heldout_losses(model, data, batch_size=16, seed=1, precision="fp32")


# --- the log --------------------------------------------------------------------------------------------------------

def test_tensorboard_has_every_term_once_even_after_a_kill(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held, config = few(8, start=100), settings(steps=50)
    first = small_vae()

    def stop(step):
        if step == 25:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        quietly(before_each_loss(small_vae(), stop), tmp_path, config, heldout=held, checkpoint_kimg=0.12)  # 15 steps
    result = quietly(small_vae(seed=1), tmp_path, config, heldout=held, checkpoint_kimg=0.12)
    log = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    terms = ["loss", "reconstruction", "kl", "mse", "reconstruction_per_image", "kl_per_image", "posterior_variance"]
    want = {*(f"train/{t}" for t in [*terms, "gradient_norm", "learning_rate"]), *(f"heldout/{t}" for t in terms)}
    assert set(log.Tags()["scalars"]) == want
    for tag in want:
        steps = [event.step for event in log.Scalars(tag)]
        assert steps == (list(range(1, 51, 10)) if tag.startswith("train/") else list(range(5, 51, 5))), tag
    x, y = Batches(few(), 8, 0, n_slices=2, slices=(0, 1))(0, draws := Draws(0, 0, (0, 1)))
    loss = first.training_loss(x, y, draws=draws)["loss"].item()
    assert log.Scalars("train/loss")[0].value == pytest.approx(loss, rel=1e-5)
    assert log.Scalars("train/learning_rate")[3].value == pytest.approx(config.lr_at(30))
    for event, point in zip(log.Scalars("heldout/kl"), result.history):
        assert event.value == pytest.approx(point["heldout_kl"], rel=1e-5) and point["kimg"] == event.step * 8 / 1000


def test_the_history_is_the_mean_of_the_steps_between_its_points(tmp_path):
    seen, model = [], small_vae()
    original = model.training_loss

    def remember(*args, **kwargs):
        terms = original(*args, **kwargs)
        seen.append(terms["kl"].item())
        return terms
    model.training_loss = remember
    result = quietly(model, tmp_path, settings(steps=30))
    assert len(result.history) == POINTS == 10 and result.step == 30
    for i, point in enumerate(result.history):
        assert point["kimg"] == pytest.approx(0.008 * 3 * (i + 1))
        assert point["kl"] == pytest.approx(np.mean(seen[3 * i:3 * i + 3]), rel=1e-5)


# --- several processes ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    "Where two processes have left `shared_run` and `limited_run`, and what they said."
    folder = tmp_path_factory.mktemp("runs") / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return folder, as_a_process("share", folder, launcher=launcher).stderr


def test_two_processes_end_with_the_weights_of_one(two_processes, tmp_path):
    folder, said = two_processes
    one, result = shared_run(tmp_path / "one")
    assert latest_checkpoint(folder), said
    two = load_model(latest_checkpoint(folder) / "model.safetensors").state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5, msg=name)
    start = small_vae().state_dict()
    assert max((value - start[name]).abs().max() for name, value in one.state_dict().items()) > 1e-3  # it has learnt
    history = progress(folder)["history"]
    assert len(history) == len(result.history) > 5
    for point, expected in zip(history, result.history):  # of the whole batch, not of one process' slices
        assert point == pytest.approx(expected, rel=1e-4)


def test_processes_whose_clocks_differ_stop_in_the_same_step(two_processes):
    folder, said = two_processes
    ends = sorted(folder.parent.glob("two-limited-*.json"))
    assert [json.loads(end.read_text()) for end in ends] == [[False, 4], [False, 4]], said
    assert latest_checkpoint(f"{folder}-limited").name == "checkpoint-4"


def test_what_two_processes_began_one_ends(two_processes, tmp_path):
    "A checkpoint does not depend on the number of processes."
    folder, said = two_processes
    shutil.copytree(f"{folder}-limited", tmp_path / "moved")
    moved, alone = small_vae(), small_vae()
    result = quietly(moved, tmp_path / "moved", settings(steps=12))
    assert result.finished and result.step == 12 and result.history[-1]["kimg"] == 12 * 8 / 1000
    quietly(alone, tmp_path / "alone", settings(steps=12))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(moved.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_slices_that_the_processes_cannot_share_are_refused(tmp_path, monkeypatch):
    class Three(training.Accelerator):
        num_processes = 3
    monkeypatch.setattr(training, "Accelerator", Three)
    with complains("2 slices cannot be shared by 3 processes"):
        quietly(small_vae(), tmp_path, settings())


# --- a step for measuring ------------------------------------------------------------------------------------------

def test_a_step_for_measuring_trains_what_is_trained_next_to_nothing_and_sets_the_gradients_free():
    model, x = small_ddpm(), torch.rand(4, 3, 16, 16, generator=generator()) * 2 - 1
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = training_step(model.eval(), x, settings())
    step()
    step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if p is not frozen}
    assert 0 < max(moved.values()) < 4e-6 and torch.equal(
        frozen, before[next(iter(before))]
    )  # two steps of at most 1e-6 each
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_a_step_for_measuring_is_that_of_adamw_on_the_models_loss():
    ours, other, x = (
        small_ddpm(dropout=0.0),
        small_ddpm(dropout=0.0),
        torch.rand(4, 3, 16, 16, generator=generator()) * 2 - 1,
    )
    step = training_step(ours, x, settings(weight_decay=0.5))
    step()
    other.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-6, weight_decay=0.5)
    other.training_loss(x.contiguous(memory_format=torch.channels_last), draws=Draws(0, 0))["loss"].backward()
    optimizer.step()
    start = small_ddpm(dropout=0.0).state_dict()
    for (name, a), b in zip(ours.named_parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-8, msg=name)
    assert any((a - start[name]).abs().max() > 5e-7 for name, a in ours.named_parameters())


def test_a_slow_run_leaves_a_checkpoint_every_few_minutes(tmp_path, monkeypatch):
    "A clock on which every step takes a minute: a run that is killed loses at most four steps."
    now, saved, save = [0.0], [], training.save_checkpoint
    monkeypatch.setattr(training, "time", SimpleNamespace(process_time=time.process_time, monotonic=lambda: now[0]))
    monkeypatch.setattr(training, "save_checkpoint", lambda folder, *a: saved.append(a[-1]["step"]) or save(folder, *a))

    def step(*_):
        now[0] += 60
    quietly(before_each_loss(small_vae(), step), tmp_path, settings(steps=22), checkpoint_kimg=1e9)
    assert saved == [5, 10, 15, 20, 22]


# --- the end of a process that was connected to others ---------------------------------------------------------------

def busy(until, done):
    "Work outside of Python's lock until a moment."
    while time.monotonic() < until:
        zlib.compress(bytes(20_000_000), 9)  # long beside the moments between two of them
    done.set()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_the_end_waits_for_threads_that_run():
    done = threading.Event()
    threading.Thread(target=busy, args=(time.monotonic() + 0.5, done), daemon=True).start()
    training._let_others_rest()
    assert done.is_set()


def test_the_end_does_not_wait_for_ever():
    done, start = threading.Event(), time.monotonic()
    threading.Thread(target=busy, args=(start + 2.0, done), daemon=True).start()
    training._let_others_rest(0.1)
    assert time.monotonic() - start < 1.5 and not done.is_set()
    assert done.wait(10)
