"""In-context DQN and CQL: contract, and values by hand on trajectories with every kind of end."""

import copy
import pickle
import statistics

import pytest
import torch
from loss_contract import NAN, TRANSITION_ENTRIES, LossContract, attach_targets, make_model, make_steps, total
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Categorical, OneHot
from torchrl.modules import QValueActor

from torchrl_mouse import schema
from torchrl_mouse.modules import DQNHead
from torchrl_mouse.objectives import MouseDQNLoss


class TestMouseDQNLoss(LossContract):
    loss_class = MouseDQNLoss
    entries = TRANSITION_ENTRIES

    @staticmethod
    def make_loss(seed=0, **options):
        model = make_model(seed)
        return MouseDQNLoss(model.head("dqn"), trunk=model.trunk, cql_weight=0.5, **options)

    @pytest.mark.parametrize("name", ["gamma", "gamma_terminal", "gamma_truncated"])
    @pytest.mark.parametrize("value", [-0.1, 1.1])
    def test_discount_out_of_range(self, name, value):
        with pytest.raises(ValueError, match=rf"MouseDQNLoss: {name} must lie in \[0, 1\], .*got {value}"):
            self.make_loss(**{name: value})

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
    def test_n_steps_out_of_range(self, value):
        with pytest.raises(ValueError, match=f"MouseDQNLoss: n_steps must be an integer of at least 1, got {value}"):
            self.make_loss(n_steps=value)

    @pytest.mark.parametrize("value", [1.1, [0.5, -0.1], [0.5, float("nan")]])
    def test_one_of_the_discounts_out_of_range(self, value):
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], one number or a list of some, got "):
            self.make_loss(gamma=value)

    @pytest.mark.parametrize("value", [None, "high", [[0.9], 0.5]])
    def test_gamma_of_wrong_type(self, value):
        with pytest.raises(TypeError, match="gamma must be a number or a list of numbers, got"):
            self.make_loss(gamma=value)

    @pytest.mark.parametrize("name", ["cql_weight", "cql_scale_q_eps"])
    @pytest.mark.parametrize("value", [-1.0, NAN])
    def test_cql_options_out_of_range(self, name, value):
        model = make_model()
        with pytest.raises(ValueError, match=f"MouseDQNLoss: {name} must be at least 0, got {value}"):
            MouseDQNLoss(model.head("dqn"), trunk=model.trunk, **{name: value})

    @pytest.mark.parametrize("name", ["reward_scale", "reward_shift"])
    def test_reward_options_must_be_finite(self, name):
        with pytest.raises(ValueError, match=f"MouseDQNLoss: {name} must be finite, got nan"):
            self.make_loss(**{name: NAN})

    def test_discount_stays_exact_in_a_narrow_type(self):
        loss = self.make_loss(gamma=0.999).to(torch.bfloat16)
        assert loss.gamma.item() == pytest.approx(0.999)
        assert next(loss.parameters()).dtype == torch.bfloat16
        assert loss.double().gamma.dtype == torch.float64

    def test_head_that_writes_several_entries(self):
        actor = QValueActor(nn.Linear(16, 3), in_keys=["hidden"], spec=OneHot(3))
        with pytest.raises(ValueError, match=r"MouseDQNLoss: head must write one entry, got \['action',"):
            MouseDQNLoss(actor)

    def test_a_copy_takes_its_actor_along(self):
        model = make_model()
        actor = model.actor(Categorical(3), head="dqn")
        loss = attach_targets(MouseDQNLoss(model.head("dqn"), trunk=model.trunk, actor=actor))
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            own = {id(weight) for weight in other.parameters()}
            assert own == {id(weight) for weight in other.value_network.parameters()}
            assert not own & {id(weight) for weight in loss.parameters()}
        assert {id(weight) for weight in loss.parameters()} == {id(weight) for weight in actor.parameters()}

    def test_no_discount(self):
        with pytest.raises(ValueError, match=r"gamma must lie in .* got \[\]"):
            self.make_loss(gamma=[])

    def test_negative_cql_weight(self):
        model = make_model()
        with pytest.raises(ValueError, match="cql_weight must be at least 0, got -1"):
            MouseDQNLoss(model.head("dqn"), trunk=model.trunk, cql_weight=-1)

    def test_gamma_can_be_scheduled(self, loss):
        steps = make_steps()
        loss.gamma = 0.0
        assert loss.gamma.dtype == torch.float32
        assert (loss(steps.clone()) == attach_targets(self.make_loss(gamma=0.0))(steps)).all()

    def test_nested_priority_is_written(self, loss):
        steps = make_steps()
        expected = loss(steps.clone())
        loss.set_keys(priority=("agent", "error"))
        assert (loss(steps) == expected).all()
        assert steps["agent", "error"].shape == (*steps.shape, 1)
        assert "td_error" not in steps


class TestSeveralDiscounts(LossContract):
    loss_class = MouseDQNLoss
    entries = TRANSITION_ENTRIES

    @staticmethod
    def make_loss(seed=0, gamma=(0.9, 0.5), **options):
        model = make_model(seed)
        torch.manual_seed(seed)
        head = DQNHead(16, 3, num_discounts=2, hidden_dim=8).online
        head = TensorDictModule(head, ["hidden"], ["dqn"])
        return MouseDQNLoss(head, trunk=model.trunk, gamma=gamma, cql_weight=0.5, n_steps=2, **options)

    @pytest.mark.parametrize("gamma", [[0.9], [0.9, 0.5, 0.1]])
    def test_head_with_another_number_of_discounts(self, gamma):
        loss = attach_targets(self.make_loss(gamma=gamma))
        match = f"action values for each of gamma's {len(gamma)} discounts, got 2. Build it with num_discounts"
        with pytest.raises(ValueError, match=match):
            loss(make_steps())

    def test_discounts_can_be_scheduled(self):
        loss, steps = attach_targets(self.make_loss()), make_steps()
        loss.gamma = torch.tensor([0.3, 0.1])
        assert (loss(steps.clone()) == attach_targets(self.make_loss(gamma=(0.3, 0.1)))(steps.clone())).all()
        loss.gamma = 0.3
        assert (loss(steps.clone()) == attach_targets(self.make_loss(gamma=(0.3, 0.3)))(steps)).all()

    def test_last_step_counts_only_if_its_target_is_known_for_every_discount(self):
        steps = make_steps()
        steps[schema.MASK][:] = True
        last = attach_targets(self.make_loss(gamma=(0.0, 0.9), reduction="none"))(steps.clone())["loss_dqn"][:, -1]
        assert (last == 0).all()
        last = attach_targets(self.make_loss(gamma=(0.0, 0.0), reduction="none"))(steps)["loss_dqn"][:, -1]
        assert (last > 0).all()

    def test_head_of_one_discount(self):
        model = make_model()
        loss = attach_targets(MouseDQNLoss(model.head("dqn"), trunk=model.trunk, gamma=[0.9, 0.5]))
        with pytest.raises(ValueError, match=r"the head must write \[\*, T, D, A\], got \(3, 8, 3\)"):
            loss(make_steps())

    def test_equals_a_loss_for_each(self):
        several = attach_targets(self.make_loss())
        steps = make_steps()
        out = several(steps)
        apart = []
        for index, gamma in enumerate((0.9, 0.5)):
            model = make_model()
            torch.manual_seed(0)
            whole = DQNHead(16, 3, num_discounts=2, hidden_dim=8).online
            part = TensorDictSequential(
                TensorDictModule(whole, ["hidden"], ["all"]),
                TensorDictModule(lambda out, index=index: out[..., index, :], ["all"], ["dqn"]),
            ).select_out_keys("dqn")
            options = {"gamma": gamma, "cql_weight": 0.5, "n_steps": 2, "delay_value": False}
            apart.append(MouseDQNLoss(part, trunk=model.trunk, **options)(one := make_steps()))
            if index == 0:
                assert torch.allclose(one["td_error"], steps["td_error"], atol=1e-6)
        for name in ("loss_dqn", "loss_cql"):
            assert torch.allclose(out[name], (apart[0][name] + apart[1][name]) / 2, atol=1e-6), name
        for name in set(out.keys()) - {"loss_dqn", "loss_cql"}:
            assert torch.allclose(out[name], apart[0][name], atol=1e-6), name


# Hand-computed values: `hidden` is the observation, whose halves are the online and the target action values.


def controlled_loss(num_actions=2, trunk=True, **options):
    head = nn.Linear(2 * num_actions, num_actions, bias=False)
    identity, nothing = torch.eye(num_actions), torch.zeros(num_actions, num_actions)
    head.weight.data = torch.cat([identity, nothing], 1)
    stub = TensorDictModule(nn.Identity(), ["observation"], ["hidden"]) if trunk else None
    loss = MouseDQNLoss(TensorDictModule(head, ["hidden"], ["dqn"]), trunk=stub, **options)
    attach_targets(loss)  # Copies the head to its target.
    if "target_head_params" in dict(loss.named_children()):
        loss.target_head_params["module", "weight"].copy_(torch.cat([nothing, identity], 1))
    return loss


def window(online, target, action, reward, *, terminal=(), cut=(), init=(), ends=(), padding=()):
    """Returns a window ``[1, T]`` with the given action values ``[T, A]``.

    Terminal frames (``cut``: of a truncation) may name index ``T``, the frame after the window.
    """
    num = len(online)

    def flags(where, length=num):
        out = torch.zeros(1, length, 1, dtype=torch.bool)
        out[:, list(where)] = True
        return out

    terminal, cut = flags(terminal, num + 1), flags(cut, num + 1)
    return TensorDict(
        {
            "observation": torch.cat([torch.tensor(online), torch.tensor(target)], -1).unsqueeze(0),
            "is_init": flags(init),
            "action": torch.tensor([action]),
            "previous": {"terminated": terminal[:, :-1], "truncated": cut[:, :-1]},
            "collector": {"mask": ~flags(padding).squeeze(-1)},
            "next": {
                "reward": torch.tensor([reward]).unsqueeze(-1),
                "done": flags(ends),
                "previous": {"terminated": terminal[:, 1:], "truncated": cut[:, 1:]},
            },
        },
        [1, num],
    )


ONLINE = [[1.0, 2.0], [3.0, 4.0], [90.0, 91.0], [5.0, 6.0], [92.0, 93.0], [7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]
TARGET = [[-9.0, 10.0], [20.0, 0.0], [30.0, 31.0], [0.0, 40.0], [50.0, 5.0], [60.0, 6.0], [7.0, 70.0], [80.0, 8.0]]
ACTION = [0, 1, -1, 0, 99, 1, 0, 1]
REWARD = [0.5, 1.0, 7.0, -1.0, 7.0, 2.0, 0.25, 7.0]


def two_tasks(**changes):
    """Three episodes of one task, then a second task.

    ====  =====================================================  =================
    step  what happens                                           next value
    ====  =====================================================  =================
    0     goes on                                                max target[1]: 20
    1     terminates: frame 2 is terminal, 3 the next episode's  none, or max target[3]: 40
    2     terminal frame                                         none
    3     truncated: frame 4 is terminal, 5 the next episode's   max target[4]: 50, or max target[5]: 60
    4     terminal frame                                         none
    5     ends the task                                          0
    6     the second task's first step, goes on                  max target[7]: 80
    7     the window ends                                        unknown
    ====  =====================================================  =================
    """
    entries = {"action": ACTION, "reward": REWARD, "terminal": [2], "cut": [4], "init": [0, 6], "ends": [5]}
    return window(ONLINE, TARGET, **{**entries, **changes})


CHOSEN = [1.0, 4.0, None, 5.0, None, 8.0, 9.0, None]


def per_step(steps, **options):
    """Returns the squared errors by step, ``None`` where zero."""
    out = controlled_loss(reduction="none", **options)(steps)["loss_dqn"].squeeze(0).tolist()
    return [value or None for value in out]


def errors(targets, chosen=CHOSEN):
    pairs = zip(chosen, targets, strict=True)
    return [None if y is None else pytest.approx((q - y) ** 2, rel=1e-6) for q, y in pairs]


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        # gamma 0.5; a termination counts for nothing, a truncation like any step, up to the terminal frame.
        ({}, [0.5 + 10, 1.0, None, -1 + 25, None, 2.0, 0.25 + 40, None]),
        ({"gamma_truncated": 0.1}, [0.5 + 10, 1.0, None, -1 + 5, None, 2.0, 0.25 + 40, None]),
        ({"gamma_truncated": 0.0}, [0.5 + 10, 1.0, None, -1.0, None, 2.0, 0.25 + 40, None]),
        # The online head likes action 1 best everywhere.
        ({"double_dqn": True}, [0.5 + 0, 1.0, None, -1 + 2.5, None, 2.0, 0.25 + 4, None]),
        # Returns span episodes: both ends go on at the next episode's first frame.
        ({"gamma_terminal": 0.25}, [0.5 + 10, 1 + 10, None, -1 + 30, None, 2.0, 0.25 + 40, None]),
        (
            {"gamma_terminal": 0.25, "gamma_truncated": 0.2},
            [0.5 + 10, 1 + 10, None, -1 + 12, None, 2.0, 0.25 + 40, None],
        ),
        ({"reward_scale": 2.0, "reward_shift": 3.0}, [4 + 10, 5.0, None, 1 + 25, None, 7.0, 3.5 + 40, None]),
    ],
)
def test_dqn_by_hand(options, targets):
    assert per_step(two_tasks(), gamma=0.5, **options) == errors(targets)


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        # Step 0 goes on over the termination at step 1; 3 is cut at frame 4; 5 ends the task, 7 the window.
        ({"reward_shift": 0.25}, [0.75 + 0.5 * 1.25, 1.25, None, -0.75 + 25, None, 2.25, 0.5 + 40, None]),
        (
            {"reward_shift": 0.25, "gamma_truncated": 0.1},
            [0.75 + 0.5 * 1.25, 1.25, None, -0.75 + 5, None, 2.25, 0.5 + 40, None],
        ),
        # Returns span episodes: frame 0, 1, 3, 5, end.
        (
            {"gamma_terminal": 0.25},
            [0.5 + 0.5 * (1 + 10), 1 + 0.25 * (-1 + 30), None, -1 + 0.5 * 2, None, 2.0, 0.25 + 40, None],
        ),
        (
            {"n_steps": 3, "gamma_terminal": 0.25},
            [0.5 + 0.5 * (1 + 0.25 * (-1 + 30)), 1 + 0.25 * (-1 + 0.5 * 2), None, 0.0, None, 2.0, 0.25 + 40, None],
        ),
        (
            {"n_steps": 99, "gamma_terminal": 0.25, "reward_scale": 2.0, "reward_shift": 1.0},
            [2 + 0.5 * (3 + 0.25 * (-1 + 0.5 * 5)), 3 + 0.25 * (-1 + 0.5 * 5), None, 1.5, None, 5.0, 1.5 + 40, None],
        ),
        (
            {"reward_shift": 0.25, "double_dqn": True},
            [0.75 + 0.5 * 1.25, 1.25, None, -0.75 + 2.5, None, 2.25, 0.5 + 4, None],
        ),
    ],
)
def test_dqn_n_steps_by_hand(options, targets):
    assert per_step(two_tasks(), gamma=0.5, **{"n_steps": 2, **options}) == errors(targets)


def test_dqn_n_steps_stop_at_the_window_at_other_tasks_and_at_steps_left_out():
    steps = window(ONLINE[:4], TARGET[:4], [0, 1, 0, 0], [1.0, 2.0, 3.0, 4.0])
    chosen = [1.0, 4.0, 90.0, None]
    targets = [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 40)), 2 + 0.5 * (3 + 0.5 * 40), 3 + 20, None]
    assert per_step(steps, gamma=0.5, n_steps=9) == errors(targets, chosen)
    other = window(ONLINE[:4], TARGET[:4], [0, 1, 0, 0], [1.0, 2.0, 3.0, 4.0], init=[0, 2])
    assert per_step(other, gamma=0.5, n_steps=9) == errors([1 + 10, None, 3 + 20, None], chosen)
    left_out = window(ONLINE[:4], TARGET[:4], [0, 1, 0, 0], [1.0, 2.0, 3.0, 4.0], padding=[1])
    assert per_step(left_out, gamma=0.5, n_steps=9) == errors([1 + 10, None, 3 + 20, None], chosen)


def test_dqn_action_masks_by_hand():
    online = [[1.0, 2.0, 3.0], [4.0, 9.0, 5.0], [6.0, 7.0, 8.0]]
    target = [[0.0, 0.0, 0.0], [10.0, 30.0, 20.0], [7.0, 8.0, 9.0]]
    steps = window(online, target, [0, 2, 0], [1.0, 2.0, 3.0])
    steps["action_mask"] = torch.tensor([[[1, 1, 0], [1, 0, 1], [0, 0, 0]]], dtype=torch.bool)
    for double, values in ((False, (20.0, 9.0)), (True, (20.0, 9.0))):
        options = {"num_actions": 3, "gamma": 0.5, "cql_weight": 1.0, "cql_scale_q": False, "reduction": "none"}
        loss = controlled_loss(double_dqn=double, **options)
        loss.set_keys(action_mask="action_mask")
        out = loss(steps)
        # Frame 2 allows nothing, as ends of episodes do: all of its actions count.
        expected = [(1 - (1 + 0.5 * values[0])) ** 2, (5 - (2 + 0.5 * values[1])) ** 2, 0.0]
        assert out["loss_dqn"][0].tolist() == pytest.approx(expected)
        pushed = [torch.tensor(q).logsumexp(-1).item() - q[at] for q, at in (([1.0, 2.0], 0), ([4.0, 5.0], 1))]
        assert out["loss_cql"][0].tolist() == pytest.approx([*pushed, 0.0], abs=1e-6)
    # Without the mask the online head would choose action 1 at frame 1.
    plain = controlled_loss(double_dqn=True, **options)(steps)
    assert plain["loss_dqn"][0, 0].item() == pytest.approx((1 - (1 + 15)) ** 2)


def test_dqn_action_in_the_data_that_is_not_allowed():
    steps = two_tasks()
    steps["action_mask"] = torch.ones(1, 8, 2, dtype=torch.bool)
    steps["action_mask"][:, :, 1] = False  # at frame 2, which is terminal, it does not matter
    loss = controlled_loss()
    loss.set_keys(action_mask="action_mask")
    with pytest.raises(ValueError, match=r"entry 'action' must hold actions that 'action_mask' allows, got 1 at \(0,"):
        loss(steps)
    steps["action_mask"][0, [1, 5], 1] = True
    assert loss(steps)["loss_dqn"] > 0


def test_dqn_with_a_truncation_by_default_like_any_step():
    assert per_step(two_tasks(), gamma=0.9) == per_step(two_tasks(), gamma=0.9, gamma_truncated=0.9)


def test_dqn_scheduled_gamma_moves_truncations_too():
    loss = controlled_loss(gamma=0.9, reduction="none")
    loss.gamma = 0.5
    assert loss(two_tasks())["loss_dqn"].squeeze(0).tolist() == [
        value or 0.0 for value in per_step(two_tasks(), gamma=0.5)
    ]


def test_dqn_metrics_and_means_by_hand():
    targets = [0.5 + 10, 1.0, None, -1 + 25, None, 2.0, 0.25 + 40, None]
    steps = two_tasks()
    out = controlled_loss(gamma=0.5)(steps)
    known = [(q, y) for q, y in zip(CHOSEN, targets, strict=True) if y is not None]
    assert out["loss_dqn"].item() == pytest.approx(sum((q - y) ** 2 for q, y in known) / 5)
    assert out["loss_cql"].item() == 0
    assert out["q_values_mean"].item() == pytest.approx(sum(q for q, _ in known) / 5)
    assert out["q_values_std"].item() == pytest.approx(statistics.stdev(q for q, _ in known))
    assert (out["q_values_min"], out["q_values_max"]) == (1.0, 9.0)
    penalties = [cql(ONLINE[step], ACTION[step], 0.0) for step in (0, 1, 3, 5, 6)]
    assert out["cql_penalty"].item() == pytest.approx(sum(penalties) / 5), "without weight and factor"
    assert out["q_values_target"].item() == pytest.approx(sum(y for _, y in known) / 5)
    expected = [0.0 if y is None else abs(q - y) for q, y in zip(CHOSEN, targets, strict=True)]
    assert steps["td_error"].shape == (1, 8, 1)
    assert steps["td_error"].flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("std", [False, True])
def test_dqn_normalises_the_rewards_of_valid_steps(mean, std):
    known = [reward for reward, q in zip(REWARD, CHOSEN, strict=True) if q is not None]
    center = statistics.mean(known) if mean else 0.0
    factor = 3.0 / (statistics.stdev(known) + 0.5) if std else 1.0
    expected = [2.0 * (reward - center) * factor + 0.25 for reward in REWARD]
    options = {"normalize_reward_mean": mean, "normalize_reward_std": std, "normalize_reward_std_target": 3.0}
    options |= {"normalize_reward_eps": 0.5, "reward_scale": 2.0, "reward_shift": 0.25}
    targets = [expected[step] + value for step, value in {0: 10, 1: 0, 3: 25, 5: 0, 6: 40}.items()]
    known_targets = iter(targets)
    assert per_step(two_tasks(), gamma=0.5, **options) == [
        None if q is None else pytest.approx((q - next(known_targets)) ** 2, rel=1e-5) for q in CHOSEN
    ]


@pytest.mark.parametrize("name", ["normalize_reward_eps", "normalize_reward_std_target"])
def test_dqn_normalisation_out_of_range(name):
    with pytest.raises(ValueError, match=f"MouseDQNLoss: {name} must be positive, got 0"):
        controlled_loss(**{name: 0.0})


def test_dqn_metrics_of_negative_values():
    steps = window([[-3.0, -4.0], [-5.0, -1.0], [6.0, 7.0]], TARGET[:3], [0, 0, 0], [1.0, 2.0, 3.0])
    out = controlled_loss()(steps)  # The last step, whose successor is unknown, counts for none of them.
    assert (out["q_values_min"], out["q_values_max"], out["q_values_mean"]) == (-5.0, -3.0, -4.0)


def test_dqn_gradient_by_hand():
    steps = two_tasks()
    steps["observation"].requires_grad_()
    controlled_loss(gamma=0.5, reduction="sum")(steps)["loss_dqn"].backward()
    expected = torch.zeros(8, 4)
    for step, (action, chosen, y) in {
        0: (0, 1, 10.5),
        1: (1, 4, 1.0),
        3: (0, 5, 24.0),
        5: (1, 8, 2.0),
        6: (0, 9, 40.25),
    }.items():
        expected[step, action] = 2 * (chosen - y)
    assert torch.allclose(steps["observation"].grad[0], expected)


def test_dqn_window_that_starts_and_ends_mid_episode():
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [1.0, 2.0, 3.0])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, 2 + 15.5, None], [1.0, 4.0, None])


def test_dqn_last_step_is_known_where_its_next_value_counts_for_nothing():
    steps = window(ONLINE[:2], TARGET[:2], [0, 1], [1.0, 2.0], terminal=[2])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, 2.0], [1.0, 4.0])
    assert per_step(steps, gamma=0.5, gamma_terminal=0.1) == errors([1 + 10, None], [1.0, None])
    steps = window(ONLINE[:2], TARGET[:2], [0, 1], [1.0, 2.0], ends=[1])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, 2.0], [1.0, 4.0])
    steps = window(ONLINE[:2], TARGET[:2], [0, 1], [1.0, 2.0], cut=[2])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, None], [1.0, None])


def test_dqn_episode_whose_successor_lies_outside():
    # Frame 2 is the window's last, and terminal: the next episode's first frame is not here.
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [1.0, 2.0, 3.0], terminal=[2])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, 2.0, None], [1.0, 4.0, None])
    assert per_step(steps, gamma=0.5, gamma_terminal=0.1) == errors([1 + 10, None, None], [1.0, None, None])
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [1.0, 2.0, 3.0], cut=[2])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, 2 + 15.5, None], [1.0, 4.0, None])
    assert per_step(steps, gamma=0.5, gamma_terminal=0.1) == errors([1 + 10, None, None], [1.0, None, None])
    # Frame 3 belongs to another task.
    steps = window(ONLINE[:4], TARGET[:4], [0, 1, 0, 0], [1.0, 2.0, 3.0, 4.0], terminal=[2], init=[3])
    assert per_step(steps, gamma=0.5, gamma_terminal=0.1) == errors([1 + 10, None, None, None], [1.0, None, None, None])


def test_dqn_never_bootstraps_from_another_task():
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [1.0, 2.0, 3.0], init=[2])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, None, None], [1.0, None, None])


def test_dqn_end_of_the_task_wins_over_the_end_of_the_episode():
    for kind in ("terminal", "cut"):
        steps = window(ONLINE[:4], TARGET[:4], [0, 1, 0, 0], [1.0, 2.0, 3.0, 4.0], ends=[1], **{kind: [2]})
        out = per_step(steps, gamma=0.5, gamma_terminal=0.5, gamma_truncated=0.5)
        assert out[:3] == errors([1 + 10, 2.0, None], [1.0, 4.0, None])


def test_dqn_termination_wins_over_a_truncation_at_the_same_step():
    steps = window(ONLINE[:4], TARGET[:4], [0, 1, 0, 0], [1.0, 2.0, 3.0, 4.0], terminal=[2], cut=[2])
    for options in ({}, {"gamma_truncated": 0.9}):
        assert per_step(steps, gamma=0.5, **options)[1] == pytest.approx((4.0 - 2.0) ** 2)


def test_dqn_a_task_may_end_in_a_frame_without_decision():
    # As stores give it: the last frame is padding for learning, yet the step before bootstraps from it.
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [1.0, 2.0, 3.0], padding=[2])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, 2 + 15.5, None], [1.0, 4.0, None])


def cql(q, action, y, eps=1.0, scale=True):
    penalty = torch.tensor(q).logsumexp(-1).item() - q[action]
    return penalty * (abs(y) + eps) if scale else penalty


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("eps", [1.0, 0.1])
def test_cql_by_hand(scale, eps):
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [-30.0, 2.0, 3.0])
    steps["observation"].requires_grad_()
    loss = controlled_loss(gamma=0.5, cql_weight=0.3, cql_scale_q=scale, cql_scale_q_eps=eps, reduction="none")
    out = loss(steps)
    expected = [cql(ONLINE[0], 0, -30 + 10, eps, scale), cql(ONLINE[1], 1, 2 + 15.5, eps, scale), 0.0]
    assert out["loss_cql"].squeeze(0).tolist() == pytest.approx([0.3 * value for value in expected], abs=1e-5)
    assert out["loss_dqn"].squeeze(0).tolist() == pytest.approx([(1 + 20) ** 2, (4 - 17.5) ** 2, 0.0])
    out["loss_cql"].sum().backward()
    factor = torch.tensor([20 + eps, 17.5 + eps]) if scale else torch.ones(2)
    gradient = torch.tensor(ONLINE[:2]).softmax(-1) - torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(steps["observation"].grad[0, :2, :2], 0.3 * factor.unsqueeze(-1) * gradient, atol=1e-5)
    assert (steps["observation"].grad[0, :, 2:] == 0).all(), "the factor is detached"


def test_dqn_reward_from_another_entry():
    steps, loss = two_tasks(), controlled_loss(gamma=0.5)
    expected = loss(steps.clone())
    loss.set_keys(reward="xformed_reward")
    steps["next", "xformed_reward"] = steps["next", "reward"]
    steps["next", "reward"] = torch.full_like(steps["next", "reward"], NAN)
    assert (loss(steps) == expected).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_dqn_one_hot_actions(dtype):
    steps = two_tasks()
    expected = per_step(steps.clone(), gamma=0.5)
    steps["action"] = nn.functional.one_hot(steps["action"].clamp(0, 1), 2).to(dtype)
    assert per_step(steps, gamma=0.5) == expected


def test_dqn_actions_with_a_trailing_dimension():
    steps = two_tasks()
    expected = per_step(steps.clone(), gamma=0.5)
    steps["action"] = steps["action"].unsqueeze(-1)
    assert per_step(steps, gamma=0.5) == expected


@pytest.mark.parametrize("garbage", [-1, 2, 10**9])
def test_dqn_action_out_of_range_at_a_decision(garbage):
    with pytest.raises(ValueError, match=rf"entry 'action' must lie in \[0, 2\), got {garbage}"):
        controlled_loss()(two_tasks(action=[0, garbage, 0, 0, 0, 0, 0, 0]))


def test_dqn_garbage_where_nothing_is_decided():
    steps = two_tasks()
    expected = per_step(steps.clone(), gamma=0.5)
    for step in (2, 4, 7):
        steps["next", "reward"][0, step] = NAN
    steps["observation"].requires_grad_()
    out = controlled_loss(gamma=0.5, cql_weight=1.0, reduction="none")(steps)
    assert [value or None for value in out["loss_dqn"].squeeze(0).tolist()] == expected
    total(out).backward()
    assert steps["observation"].grad.isfinite().all()
    assert steps["td_error"].isfinite().all()


def test_dqn_infinite_next_value_of_a_step_that_is_left_out():
    steps, loss = two_tasks(), controlled_loss(gamma=0.5)
    loss.target_head_params["module", "weight"].mul_(10)
    steps["observation"][0, 5, 2:] = 1e38  # Only frame 4, which is terminal, would bootstrap from it.
    steps["observation"].requires_grad_()
    total(loss(steps)).backward()
    assert steps["observation"].grad.isfinite().all()


def test_dqn_next_value_that_is_not_a_number_is_seen_where_it_counts():
    steps = two_tasks()
    steps["observation"][0, 1, 2:] = NAN
    assert controlled_loss(gamma=0.5)(steps)["loss_dqn"].isnan()


def test_dqn_rewards_of_a_narrow_type_are_normalised_in_full_precision():
    steps = two_tasks()
    expected = controlled_loss(gamma=0.5, normalize_reward_std=True)(steps.clone())
    steps["next", "reward"] = steps["next", "reward"].to(torch.bfloat16)  # which holds these rewards exactly
    assert (controlled_loss(gamma=0.5, normalize_reward_std=True)(steps) == expected).all()


def test_dqn_masked_frame_is_still_the_next_one():
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [1.0, 2.0, 3.0], padding=[2])
    assert per_step(steps, gamma=0.5) == errors([1 + 10, 2 + 15.5, None], [1.0, 4.0, None])


def test_dqn_without_target_head():
    loss = controlled_loss(gamma=0.5, delay_value=False, reduction="none")
    assert "target_head_params" not in dict(loss.named_children())
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [1.0, 2.0, 3.0])
    steps["observation"].requires_grad_()
    out = loss(steps)["loss_dqn"]
    assert out.squeeze(0).tolist() == pytest.approx([(1 - (1 + 2)) ** 2, (4 - (2 + 45.5)) ** 2, 0.0])
    out.sum().backward()
    assert (steps["observation"].grad[0, 2] == 0).all(), "the next value is a target, without gradient"


def test_what_heads_read_is_read():
    head = TensorDictModule(lambda hidden, more: hidden[..., :2] + more, ["hidden", ("agent", "more")], ["q"])
    trunk = TensorDictModule(nn.Identity(), ["observation"], ["hidden"])
    loss = MouseDQNLoss(head, trunk=trunk, delay_value=False)
    assert ("agent", "more") in loss.in_keys
    assert "hidden" not in loss.in_keys
    alone = MouseDQNLoss(head, delay_value=False)
    assert {"hidden", ("agent", "more")} <= set(alone.in_keys)


def test_dqn_reads_hidden_without_trunk():
    steps = two_tasks()
    loss = controlled_loss(gamma=0.5, trunk=False)
    assert "observation" not in loss.in_keys
    expected = controlled_loss(gamma=0.5)(steps.clone())
    assert (loss(steps.rename_key_("observation", "hidden")) == expected).all()


def test_heads_may_read_and_write_nested_entries():
    head = nn.Linear(4, 2, bias=False)
    head.weight.data = torch.cat([torch.eye(2), torch.zeros(2, 2)], 1)
    trunk = TensorDictModule(nn.Identity(), ["observation"], [("agent", "hidden")])
    loss = MouseDQNLoss(TensorDictModule(head, [("agent", "hidden")], [("agent", "q")]), trunk=trunk, gamma=0.5)
    attach_targets(loss).target_head_params["module", "weight"].copy_(torch.cat([torch.zeros(2, 2), torch.eye(2)], 1))
    assert (loss(two_tasks()) == controlled_loss(gamma=0.5)(two_tasks())).all()
