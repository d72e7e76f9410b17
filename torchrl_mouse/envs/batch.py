"""What environments of many rows, each with its own task, have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchrl.data import Categorical, Composite

if TYPE_CHECKING:
    from collections.abc import Sequence


def task_rows(where: str, batch_size: int | Sequence[int] | None, num_tasks: int) -> torch.Size:
    """The batch size of an environment that has ``batch_size`` rows, or, with None, one for each of its tasks.

    Args:
        where: who asks, for the error.
        batch_size: number of rows, or their shape.
        num_tasks: number of tasks.

    Raises:
        ValueError: there would be no row.

    Examples:
        >>> task_rows("Env", 3, num_tasks=5), task_rows("Env", None, num_tasks=5)
        (torch.Size([3]), torch.Size([5]))
    """
    size = num_tasks if batch_size is None else batch_size
    rows = torch.Size([size] if isinstance(size, int) else size)
    if min(rows, default=1) < 1:
        raise ValueError(f"{where}: batch_size must be at least 1, got {batch_size}. Change it.")
    return rows


def done_spec(rows: torch.Size, device: torch.device | None) -> Composite:
    """Makes the spec of ``done``, ``terminated`` and ``truncated``, each bool ``[*, 1]``.

    Examples:
        >>> sorted(done_spec(torch.Size([3]), None).zero().keys())
        ['done', 'terminated', 'truncated']
    """
    flag = Categorical(2, shape=(*rows, 1), dtype=torch.bool, device=device)
    return Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=rows, device=device)
