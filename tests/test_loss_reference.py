"""The losses agree with MOUSE's reference cases: value, gradient norm, metrics."""

import json
from pathlib import Path

import pytest
import torch
from loss_contract import attach_targets
from safetensors.torch import load_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from test_dqn_loss import controlled_loss
from torch import nn

from torchrl_mouse import functional
from torchrl_mouse.functional import SP_LOSSES, SV_LOSSES, td_target
from torchrl_mouse.objectives import SupervisedPolicyLoss, SupervisedValueLoss, VecDQNLoss

REFERENCE = Path(__file__).parent / "reference_losses"
NORMALIZATION = {f"normalize_reward_{name}" for name in ("mean", "std", "eps", "std_target")}
CQL = {"cql_weight", "cql_scale_q_eps"}
GAMMAS = {"gamma", "gamma_terminal", "gamma_truncated"}


def reference_cases(loss):
    cases = json.loads((REFERENCE / "cases.json").read_text())
    return [case for case in cases if case["loss"] == loss]


def reference(name):
    return load_file(REFERENCE / f"{name}.safetensors")


CASES = [case for name in ("dqn", "vec_dqn", "sp", "sv") for case in reference_cases(name)]


def cases(*losses):
    chosen = [case for case in CASES if case["loss"] in losses]
    return pytest.mark.parametrize(
        "case", chosen, ids=lambda case: json.dumps([case["loss"], case["config"], case.get("q_star_masked", False)])
    )


def test_reference_cases_are_all_known():
    assert len(CASES) == len(json.loads((REFERENCE / "cases.json").read_text())) == 26
    assert {name: len(reference_cases(name)) for name in ("dqn", "vec_dqn", "sp", "sv")} == {
        "dqn": 6,
        "vec_dqn": 4,
        "sp": 12,
        "sv": 4,
    }


def part(config, names):
    return {name: value for name, value in config.items() if name in names}


def rewards(case, stream):
    """Returns the rewards that the case is about, of all pairs, before scale and shift."""
    reward = stream["xformed_reward" if case["config"].get("use_xformed_reward") else "reward"][:, 1:]
    return functional.normalize_reward(
        reward, torch.ones_like(reward, dtype=torch.bool), **part(case["config"], NORMALIZATION)
    )


def teacher(case):
    return reference("q_star_masked" if case.get("q_star_masked") else "stream")["q_star"]


def dqn(case, online, target, stream):
    config = {"gamma_truncated": 0.0, **case["config"]}  # MOUSE's default.
    done = stream["done"][:, 1:]
    discount = functional.episode_discount(done == 1, done == 2, **part(config, GAMMAS))
    scale, shift = config.get("reward_scale", 1.0), config.get("reward_shift", 0.0)
    y = td_target(rewards(case, stream), target[:, 1:].amax(-1), discount, scale=scale, shift=shift)
    return y, functional.dqn_costs(online[:, :-1], stream["action"][:, 1:], y, **part(config, CQL))


def agree(case, value, predictions, metrics):
    """Compares value and gradient norm, and the metrics too; MOUSE's own losses are their values again."""
    assert value.item() == pytest.approx(case["value"], abs=1e-5)
    value.backward()
    assert predictions.grad.norm().item() == pytest.approx(case["grad_norm"], abs=1e-5)
    expected = {name: value for name, value in case["metrics"].items() if not name.endswith("_loss")}
    assert set(metrics.keys()) >= set(expected)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, abs=1e-5), name


@cases("dqn")
def test_dqn_arithmetic(case):
    predictions, stream = reference("predictions"), reference("stream")
    online = predictions["dqn"].requires_grad_()
    y, costs = dqn(case, online, predictions["dqn_target"], stream)
    chosen = costs.chosen_action_value.detach()
    mean, std = functional.masked_moments(chosen.flatten(), torch.ones(chosen.numel(), dtype=torch.bool))
    metrics = {"q_values_mean": mean, "q_values_std": std, "q_values_min": chosen.min(), "q_values_max": chosen.max()}
    metrics |= {"q_values_target": y.mean(), "cql_penalty": costs.cql_penalty.mean()}
    agree(case, costs.dqn.mean() + costs.cql.mean(), online, metrics)


@cases("vec_dqn")
def test_vec_dqn_arithmetic(case):
    predictions, stream = reference("predictions"), reference("stream")
    online, config = predictions["vec_dqn"].requires_grad_(), case["config"]
    following = functional.greedy_vector(predictions["vec_dqn_target"][:, 1:])
    theta = config.get("reward_scale", 1.0) * rewards(case, stream) + config.get("reward_shift", 0.0)
    cost = functional.vec_dqn_cost(online[:, :-1], stream["action"][:, 1:], following, theta)
    assert cost.shape == theta.shape
    sizes = functional.vec_dqn_scores(online[:, -1]).abs() / torch.pi
    metrics = {f"vec_dqn_score_abs_{name}": getattr(sizes, name)() for name in ("min", "max", "mean")}
    agree(case, cost.mean(), online, metrics)


@cases("sp")
def test_sp_arithmetic(case):
    logits, options = reference("predictions")["sp"].requires_grad_(), dict(case["config"])
    cost = SP_LOSSES[options.pop("loss_type")](logits, teacher(case), **options)
    assert cost.shape == logits.shape[:-1]
    agree(case, cost.mean(), logits, {})


@cases("sv")
def test_sv_arithmetic(case):
    values = reference("predictions")["sv"].requires_grad_()
    cost = SV_LOSSES[case["config"]["loss_type"]](values, teacher(case))
    assert cost.shape == values.shape[:-1]
    agree(case, cost.mean(), values, {})


# Through the modules


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


DQN_CASES = [case for case in reference_cases("dqn") if not part(case["config"], NORMALIZATION)]


@pytest.mark.parametrize("case", DQN_CASES, ids=lambda case: json.dumps(case["config"]))
def test_dqn_module(case):
    options = {"gamma_truncated": 0.0, **case["config"]}
    xformed = options.pop("use_xformed_reward", False)
    predictions = reference("predictions")
    online = predictions["dqn"].requires_grad_()
    steps = pairs_as_windows(reference("stream"), online, predictions["dqn_target"])
    loss = controlled_loss(num_actions=5, trunk=False, **options)
    if xformed:
        loss.set_keys(reward="xformed_reward")
    out = loss(steps)
    agree(case, out["loss_dqn"] + out["loss_cql"], online, out)


def endless(stream, hidden):
    """Returns the stream as windows in which no episode ends, whose last frame decides, but has no successor."""
    num = stream["reward"].shape[-1]
    flags = torch.zeros(*stream["reward"].shape, 1, dtype=torch.bool)
    ends = {"terminated": flags, "truncated": flags}
    following = {name: stream[name].roll(-1, -1).unsqueeze(-1) for name in ("reward", "xformed_reward")}
    return TensorDict(
        {
            "hidden": hidden,
            "is_init": flags,
            "action": stream["action"].roll(-1, -1),
            "previous": ends,
            "next": {**following, "done": flags, "previous": ends},
        },
        [len(flags), num],
    )


@pytest.mark.parametrize("case", reference_cases("dqn"), ids=lambda case: json.dumps(case["config"]))
def test_dqn_module_without_ends_equals_the_arithmetic(case):
    """Windows of several pairs, whose rewards are normalised together."""
    predictions, stream = reference("predictions"), reference("stream")
    online, target = predictions["dqn"].requires_grad_(), predictions["dqn_target"]
    y, costs = dqn(case, online, target, {**stream, "done": torch.zeros_like(stream["done"])})
    options = dict(case["config"])
    xformed = options.pop("use_xformed_reward", False)
    loss = controlled_loss(num_actions=5, trunk=False, **options)
    if xformed:
        loss.set_keys(reward="xformed_reward")
    out = loss(endless(stream, torch.cat([online, target], -1)))
    assert out["loss_dqn"].item() == pytest.approx(costs.dqn.mean().item(), abs=1e-5)
    assert out["loss_cql"].item() == pytest.approx(costs.cql.mean().item(), abs=1e-5)
    assert out["q_values_target"].item() == pytest.approx(y.mean().item(), abs=1e-5)


class _Halves(nn.Module):
    """A head whose online copy reads one half of ``hidden``, its target the other."""

    def __init__(self):
        super().__init__()
        self.online = nn.Parameter(torch.ones(()))

    def forward(self, hidden):
        online, target = hidden.chunk(2, -1)
        return torch.where(self.online == 1, online, target)


@cases("vec_dqn")
def test_vec_dqn_module(case):
    predictions = reference("predictions")
    online = predictions["vec_dqn"].requires_grad_()
    options = dict(case["config"])
    xformed = options.pop("use_xformed_reward", False)
    loss = attach_targets(VecDQNLoss(TensorDictModule(_Halves(), ["hidden"], ["vec_dqn"]), **options))
    loss.target_head_params["module", "online"].zero_()
    if xformed:
        loss.set_keys(reward="xformed_reward")
    out = loss(endless(reference("stream"), torch.cat([online, predictions["vec_dqn_target"]], -1)))
    agree(case, out["loss_vec_dqn"], online, out)


@cases("sp", "sv")
def test_supervised_modules(case):
    name = case["loss"]
    kind = {"sp": SupervisedPolicyLoss, "sv": SupervisedValueLoss}[name]
    loss = kind(TensorDictModule(nn.Identity(), ["hidden"], [name]), **case["config"])
    predictions = reference("predictions")[name].requires_grad_()
    steps = endless(reference("stream"), predictions)
    agree(case, loss(steps.set("q_star", teacher(case)))[f"loss_{name}"], predictions, {})
