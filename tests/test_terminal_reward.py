"""The agent sees the reward that an episode ends with, and learns to act on it in the next episode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector, RandomPolicy
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.modules import ValueOperator

from torchrl_mouse import schema
from torchrl_mouse.envs import ClearContext, TaskEnv
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.modules import SwiGLUHead
from torchrl_mouse.objectives import MouseDQNLoss, MouseIQLLoss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchrl.objectives import LossModule

DECISIONS, EPISODES = 2, 4
FRAMES = EPISODES * (DECISIONS + 1) - 1  # the task ends with the last terminal frame


class TwoArmedEnv(EnvBase):
    """Pays 1 or -1 at the last step, for the arm that is chosen there; the good arm is not observed.

    All rows are at the same step: their episodes have the same length.
    """

    def __init__(self, rows: int, *, seed: int = 0) -> None:
        super().__init__(batch_size=[rows])
        self.observation_spec = Composite(observation=Unbounded((rows, 1)), shape=[rows])
        self.action_spec = Categorical(2, shape=[rows])
        self.reward_spec = Unbounded((rows, 1))
        self.good = torch.zeros(rows, dtype=torch.int64)
        self.step_index = 0
        self.set_seed(seed)

    def sample_task(self, mask: torch.Tensor) -> None:
        self.good = torch.where(mask, torch.randint(2, mask.shape, generator=self.generator), self.good)

    def _frame(self) -> TensorDict:
        return TensorDict({"observation": torch.full((*self.batch_size, 1), float(self.step_index))}, self.batch_size)

    def _reset(self, _: TensorDictBase | None = None) -> TensorDict:
        self.step_index = 0
        return self._frame()

    def _step(self, steps: TensorDictBase) -> TensorDict:
        self.step_index += 1
        last = torch.full((*self.batch_size, 1), self.step_index == DECISIONS)
        pay = torch.where(steps["action"] == self.good, 1.0, -1.0).unsqueeze(-1)
        return self._frame().update({"reward": torch.where(last, pay, 0.0), "done": last, "terminated": last})

    def _set_seed(self, seed: int | None) -> None:
        self.generator = torch.Generator().manual_seed(seed or 0)


def make_env(rows: int, seed: int) -> TaskEnv:
    return TaskEnv(TwoArmedEnv(rows, seed=seed), episodes_per_task=EPISODES)


def collect(env: EnvBase, policy: Callable[[TensorDictBase], TensorDictBase], tasks: int = 1) -> TensorDict:
    """Collects whole tasks of each row, ``[rows, tasks * FRAMES]``."""
    frames = FRAMES * env.batch_size.numel()
    collector = Collector(env, policy, frames_per_batch=frames, total_frames=tasks * frames)
    try:
        return torch.cat([batch.clone() for batch in collector], -1)
    finally:
        collector.shutdown()


def collect_random(env: EnvBase, tasks: int = 1) -> TensorDict:
    return collect(env, RandomPolicy(env.full_action_spec), tasks)


# What is seen


EMBEDDING = {"max_num_actions": 2, "max_num_obs_continuous": 1}


@pytest.mark.parametrize("how", ["rollout", "collector"])
def test_terminal_reward_alone_changes_what_follows(how, make_model, full_pass):
    trunk = make_model(embedding_kwargs={**EMBEDDING, "std": 1.0}).trunk
    always_first = TensorDictModule(lambda hidden: torch.zeros(len(hidden), dtype=torch.int64), ["hidden"], ["action"])
    policy = TensorDictSequential(trunk, always_first)
    env = make_env(2, seed=0)
    env.base_env.sample_task = lambda mask: setattr(env.base_env, "good", torch.arange(2))  # one row is paid
    steps = env.rollout(FRAMES, policy) if how == "rollout" else collect(env, policy)
    one, other = steps[schema.HIDDEN]
    assert steps[schema.PREVIOUS_REWARD].squeeze(-1)[:, :5].tolist() == [[0, 0, 1, 0, 0], [0, 0, -1, 0, 0]]
    frames = steps.select(*trunk.in_keys).exclude(schema.PREVIOUS_REWARD, schema.STREAM)
    assert (frames[0] == frames[1]).all(), "the terminal reward is the only difference"
    torch.testing.assert_close(one[:DECISIONS], other[:DECISIONS], atol=1e-6, rtol=0)
    assert (one - other).abs().amax(-1)[DECISIONS] > 1e-2  # the terminal frame
    assert (one - other).abs().amax(-1)[DECISIONS + 1] > 1e-2  # the next episode's first frame
    torch.testing.assert_close(steps[schema.HIDDEN], full_pass(trunk, steps), atol=1e-5, rtol=0)


# What is learned


def right_choices(env: EnvBase, model: MouseModel) -> torch.Tensor:
    """Returns how often each episode's paying choice was the good arm, ``[EPISODES]``."""
    steps = collect(env, model.actor(env.action_spec_unbatched))
    ends = steps["next", "previous", "terminated"].squeeze(-1)
    paid = steps["next", "reward"].squeeze(-1)[ends].reshape(-1, EPISODES)
    return (paid > 0).float().mean(0)


def dqn(model: MouseModel) -> LossModule:
    return MouseDQNLoss(model.head("dqn"), trunk=model.trunk, gamma=0.5, delay_value=False)


def several_discounts(model: MouseModel) -> LossModule:
    options = {"gamma": [0.5, 0.9], "n_steps": 2, "double_dqn": True, "delay_value": False}
    return MouseDQNLoss(model.head("dqn"), trunk=model.trunk, **options)


def iql(model: MouseModel) -> LossModule:
    value = ValueOperator(SwiGLUHead(32, 1), in_keys=["hidden"])
    heads = (model.head("dqn"), value, model.head("sp"))
    return MouseIQLLoss(*heads, trunk=model.trunk, gamma=0.5, expectile=0.7, delay_value=False)


LEARNERS = {
    "dqn": (dqn, {"dqn_head_kwargs": {}}),
    "several discounts": (several_discounts, {"dqn_head_kwargs": {"num_discounts": 2}}),
    "iql": (iql, {"dqn_head_kwargs": {}, "sp_head_kwargs": {}, "action_head": "sp"}),
}


@pytest.fixture(scope="module", params=LEARNERS)
def trained(request: pytest.FixtureRequest) -> MouseModel:
    """Learns from the tasks of a random policy, in context."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make_loss, heads = LEARNERS[request.param]
    backbone = {"num_layers": 2, "num_heads": 2}
    model = MouseModel(MouseConfig(32, 16, {**EMBEDDING, "std": 0.2}, backbone_kwargs=backbone, **heads))
    loss = make_loss(model)
    tasks = collect_random(make_env(128, seed=1), tasks=8)
    tasks = torch.cat(tasks.split(FRAMES, -1))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        losses = loss(tasks[torch.randint(len(tasks), (64,))])
        sum(value for name, value in losses.items() if name.startswith("loss")).backward()
        optimizer.step()
    model.trunk.mark_weight_update()
    return model


def test_agent_acts_on_the_terminal_reward(trained):
    right = right_choices(make_env(128, seed=2), trained)
    # a share of 128 has a standard deviation of .044 at chance
    assert 0.3 < right[0] < 0.7, "nothing is known in the first episode"
    assert right[1:].min() > 0.95


def test_agent_with_its_context_cleared_is_at_chance(trained):
    right = right_choices(TransformedEnv(make_env(128, seed=2), ClearContext()), trained)
    assert right.min() > 0.3
    assert right.max() < 0.7


def test_environment_is_what_it_says():
    steps = collect_random(make_env(64, seed=3))
    ends = steps["next", "previous", "terminated"].squeeze(-1)
    assert ends[0].nonzero().squeeze(-1).tolist() == [DECISIONS - 1 + episode * (DECISIONS + 1) for episode in range(4)]
    paid, arm = (steps[key].reshape(64, -1)[ends].reshape(64, EPISODES) for key in (("next", "reward"), "action"))
    good = torch.where(paid > 0, arm, 1 - arm)
    assert (good == good[:, :1]).all(), "the good arm is the task's"
    assert 0.3 < good.float().mean() < 0.7
    assert not steps["next", "reward"].squeeze(-1)[~ends].any()
