"""What every loss must do, as a class to subclass, with the model, the steps and the targets that it needs."""

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.utils import unravel_key
from torchrl.objectives import SoftUpdate

from torchrl_mouse import objectives, schema
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.schema import from_mouse_records

NUM_ACTIONS = 3
NAN, INF = float("nan"), float("inf")
TRANSITION_ENTRIES = {
    "is_init": [("is_init",)],
    "action": [("action",)],
    "reward": [("next", "reward")],
    "done": [("next", "done")],
    "terminated": [("previous", "terminated"), ("next", "previous", "terminated")],
    "truncated": [("previous", "truncated"), ("next", "previous", "truncated")],
    "priority": [],
}
TEACHER_ENTRIES = {
    "terminated": [("previous", "terminated")],
    "truncated": [("previous", "truncated")],
    "q_star": [("q_star",)],
}


def make_model(seed=0, **backbone):
    torch.manual_seed(seed)
    backbone = backbone or {"backbone_kwargs": {"num_layers": 1, "num_heads": 2, "expand": 1}}
    return MouseModel(
        MouseConfig(
            hidden_dim=16,
            window=8,
            embedding_kwargs={"max_num_actions": NUM_ACTIONS, "max_num_obs_continuous": 2, "max_num_time_steps": 9},
            dqn_head_kwargs={"hidden_dim": 8},
            vec_dqn_head_kwargs={"hidden_dim": 8, "vec_dim": 4},
            sp_head_kwargs={"hidden_dim": 8},
            sv_head_kwargs={"hidden_dim": 8},
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
        assert not any(value.requires_grad for value in steps.values(True, True))
        added = set(steps.keys(True, True)) - set(before.keys(True, True))
        assert added <= {"td_error", "vec_td_error"}
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

    def test_window_of_one_step(self, loss):
        steps = make_steps()[:, :1]
        if all(part.min_steps == 1 for part in self.parts(loss)):
            assert total(loss(steps)) > 0
            return
        with pytest.raises(ValueError, match=r"Loss: windows must have at least 2 steps, .* got \(3, 1\)"):
            loss(steps)

    @pytest.mark.parametrize("reward", [NAN, INF, -INF])
    def test_reward_that_is_not_finite(self, loss, reward):
        steps = make_steps()
        steps["next", "reward"][1, 3] = reward
        if all(part.min_steps == 1 for part in self.parts(loss)):
            assert loss(steps).isfinite().all()  # a teacher's loss does not read rewards
            return
        with pytest.raises(ValueError, match=rf"\('next', 'reward'\) must be finite, got {reward} at \(1, 3\)"):
            loss(steps)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_nothing_valid_costs_zero(self, loss, dtype):
        steps = make_steps().apply(lambda entry: entry.to(dtype) if entry.is_floating_point() else entry)
        steps[schema.MASK].fill_(False)
        loss = loss.to(dtype)
        with pytest.warns(UserWarning, match="a batch must hold a step to learn from, got none in") as warned:
            out = loss(steps)
        assert len(warned) == len(self.parts(loss)), "once for each loss"
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

    @pytest.mark.parametrize("shape", [(2,), (1, 1)])
    def test_entries_that_hold_several_values_a_step(self, loss, shape):
        steps = make_steps()
        steps["previous", "wide"] = torch.zeros(*steps.shape, *shape, dtype=torch.bool)
        for part in self.parts(loss):
            part.loss_mask_key = ("previous", "wide")
        with pytest.raises(ValueError, match=r"'wide'\) must hold one value a step, \(3, 8\) or \(3, 8, 1\), got"):
            loss(steps)

    def test_mask_of_value_estimators_counts_too(self, loss):
        steps = make_steps()
        valid = torch.rand(steps.shape, generator=torch.Generator().manual_seed(3)) < 0.7
        expected = loss(steps.clone().set(schema.MASK, steps[schema.MASK] & valid))
        assert (loss(steps.set("shifted_valid", valid.unsqueeze(-1))) == expected).all()

    def test_unknown_key(self, loss):
        with pytest.raises(ValueError, match=r"no_such_key is not an accepted tensordict key|got \['no_such_key'\]"):
            loss.set_keys(no_such_key="x")

    def test_every_key_can_be_nested_and_put_back(self, loss):
        configurable = set(loss._AcceptedKeys.__dataclass_fields__) - {"priority_weight", "action_mask"}
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
                    other[new] = steps[entry].roll(1, 1)
                    assert (loss(other) != expected).any(), name
                else:
                    renamed = renamed.exclude(entry)
            assert (loss(renamed) == expected).all(), name
            loss.set_keys(**{name: None})
            assert loss.in_keys == before

    @staticmethod
    def parts(loss):
        return [part for part in loss.modules() if isinstance(part, objectives.InContextLoss)]

    def test_another_mask_can_be_named(self, loss):
        steps = make_steps()
        valid = torch.rand(steps.shape, generator=torch.Generator().manual_seed(3)) < 0.7
        expected = loss(steps.clone().set(schema.MASK, valid))
        for part in self.parts(loss):
            part.loss_mask_key = ("agent", "valid")
        assert ("agent", "valid") in loss.in_keys
        with pytest.raises(KeyError, match="'agent', 'valid'"):
            loss(steps.clone())
        out = loss(steps.clone().set(("agent", "valid"), valid.unsqueeze(-1)))
        assert (out == expected).all()
        everything = loss(steps.clone().exclude(schema.MASK).set(("agent", "valid"), torch.ones_like(valid)))
        for part in self.parts(loss):
            part.loss_mask_key = None
        assert (loss(steps.clone().set(schema.MASK, valid)) == everything).all()

    def test_action_mask(self, loss):
        steps, key = make_steps(), ("agent", "allowed")
        expected = loss(steps.clone())
        for part in self.parts(loss):
            part.set_keys(action_mask=key)
        assert key in loss.in_keys
        with pytest.raises(KeyError, match="'agent', 'allowed'"):
            loss(steps.clone())
        allowed = torch.ones(*steps.shape, NUM_ACTIONS, dtype=torch.bool)
        assert (loss(steps.clone().set(key, allowed)) == expected).all()
        nothing_said = allowed.clone()
        nothing_said[:, 2] = False  # no action is allowed at a terminal frame
        assert (loss(steps.clone().set(key, nothing_said)) == expected).all()
        # The action in the data and one more: what is not allowed changes every term.
        some = torch.nn.functional.one_hot(steps["action"], NUM_ACTIONS) | torch.tensor([0, 1, 0])
        out = loss(steps.clone().set(key, some.bool()))
        changed = {name for name, value in out.items() if value != expected[name]}
        assert changed & {"loss_cql", "loss_vec_dqn", "loss_sp", "loss_sv", "loss_actor"}
        total(out).backward()
        assert all(weight.grad.isfinite().all() for weight in loss.parameters() if weight.grad is not None)
        with pytest.raises(TypeError, match=r"'allowed'.* must be of bool type, got"):
            loss(steps.clone().set(key, allowed.float()))
        with pytest.raises(ValueError, match=r"must hold a flag for each of the head's 3 actions, got \(3, 8, 2\)"):
            loss(steps.clone().set(key, allowed[..., :2]))

    @pytest.mark.parametrize("key", ["importance", ("agent", "importance")])
    def test_priority_weight_can_be_renamed(self, key):
        steps = make_steps()
        weights = torch.rand(steps.shape, generator=torch.Generator().manual_seed(5)) + 0.1
        expected = attach_targets(self.make_loss())(steps.clone().set("priority_weight", weights))
        loss = attach_targets(self.make_loss())
        for part in loss.modules():
            if isinstance(part, objectives.InContextLoss):
                part.set_keys(priority_weight=key)
        assert (loss(steps.clone().set(key, weights)) == expected).all()
