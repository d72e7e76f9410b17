"""Trains on a data set with several processes, which share each batch and add up their gradients.

What is learned is what one process learns from the whole batches: every process draws the same windows, reads its share
of them, and divides the sum of its losses by the size of the whole batch. (A mean over the steps that count would be
another one in each share.) The processes may be on several machines, without --standalone, that see the same folders.

    python examples/create_dataset.py --episodes 40000
    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py               # --updates 20: to see it run
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from backbones import BACKBONES
from create_dataset import at_least
from offline_training import (
    CQL_WEIGHT,
    GAMMA,
    GAMMA_TERMINAL,
    LEARNING_RATE,
    REWARD_SCALE,
    START_SHARE,
    TAU,
    WEIGHT_DECAY,
    build_model,
    load,
    make_store,
    sizes_of,
)
from torch import distributed
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger
from tqdm.auto import tqdm

from torchrl_mouse.data import DatasetStore, WindowSampler, replay_buffer
from torchrl_mouse.models import MouseModel
from torchrl_mouse.objectives import MouseDQNLoss
from torchrl_mouse.recipes import warmup_cosine


class ShareSampler(WindowSampler):
    """Draws the windows of the whole batch, as every process does, and keeps this process's."""

    def sample(self, storage: DatasetStore, batch_size: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Chooses the record indices of ``batch_size`` windows."""
        rows, info = super().sample(storage, batch_size * distributed.get_world_size())
        own = slice(batch_size * distributed.get_rank(), batch_size * (distributed.get_rank() + 1))
        return rows[own], {name: value[own] for name, value in info.items()}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/frozen_lake/dataset", help="folder, or OWNER/NAME on the Hub")
    parser.add_argument("--split", default="train", help="of a data set on the Hub")
    parser.add_argument("--task", default="task", help="column that names the task of a row, where there is one")
    parser.add_argument("--backbone", choices=list(BACKBONES), default="llama", help="see offline_training.py")
    parser.add_argument("--window", type=at_least(2), default=176, help="steps per window, and in the agent's context")
    parser.add_argument("--updates", type=at_least(1), default=1600, help="optimiser steps")
    parser.add_argument("--batch-size", type=at_least(1), default=12, help="windows per update, of all processes")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and batches")
    parser.add_argument("--output", type=Path, default=Path("runs/data_parallel"), help="folder for model and log")
    arguments = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("must be started by torchrun: torchrun --standalone --nproc-per-node 2 examples/data_parallel.py")
    if arguments.batch_size % int(os.environ["WORLD_SIZE"]):
        processes = os.environ["WORLD_SIZE"]
        parser.error(f"--batch-size must be a multiple of the {processes} processes, got {arguments.batch_size}")
    if (arguments.output / "log").exists():
        parser.error(f"{arguments.output} holds a run already, and none is gone on with: give another --output")
    return arguments


def add_up(tensors: list[torch.Tensor]) -> None:
    """Replaces tensors, in place, by their sums over all processes: in one message."""
    message = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(message)
    for tensor, total in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def train(model: MouseModel, store: DatasetStore, arguments: argparse.Namespace) -> None:
    """Trains the Q-value head, as `offline_training.py` does, on the process's share of each batch."""
    loss = MouseDQNLoss(
        model.head("dqn"),
        trunk=model.trunk,
        gamma=GAMMA,
        gamma_terminal=GAMMA_TERMINAL,
        reward_scale=REWARD_SCALE,
        cql_weight=CQL_WEIGHT,
        cql_scale_q=False,
        reduction="sum",
    )
    for value in loss.state_dict().values():
        distributed.broadcast(value, src=0)  # Other machines may draw other weights from the seed.
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    schedule = warmup_cosine(optimizer, arguments.updates, warmup=arguments.updates // 20)
    targets = SoftUpdate(loss, tau=TAU)
    share = arguments.batch_size // distributed.get_world_size()
    buffer = replay_buffer(store.select(loss.in_keys), window=arguments.window, batch_size=share)
    buffer.set_sampler(ShareSampler(arguments.window, start_share=START_SHARE))
    buffer.set_rng(torch.Generator().manual_seed(arguments.seed))
    first = distributed.get_rank() == 0
    logger = CSVLogger("log", log_dir=arguments.output) if first else None
    for update in tqdm(range(1, arguments.updates + 1), unit="update", disable=not first):
        losses = loss(buffer.sample())
        total = (losses["loss_dqn"] + losses["loss_cql"]) / (arguments.batch_size * arguments.window)
        optimizer.zero_grad()
        total.backward()
        total = total.detach()
        add_up([total, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        targets.step()
        if logger is not None:
            logger.log_scalar("loss", total.item(), update)
    model.set_target("dqn", loss.target_head_params)


def main() -> None:
    """Trains, and saves the model."""
    arguments = parse_arguments()
    distributed.init_process_group("gloo")
    try:
        dataset = load(arguments)
        sizes = sizes_of(dataset)
        store = make_store(dataset, sizes, arguments)
        torch.manual_seed(arguments.seed)
        model = build_model(sizes, ["dqn"], arguments.window, arguments.backbone)
        train(model, store, arguments)
        if distributed.get_rank() == 0:
            model.save_pretrained(arguments.output / "model")
            print(f"Written: {arguments.output / 'model'}, log beside it")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
