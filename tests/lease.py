"""Ten minutes of a borrowed GPU: probe its speed, train entries in lanes, measure them, pack what comes home.

    python tests/lease.py probe cifar10 diffusevae-form1-z ddpm
    python tests/lease.py run cifar10 --minutes 9 --out OUT "features vae diffusevae-form1-z" "ddpm"
    python tests/lease.py run cifar10 --tiny --out OUT "features vae" "ddpm"
    python tests/lease.py run cifar10 --after FILE --out OUT "features vae" "ddpm"
    python tests/lease.py send cifar10 4 --out OUT

`probe` measures how fast an entry trains and samples, and fills the compiler's cache. `run` takes lanes: each is a
process that trains its entries in order and then measures them; NAME! is measured before the lane goes on. An entry
waits for what another lane trains, and is left out where the time that is left is too short for it, by what the last
network of about its size took in this lane. Whatever is finished twenty seconds after the limit is packed into parts of
15 MB, records and grids first, then weights in the order of the lanes: the first four lie in OUT, `send` puts the four
from a number on there. Put together and unpacked into a folder, `hybridvae campaign --runs FOLDER` goes on from there.
`--tiny` tries all of it on the CPU, on stand-in images. With `--after` lanes are ready before the images are there.
NAME@1 is an entry of seed 1. Nothing is needed but PyTorch and what the package imports.
"""
import argparse
import contextlib
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PEAK = 790e12  # operations per second in bfloat16 that an H100 was measured to do
PART = 15_000_000  # bytes of a part
GRACE = 20  # seconds after the limit in which a lane may end by itself
PARTS = 4  # that come home at once
RESERVE = 60  # seconds of the limit that are kept for measuring: no training that would reach into them begins
KEPT = ("seed*.json", "seed*.png", "seed*.jpg", "seed*/trained.json", "seed*/measured.json")


def pool_and_chosen(dataset: str, names: list[str], tiny: bool) -> tuple[list, list]:
    "All entries of the data set, and the named ones in this order."
    from hybridvae.campaign import queue, shrink
    from hybridvae.entries import find_entry

    pool = [shrink(entry) if tiny else entry for entry in queue(dataset)]
    return pool, [find_entry(pool, name, int(seed or 0))
                  for name, _, seed in (n.removesuffix("!").partition("@") for n in names)]


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


class Lane:
    "Trains and measures the named entries, one after the other."

    def __init__(self, dataset: str, names: list[str], others: list[str], tiny: bool, runs: Path, minutes: float):
        from hybridvae.runs import Clock

        self.pool, self.chosen = pool_and_chosen(dataset, names, tiny)
        self.awaited = [e for e in pool_and_chosen(dataset, others, tiny)[1] if e not in self.chosen]
        self.now = [name.endswith("!") for name in names]
        self.runs, self.tiny, self.clock, self.begun = runs, tiny, Clock(minutes), time.monotonic()
        self.before = 0.0, math.inf  # operations of the last training, and its seconds

    def all(self) -> None:
        "Train each entry, or train and measure it; measure the others in the end."
        for entry, now in zip(self.chosen, self.now):
            self.train(entry)
            if now:
                self.run(entry, False)
        for entry in self.chosen:
            if not (self.runs / entry.dataset / entry.experiment / f"seed{entry.seed}.json").exists():
                self.run(entry, False)

    def train(self, entry) -> None:
        "Wait for what it starts from, then train an entry, unless it would take too long."
        if (entry.folder(self.runs) / "trained.json").exists():
            return
        self.wait(entry)
        operations, left = training_operations(entry), 60 * (self.clock.left() or 0)
        done, seconds = self.before
        # a small network's training, most of it compilation and waiting for Python, says nothing of a large one's
        if 3 * done > operations and seconds * operations / done > left - RESERVE:
            print(f"{entry.experiment} seed {entry.seed} is left out: {left:.0f} s are left", flush=True)
            return
        begun = time.monotonic()
        self.run(entry, True)
        self.before = operations, time.monotonic() - begun

    def wait(self, entry) -> None:
        "Until the entries of other lanes that it starts from are trained, or the limit comes."
        parents = [e for e in self.awaited if e.experiment in entry.depends_on.values() and e.seed == entry.seed]
        while self.clock.left() and not all((e.folder(self.runs) / "trained.json").exists() for e in parents):
            time.sleep(0.2)

    def run(self, entry, train_only: bool) -> None:
        "Train or measure an entry; the others go on where that fails."
        from hybridvae.core import HybridVAEError
        from hybridvae.runs import run_entry

        if not train_only and not (entry.folder(self.runs) / "trained.json").exists():
            return
        os.environ["HYBRIDVAE_COMPILE"] = "auto" if train_only else "off"  # for measuring it takes longer than it saves
        try:
            run_entry(entry, self.pool, self.runs, self.clock.left(), self.tiny, False, train_only)
        except HybridVAEError as error:
            print(error, flush=True)
        print(f"{time.monotonic() - self.begun:5.0f} s: {entry.experiment} seed {entry.seed} "
              f"{'trained' if train_only else 'measured'}"
              f"{', or stopped by the limit' if self.clock.left() == 0 else ''}", flush=True)


def training_operations(entry) -> float:
    "Floating-point operations of an entry's training, about; 0 where nothing is trained, and for feature networks."
    import torch
    from hybridvae.core import Draws, build_model, count_flops

    model = build_model(entry.model).eval()
    if not entry.train or not hasattr(model, "image_shape"):
        return 0.0
    x = torch.zeros(1, *model.image_shape)
    return 3e3 * entry.train["kimg"] * count_flops(lambda: model.training_loss(x, draws=Draws(0, 0)))


def wait_for(file: Path | None) -> None:
    "Until the file is there."
    while file and not file.exists():
        time.sleep(0.1)


def lane(dataset: str, names: list[str], others: list[str], tiny: bool, runs: Path, minutes: float,
         after: Path | None) -> None:
    "Train and measure the named entries; those of all lanes are in `others`."
    from hybridvae.campaign import stand_in_data

    import hybridvae.runs  # noqa: F401  what takes long to import, while the images are still on their way

    wait_for(after)
    with stand_in_data() if tiny else contextlib.nullcontext():
        Lane(dataset, names, others, tiny, runs, minutes).all()


def pack(runs: Path, order: list[str] | None = None) -> list[Path]:
    "Records, grids and weights below `runs` as one archive, in parts beside it; weights in the order of experiments."
    whole = runs.with_name(runs.name + ".tar")
    place = {name: i for i, name in enumerate(order or [])}
    weights = sorted(runs.glob("*/*/seed*/model.safetensors"),
                     key=lambda path: (place.get(path.parts[-3], len(place)), path))
    with tarfile.open(whole, "w") as archive:
        for path in [*(path for pattern in KEPT for path in sorted(runs.glob(f"*/*/{pattern}"))), *weights]:
            archive.add(path, path.relative_to(runs).as_posix())
    for old in runs.parent.glob("lease.tar.*"):
        old.unlink()
    content, parts = whole.read_bytes(), []
    for i in range(0, len(content), PART):
        parts.append(runs.with_name(f"lease.tar.{i // PART:02}"))
        parts[-1].write_bytes(content[i:i + PART])
    return parts


def send(runs: Path, out: Path, first: int = 0) -> list[Path]:
    "Copy the parts from a number on to `out`, as many as come home at once."
    out.mkdir(parents=True, exist_ok=True)
    parts = sorted(runs.parent.glob("lease.tar.*"))
    return [Path(shutil.copy(part, out)) for part in parts[first:first + PARTS]]


def run(dataset: str, lanes: list[str], tiny: bool, runs: Path, minutes: float, out: Path,
        after: Path | None = None) -> None:
    "All lanes at once; then the package."
    command = [sys.executable, "-u", "-W", "ignore", __file__, "lane", dataset, "--runs", str(runs), "--minutes",
               str(minutes), "--others", " ".join(lanes), *(["--after", str(after)] if after else []),
               *(["--tiny"] if tiny else [])]
    started = [subprocess.Popen([*command, *names.split()]) for names in lanes]
    wait_for(after)
    clock = time.monotonic() + 60 * minutes + GRACE
    for process in started:
        try:
            process.wait(max(0.0, clock - time.monotonic()))
        except (
            subprocess.TimeoutExpired
        ):  # it does not look at the clock just now, and what is finished has to come home
            process.kill()
    codes = [process.wait() for process in started]
    parts = pack(runs, [name.removesuffix("!").partition("@")[0] for names in lanes for name in names.split()])
    size = sum(p.stat().st_size for p in parts) / 1e6
    print(f"{len(parts)} parts, {size:.1f} MB, {len(send(runs, out))} of them in {out}; the lanes ended with {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["probe", "run", "lane", "send"])
    parser.add_argument("dataset")
    parser.add_argument("names", nargs="+", help="entries; for run: lanes; for send: a number")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("lease"))
    parser.add_argument("--after", type=Path, help="begin when this file is there")
    parser.add_argument("--others", default="", help="for lane: all entries, which may be waited for")
    given = parser.parse_args()
    if given.what == "probe":
        probe(given.dataset, given.names, given.tiny)
    elif given.what == "lane":
        lane(given.dataset, given.names, given.others.split(), given.tiny, given.runs, given.minutes, given.after)
    elif given.what == "send":
        print([part.name for part in send(given.runs, given.out, int(given.names[0]))])
    else:
        run(given.dataset, given.names, given.tiny, given.runs, given.minutes, given.out, given.after)


if __name__ == "__main__":
    main()
