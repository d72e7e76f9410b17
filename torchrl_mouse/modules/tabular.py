"""A policy that learns a table while it acts: the source of learning histories."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict.nn import TensorDictModuleBase, dispatch

from torchrl_mouse import schema

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from tensordict.utils import NestedKey


class TabularQLearner(TensorDictModuleBase):
    """Acts by tabular Q-learning, one table per environment row, and learns from every step it sees.

    A whole task collected with it is a *learning history* (arXiv 2210.14215, 2502.17666): random at first, near optimal
    at the end. Tables start at zero, ties are broken at random, a step limit is bootstrapped through, and epsilon falls
    linearly from 1 to 0 over the task's episodes. A new task (``is_init``) clears the row's table.

    It reads ``observation_discrete``, the ``("previous", ...)`` entries, ``episode_step`` and ``is_init``, as
    :class:`~torchrl_mouse.envs.TaskEnv` writes them, and draws from torch's global generator.

    Args:
        num_states: number of ids of ``observation_discrete``.
        num_actions: number of actions.
        num_episodes: episodes in a task; the greedy policy is reached after that many.
        rate: learning rate in (0, 1]; the default is that of arXiv 2502.17666.
        gamma: discount in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    .. note:: Rows are told apart by their position: do not share one learner among collectors.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> zero, no = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool)
        >>> previous = {"action": torch.tensor([0]), "reward": zero, "terminated": no, "truncated": no}
        >>> frame = {"observation_discrete": torch.tensor([3]), "previous": previous, "is_init": ~no}
        >>> frame = TensorDict(frame | {"episode_step": torch.tensor([[0]])}, [1])
        >>> learner = TabularQLearner(81, 5, num_episodes=200)
        >>> learner(frame)["action"].shape
        torch.Size([1])
        >>> frame["is_init"], frame["episode_step"] = no, torch.tensor([[1]])
        >>> frame["previous", "action"], frame["previous", "reward"] = torch.tensor([2]), zero + 1
        >>> learner(frame).get("action").shape, round(learner.table[0, 3, 2].item(), 4)
        (torch.Size([1]), 0.9933)
    """

    in_keys = (
        schema.OBSERVATION_DISCRETE,
        schema.PREVIOUS_ACTION,
        schema.PREVIOUS_REWARD,
        schema.PREVIOUS_TERMINATED,
        schema.PREVIOUS_TRUNCATED,
        schema.EPISODE_STEP,
        schema.IS_INIT,
    )
    out_keys = (schema.ACTION,)

    def __init__(
        self, num_states: int, num_actions: int, num_episodes: int, *, rate: float = 0.9933, gamma: float = 0.9
    ) -> None:
        for name, value, valid, rule in (
            ("num_states", num_states, num_states >= 1, "be at least 1"),
            ("num_actions", num_actions, num_actions >= 1, "be at least 1"),
            ("num_episodes", num_episodes, num_episodes >= 1, "be at least 1"),
            ("rate", rate, 0 < rate <= 1, "lie in (0, 1]"),
            ("gamma", gamma, 0 <= gamma <= 1, "lie in [0, 1]"),
        ):
            if not valid:
                raise ValueError(f"TabularQLearner: {name} must {rule}, got {value}. Change it.")
        super().__init__()
        self.num_states, self.num_actions, self.num_episodes = num_states, num_actions, num_episodes
        self.rate, self.gamma = rate, gamma
        self.table = torch.empty(0, num_states, num_actions)
        """Action values ``[rows, num_states, num_actions]``, where rows is the flattened batch."""
        self._state = torch.empty(0, dtype=torch.int64)
        self._episode = torch.empty(0, dtype=torch.int64)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Learns from the transition into this frame and writes ``action``, int64 ids ``[*]``.

        Args:
            tensordict: one frame of each row, ``[*]``.

        Raises:
            RuntimeError: the number of rows changed inside a task.
        """

        def row(key: NestedKey) -> torch.Tensor:
            return schema.require(tensordict, key).reshape(-1)

        def ids(key: NestedKey, num: int) -> torch.Tensor:
            return schema.to_ids(schema.require(tensordict, key), num, tensordict.ndim, key).reshape(-1)

        state, is_init = ids(schema.OBSERVATION_DISCRETE, self.num_states), row(schema.IS_INIT)
        if len(state) != len(self.table):
            self._allocate(is_init)
        self._clear(is_init)
        rows = torch.arange(len(state), device=state.device)

        taken = (rows, self._state, ids(schema.PREVIOUS_ACTION, self.num_actions))
        following = self.table[rows, state].amax(-1) * ~row(schema.PREVIOUS_TERMINATED)
        error = row(schema.PREVIOUS_REWARD) + self.gamma * following - self.table[taken]
        # an episode's first frame has no transition behind it
        self.table[taken] += self.rate * error * (row(schema.EPISODE_STEP) > 0)
        self._state = state
        self._episode = self._episode + (row(schema.PREVIOUS_TERMINATED) | row(schema.PREVIOUS_TRUNCATED))

        value = self.table[rows, state]
        best = value == value.amax(-1, keepdim=True)
        greedy = torch.where(best, torch.rand_like(value), -1).argmax(-1)
        explores = torch.rand_like(value[:, 0]) >= self._episode / self.num_episodes
        action = torch.where(explores, torch.randint_like(greedy, self.num_actions), greedy)
        return tensordict.set(schema.ACTION, action.reshape(tensordict.shape))

    def _allocate(self, is_init: torch.Tensor) -> None:
        if not bool(is_init.all()):
            raise RuntimeError(
                f"TabularQLearner: the number of rows must not change inside a task, got {len(is_init)} after "
                f"{len(self.table)}. Reset the environment first, or use one learner per environment."
            )
        # a table born in inference mode could never be written outside of it
        with torch.inference_mode(False):
            device = is_init.device
            self.table = torch.zeros(len(is_init), self.num_states, self.num_actions, device=device)
            self._state = torch.zeros(len(is_init), dtype=torch.int64, device=device)
            self._episode = torch.zeros_like(self._state)

    def _clear(self, is_init: torch.Tensor) -> None:
        self.table.masked_fill_(is_init[:, None, None], 0)
        self._episode = self._episode.masked_fill(is_init, 0)
