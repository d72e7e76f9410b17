"""Fixtures that several test files use: tiny models and streams of random steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import set_exploration_type
from torchrl.modules import set_recurrent_mode

from torchrl_mouse import schema
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.modules import CausalBackbone, StepEmbedder, Trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUM_ACTIONS, NUM_CELLS, NUM_TIMES = 5, 9, 16
EMBEDDING = {
    "max_num_actions": NUM_ACTIONS,
    "max_num_obs_continuous": 2,
    "max_num_obs_discrete": NUM_CELLS,
    "max_num_time_steps": NUM_TIMES,
}


@pytest.fixture(autouse=True)
def _begin_alike() -> Iterator[None]:
    torch.set_num_threads(1)  # tiny networks are several times slower on more
    torch.manual_seed(0)
    # The type is the whole process's: two threads that set it, an Evaluator's beside a collector's, may leave another.
    with set_exploration_type(None):
        yield


def _strengthen(backbone: torch.nn.Module | None) -> None:
    """Scales the decoder's initial weights up: with its own, a context moves a hidden state by 1e-3 only."""
    for parameter in backbone.parameters() if backbone is not None else ():
        if parameter.ndim == 2:
            parameter.data.mul_(6)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MouseModel]:
    """Builds a tiny model for a 3 x 3 Dark Room whose hidden states depend visibly on the whole context."""

    def make(**config: Any) -> MouseModel:
        options: dict[str, Any] = {
            "hidden_dim": 16,
            "window": 64,
            "embedding_kwargs": {**EMBEDDING, "std": 1.0},
            "backbone_kwargs": {"num_layers": 2, "num_heads": 2},
            "dqn_head_kwargs": {"hidden_dim": 8},
        }
        model = MouseModel(MouseConfig(**{**options, **config}))
        _strengthen(model.trunk.backbone)
        return model

    return make


@pytest.fixture(scope="session")
def make_trunk() -> Callable[..., Trunk]:
    """Builds a tiny trunk; ``embedding`` and ``backbone`` override options, the rest goes to the trunk."""

    def make(embedding: dict[str, Any] | None = None, backbone: dict[str, Any] | None = None, **options: Any) -> Trunk:
        embedder = StepEmbedder(16, **{**EMBEDDING, "std": 1.0, **(embedding or {})})
        layers = CausalBackbone(16, **{"num_layers": 2, "num_heads": 2, **(backbone or {})})
        _strengthen(layers)
        return Trunk(embedder, layers, **{"window": 64, **options})

    return make


@pytest.fixture(scope="session")
def random_steps() -> Callable[..., TensorDict]:
    """Draws steps ``[rows, num]`` with random frames; ``starts`` holds each row's first steps of a task."""

    def draw(rows: int, num: int, starts: list[list[int]] | None = None, *, seed: int = 0) -> TensorDict:
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, num, 1)

        def ids(high: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator)

        is_init = torch.zeros(shape, dtype=torch.bool)
        is_init[:, 0] = True
        for row, firsts in enumerate(starts or []):
            is_init[row, firsts] = True
        return TensorDict(
            {
                schema.OBSERVATION: torch.randn(rows, num, 2, generator=generator),
                schema.OBSERVATION_DISCRETE: ids(NUM_CELLS).squeeze(-1),
                schema.PREVIOUS_ACTION: ids(NUM_ACTIONS).squeeze(-1),
                schema.PREVIOUS_REWARD: torch.randn(shape, generator=generator),
                schema.PREVIOUS_TERMINATED: ids(2).bool(),
                schema.PREVIOUS_TRUNCATED: ids(2).bool(),
                schema.EPISODE_STEP: ids(NUM_TIMES),
                schema.IS_INIT: is_init,
                schema.STREAM: torch.arange(1000, 1000 + rows).view(rows, 1, 1).repeat(1, num, 1),
            },
            [rows, num],
        )

    return draw


@pytest.fixture(scope="session")
def full_pass() -> Callable[[Trunk, TensorDict], torch.Tensor]:
    """Computes hidden states ``[rows, T, D]``: one pass per row and task, with nothing else in the window."""

    def run(trunk: Trunk, steps: TensorDict) -> torch.Tensor:
        rows = []
        for row in steps.select(*trunk.in_keys).unbind(0):
            firsts = row[schema.IS_INIT].reshape(-1).nonzero().reshape(-1).tolist()
            assert firsts[0] == 0, "the steps must begin with a task"
            with set_recurrent_mode(True), torch.no_grad():
                tasks = [
                    trunk(row[first:last].unsqueeze(0).clone())[schema.HIDDEN].squeeze(0)
                    for first, last in zip(firsts, [*firsts[1:], len(row)], strict=True)
                ]
            rows.append(torch.cat(tasks))
        return torch.stack(rows)

    return run


@pytest.fixture(scope="session")
def step_by_step() -> Callable[[Trunk, TensorDict], torch.Tensor]:
    """Computes hidden states ``[rows, T, D]`` in sequential mode, all rows at once."""

    def run(trunk: Trunk, steps: TensorDict) -> torch.Tensor:
        return torch.stack([trunk(steps[:, t].clone())[schema.HIDDEN] for t in range(steps.shape[1])], 1)

    return run
