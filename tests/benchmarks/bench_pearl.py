"""Cost of PEARL's gradient step against a plain loop over networks, in one run, and of the layout of its products.

Run it with ``python tests/benchmarks/bench_pearl.py`` (about two minutes). The loop is ``tests/plain_pearl.py``; it
makes the same step, as ``tests/test_pearl_loss.py`` shows. Variants take turns on one thread, CPU time is counted, and
the best round of each is shown.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from torchrl_mouse.modules.latent import LatentMLP
from torchrl_mouse.objectives import PEARLLoss

sys.path.insert(0, str(Path(__file__).parents[1]))
from plain_pearl import LEARNING_RATE, TAU, PlainPEARL, make_batch, make_loss, plain

# Sizes of observation, action and context.
CASES = {"point-robot": (2, 2, 64), "sparse-point-robot": (2, 2, 1024), "cheetah-vel": (20, 6, 100)}


def make_step(loss: PEARLLoss, batch: TensorDict, *, low: bool) -> Callable[[], None]:
    """Makes our gradient step, as ``examples/pearl.py`` makes it; its products are in bfloat16 if ``low``."""
    updater, optimizer = SoftUpdate(loss, tau=TAU), torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        for losses, names in (
            (loss.critic_loss, ("loss_kl", "loss_qvalue")),
            (loss.actor_loss, ("loss_value", "loss_actor")),
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                results = losses(batch)
            optimizer.zero_grad()
            sum(results[name] for name in names).backward()
            optimizer.step()
        updater.step()

    return step


def measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the least CPU seconds of each, taking turns."""
    best = dict.fromkeys(variants, math.inf)
    for _ in range(rounds):
        for name, variant in variants.items():
            start = time.process_time()
            variant()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="more for a steadier result")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, (observation_dim, action_dim, context) in CASES.items():
        loss, batch = make_loss(observation_dim, action_dim), make_batch(observation_dim, action_dim, context=context)
        variants = {"plain": partial(PlainPEARL(loss).step, batch)}
        variants |= {kind: make_step(loss, batch, low=kind != "ours") for kind in ("ours", "ours in bfloat16")}
        best = measure(variants, rounds)
        plainly = best.pop("plain")
        ours = (f"{kind} {1e3 * spent:.0f} ms, {plainly / spent:.2f} times as fast" for kind, spent in best.items())
        print(f"{name}: plain {1e3 * plainly:.0f} ms; {'; '.join(ours)}")
    columns, frames = LatentMLP(9, 1, (300,) * 3, last=3e-3), torch.randn(4096, 9)
    networks = {"rows": plain(columns), "columns": columns}
    variants = {name: lambda network=network: network(frames).sum().backward() for name, network in networks.items()}
    best = measure(variants, 3 * rounds)
    print(f"one network, forward and backward: columns {best['rows'] / best['columns']:.2f} times as fast as rows")


if __name__ == "__main__":
    main()
