"""TorchRL's own losses on the trunk: which next value an end leaves, and what the mask of decisions leaves out."""

import pytest
import torch
from loss_contract import NUM_ACTIONS, make_model, make_steps, total
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical
from torchrl.modules import ValueOperator, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss, DiscreteSACLoss, LossModule, SACLoss, SoftUpdate
from torchrl.objectives.value import GAE

from torchrl_mouse import schema
from torchrl_mouse.envs import DecisionMask
from torchrl_mouse.modules import GaussianHead, categorical_policy, gaussian_policy
from torchrl_mouse.objectives import CombinedLoss

GAMMA, LMBDA = 0.5, 0.5
EPISODE_END = ("previous", "terminated")


def flags(*values):
    return torch.tensor(values, dtype=torch.bool).reshape(1, -1, 1)


def column(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1)


def make_ppo(policy, value, **options):
    options = {"entropy_bonus": False, "critic_coeff": 1.0, "loss_critic_type": "l2", **options}
    loss = ClipPPOLoss(policy, ValueOperator(value, in_keys=[schema.HIDDEN]), **options)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA)
    return loss


class Estimate(LossModule):
    """Runs GAE on what the combined loss hands to it, and keeps the outcome."""

    in_keys = (schema.HIDDEN,)
    out_keys = ("loss_estimate",)

    def __init__(self, value, **keys):
        super().__init__()
        self.gae = GAE(gamma=GAMMA, lmbda=LMBDA, value_network=ValueOperator(value, in_keys=[schema.HIDDEN]))
        self.gae.set_keys(**keys)

    def forward(self, tensordict):
        self.seen = self.gae(tensordict)
        return TensorDict({"loss_estimate": tensordict[schema.HIDDEN].sum()})


# --- next values by hand: a frame's hidden state is its observation, and the value of a frame is that number.


def number_trunk():
    return TensorDictModule(nn.Identity(), [schema.OBSERVATION], [schema.HIDDEN])


def number_value():
    head = nn.Linear(1, 1, bias=False)
    nn.init.ones_(head.weight)
    return head


def number_steps(observation, following, reward, *, done=(0, 0, 0, 0), terminated=(0, 0, 0, 0), is_init=(1, 0, 0, 0)):
    """Steps ``[1, 4]`` whose actions were drawn from a uniform policy over three."""
    zero = flags(0, 0, 0, 0)
    return TensorDict(
        {
            schema.OBSERVATION: column(*observation),
            schema.IS_INIT: flags(*is_init),
            schema.ACTION: torch.tensor([[0, 1, 2, 0]]),
            "action_log_prob": torch.full((1, 4), 1 / 3).log(),
            "previous": {"terminated": zero, "truncated": zero},
            "next": {
                schema.OBSERVATION: column(*following),
                "reward": column(*reward),
                "done": flags(*done),
                "terminated": flags(*terminated),
                "previous": {"terminated": zero, "truncated": zero},
            },
        },
        [1, 4],
    )


def number_ppo(**options):
    logits = nn.Linear(1, 3)
    nn.init.zeros_(logits.weight)
    nn.init.zeros_(logits.bias)
    policy = categorical_policy(TensorDictModule(logits, [schema.HIDDEN], ["logits"]), Categorical(3))
    return make_ppo(policy, number_value(), **options)


def advantages(steps, **keys):
    """The advantages of PPO inside the combined loss: the objective at a ratio of 1, and the critic's error."""
    ppo = number_ppo(reduction="none")
    ppo.set_keys(**keys)
    out = CombinedLoss(number_trunk(), {"ppo": ppo})(steps)
    advantage = -out["loss_objective"].flatten()
    # the critic's squared error is that of the target, which lies an advantage above the value
    torch.testing.assert_close(out["loss_critic"].flatten(), advantage**2)
    estimate = Estimate(number_value(), **keys)
    CombinedLoss(number_trunk(), {"estimate": estimate})(steps)
    torch.testing.assert_close(estimate.seen["advantage"].flatten(), advantage)
    target = estimate.seen["value_target"].flatten()
    torch.testing.assert_close(target, advantage + steps[schema.OBSERVATION].flatten())
    return advantage.tolist()


def test_the_window_ends_with_the_value_of_the_frame_after_it():
    steps = number_steps([1, 2, 3, 4], [2, 3, 4, 7], [1, 2, 4, 8])
    # r + V'/2 - V: 1, 1.5, 3, and 8 + 7/2 - 4 = 7.5; then each a quarter of the next one's sum
    assert advantages(steps) == [1 + (1.5 + (3 + 7.5 / 4) / 4) / 4, 1.5 + (3 + 7.5 / 4) / 4, 3 + 7.5 / 4, 7.5]


def test_a_task_that_terminates_leaves_no_next_value():
    ends = {"done": (0, 0, 1, 0), "terminated": (0, 0, 1, 0)}
    steps = number_steps([1, 2, 3, 4], [2, 3, 10, 7], [1, 2, 4, 8], is_init=(1, 0, 0, 1), **ends)
    # the third step: 4 - 3 = 1, and nothing of the fourth, another task's
    assert advantages(steps) == [1 + (1.5 + 1 / 4) / 4, 1.5 + 1 / 4, 1.0, 7.5]


@pytest.mark.parametrize(
    ("keys", "last"),
    [
        # TorchRL bootstraps where a task was cut, here from the next task's first frame (4), not from its own (10)
        ({}, 4 + 4 / 2 - 3),
        # pointed at the task's end: no next value at all
        ({"terminated": "done"}, 4 - 3),
    ],
)
def test_a_task_that_is_cut_inside_the_window(keys, last):
    steps = number_steps([1, 2, 3, 4], [2, 3, 10, 7], [1, 2, 4, 8], is_init=(1, 0, 0, 1), done=(0, 0, 1, 0))
    assert advantages(steps, **keys) == [1 + (1.5 + last / 4) / 4, 1.5 + last / 4, last, 7.5]


@pytest.mark.parametrize(("keys", "last"), [({}, 8 + 10 / 2 - 4), ({"terminated": "done"}, 8 - 4)])
def test_a_task_that_is_cut_at_the_windows_end_leaves_its_own_last_frame(keys, last):
    steps = number_steps([1, 2, 3, 4], [2, 3, 4, 10], [1, 2, 4, 8], done=(0, 0, 0, 1))
    assert advantages(steps, **keys)[-2:] == [3 + last / 4, last]


def episode_steps():
    """An episode ends with the second step: the third frame is terminal, and nothing is decided there."""
    steps = number_steps([1, 2, 3, 4], [2, 3, 4, 7], [1, 2, 0, 8])
    steps[EPISODE_END], steps["next", "previous", "terminated"] = flags(0, 0, 1, 0), flags(0, 1, 0, 0)
    return steps


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # over the end: 2 + V(terminal frame)/2 - 2 = 1.5, then the terminal frame's 0 + 4/2 - 3 = -1
        ({}, [1 + (1.5 + (-1 + 7.5 / 4) / 4) / 4, 1.5 + (-1 + 7.5 / 4) / 4, -1 + 7.5 / 4, 7.5]),
        # no next value, 2 - 2 = 0, but what comes after the end still counts, a quarter of it
        ({"terminated": EPISODE_END}, [1 + (0 + (-1 + 7.5 / 4) / 4) / 4, (-1 + 7.5 / 4) / 4, -1 + 7.5 / 4, 7.5]),
        # the end of everything
        ({"terminated": EPISODE_END, "done": EPISODE_END}, [1.0, 0.0, -1 + 7.5 / 4, 7.5]),
    ],
    ids=["over it", "terminated", "terminated and done"],
)
def test_an_episode_ends_inside_a_task(keys, expected):
    assert advantages(episode_steps(), **keys) == expected


# --- next values of a real trunk: each next frame by itself, after all that came before it in its task.


def real_model():
    model = make_model()
    for parameter in model.trunk.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)  # with its initial weights a context moves a hidden state by 1e-3 only
    return model


def real_steps():
    """Windows of 7 steps with a frame after the last; the last row begins a second task at its last step."""
    steps = make_steps()[:, :7].exclude(schema.MASK)
    steps["next", "terminated"] = torch.zeros_like(steps["next", "done"])
    # how the first task ended, which its window does not hold
    steps["next", schema.OBSERVATION][-1, 5] = 9.0
    return steps


def next_values(model, value, steps):
    """The value of each step's next frame ``[B, T]``, as if it were the last frame seen."""
    frame_keys = [key for key in model.trunk.in_keys if key != schema.STREAM]
    roots = steps.select(*frame_keys)
    after = steps["next"].select(*frame_keys)
    out = torch.zeros(steps.shape)
    num = steps.shape[1]
    for row in range(steps.shape[0]):
        for step in range(num):
            inside = step + 1 < num
            following = roots[row, step + 1] if inside else after[row, step]
            starts = roots[schema.IS_INIT][row, : step + 1].flatten().nonzero().flatten()
            first = step + 1 if inside and bool(roots[schema.IS_INIT][row, step + 1]) else int(starts[-1])
            frames = torch.cat([roots[row, first : step + 1], following.unsqueeze(0)]).unsqueeze(0)
            with set_recurrent_mode(True), torch.no_grad():
                out[row, step] = value(model.trunk(frames)[schema.HIDDEN][0, -1])
    return out


def recursion(reward, value, next_value, done, terminated):
    """Generalised advantages, arXiv:1506.02438, one step after the other."""
    advantage = torch.zeros_like(value)
    for row in range(value.shape[0]):
        later = 0.0
        for step in reversed(range(value.shape[1])):
            bootstrap = 0.0 if terminated[row, step] else next_value[row, step]
            error = reward[row, step] + GAMMA * bootstrap - value[row, step]
            later = error + (0.0 if done[row, step] else GAMMA * LMBDA * later)
            advantage[row, step] = later
    return advantage


KEYS = [
    ({}, "done", "terminated"),
    ({"terminated": "done"}, "done", "done"),
    ({"terminated": EPISODE_END}, "done", EPISODE_END),
    ({"terminated": EPISODE_END, "done": EPISODE_END}, EPISODE_END, EPISODE_END),
]


@pytest.mark.parametrize(("keys", "done", "terminated"), KEYS, ids=["default", "cut", "episodes", "episodes alone"])
def test_real_trunk_equals_the_recursion_by_hand(keys, done, terminated):
    model, steps = real_model(), real_steps()
    value = nn.Linear(16, 1)
    with set_recurrent_mode(True), torch.no_grad():
        hidden = model.trunk(steps.clone())[schema.HIDDEN]
        values = value(hidden).squeeze(-1)
        policy = categorical_policy(model.head("sp"), Categorical(NUM_ACTIONS))
        logits = model.head("sp")(TensorDict({schema.HIDDEN: hidden}, steps.shape))["sp"]
    log_prob = logits.log_softmax(-1).gather(-1, steps[schema.ACTION].unsqueeze(-1)).squeeze(-1)
    steps["action_log_prob"] = log_prob
    following = next_values(model, value, steps)

    ends = {name: steps.get(("next", *((key,) if isinstance(key, str) else key))).squeeze(-1) for name, key in
            (("done", done), ("terminated", terminated))}  # fmt: skip
    assert ends["done"].any()
    expected = recursion(steps["next", "reward"].squeeze(-1), values, following, **ends)

    estimate = Estimate(value, **keys)
    CombinedLoss(model.trunk, {"estimate": estimate})(steps)
    torch.testing.assert_close(estimate.seen["next", "state_value"].squeeze(-1), following, atol=1e-5, rtol=0)
    torch.testing.assert_close(estimate.seen["advantage"].squeeze(-1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(estimate.seen["value_target"].squeeze(-1), expected + values, atol=1e-5, rtol=0)

    ppo = make_ppo(policy, value, reduction="none")
    ppo.set_keys(**keys)
    out = CombinedLoss(model.trunk, {"ppo": ppo})(steps)
    torch.testing.assert_close(-out["loss_objective"].squeeze(-1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(out["loss_critic"].squeeze(-1), expected**2, atol=1e-4, rtol=0)


def test_next_frames_without_their_past_are_worth_something_else():
    model, steps, value = real_model(), real_steps(), nn.Linear(16, 1)
    with set_recurrent_mode(True), torch.no_grad():
        frames = steps["next"].select(*model.trunk.in_keys, strict=False)
        alone = value(model.trunk(frames)[schema.HIDDEN]).squeeze(-1)
    assert (alone - next_values(model, value, steps)).abs().max() > 0.01


# --- the mask of decisions


def discrete_ppo(model, **options):
    return make_ppo(
        categorical_policy(model.head("sp"), Categorical(NUM_ACTIONS)), nn.Linear(16, 1), entropy_bonus=True, **options
    )


def continuous_sac(model, **options):
    head = TensorDictModule(GaussianHead(16, 2, hidden_dim=8), [schema.HIDDEN], ["gaussian"])
    spec = Bounded(-1.0, 1.0, shape=(2,))

    class ActionValue(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(18, 1)

        def forward(self, hidden, action):
            return self.head(torch.cat([hidden, action], -1))

    value = ValueOperator(ActionValue(), in_keys=[schema.HIDDEN, schema.ACTION])
    loss = SACLoss(gaussian_policy(head, spec), value, action_spec=spec, alpha_init=0.5, **options)
    loss.make_value_estimator(gamma=GAMMA)
    SoftUpdate(loss, tau=0.1)
    return loss


def discrete_sac(model, **options):
    value = TensorDictModule(nn.Linear(16, NUM_ACTIONS), [schema.HIDDEN], ["action_value"])
    policy = categorical_policy(model.head("sp"), Categorical(NUM_ACTIONS))
    options = {"action_space": "categorical", "num_actions": NUM_ACTIONS, "alpha_init": 0.5, **options}
    loss = DiscreteSACLoss(policy, value, **options)
    loss.make_value_estimator(gamma=GAMMA)
    SoftUpdate(loss, tau=0.1)
    return loss


LOSSES = {"ppo": discrete_ppo, "sac": continuous_sac, "discrete sac": discrete_sac}


def masked_steps(name):
    steps = DecisionMask()(real_steps())
    generator = torch.Generator().manual_seed(3)
    if name == "sac":
        steps[schema.ACTION] = torch.rand(*steps.shape, 2, generator=generator) * 1.8 - 0.9
    if name == "ppo":
        steps["action_log_prob"] = -1 - torch.rand(steps.shape, generator=generator)
        steps["advantage"] = torch.randn(*steps.shape, 1, generator=generator)
        steps["value_target"] = torch.randn(*steps.shape, 1, generator=generator)
    assert (~steps[schema.MASK]).sum() == 6
    return steps


def disturbed(steps):
    """Other numbers wherever nothing is decided."""
    other, masked = steps.clone(), ~steps[schema.MASK]
    if steps[schema.ACTION].is_floating_point():
        other[schema.ACTION][masked] = -other[schema.ACTION][masked]
    else:
        other[schema.ACTION][masked] = (other[schema.ACTION][masked] + 1) % NUM_ACTIONS
    for key in ("advantage", "value_target", "action_log_prob"):
        if key in other:
            other[key][masked] -= 1.0
    return other


def run(loss, steps):
    """The losses and their gradients."""
    torch.manual_seed(0)  # SAC draws actions
    loss.zero_grad()
    out = loss(steps)
    total(out).backward()
    terms = {key: value.detach() for key, value in out.items() if key.startswith("loss")}
    return terms, {name: weight.grad.clone() for name, weight in loss.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_decided_is_left_out(name):
    model = real_model()
    loss = CombinedLoss(model.trunk, {name: LOSSES[name](model)})
    steps = masked_steps(name)
    terms, gradients = run(loss, steps)
    assert gradients
    others, other_gradients = run(loss, disturbed(steps))
    for key, value in terms.items():
        torch.testing.assert_close(others[key], value, rtol=0, atol=0, msg=key)
    for key, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[key], gradient, rtol=0, atol=0, msg=key)
    # without the mask, and with it elsewhere, it is not so
    for moved in (steps.exclude(schema.MASK), steps.clone().set(schema.MASK, steps[schema.MASK].roll(1, 1))):
        others, _ = run(loss, moved)
        assert all(others[key] != value for key, value in terms.items())


@pytest.mark.parametrize("name", LOSSES)
def test_means_are_over_the_decisions(name):
    model = real_model()
    part = LOSSES[name](model)
    steps = masked_steps(name)
    mean, _ = run(CombinedLoss(model.trunk, {name: part}), steps)
    part.reduction = "none"
    part.scalar_output_mode = "exclude"
    torch.manual_seed(0)
    each = CombinedLoss(model.trunk, {name: part})(steps)
    decided = steps[schema.MASK]
    for key, value in mean.items():
        single = each[key].detach().reshape(steps.shape)
        assert (single[~decided] == 0).all(), key
        torch.testing.assert_close(value, single[decided].mean(), msg=key)


def test_normalised_advantages_count_every_step():
    """The one thing that the mask does not reach: ``normalize_advantage`` takes its mean and spread over all steps."""
    model = real_model()
    steps = masked_steps("ppo")
    for options, same in (({"normalize_advantage": False}, True), ({"normalize_advantage": True}, False)):
        loss = CombinedLoss(model.trunk, {"ppo": discrete_ppo(model, **options)})
        objective = [run(loss, each)[0]["loss_objective"] for each in (steps, disturbed(steps))]
        assert bool(objective[0] == objective[1]) is same


# --- returns that span episodes: a terminal frame's value is a target of the step before it.


def table_ppo():
    """A critic with a number of its own for each of five frames."""
    value = nn.Linear(5, 1, bias=False)
    value.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0, 7.0]]))
    logits = TensorDictModule(nn.Linear(5, 3, bias=False), [schema.HIDDEN], ["logits"])
    nn.init.zeros_(logits.module.weight)
    return make_ppo(categorical_policy(logits, Categorical(3)), value), value.weight, logits.module.weight


def table_steps():
    steps, frames = DecisionMask()(episode_steps()), torch.eye(5).unsqueeze(0)
    steps[schema.OBSERVATION], steps["next", schema.OBSERVATION] = frames[:, :4], frames[:, 1:]
    return steps


def table_gradients(ppo, *weights):
    total(CombinedLoss(number_trunk(), {"ppo": ppo})(table_steps())).backward()
    return [weight.grad for weight in weights]


# the advantages of `test_an_episode_ends_inside_a_task`, over the end
SPANNING = [1 + (1.5 + (-1 + 7.5 / 4) / 4) / 4, 1.5 + (-1 + 7.5 / 4) / 4, -1 + 7.5 / 4, 7.5]


def test_a_masked_critic_never_learns_the_terminal_frame_it_bootstraps_from():
    ppo, table, _ = table_ppo()
    (gradient,) = table_gradients(ppo, table)
    # -2 (target - value) / 3 decisions, and none at the terminal frame, whose value (3) made up those before it
    expected = [-2 * SPANNING[0] / 3, -2 * SPANNING[1] / 3, 0.0, -2 * SPANNING[3] / 3, 0.0]
    torch.testing.assert_close(gradient, torch.tensor([expected]))


def test_returns_over_episodes_need_the_critic_everywhere_and_the_actor_at_decisions():
    masked, _, policy = table_ppo()
    (expected,) = table_gradients(masked, policy)
    ppo, table, policy = table_ppo()
    ppo.loss_mask_key = None

    def decisions_alone(module, inputs, tensordict):
        tensordict["advantage"] = tensordict["advantage"] * schema.decision_mask(tensordict).unsqueeze(-1)

    ppo.value_estimator.register_forward_hook(decisions_alone)
    gradient, actor = table_gradients(ppo, table, policy)
    torch.testing.assert_close(gradient, torch.tensor([[-2 * each / 4 for each in SPANNING] + [0.0]]))
    torch.testing.assert_close(actor, expected * 3 / 4)  # a mean over four steps instead of three
    assert (actor[:, 2] == 0).all()
    assert (actor[:, [0, 1, 3]] != 0).all()
