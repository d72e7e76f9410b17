"""In-context IQL: contract, and values by hand."""

import math

import pytest
import test_dqn_loss
import torch
from loss_contract import TRANSITION_ENTRIES, LossContract, attach_targets, make_model, make_steps
from tensordict.nn import TensorDictModule
from test_dqn_loss import ACTION, ONLINE, TARGET, two_tasks
from torch import nn
from torchrl.modules import ValueOperator

from torchrl_mouse.modules import SwiGLUHead
from torchrl_mouse.objectives import MouseIQLLoss


class TestMouseIQLLoss(LossContract):
    loss_class = MouseIQLLoss
    entries = TRANSITION_ENTRIES

    @staticmethod
    def make_loss(seed=0, **options):
        model = make_model(seed)
        value = ValueOperator(SwiGLUHead(16, 1, hidden_dim=8), in_keys=["hidden"])
        return MouseIQLLoss(model.head("dqn"), value, model.head("sp"), trunk=model.trunk, **options)

    @pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
    def test_expectile_out_of_range(self, value):
        with pytest.raises(ValueError, match=rf"MouseIQLLoss: expectile must lie in \(0, 1\), got {value}"):
            self.make_loss(expectile=value)

    @pytest.mark.parametrize("value", [-0.1, float("nan")])
    def test_temperature_out_of_range(self, value):
        with pytest.raises(ValueError, match=f"MouseIQLLoss: temperature must be at least 0, got {value}"):
            self.make_loss(temperature=value)

    def test_several_discounts(self):
        with pytest.raises(ValueError, match=r"MouseIQLLoss: gamma must be one discount, got \[0.5, 0.25\]"):
            self.make_loss(gamma=[0.5, 0.25])

    @pytest.mark.parametrize("head", ["value_head", "policy_head"])
    def test_heads_of_another_size(self, head):
        model = make_model()
        heads = {
            "value_head": ValueOperator(SwiGLUHead(16, 1), in_keys=["hidden"]),
            "policy_head": model.head("sp"),
        }
        heads[head] = TensorDictModule(SwiGLUHead(16, 2), ["hidden"], ["other"])
        loss = attach_targets(MouseIQLLoss(model.head("dqn"), trunk=model.trunk, **heads))
        with pytest.raises(ValueError, match="value_head must write 1 and policy_head as many numbers as head, 3, got"):
            loss(make_steps())


def test_heads_may_write_the_same_entry():
    model, steps = make_model(), make_steps()
    value = TensorDictModule(SwiGLUHead(16, 1, hidden_dim=8), ["hidden"], ["value"])
    outputs = []
    for names in (("one", "two", "three"), ("same", "same", "same")):
        heads = [
            TensorDictModule(head.module, ["hidden"], [name])
            for head, name in zip((model.head("dqn"), value, model.head("sp")), names, strict=True)
        ]
        outputs.append(MouseIQLLoss(*heads, trunk=model.trunk, delay_value=False)(steps.clone()))
    assert (outputs[0] == outputs[1]).all()


VALUES = [2.0, -1.0, 50.0, 5.5, 60.0, 8.0, 3.0, 12.0]
LOGITS = [[0.1 * step, -0.2 * step] for step in range(8)]
DECISIONS = (0, 1, 3, 5, 6)


def linear(weight, out_key):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight
    return TensorDictModule(module, ["hidden"], [out_key])


def controlled_loss(**options):
    """`hidden` holds the online and the target action values, the state value, and the logits."""
    eye = torch.eye(7)
    trunk = TensorDictModule(nn.Identity(), ["observation"], ["hidden"])
    heads = (linear(eye[:2], "q"), linear(eye[4:5], "v"), linear(eye[5:], "pi"))
    loss = attach_targets(MouseIQLLoss(*heads, trunk=trunk, gamma=0.5, **options))
    loss.target_head_params["module", "weight"].copy_(eye[2:4])
    return loss


def trajectory(**changes):
    steps = two_tasks(**changes)
    more = torch.cat([torch.tensor(VALUES).unsqueeze(-1), torch.tensor(LOGITS)], -1)
    steps["observation"] = torch.cat([steps["observation"], more.unsqueeze(0)], -1)
    return steps


# As in the DQN loss: 1 terminates, 3 is cut at frame 4, 5 ends the task, 7 the window.
Y = {0: 0.5 + 0.5 * -1, 1: 1.0, 3: -1 + 0.5 * 60, 5: 2.0, 6: 0.25 + 0.5 * 12}


def advantage(step):
    return TARGET[step][ACTION[step]] - VALUES[step]


def rows(values):
    return pytest.approx([values.get(step, 0.0) for step in range(8)], rel=1e-5)


@pytest.mark.parametrize("expectile", [0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.0, 0.05, 3.0])
def test_by_hand(expectile, temperature):
    steps = trajectory()
    out = controlled_loss(expectile=expectile, temperature=temperature, reduction="none")(steps)
    q = {step: ONLINE[step][ACTION[step]] for step in DECISIONS}
    assert out["loss_qvalue"][0].tolist() == rows({step: (q[step] - y) ** 2 for step, y in Y.items()})
    assert steps["td_error"][0, :, 0].tolist() == rows({step: abs(q[step] - y) for step, y in Y.items()})
    assert {advantage(step) > 0 for step in DECISIONS} == {True, False}
    share = {step: expectile if advantage(step) > 0 else 1 - expectile for step in DECISIONS}
    assert out["loss_value"][0].tolist() == rows({step: share[step] * advantage(step) ** 2 for step in DECISIONS})
    weight = {step: min(math.exp(min(temperature * advantage(step), 10)), 100) for step in DECISIONS}
    log_policy = torch.tensor(LOGITS).log_softmax(-1)
    taken = {step: log_policy[step, ACTION[step]].item() for step in DECISIONS}
    assert out["loss_actor"][0].tolist() == rows({step: -weight[step] * taken[step] for step in DECISIONS})
    assert out["advantage_mean"].item() == pytest.approx(sum(map(advantage, DECISIONS)) / 5)


def test_returns_span_episodes():
    out = controlled_loss(gamma_terminal=0.25, n_steps=2, reduction="none")(trajectory())
    y = {
        0: 0.5 + 0.5 * (1 + 0.25 * 5.5),
        1: 1 + 0.25 * (-1 + 0.5 * 8),
        3: -1 + 0.5 * 2,
        5: 2.0,
        6: 0.25 + 6,
    }
    expected = {step: (ONLINE[step][ACTION[step]] - target) ** 2 for step, target in y.items()}
    assert out["loss_qvalue"][0].tolist() == rows(expected)


def test_each_term_moves_its_own_head():
    heads = {"loss_qvalue": {0, 1}, "loss_value": {4}, "loss_actor": {5, 6}}
    for name, columns in heads.items():
        steps = trajectory()
        steps["observation"].requires_grad_()
        controlled_loss()(steps)[name].backward()
        gradient = steps["observation"].grad[0]
        assert set(gradient.abs().sum(0).nonzero().flatten().tolist()) == columns, name
        assert set(gradient.abs().sum(-1).nonzero().flatten().tolist()) == set(DECISIONS), name


def test_the_policy_is_over_the_actions_that_are_allowed():
    steps = trajectory()
    steps["action_mask"] = nn.functional.one_hot(torch.tensor([ACTION]).clamp(0, 1), 2).bool()
    steps["action_mask"][0, 5] = True
    loss = controlled_loss(temperature=0.0, reduction="none")
    loss.set_keys(action_mask="action_mask")
    expected = {5: -torch.tensor(LOGITS[5]).log_softmax(-1)[ACTION[5]].item()}
    out = loss(steps)
    assert out["loss_actor"][0].tolist() == rows(expected)
    assert (out["loss_qvalue"] == controlled_loss(reduction="none")(steps)["loss_qvalue"]).all()


def test_the_same_steps_count_as_in_the_dqn_loss():
    for changes in ({}, {"padding": [1]}, {"init": [0, 3, 6]}, {"terminal": [2, 7]}):
        dqn = test_dqn_loss.controlled_loss(gamma=0.5, reduction="none")(two_tasks(**changes))["loss_dqn"]
        iql = controlled_loss(reduction="none")(trajectory(**changes))["loss_qvalue"]
        assert ((dqn != 0) == (iql != 0)).all(), changes
