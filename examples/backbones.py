"""What the examples compare: a transformer, TorchRL's GRU in its place, and no memory at all.

All of them take the options that are made here, for instance:

    python examples/dark_room.py --backbone gru --output runs/dark_room_gru
    python examples/dark_room.py --backbone none --output runs/dark_room_none
    python examples/dark_room.py --compare runs/dark_room_gru runs/dark_room_none    # all three in one figure
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrl_mouse.evaluation import Run

BACKBONES: dict[str, dict[str, Any] | None] = {
    "llama": {"kind": "llama", "num_layers": 4, "num_heads": 4, "initializer_range": 0.1},
    "gru": {"kind": "gru", "num_layers": 2},
    "none": None,
}


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of the backbone, and of runs to be seen beside this one."""
    parser.add_argument(
        "--backbone",
        choices=list(BACKBONES),
        default="llama",
        help="what remembers a task: a transformer's context (llama), the state of a recurrent network (gru), or none",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="output folders of finished runs with other backbones, whose curves the figure shows as well (dashed)",
    )


def load_runs(directories: Sequence[Path], panel: str) -> list[Run]:
    """Reads the runs to compare with: before the training, so that a wrong folder is not found out after it."""
    try:
        runs = [Run.load(directory) for directory in directories]
    except FileNotFoundError as error:
        raise SystemExit(f"{error} (--compare)") from None
    for directory, run in zip(directories, runs, strict=True):
        if panel not in run.panels:
            raise SystemExit(f"--compare: {directory} must hold returns on {panel}, got {', '.join(run.panels)}.")
    return runs
