"""Vectors as action values: contract, and values by hand on trajectories with every kind of end."""

import pytest
import torch
from loss_contract import TRANSITION_ENTRIES, LossContract, attach_targets, make_model, make_steps
from tensordict.nn import TensorDictModule
from test_dqn_loss import window
from torch import nn

from torchrl_mouse.objectives import VecDQNLoss

NAN = float("nan")


class TestVecDQNLoss(LossContract):
    loss_class = VecDQNLoss
    entries = TRANSITION_ENTRIES

    @staticmethod
    def make_loss(seed=0, **options):
        model = make_model(seed)
        return VecDQNLoss(model.head("vec_dqn"), trunk=model.trunk, **options)

    def test_priority_is_the_cost_and_can_be_renamed(self):
        steps, loss = make_steps(), attach_targets(self.make_loss(reduction="none"))
        cost = loss(steps)["loss_vec_dqn"]
        assert torch.equal(steps["vec_td_error"].squeeze(-1), cost)
        loss.set_keys(priority=("agent", "error"))
        loss(steps)
        assert torch.equal(steps["agent", "error"], steps["vec_td_error"])


class _Angles(nn.Module):
    """Turns the angles of two actions into their vectors: the online copy reads the first pair, the target the second.

    The parameter is what a target can differ in.
    """

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, hidden):
        online, target = hidden.chunk(2, -1)
        angle = torch.where(self.shift == 0, online, target)
        return torch.stack([angle.cos(), angle.sin()], -1)


def controlled_loss(**options):
    head = TensorDictModule(_Angles(), ["observation"], ["vec_dqn"])
    loss = attach_targets(VecDQNLoss(head, reduction="none", **options))
    if "target_head_params" in dict(loss.named_children()):
        loss.target_head_params["module", "shift"].fill_(1.0)
    return loss


ONLINE = [[0.1 * step, 0.1 * step + 0.7] for step in range(8)]
TARGET = [[0.2 * step, 0.2 * step + (0.5 if step % 2 else -0.5)] for step in range(8)]
GREEDY = [0.2 * step + (0.5 if step % 2 else 0.0) for step in range(8)]  # The action that is ahead.
ACTION = [0, 1, -1, 0, 99, 1, 0, 1]
REWARD = [0.5, 1.0, 7.0, -1.0, 7.0, 2.0, 0.25, 7.0]


def trajectory(**changes):
    """Frames 2 and 4 are terminal (a termination, a truncation); the task ends at step 5, and another begins."""
    entries = {"action": ACTION, "reward": REWARD, "terminal": [2], "cut": [4], "init": [0, 6], "ends": [5]}
    return window(ONLINE, TARGET, **{**entries, **changes})


def costs(successors, reward=REWARD, greedy=GREEDY):
    """Returns the costs of the steps whose successors are given, and zero elsewhere."""
    out = [0.0] * 8
    for step, successor in successors.items():
        taken = ONLINE[step][ACTION[step]]
        out[step] = 1 - torch.tensor(taken - greedy[successor] - reward[step]).cos().item()
    return pytest.approx(out, abs=1e-6)


def per_step(steps, **options):
    return controlled_loss(**options)(steps)["loss_vec_dqn"].squeeze(0).tolist()


# Both ends go on at the next episode's first frame; 5 ends the task, 7 the window.
SUCCESSORS = {0: 1, 1: 3, 3: 5, 6: 7}


def test_by_hand():
    assert per_step(trajectory()) == costs(SUCCESSORS)


def test_reward_scale_and_shift():
    theta = [0.3 * reward + 0.1 for reward in REWARD]
    assert per_step(trajectory(), reward_scale=0.3, reward_shift=0.1) == costs(SUCCESSORS, theta)


def test_rewards_are_normalised_over_the_valid_steps_only():
    known = torch.tensor([REWARD[step] for step in SUCCESSORS])
    theta = ((torch.tensor(REWARD) - known.mean()) / known.std() * 0.5).tolist()
    options = {"normalize_reward_mean": True, "normalize_reward_std": True, "normalize_reward_std_target": 0.5}
    assert per_step(trajectory(), **options) == costs(SUCCESSORS, theta)


def test_without_target_head():
    online = [max(row) for row in ONLINE]
    assert per_step(trajectory(), delay_value=False) == costs(SUCCESSORS, greedy=online)


def test_an_end_of_the_task_without_another_task_is_left_out():
    """A padded window: what follows is no successor."""
    padded = trajectory(init=[0], padding=[6, 7])
    assert per_step(padded) == costs({0: 1, 1: 3, 3: 5})


def test_never_across_tasks():
    assert per_step(trajectory(ends=[])) == costs(SUCCESSORS)
    assert per_step(trajectory(init=[0, 3, 6])) == costs({0: 1, 3: 5, 6: 7}), "the next episode is another task's"


def test_padding_is_left_out():
    assert per_step(trajectory(padding=[3, 6, 7])) == costs({0: 1, 1: 3})


def test_successor_outside_the_window():
    assert per_step(trajectory(terminal=[2, 7])) == costs({0: 1, 1: 3, 3: 5})


def test_gradient_reaches_the_taken_actions_only():
    steps = trajectory()
    steps["observation"].requires_grad_()
    controlled_loss()(steps)["loss_vec_dqn"].sum().backward()
    gradient = steps["observation"].grad[0]
    expected = torch.zeros(8, 4)
    for step, successor in SUCCESSORS.items():
        off = ONLINE[step][ACTION[step]] - GREEDY[successor] - REWARD[step]
        expected[step, ACTION[step]] = torch.tensor(off).sin()
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_garbage_where_nothing_is_decided():
    steps = trajectory()
    for step in (2, 4, 5, 7):
        steps["next", "reward"][0, step] = NAN
    steps["observation"].requires_grad_()
    out = controlled_loss()(steps)
    assert out["loss_vec_dqn"].squeeze(0).tolist() == costs(SUCCESSORS)
    out["loss_vec_dqn"].sum().backward()
    assert steps["observation"].grad.isfinite().all()


def test_metrics_are_those_of_each_rows_last_decision():
    rows = torch.cat([trajectory(padding=padding) for padding in ([], [3, 4, 5, 6, 7], list(range(8)))])
    rows["observation"][0, 7, :2] = torch.tensor([0.0, 0.25 * torch.pi])
    rows["observation"][1, 1, :2] = torch.tensor([0.0, -0.75 * torch.pi])  # Frame 2 is terminal.
    out = controlled_loss()(rows)
    metrics = {name: out[f"vec_dqn_score_abs_{name}"].item() for name in ("min", "max", "mean")}
    assert metrics == pytest.approx({"min": 0.25, "max": 0.75, "mean": 0.5}, abs=1e-6)


def test_actions_that_are_not_allowed_are_as_if_they_were_not_there():
    generator = torch.Generator().manual_seed(0)
    steps = trajectory().set("hidden", torch.randn(1, 8, 3, 4, generator=generator))
    taken = steps["action"].clamp(0, 1)

    def loss(part):
        head = TensorDictModule(lambda hidden: hidden[..., part, :], ["hidden"], ["vec_dqn"])
        return VecDQNLoss(head, delay_value=False, reduction="none")

    first_two = loss(slice(2))(steps.set("action", taken))
    shifted = loss(slice(None))
    assert (shifted(steps)["loss_vec_dqn"] != first_two["loss_vec_dqn"]).any()
    shifted.set_keys(action_mask="allowed")
    out = shifted(steps.set("allowed", torch.tensor([True, True, False]).expand(1, 8, 3)))
    for name, value in first_two.items():
        assert torch.allclose(out[name], value, atol=1e-6), name
