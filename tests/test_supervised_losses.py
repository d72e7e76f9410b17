"""Learning from a teacher's values: contracts, and values by hand."""

import pytest
import torch
from loss_contract import INF, NUM_ACTIONS, TEACHER_ENTRIES, LossContract, make_model, make_steps
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_mouse.functional import SP_LOSSES
from torchrl_mouse.objectives import SupervisedPolicyLoss, SupervisedValueLoss


class TestSupervisedPolicyLoss(LossContract):
    loss_class = SupervisedPolicyLoss
    entries = TEACHER_ENTRIES

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

    def test_unknown_loss_type(self):
        with pytest.raises(
            ValueError, match="one of ce, ce-soft-fwd, ce-soft-bwd, kl-fwd, kl-bwd, js, got 'cross-entropy'"
        ):
            self.make_loss(loss_type="cross-entropy")

    @pytest.mark.parametrize("value", [0.0, -1.0])
    def test_temperature_out_of_range(self, value):
        with pytest.raises(ValueError, match=f"temperature must be positive, got {value}"):
            self.make_loss(temperature=value)

    @pytest.mark.parametrize("loss_type", SP_LOSSES)
    def test_every_loss_type_on_taught_decisions(self, loss_type):
        options = {"temperature": 0.5, "label_smoothing": 0.1}
        loss = SupervisedPolicyLoss(
            TensorDictModule(nn.Identity(), ["hidden"], ["sp"]), loss_type=loss_type, reduction="none", **options
        )
        steps = make_steps()
        logits = torch.randn(*steps.shape, NUM_ACTIONS, generator=torch.Generator().manual_seed(9)).requires_grad_()
        out = loss(steps.set("hidden", logits))["loss_sp"]
        expected = SP_LOSSES[loss_type](logits, steps["q_star"], **options)
        expected[:, [2, 5, 7]] = 0.0  # Terminal frames, and the last record.
        assert torch.allclose(out, expected)
        assert (out[0, 1], (out == 0).sum()) == (0, 10)
        out.sum().backward()
        assert logits.grad.isfinite().all()
        assert (logits.grad[1, :, 2] == 0).all()


class TestSupervisedValueLoss(LossContract):
    loss_class = SupervisedValueLoss
    entries = TEACHER_ENTRIES

    @staticmethod
    def make_loss(seed=0, **options):
        model = make_model(seed)
        return SupervisedValueLoss(model.head("sv"), trunk=model.trunk, **options)

    def test_unknown_loss_type(self):
        with pytest.raises(ValueError, match="SupervisedValueLoss: loss_type must be one of mse, mae, got 'huber'"):
            self.make_loss(loss_type="huber")

    def test_teacher_of_another_size(self, loss):
        steps = make_steps()
        steps["q_star"] = steps["q_star"][..., :2]
        with pytest.raises(ValueError, match=r"entry 'q_star' must have the head's shape \(3, 8, 3\), got \(3, 8, 2\)"):
            loss(steps)

    @pytest.mark.parametrize(("loss_type", "expected"), [("mse", (4 + 1 + 9) / 3 + 25), ("mae", (2 + 1 + 3) / 3 + 5)])
    def test_mean_over_taught_decisions_by_hand(self, loss_type, expected):
        loss = SupervisedValueLoss(TensorDictModule(nn.Identity(), ["hidden"], ["sv"]), loss_type=loss_type)
        values = torch.tensor([[1.0, 2.0, 3.0], [50.0, 50.0, 50.0], [0.0, 70.0, 70.0], [0.0, 0.0, 0.0]])
        q_star = torch.tensor([[3.0, 1.0, 0.0], [-INF, -INF, -INF], [5.0, -INF, -INF], [9.0, 9.0, 9.0]])
        flags = torch.zeros(4, 1, dtype=torch.bool)
        previous = {"terminated": flags, "truncated": torch.tensor([False, False, False, True]).unsqueeze(-1)}
        values.requires_grad_()
        out = loss(TensorDict({"hidden": values, "q_star": q_star, "previous": previous}, [4]))["loss_sv"]
        assert out.item() == pytest.approx(expected / 2)
        out.backward()
        moved = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
        assert (values.grad != 0).int().tolist() == moved


@pytest.mark.parametrize(("kind", "name"), [(SupervisedPolicyLoss, "sp"), (SupervisedValueLoss, "sv")])
def test_actions_that_are_not_allowed_have_no_teacher(kind, name):
    loss = kind(TensorDictModule(nn.Identity(), ["hidden"], [name]), reduction="none")
    steps = make_steps().set("hidden", torch.randn(3, 8, NUM_ACTIONS, generator=torch.Generator().manual_seed(1)))
    allowed = torch.rand(3, 8, NUM_ACTIONS, generator=torch.Generator().manual_seed(2)) < 0.6
    allowed[0, 0] = False  # where none is allowed, all count
    expected = steps.clone()
    expected["q_star"][~(allowed | ~allowed.any(-1, keepdim=True))] = -INF
    expected = loss(expected)
    assert (loss(steps) != expected).any()
    loss.set_keys(action_mask="allowed")
    assert (loss(steps.set("allowed", allowed)) == expected).all()
