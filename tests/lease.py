"""Ten minutes of a borrowed GPU: probe its speed, train entries in lanes, measure them, pack what comes home.

    python tests/lease.py probe cifar10 diffusevae-form1-z ddpm
    python tests/lease.py run cifar10 --minutes 9 --out OUT "features vae diffusevae-form1-z" "ddpm"
    python tests/lease.py run cifar10 --tiny --out OUT "features vae" "ddpm"

`probe` measures how fast an entry trains and samples, and fills the compiler's cache. `run` takes lanes: each is a
process that trains its entries in order and then measures them; two lanes keep the GPU busy while one of them compiles.
Whatever is finished twenty seconds after the limit is packed into parts of 15 MB; put together and unpacked into a
folder, `hybridvae campaign --runs FOLDER` goes on from there. `--tiny` tries all of it on the CPU, on stand-in images.
NAME@1 is an entry of seed 1. Nothing is needed but PyTorch and what the package imports.
"""
import argparse
import contextlib
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PEAK = 790e12  # operations per second in bfloat16 that an H100 was measured to do
PART = 15_000_000  # bytes of a part
GRACE = 20  # seconds after the limit in which a lane may end by itself
KEPT = ("seed*.json", "seed*.png", "seed*.jpg", "seed*/model.safetensors", "seed*/trained.json", "seed*/measured.json")


def pool_and_chosen(dataset: str, names: list[str], tiny: bool) -> tuple[list, list]:
    "All entries of the data set, and the named ones in this order."
    from hybridvae.campaign import queue, shrink
    from hybridvae.entries import find_entry

    pool = [shrink(entry) if tiny else entry for entry in queue(dataset)]
    return pool, [find_entry(pool, name, int(seed or 0)) for name, _, seed in (n.partition("@") for n in names)]


def probe(dataset: str, names: list[str], tiny: bool) -> None:
    "Images per second of entries' training and sampling, compiled, and how long it takes until they run."
    for entry in pool_and_chosen(dataset, names, tiny)[1]:
        probe_entry(entry, tiny)


def probe_entry(entry, tiny: bool) -> None:
    "Print a line on training, and one on sampling."
    import torch
    from hybridvae.core import Draws, build_model, count_flops, default_device, image_draws
    from hybridvae.training import TrainConfig, autocast, compile_networks, training_step

    device, n = default_device(), 2 if tiny else 40
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    model, config = build_model(entry.model).to(device).eval(), TrainConfig(**entry.train)
    x = torch.rand(config.batch_size, *model.image_shape, device=device) * 2 - 1
    flops = 3 * count_flops(lambda: model.training_loss(x[:1], draws=Draws(0, 0, device=device)))
    torch.backends.cudnn.benchmark = True
    if not tiny:
        compile_networks(model)
    begun, step = time.monotonic(), training_step(model, x, config)
    for _ in range(3):
        step()
    wait()
    ready = time.monotonic()
    for _ in range(n):
        step()
    wait()
    rate = n * config.batch_size / (time.monotonic() - ready)
    print(f"{entry.experiment}: trains {rate:,.0f} images/s, {rate * flops / PEAK:.1%} of the peak, ready after "
          f"{ready - begun:.0f} s", flush=True)
    begun, draws = time.monotonic(), image_draws(0, 0, entry.batch)
    for _ in range(2):
        ready = time.monotonic()
        with autocast(device):
            model.eval().sample(entry.batch, sampler="dpmpp", steps=10, generator=draws)
        wait()
    rate = entry.batch / (time.monotonic() - ready)
    print(f"{entry.experiment}: samples {rate:,.0f} images/s with 10 steps, ready after {ready - begun:.0f} s",
          flush=True)


def lane(dataset: str, names: list[str], tiny: bool, runs: Path, minutes: float) -> None:
    "Train the named entries, then measure them."
    from hybridvae.campaign import stand_in_data
    from hybridvae.core import HybridVAEError
    from hybridvae.runs import Clock, run_entry

    pool, chosen = pool_and_chosen(dataset, names, tiny)
    clock, begun = Clock(minutes), time.monotonic()
    with stand_in_data() if tiny else contextlib.nullcontext():
        for train_only in (True, False):
            for entry in chosen:
                try:
                    run_entry(entry, pool, runs, clock.left(), tiny, False, train_only)
                except HybridVAEError as error:  # the others go on
                    print(error, flush=True)
                what = "trained" if train_only else "measured"
                print(f"{time.monotonic() - begun:5.0f} s: {entry.experiment} seed {entry.seed} {what}"
                      f"{', or stopped by the limit' if clock.left() == 0 else ''}", flush=True)


def pack(runs: Path, out: Path) -> list[Path]:
    "Records, grids and weights below `runs` as one archive, in parts."
    out.mkdir(parents=True, exist_ok=True)
    whole = runs.with_name(runs.name + ".tar")
    with tarfile.open(whole, "w") as archive:
        for pattern in KEPT:
            for path in sorted(runs.glob(f"*/*/{pattern}")):
                archive.add(path, path.relative_to(runs).as_posix())
    content, parts = whole.read_bytes(), []
    for i in range(0, len(content), PART):
        parts.append(out / f"lease.tar.{i // PART}")
        parts[-1].write_bytes(content[i:i + PART])
    return parts


def run(dataset: str, lanes: list[str], tiny: bool, runs: Path, minutes: float, out: Path) -> None:
    "All lanes at once; then the package."
    command = [sys.executable, "-u", "-W", "ignore", __file__, "lane", dataset, "--runs", str(runs), "--minutes",
               str(minutes),
               *(["--tiny"] if tiny else [])]
    started = [subprocess.Popen([*command, *names.split()]) for names in lanes]
    clock = time.monotonic() + 60 * minutes + GRACE
    for process in started:
        try:
            process.wait(max(0.0, clock - time.monotonic()))
        except (
            subprocess.TimeoutExpired
        ):  # it does not look at the clock just now, and what is finished has to come home
            process.kill()
    codes = [process.wait() for process in started]
    parts = pack(runs, out)
    size = sum(p.stat().st_size for p in parts) / 1e6
    print(f"{len(parts)} parts, {size:.1f} MB, in {out}; the lanes ended with {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["probe", "run", "lane"])
    parser.add_argument("dataset")
    parser.add_argument("names", nargs="+", help="entries; for run: lanes")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("lease"))
    given = parser.parse_args()
    if given.what == "probe":
        probe(given.dataset, given.names, given.tiny)
    elif given.what == "lane":
        lane(given.dataset, given.names, given.tiny, given.runs, given.minutes)
    else:
        run(given.dataset, given.names, given.tiny, given.runs, given.minutes, given.out)


if __name__ == "__main__":
    main()
