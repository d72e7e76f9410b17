"""The losses: TorchRL's contract, hand-computed values, targets, combination, MOUSE's reference cases."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from tensordict.utils import unravel_key
from torch import nn
from torchrl.objectives import HardUpdate, LossModule, SoftUpdate

from torchrl_mouse import objectives, schema
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.objectives import CombinedLoss, MouseDQNLoss, SupervisedPolicyLoss
from torchrl_mouse.schema import from_mouse_records

NUM_ACTIONS = 3
REFERENCE = Path(__file__).parent / "reference_losses"
NAN, INF = float("nan"), float("inf")


def make_model(seed=0, **backbone):
    torch.manual_seed(seed)
    backbone = backbone or {"backbone_kwargs": {"num_layers": 1, "num_heads": 2, "expand": 1}}
    return MouseModel(
        MouseConfig(
            hidden_dim=16,
            window=8,
            embedding_kwargs={"max_num_actions": NUM_ACTIONS, "max_num_obs_continuous": 2, "max_num_time_steps": 9},
            dqn_head_kwargs={"hidden_dim": 8},
            sp_head_kwargs={"hidden_dim": 8},
            **backbone,
        )
    )


def make_steps(seed=0, batch=3):
    """Windows of 8 steps, with episodes of 3 frames, a second task in the last row, and rows without a teacher."""
    generator = torch.Generator().manual_seed(seed)
    shape, ends = (batch, 8), torch.tensor([0, 0, 1, 0, 0, 2, 0, 0])
    steps = from_mouse_records(
        TensorDict(
            {
                "action": torch.randint(NUM_ACTIONS, shape, generator=generator),
                "reward": torch.randn(shape, generator=generator),
                "done": ends.repeat(batch, 1),
                "time": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]).repeat(batch, 1),
                "obs_continuous": torch.randn(*shape, 2, generator=generator),
                "q_star": torch.randn(*shape, NUM_ACTIONS, generator=generator),
            },
            shape,
        )
    )
    steps["q_star"][0, 1] = -INF
    steps["q_star"][1, :, 2] = -INF
    steps[schema.IS_INIT][-1, 6] = True
    steps["next", "done"][-1, 5] = True
    return steps


def total(losses):
    return sum(value.sum() for key, value in losses.items() if key.startswith("loss"))


def attach_targets(loss):
    """A loss with targets warns until something moves them."""
    for part in loss.modules():
        if "target_head_params" in dict(part.named_children()):
            SoftUpdate(part, tau=0.1)
    return loss


class LossContract:
    """What every loss must do. A test class per loss subclasses it and says how to build the loss.

    Attributes:
        loss_class: the loss under test.
        entries: for each configurable key, the entries that are read through it.
        make_loss: builds the loss with a model of its own from a seed and the loss's options.
    """

    contracts = {}  # noqa: RUF012 - filled by subclasses
    loss_class = entries = make_loss = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in ("loss_class", "entries", "make_loss"):
            if getattr(cls, name) is None:
                raise TypeError(f"{cls.__name__} must define {name}.")
        LossContract.contracts[cls.loss_class] = cls

    @pytest.fixture
    def loss(self):
        return attach_targets(self.make_loss())

    def test_out_keys(self, loss):
        out = loss(make_steps())
        assert list(out.keys()) == list(loss.out_keys)
        assert out.batch_size == torch.Size([])
        terms = [key for key in loss.out_keys if key.startswith("loss")]
        assert terms
        for key, value in out.items():
            assert value.shape == (), key
            assert value.isfinite(), key
            assert value.requires_grad is (key in terms), key

    def test_gradients_reach_every_parameter(self, loss):
        total(loss(make_steps())).backward()
        for name, parameter in loss.named_parameters():
            if "embed_tokens" in name:  # A stub that `transformers` wants and nothing reads.
                continue
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert (parameter.grad != 0).any(), name

    def test_optimizer_gets_each_parameter_once(self, loss):
        parameters = [id(parameter) for parameter in loss.parameters()]
        assert len(parameters) == len(set(parameters))

    def test_in_keys_are_complete_and_needed(self, loss):
        steps = make_steps()
        for key in loss.in_keys:
            with pytest.raises(KeyError, match="must be present"):
                loss(steps.clone().exclude(key))
        only = steps.select(*loss.in_keys)
        assert (loss(only) == loss(steps.exclude(schema.MASK))).all()

    def test_in_keys_are_distinct(self, loss):
        assert loss.in_keys == list(dict.fromkeys(unravel_key(key) for key in loss.in_keys))
        assert schema.STREAM not in loss.in_keys

    def test_dispatch_equals_tensordict(self, loss):
        steps = make_steps().select(*loss.in_keys)
        expected = loss(steps.clone())
        names = ["_".join(key) if isinstance(key, tuple) else key for key in loss.in_keys]
        entries = {name: steps[key] for name, key in zip(names, loss.in_keys, strict=True)}
        out = loss(**entries)
        out = out if isinstance(out, tuple) else (out,)
        assert len(out) == len(loss.out_keys)
        for key, value in zip(loss.out_keys, out, strict=True):
            assert torch.equal(value, expected[key]), key

    def test_input_keeps_its_entries(self, loss):
        steps = make_steps()
        before = steps.clone()
        loss(steps)
        added = set(steps.keys(True, True)) - set(before.keys(True, True))
        assert added <= {"td_error"}
        assert (steps.select(*before.keys(True, True)) == before).all()

    def test_state_dict_round_trip(self):
        loss, other = attach_targets(self.make_loss(seed=0)), attach_targets(self.make_loss(seed=1))
        steps = make_steps()
        expected = loss(steps.clone())
        assert (other(steps.clone()) != expected).any()
        other.load_state_dict(loss.state_dict())
        assert (other(steps.clone()) == expected).all()

    def test_deepcopy_is_equal_and_apart(self, loss):
        steps = make_steps()
        expected = loss(steps.clone())
        duplicate = attach_targets(copy.deepcopy(loss))
        assert (duplicate(steps.clone()) == expected).all()
        for parameter in duplicate.parameters():
            parameter.data.normal_()
        assert (loss(steps.clone()) == expected).all()
        assert (duplicate(steps.clone()) != expected).any()

    def test_reset_parameters_recursive(self, loss):
        before = [parameter.detach().clone() for parameter in loss.parameters()]
        loss.reset_parameters_recursive()
        assert any((old != new).any() for old, new in zip(before, loss.parameters(), strict=True))

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_reductions(self, reduction):
        steps = make_steps()
        per_step = attach_targets(self.make_loss(reduction="none"))(steps.clone())
        out = attach_targets(self.make_loss(reduction=reduction))(steps.clone())
        for key in out.keys():  # noqa: SIM118 - a TensorDict
            if not key.startswith("loss"):
                continue
            assert per_step[key].shape == steps.shape
            valid = per_step[key] != 0  # No term is exactly zero by chance.
            assert 0 < valid.sum() < valid.numel()
            expected = {
                "none": per_step[key],
                "sum": per_step[key].sum(),
                "mean": per_step[key].sum() / valid.sum(),
            }[reduction]
            assert torch.allclose(out[key], expected, atol=1e-6), key

    def test_unknown_reduction(self):
        with pytest.raises(ValueError, match=r"reduction must be one of .* got 'median'"):
            self.make_loss(reduction="median")

    def test_no_time_dimension(self, loss):
        with pytest.raises(ValueError, match="got no time dimension"):
            loss(make_steps()[0, 0])

    def test_padding_costs_nothing_and_moves_nothing(self, loss):
        steps = make_steps()
        steps[schema.MASK][:, 5:] = False
        expected = loss(steps.clone())
        steps["q_star"][:, 5:] = NAN
        steps["action"][:, 5:] = -7
        for key in ("reward", "xformed_reward"):
            if ("next", key) in steps.keys(True):
                steps["next", key][:, 5:] = NAN
        out = loss(steps)
        assert (out == expected).all()
        total(out).backward()
        assert all(parameter.grad.isfinite().all() for parameter in loss.parameters() if parameter.grad is not None)

    def test_nothing_valid_costs_zero(self, loss):
        steps = make_steps()
        steps[schema.MASK].fill_(False)
        out = loss(steps)
        for key, value in out.items():
            assert value == 0, key
        total(out).backward()
        for name, parameter in loss.named_parameters():
            if "embed_tokens" not in name:
                assert (parameter.grad == 0).all(), name

    @pytest.mark.parametrize("trailing", [(), (1,)])
    def test_priority_weights(self, trailing):
        steps = make_steps()
        weights = torch.rand(steps.shape, generator=torch.Generator().manual_seed(5)) + 0.1
        per_step = attach_targets(self.make_loss(reduction="none"))(steps.clone())
        steps["priority_weight"] = weights.reshape(*steps.shape, *trailing)
        out = {
            reduction: attach_targets(self.make_loss(reduction=reduction))(steps.clone())
            for reduction in ("none", "sum", "mean")
        }
        for key in (key for key in out["none"].keys() if key.startswith("loss")):  # noqa: SIM118 - a TensorDict
            valid = per_step[key] != 0
            weighted = per_step[key] * weights
            assert torch.allclose(out["none"][key], weighted)
            assert torch.allclose(out["sum"][key], weighted.sum())
            assert torch.allclose(out["mean"][key], weighted.sum() / (weights * valid).sum())

    def test_float64(self):
        steps = make_steps()
        expected = attach_targets(self.make_loss())(steps.clone())
        steps = steps.apply(lambda entry: entry.double() if entry.is_floating_point() else entry)
        out = attach_targets(self.make_loss().double())(steps)
        for key, value in out.items():
            assert value.dtype == torch.float64, key
            assert torch.allclose(value.float(), expected[key], atol=1e-5), key

    def test_unknown_key(self, loss):
        with pytest.raises(ValueError, match="no_such_key is not an accepted tensordict key"):
            loss.set_keys(no_such_key="x")

    def test_every_key_can_be_nested_and_put_back(self, loss):
        configurable = set(loss._AcceptedKeys.__dataclass_fields__) - {"priority_weight"}
        assert set(self.entries) == configurable
        steps, before = make_steps(), list(loss.in_keys)
        expected = loss(steps.clone())
        for name, entries in self.entries.items():
            moved = {entry: (*entry[: entry[0] == "next"], "agent", name) for entry in entries}
            loss.set_keys(**{name: ("agent", name)})
            assert set(moved.values()) <= set(loss.in_keys), name
            renamed = steps.clone()
            for entry, new in moved.items():
                renamed[new] = steps[entry]
            for entry, new in moved.items():
                if unravel_key(entry) in loss.trunk.in_keys:
                    other = renamed.clone()
                    other[new] = ~steps[entry]
                    assert (loss(other) != expected).any(), name
                else:
                    renamed = renamed.exclude(entry)
            assert (loss(renamed) == expected).all(), name
            loss.set_keys(**{name: None})
            assert loss.in_keys == before

    def test_priority_weight_can_be_renamed(self):
        steps, key = make_steps(), "importance"
        weights = torch.rand(steps.shape, generator=torch.Generator().manual_seed(5)) + 0.1
        expected = attach_targets(self.make_loss())(steps.clone().set("priority_weight", weights))
        loss = attach_targets(self.make_loss())
        for part in loss.modules():
            if isinstance(part, objectives.InContextLoss):
                part.set_keys(priority_weight=key)
        assert (loss(steps.clone().set(key, weights)) == expected).all()


class TestMouseDQNLoss(LossContract):
    loss_class = MouseDQNLoss
    entries = {  # noqa: RUF012 - read only
        "is_init": [("is_init",)],
        "action": [("action",)],
        "reward": [("next", "reward")],
        "done": [("next", "done")],
        "terminated": [("previous", "terminated"), ("next", "previous", "terminated")],
        "truncated": [("previous", "truncated"), ("next", "previous", "truncated")],
        "priority": [],
    }

    @staticmethod
    def make_loss(seed=0, **options):
        model = make_model(seed)
        return MouseDQNLoss(model.head("dqn"), trunk=model.trunk, cql_weight=0.5, **options)

    @pytest.mark.parametrize("name", ["gamma", "gamma_terminal", "gamma_truncated"])
    @pytest.mark.parametrize("value", [-0.1, 1.1])
    def test_discount_out_of_range(self, name, value):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got {value}"):
            self.make_loss(**{name: value})

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


class TestSupervisedPolicyLoss(LossContract):
    loss_class = SupervisedPolicyLoss
    entries = {  # noqa: RUF012 - read only
        "terminated": [("previous", "terminated")],
        "truncated": [("previous", "truncated")],
        "q_star": [("q_star",)],
    }

    @staticmethod
    def make_loss(seed=0, **options):
        model = make_model(seed)
        return SupervisedPolicyLoss(model.head("sp"), trunk=model.trunk, **options)

    @pytest.mark.parametrize("value", [-0.1, 1.0])
    def test_label_smoothing_out_of_range(self, value):
        with pytest.raises(ValueError, match=rf"label_smoothing must lie in \[0, 1\), got {value}"):
            self.make_loss(label_smoothing=value)

    def test_teacher_of_another_size(self, loss):
        steps = make_steps()
        steps["q_star"] = steps["q_star"][..., :2]
        with pytest.raises(ValueError, match=r"entry 'q_star' must have the head's shape \(3, 8, 3\), got \(3, 8, 2\)"):
            loss(steps)

    def test_mean_over_taught_decisions_by_hand(self):
        loss = SupervisedPolicyLoss(TensorDictModule(nn.Identity(), ["hidden"], ["sp"]), label_smoothing=0.1)
        steps = make_steps()
        logits = torch.randn(*steps.shape, NUM_ACTIONS, generator=torch.Generator().manual_seed(9))
        costs = []
        for row in range(3):
            for step in (0, 1, 3, 4, 6):  # Frames 2 and 5 are terminal, 7 is the last record.
                if (row, step) == (0, 1):
                    continue  # The teacher is silent.
                actions = 2 if row == 1 else 3
                label = steps["q_star"][row, step, :actions].argmax()
                costs.append(
                    nn.functional.cross_entropy(logits[row, step, :actions], label, label_smoothing=0.1).item()
                )
        assert loss(steps.set("hidden", logits))["loss_sp"].item() == pytest.approx(sum(costs) / len(costs), abs=1e-6)


class TestCombinedLoss(LossContract):
    loss_class = CombinedLoss
    entries = {}  # noqa: RUF012 - the parts have keys

    @staticmethod
    def make_loss(seed=0, weights=None, **options):
        model = make_model(seed)
        parts = {
            "dqn": MouseDQNLoss(model.head("dqn"), cql_weight=0.5, **options),
            "sp": SupervisedPolicyLoss(model.head("sp"), **options),
        }
        return CombinedLoss(model.trunk, parts, weights=weights)

    def test_equals_the_separate_losses(self, loss):
        steps = make_steps()
        out = loss(steps.clone())
        for single in (TestMouseDQNLoss.make_loss(), TestSupervisedPolicyLoss.make_loss()):
            for key, value in attach_targets(single)(steps.clone()).items():
                assert torch.allclose(out[key], value, atol=1e-6), key

    def test_gradients_are_the_sum(self):
        weights = {"dqn": 0.3, "sp": 2.0}
        combined, separate = attach_targets(self.make_loss(weights=weights)), make_model()
        total(combined(make_steps())).backward()
        for weight, loss in (
            (0.3, MouseDQNLoss(separate.head("dqn"), trunk=separate.trunk, cql_weight=0.5)),
            (2.0, SupervisedPolicyLoss(separate.head("sp"), trunk=separate.trunk)),
        ):
            (weight * total(attach_targets(loss)(make_steps()))).backward()
        expected = dict(separate.trunk.named_parameters())
        for name, parameter in combined.trunk_params.flatten_keys(".").items():
            if isinstance(parameter, nn.Parameter) and "embed_tokens" not in name:
                assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-6), name

    def test_weights_scale_the_terms_only(self):
        steps = make_steps()
        plain = attach_targets(self.make_loss())(steps.clone())
        weighted = attach_targets(self.make_loss(weights={"dqn": 0.25}))(steps.clone())
        for key, value in plain.items():
            factor = 0.25 if key in ("loss_dqn", "loss_cql") else 1.0
            assert torch.allclose(weighted[key], factor * value), key

    def test_runs_the_trunk_once(self, loss):
        calls = []
        hook = loss.trunk.register_forward_hook(lambda *_: calls.append(1))
        loss(make_steps())
        hook.remove()
        assert calls == [1]

    def test_writes_priorities_afresh_at_every_call(self, loss):
        steps = make_steps()
        loss(steps)
        first = steps["td_error"].clone()
        for parameter in loss.losses["dqn"].parameters():
            parameter.data.mul_(2)
        loss(steps)
        assert (steps["td_error"] != first).any()
        assert "hidden" not in steps

    def test_parts_keys_can_be_set_afterwards(self, loss):
        steps = make_steps()
        expected = loss(steps.clone())
        loss.losses["dqn"].set_keys(reward="scaled")
        steps["next", "scaled"] = steps["next"].pop("reward")
        assert ("next", "scaled") in loss.in_keys
        assert ("next", "reward") not in loss.in_keys
        assert (loss(steps) == expected).all()

    def test_part_with_a_trunk(self):
        model = make_model()
        part = SupervisedPolicyLoss(model.head("sp"), trunk=model.trunk)
        with pytest.raises(ValueError, match="loss 'sp' must be built without trunk="):
            CombinedLoss(model.trunk, {"sp": part})

    def test_parts_that_write_the_same_entries(self):
        model = make_model()
        parts = {name: SupervisedPolicyLoss(model.head("sp")) for name in ("one", "two")}
        with pytest.raises(ValueError, match=r"must write distinct entries, got \['loss_sp'\] twice"):
            CombinedLoss(model.trunk, parts)

    def test_weight_of_no_part(self):
        model = make_model()
        parts = {"sp": SupervisedPolicyLoss(model.head("sp"))}
        with pytest.raises(ValueError, match=r"weights must name losses \(sp\), got \['dqn'\]"):
            CombinedLoss(model.trunk, parts, weights={"dqn": 1.0})


def test_every_loss_has_a_contract():
    public = [getattr(objectives, name) for name in objectives.__all__]
    losses = {item for item in public if isinstance(item, type) and issubclass(item, LossModule)}
    assert losses - {objectives.InContextLoss} == set(LossContract.contracts)


def test_a_contract_must_be_filled_in():
    with pytest.raises(TypeError, match="TestNothing must define loss_class"):
        type("TestNothing", (LossContract,), {"make_loss": lambda **_: None})


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
    assert out["q_values_target"].item() == pytest.approx(sum(y for _, y in known) / 5)
    expected = [0.0 if y is None else abs(q - y) for q, y in zip(CHOSEN, targets, strict=True)]
    assert steps["td_error"].shape == (1, 8, 1)
    assert steps["td_error"].flatten().tolist() == pytest.approx(expected)


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


def test_dqn_without_target_head():
    loss = controlled_loss(gamma=0.5, delay_value=False, reduction="none")
    assert "target_head_params" not in dict(loss.named_children())
    steps = window(ONLINE[:3], TARGET[:3], [0, 1, 0], [1.0, 2.0, 3.0])
    steps["observation"].requires_grad_()
    out = loss(steps)["loss_dqn"]
    assert out.squeeze(0).tolist() == pytest.approx([(1 - (1 + 2)) ** 2, (4 - (2 + 45.5)) ** 2, 0.0])
    out.sum().backward()
    assert (steps["observation"].grad[0, 2] == 0).all(), "the next value is a target, without gradient"


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


# Targets


@pytest.fixture
def dqn():
    return TestMouseDQNLoss.make_loss()


def snapshot(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def leaves(params):
    return {name: value for name, value in params.flatten_keys(".").items() if isinstance(value, torch.Tensor)}


def test_soft_update_moves_the_heads_target_only(dqn):
    updater = SoftUpdate(dqn, tau=0.25)
    assert "target_trunk_params" not in dict(dqn.named_children())
    for parameter in dqn.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    before, online = snapshot(dqn.state_dict().items()), leaves(dqn.head_params)
    updater.step()
    moved = set()
    for name, value in dqn.state_dict().items():
        if "target_head_params" not in name:
            assert torch.equal(value, before[name]), name
            continue
        leaf = name.removeprefix("target_head_params.")
        if leaf in online:
            assert torch.allclose(value, torch.lerp(before[name], online[leaf], 0.25), atol=1e-7), name
            moved.add(leaf)
    assert moved == set(online)


def test_hard_update_copies_the_head_at_its_interval(dqn):
    updater = HardUpdate(dqn, value_network_update_interval=2)
    for parameter in dqn.parameters():
        parameter.data.add_(1.0)
    before = snapshot(leaves(dqn.target_head_params).items())
    online = leaves(dqn.head_params)
    for _ in range(2):
        updater.step()
        assert all(torch.equal(value, before[name]) for name, value in leaves(dqn.target_head_params).items())
    updater.step()
    assert all(torch.equal(value, online[name]) for name, value in leaves(dqn.target_head_params).items())


def test_training_moves_trunk_and_head_and_never_the_target(dqn):
    SoftUpdate(dqn, tau=0.5)
    target = snapshot(leaves(dqn.target_head_params).items())
    before = snapshot(dqn.named_parameters())
    optimizer = torch.optim.SGD(dqn.parameters(), lr=0.1)
    total(dqn(make_steps())).backward()
    optimizer.step()
    for name, value in leaves(dqn.target_head_params).items():
        assert torch.equal(value, target[name])
        assert not value.requires_grad
        assert value.grad is None
    for part in ("trunk_params", "head_params"):
        assert any((value != before[name]).any() for name, value in dqn.named_parameters() if name.startswith(part))


def test_target_can_be_updated_after_a_forward_pass(dqn):
    updater = SoftUpdate(dqn, tau=0.5)
    for _ in range(2):
        total(dqn(make_steps())).backward()
        updater.step()
    assert not any(value.requires_grad for value in leaves(dqn.target_head_params).values())


@pytest.mark.parametrize("combined", [False, True])
def test_parameters_are_the_models(combined):
    model = make_model()
    parts = {"dqn": MouseDQNLoss(model.head("dqn"), trunk=None if combined else model.trunk)}
    if combined:
        parts["sp"] = SupervisedPolicyLoss(model.head("sp"))
    loss = CombinedLoss(model.trunk, parts) if combined else parts["dqn"]
    heads = [model.dqn_head.online, *([model.sp_head] if combined else [])]
    owned = {id(parameter) for module in (model.trunk, *heads) for parameter in module.parameters()}
    assert {id(parameter) for parameter in loss.parameters()} == owned


def test_combined_loss_moves_its_parts_target():
    loss = TestCombinedLoss.make_loss()
    updater = SoftUpdate(loss.losses["dqn"], tau=0.25)
    part = loss.losses["dqn"]
    before = snapshot(leaves(part.target_head_params).items())
    for parameter in part.parameters():
        parameter.data.add_(1.0)
    loss(make_steps())
    updater.step()
    for name, value in leaves(part.target_head_params).items():
        assert torch.allclose(value, before[name] + 0.25, atol=1e-6)


# MOUSE's reference cases


def reference_cases(loss):
    cases = json.loads((REFERENCE / "cases.json").read_text())
    return [case for case in cases if case["loss"] == loss]


def reference(name):
    return load_file(REFERENCE / f"{name}.safetensors")


DQN_OPTIONS = {"gamma", "gamma_terminal", "gamma_truncated", "reward_scale", "reward_shift", "cql_weight"}
DQN_OPTIONS |= {"cql_scale_q_eps", "use_xformed_reward"}
DQN_CASES = [case for case in reference_cases("dqn") if set(case["config"]) <= DQN_OPTIONS]


def pairs_as_windows(stream, online, target):
    """Lays out each pair of consecutive records as a window of three frames, of which the first decides.

    Where returns span episodes, MOUSE bootstraps an episode's end from the next record, this library from the frame
    after the terminal one: the record that follows is therefore the last frame of every window. It is also the middle
    one, except at a termination, whose terminal frame is garbage.
    """
    batch, num = stream["done"].shape
    terminated, truncated = ((stream["done"][:, 1:] == code).reshape(-1, 1) for code in (1, 2))
    garbage = torch.full((batch * (num - 1), online.shape[-1]), 1e3)

    def frames(values, now):
        first, following = (part.reshape(-1, values.shape[-1]) for part in (values[:, :-1], values[:, 1:]))
        first = first if now else garbage
        middle = garbage if now else torch.where(terminated, garbage, following)
        return torch.stack([first, middle, garbage if now else following], 1)

    rows = torch.Size([batch * (num - 1), 3])

    def at_first(values):
        out = torch.zeros(rows, dtype=values.dtype)
        out[:, 0] = values[:, 1:].reshape(-1)
        return out.unsqueeze(-1)

    def frame_1(flags):
        return torch.stack([torch.zeros_like(flags), flags, torch.zeros_like(flags)], 1)

    mask = torch.tensor([True, False, False]).expand(rows)
    return TensorDict(
        {
            "hidden": torch.cat([frames(online, True), frames(target, False)], -1),
            "is_init": torch.zeros(*rows, 1, dtype=torch.bool),
            "action": at_first(stream["action"]),
            "collector": {"mask": mask},
            "previous": {"terminated": frame_1(terminated), "truncated": frame_1(truncated)},
            "next": {
                "reward": at_first(stream["reward"]),
                "xformed_reward": at_first(stream["xformed_reward"]),
                "done": torch.zeros(*rows, 1, dtype=torch.bool),
                "previous": {
                    "terminated": frame_1(terminated).roll(-1, 1),
                    "truncated": frame_1(truncated).roll(-1, 1),
                },
            },
        },
        rows,
    )


def test_reference_cases_are_all_known():
    assert len(reference_cases("dqn")) == 6
    assert len(DQN_CASES) == 5  # Without reward normalisation.


@pytest.mark.parametrize("case", DQN_CASES, ids=lambda case: json.dumps(case["config"]))
def test_dqn_agrees_with_mouse(case):
    options = {"gamma_truncated": 0.0, **case["config"]}
    xformed = options.pop("use_xformed_reward", False)
    predictions = reference("predictions")
    online = predictions["dqn"].requires_grad_()
    steps = pairs_as_windows(reference("stream"), online, predictions["dqn_target"])
    loss = controlled_loss(num_actions=5, trunk=False, **options)
    if xformed:
        loss.set_keys(reward="xformed_reward")
    out = loss(steps)
    value = out["loss_dqn"] + out["loss_cql"]
    assert value.item() == pytest.approx(case["value"], abs=1e-5)
    value.backward()
    assert online.grad.norm().item() == pytest.approx(case["grad_norm"], abs=1e-5)
    assert out["q_values_target"].item() == pytest.approx(case["metrics"]["q_values_target"], abs=1e-5)


@pytest.mark.parametrize(
    "case",
    [case for case in reference_cases("sp") if case["config"]["loss_type"] == "ce"],
    ids=lambda case: json.dumps(case["config"]),
)
def test_sp_agrees_with_mouse(case):
    # The teacher's temperature does not move its best action.
    loss = SupervisedPolicyLoss(
        TensorDictModule(nn.Identity(), ["hidden"], ["sp"]), label_smoothing=case["config"].get("label_smoothing", 0.0)
    )
    logits, q_star = reference("predictions")["sp"].requires_grad_(), reference("stream")["q_star"]
    nothing = torch.zeros(*logits.shape[:2], 1, dtype=torch.bool)
    previous = {"terminated": nothing, "truncated": nothing}
    value = loss(TensorDict({"hidden": logits, "q_star": q_star, "previous": previous}, logits.shape[:2]))["loss_sp"]
    assert value.item() == pytest.approx(case["value"], abs=1e-5)
    value.backward()
    assert logits.grad.norm().item() == pytest.approx(case["grad_norm"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dqn", schema.IS_INIT),
        ("dqn", schema.MASK),
        ("dqn", schema.PREVIOUS_TERMINATED),
        ("dqn", ("next", "done")),
        ("dqn", ("next", "previous", "terminated")),
        ("dqn", ("next", "previous", "truncated")),
        ("sp", schema.MASK),
        ("sp", schema.PREVIOUS_TRUNCATED),
    ],
)
def test_marks_of_wrong_type(name, key):
    model = make_model()
    kind = {"dqn": MouseDQNLoss, "sp": SupervisedPolicyLoss}[name]
    steps = make_steps().set("hidden", torch.zeros(3, 8, 16))
    loss = attach_targets(kind(model.head(name)))  # without a trunk, which looks at some of them, too
    loss(steps.clone())
    steps[key] = steps[key].float()
    with pytest.raises(TypeError, match=rf"{key if isinstance(key, str) else key[-1]}.* must be of bool type, got"):
        loss(steps)
