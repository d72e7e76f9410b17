"""Losses together: combination on one trunk, targets, and that every loss fulfils the contract."""

import pytest
import test_dqn_loss
import test_iql_loss  # noqa: F401 - its contract
import test_supervised_losses
import test_vec_dqn_loss
import torch
from loss_contract import LossContract, attach_targets, make_model, make_steps, total
from torch import nn
from torchrl.objectives import HardUpdate, LossModule, SoftUpdate

from torchrl_mouse import objectives, schema
from torchrl_mouse.objectives import (
    CombinedLoss,
    MouseDQNLoss,
    SupervisedPolicyLoss,
    SupervisedValueLoss,
    VecDQNLoss,
)


class TestCombinedLoss(LossContract):
    loss_class = CombinedLoss
    entries = {}  # noqa: RUF012 - the parts have keys

    @staticmethod
    def make_loss(seed=0, weights=None, **options):
        model = make_model(seed)
        parts = {
            "dqn": MouseDQNLoss(model.head("dqn"), cql_weight=0.5, **options),
            "vec_dqn": VecDQNLoss(model.head("vec_dqn"), **options),
            "sp": SupervisedPolicyLoss(model.head("sp"), **options),
            "sv": SupervisedValueLoss(model.head("sv"), **options),
        }
        return CombinedLoss(model.trunk, parts, weights=weights)

    def test_equals_the_separate_losses(self, loss):
        steps = make_steps()
        out = loss(steps.clone())
        for single in (
            test_dqn_loss.TestMouseDQNLoss.make_loss(),
            test_vec_dqn_loss.TestVecDQNLoss.make_loss(),
            test_supervised_losses.TestSupervisedPolicyLoss.make_loss(),
            test_supervised_losses.TestSupervisedValueLoss.make_loss(),
        ):
            for key, value in attach_targets(single)(steps.clone()).items():
                assert torch.allclose(out[key], value, atol=1e-6), key

    def test_gradients_are_the_sum(self):
        weights = {"dqn": 0.3, "sp": 2.0, "vec_dqn": 0.7, "sv": 0.1}
        combined, separate = attach_targets(self.make_loss(weights=weights)), make_model()
        total(combined(make_steps())).backward()
        for weight, loss in (
            (0.3, MouseDQNLoss(separate.head("dqn"), trunk=separate.trunk, cql_weight=0.5)),
            (2.0, SupervisedPolicyLoss(separate.head("sp"), trunk=separate.trunk)),
            (0.7, VecDQNLoss(separate.head("vec_dqn"), trunk=separate.trunk)),
            (0.1, SupervisedValueLoss(separate.head("sv"), trunk=separate.trunk)),
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
        for part in ("dqn", "vec_dqn"):
            loss.losses[part].set_keys(reward="scaled")
        steps["next", "scaled"] = steps["next"].pop("reward")
        assert ("next", "scaled") in loss.in_keys
        assert ("next", "reward") not in loss.in_keys
        assert (loss(steps) == expected).all()

    def test_mask_key_is_set_for_every_part(self, loss):
        loss.loss_mask_key = "valid"
        assert loss.loss_mask_key == "valid"
        assert {part.loss_mask_key for part in loss.losses.values()} == {"valid"}
        with pytest.raises(KeyError, match="'valid'"):
            loss(make_steps())

    def test_keys_are_those_of_the_parts(self, loss):
        with pytest.raises(ValueError, match=r"must be set on one of the losses \(dqn, .*\), got \['reward'\]"):
            loss.set_keys(reward="scaled")

    def test_parts_that_write_the_same_priority(self, loss):
        loss.losses["vec_dqn"].set_keys(priority="td_error")
        match = r"priorities to distinct entries, got 'td_error' of both 'dqn' and 'vec_dqn'. Move one"
        with pytest.raises(ValueError, match=match):
            loss(make_steps())

    def test_no_parts(self):
        with pytest.raises(ValueError, match="CombinedLoss: losses must be at least one"):
            CombinedLoss(make_model().trunk, {})

    def test_weight_that_is_not_finite(self):
        model = make_model()
        with pytest.raises(ValueError, match="weights must be finite, got nan for 'sp'"):
            CombinedLoss(model.trunk, {"sp": SupervisedPolicyLoss(model.head("sp"))}, weights={"sp": float("nan")})

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
    # PEARL's batches are contexts and transitions of tasks, not sequences of steps: it has tests of its own.
    assert losses - {objectives.InContextLoss, objectives.PEARLLoss} == set(LossContract.contracts)


def test_a_contract_must_be_filled_in():
    with pytest.raises(TypeError, match="TestNothing must define loss_class"):
        type("TestNothing", (LossContract,), {"make_loss": lambda **_: None})


# Targets


@pytest.fixture
def dqn():
    return test_dqn_loss.TestMouseDQNLoss.make_loss()


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
    loss = attach_targets(TestCombinedLoss.make_loss())
    updater = SoftUpdate(loss.losses["dqn"], tau=0.25)
    part = loss.losses["dqn"]
    before = snapshot(leaves(part.target_head_params).items())
    for parameter in part.parameters():
        parameter.data.add_(1.0)
    loss(make_steps())
    updater.step()
    for name, value in leaves(part.target_head_params).items():
        assert torch.allclose(value, before[name] + 0.25, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dqn", schema.IS_INIT),
        ("dqn", schema.MASK),
        ("dqn", schema.PREVIOUS_TERMINATED),
        ("dqn", ("next", "done")),
        ("dqn", ("next", "previous", "terminated")),
        ("dqn", ("next", "previous", "truncated")),
        ("vec_dqn", schema.IS_INIT),
        ("vec_dqn", ("next", "done")),
        ("sp", schema.MASK),
        ("sv", schema.MASK),
        ("sp", schema.PREVIOUS_TRUNCATED),
    ],
)
def test_marks_of_wrong_type(name, key):
    model = make_model()
    kind = {"dqn": MouseDQNLoss, "vec_dqn": VecDQNLoss, "sp": SupervisedPolicyLoss, "sv": SupervisedValueLoss}[name]
    steps = make_steps().set("hidden", torch.zeros(3, 8, 16))
    loss = attach_targets(kind(model.head(name)))  # without a trunk, which looks at some of them, too
    loss(steps.clone())
    steps[key] = steps[key].float()
    with pytest.raises(TypeError, match=rf"{key if isinstance(key, str) else key[-1]}.* must be of bool type, got"):
        loss(steps)


@pytest.mark.parametrize(
    ("name", "kind"), [("vec_dqn", MouseDQNLoss), ("vec_dqn", SupervisedValueLoss), ("dqn", VecDQNLoss)]
)
def test_heads_of_another_loss(name, kind):
    loss = attach_targets(kind(make_model().head(name)))
    with pytest.raises(ValueError, match=rf"{kind.__name__}: the head must write \[\*, T, A(, V)?\], got \(3, 8, 3"):
        loss(make_steps().set("hidden", torch.zeros(3, 8, 16)))


def bfloat16_model(model):
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("convert", [lambda model: model, bfloat16_model], ids=["float32", "bfloat16"])
def test_what_losses_write_is_of_full_precision(convert, autocast):
    model = convert(make_model())
    parts = {
        "dqn": MouseDQNLoss(model.head("dqn"), cql_weight=0.5, normalize_reward_std=True),
        "vec_dqn": VecDQNLoss(model.head("vec_dqn")),
        "sp": SupervisedPolicyLoss(model.head("sp"), loss_type="js"),
        "sv": SupervisedValueLoss(model.head("sv")),
    }
    loss, steps = attach_targets(CombinedLoss(model.trunk, parts)), make_steps()
    with torch.autocast("cpu", torch.bfloat16, autocast):
        out = loss(steps)
    assert {value.dtype for value in (*out.values(), steps["td_error"], steps["vec_td_error"])} == {torch.float32}
    total(out).backward()
    weights = [weight for weight in loss.parameters() if weight.grad is not None]
    assert len(weights) > 20
    assert all(weight.grad.isfinite().all() for weight in weights)


def test_losses_on_one_trunk_write_priorities_apart():
    loss, steps = attach_targets(TestCombinedLoss.make_loss()), make_steps()
    loss(steps)
    for name, kind in (
        ("td_error", test_dqn_loss.TestMouseDQNLoss),
        ("vec_td_error", test_vec_dqn_loss.TestVecDQNLoss),
    ):
        alone = make_steps()
        attach_targets(kind.make_loss())(alone)
        assert torch.allclose(steps[name], alone[name], atol=1e-6)
