"""Trains the model on CPU processes or one GPU: stably for as long as it is let, or cooling from a checkpoint.

    torchrun --standalone --nproc-per-node 2 train.py --out run
    torchrun --standalone --nproc-per-node 2 train.py --from run/latest.pt --decay-tokens 8000000 --out cooled

The first goes on until it is stopped. Where there is OUT/latest.pt a run goes on from there, with optimisers, schedule
and data as they were. SIGTERM and Ctrl-C save first.
"""

import argparse
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data import Batches
from evaluate import summary
from loss import training_loss
from model import Model, Shape
from optimiser import Optimiser, Schedule

LINE_EVERY = 20  # steps


class Gradients:
    """Gradients of all parameters and what is said beside them, one flat tensor that processes exchange in one go."""

    def __init__(self, model: Model, said: int) -> None:
        weights = list(model.parameters())
        self.count = sum(weight.numel() for weight in weights)
        self.flat = torch.zeros(self.count + said, device=weights[0].device)
        for weight, view in zip(weights, self.flat[: self.count].split([w.numel() for w in weights]), strict=True):
            weight.grad = view.view_as(weight)

    def exchange(self, said: Tensor, processes: int) -> Tensor:
        """Averages gradients over processes and returns the sum of what each said."""
        self.flat[self.count :] = said
        if processes > 1:
            dist.all_reduce(self.flat)
            self.flat[: self.count] /= processes
        return self.flat[self.count :].clone()


class Run:
    """A model in training, with all that a checkpoint holds."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = Model(Shape.read(arguments.config)).to(arguments.device)
        self.model.initialise(arguments.seed)
        self.optimiser = Optimiser(self.model)
        self.schedule = Schedule()
        self.seed, self.step, self.tokens, self.seconds = arguments.seed, 0, 0, 0.0

    def save(self, path: Path) -> None:
        """Writes a checkpoint beside `path` and renames it, so that there is a whole one at any time."""
        state = {name: getattr(self, name) for name in ("seed", "step", "tokens", "seconds")}
        state |= {"schedule": asdict(self.schedule), "shape": asdict(self.model.shape)}
        state |= {"model": self.model.state_dict(), "optimiser": self.optimiser.state()}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path, device: str) -> None:
        state = torch.load(path, map_location=device, weights_only=True)
        if state["shape"] != asdict(self.model.shape):
            raise SystemExit(f"{path}: shape is not that of --config; give the config.json it was trained with")
        self.model.load_state_dict(state["model"])
        self.optimiser.load(state["optimiser"])
        self.schedule = Schedule(**state["schedule"])
        for name in ("seed", "step", "tokens", "seconds"):
            setattr(self, name, state[name])


def gradients_of(loss: Callable, model: Model, batches: list[Tensor], device: str) -> tuple[Tensor, Tensor]:
    """Adds the gradients of the batches' mean loss; returns nats of trunk and module [2] and loads [layers, E]."""
    nats, loads = [], []
    for ids in batches:
        with torch.autocast(device, torch.bfloat16):
            total, mean, load = loss(model, ids.to(device))
        (total / len(batches)).backward()
        nats.append(mean.detach())
        loads.append(load.detach())
    return torch.stack(nats).mean(0), torch.stack(loads).sum(0)


def train(run: Run, arguments: argparse.Namespace, rank: int, processes: int) -> None:
    model, device, latest = run.model, arguments.device, arguments.out / "latest.pt"
    data = Batches(arguments.corpus, arguments.sequences, arguments.length, run.seed)
    loss = torch.compile(training_loss, dynamic=False) if arguments.compile else training_loss
    stopping = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))

    layers = len(model.moes())
    gradients = Gradients(model, 3 + layers * model.shape.n_routed_experts)
    tokens_a_step = processes * arguments.accumulate * arguments.sequences * arguments.length
    began, at_start = time.monotonic() - run.seconds, run.tokens
    saved = began_here = time.monotonic()
    smooth = None
    while not run.schedule.finished(run.tokens):
        first = run.step * arguments.accumulate
        batches = [data.at(first + part, rank) for part in range(arguments.accumulate)]
        gradients.flat.zero_()
        nats, loads = gradients_of(loss, model, batches, device)
        stop = torch.tensor([float(bool(stopping))], device=device)
        said = gradients.exchange(torch.cat([nats / processes, stop, loads.flatten()]), processes)
        run.step += 1
        factor = run.schedule.factor(run.tokens)
        run.optimiser.step(run.step, factor, said[3:].view(layers, -1))
        run.tokens += tokens_a_step
        run.seconds = time.monotonic() - began
        smooth = said[:2] if smooth is None else smooth.lerp(said[:2], 0.05)

        ended = run.schedule.finished(run.tokens) or bool(said[2])
        if rank != 0:
            if ended:
                break
            continue
        if run.step % LINE_EVERY == 0 or ended:
            speed = (run.tokens - at_start) / (time.monotonic() - began_here)
            trunk, module = smooth.tolist()
            print(
                f"step {run.step} tokens {run.tokens / 1e6:.2f}M {run.seconds:.0f} s {speed:.0f} tokens/s "
                f"rate {factor:.3f} nats {trunk:.3f} mtp {module:.3f}",
                flush=True,
            )
        crossed = run.tokens // arguments.evaluate_tokens > (run.tokens - tokens_a_step) // arguments.evaluate_tokens
        if crossed or (ended and not stopping):
            print(summary(model, arguments.corpus, arguments.length, windows=8), flush=True)
        if ended or time.monotonic() - saved > 60 * arguments.save_minutes:
            run.save(latest)
            saved = time.monotonic()
        if ended:
            print(f"{latest}: saved after {run.tokens} tokens", flush=True)
            break


def arguments_of_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", type=Path, default=Path("corpus"), help="folder of corpus.py (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for latest.pt; a run there goes on")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("config.json"), help="shape of the model"
    )
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="checkpoint to start a new OUT from")
    parser.add_argument(
        "--decay-tokens", type=int, default=0, metavar="N", help="cool to rate 0 over N tokens, then end"
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights and data (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a window (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=12, help="windows at once in a process (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=2, help="times that many a step (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: %(default)s)"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the loss")
    parser.add_argument("--save-minutes", type=float, default=5, help="between checkpoints (default: %(default)s)")
    parser.add_argument(
        "--evaluate-tokens", type=int, default=4_000_000, help="between evaluations (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of_command_line()
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.device == "cuda" and processes > 1:
        raise SystemExit(f"--device cuda: {processes} processes, expected 1; start it without torchrun")
    torch.set_flush_denormal(True)
    if processes > 1:
        # A day: processes may be suspended while the machine is wanted for something else.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    arguments.out.mkdir(parents=True, exist_ok=True)

    run, latest = Run(arguments), arguments.out / "latest.pt"
    if latest.exists():
        run.load(latest, arguments.device)
    elif arguments.source:
        run.load(arguments.source, arguments.device)
        run.schedule = Schedule()  # the source may have cooled
    if arguments.decay_tokens and not run.schedule.decay_tokens:
        run.schedule = Schedule(run.tokens, arguments.decay_tokens)
    if rank == 0:
        print(f"{sum(w.numel() for w in run.model.parameters())} parameters, from token {run.tokens}", flush=True)
    train(run, arguments, rank, processes)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
