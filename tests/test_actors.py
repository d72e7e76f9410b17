"""Actors act on a head's scores through TorchRL's own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule, QValueModule

from torchrl_mouse import schema
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.functional import vec_dqn_scores
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.modules import (
    DQNHead,
    StickyActions,
    SwiGLUHead,
    VecDQNHead,
    VectorHead,
    categorical_policy,
    make_actor,
)

SPECS = {"categorical": Categorical(5), "one-hot": OneHot(5, dtype=torch.int64)}
HEADS = {
    "swiglu": lambda: SwiGLUHead(16, 5),
    "dqn": lambda: DQNHead(16, 5),
    "discounts": lambda: DQNHead(16, 5, num_discounts=3),
    "vector": lambda: VectorHead(16, 5, vec_dim=4),
    "vec_dqn": lambda: VecDQNHead(16, 5, vec_dim=2),
}


def scores_actor(spec, temperature=0.0, **options):
    """An actor whose scores are the observation: trunk and head pass it on."""
    trunk = TensorDictModule(torch.nn.Identity(), [schema.OBSERVATION], [schema.HIDDEN])
    head = TensorDictModule(torch.nn.Identity(), [schema.HIDDEN], ["dqn"])
    return make_actor(trunk, head, spec, temperature=temperature, **options)


def head_actor(network, spec, **options):
    """An actor whose hidden state is the observation."""
    trunk = TensorDictModule(torch.nn.Identity(), [schema.OBSERVATION], [schema.HIDDEN])
    return make_actor(trunk, TensorDictModule(network, [schema.HIDDEN], ["head"]), spec, **options)


def head_scores(network, hidden, mask=None):
    output = network(hidden)
    if isinstance(network, DQNHead) and output.ndim > hidden.ndim:
        return output[..., 0, :]  # the first of several discounts
    return vec_dqn_scores(output, mask) if output.ndim > hidden.ndim else output


def random_mask(rows, actions):
    """Allows at least one action in each row, and only one in some."""
    mask = torch.rand(rows, actions) < 0.4
    mask[torch.arange(rows), torch.randint(actions, (rows,))] = True
    return mask


def act(actor, scores, **entries):
    return actor(TensorDict({schema.OBSERVATION: scores, **entries}, scores.shape[:-1]))


def as_ids(action, kind):
    return action.long().argmax(-1) if kind == "one-hot" else action


@pytest.mark.parametrize("kind", SPECS)
def test_temperature_zero_takes_the_best_action(kind):
    actor = scores_actor(SPECS[kind])
    assert isinstance(actor[-1], QValueModule)
    scores = torch.randn(64, 5)
    out = act(actor, scores)
    assert torch.equal(as_ids(out[schema.ACTION], kind), scores.argmax(-1))
    assert torch.equal(out["dqn"], scores)
    assert torch.equal(out["chosen_action_value"], scores.amax(-1, keepdim=True))
    assert SPECS[kind].expand(64, *SPECS[kind].shape).is_in(out[schema.ACTION])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("kind", SPECS)
def test_temperature_draws_from_the_softmax(kind, temperature):
    num = 20_000
    scores = torch.tensor([0.3, -0.4, 1.1, 0.0, 0.6])
    out = act(scores_actor(SPECS[kind], temperature), scores.expand(num, -1))
    assert SPECS[kind].expand(num, *SPECS[kind].shape).is_in(out[schema.ACTION])
    observed = torch.bincount(as_ids(out[schema.ACTION], kind), minlength=5)

    def chi_square(of):
        expected = num * (scores / of).softmax(-1)
        return ((observed - expected) ** 2 / expected).sum()

    # four degrees of freedom: above 23.5 with probability 1e-4
    assert chi_square(temperature) < 23.5
    assert chi_square(1.0) > 23.5  # no other temperature would pass


@pytest.mark.parametrize("kind", SPECS)
def test_deterministic_exploration_takes_the_best_action(kind):
    actor, scores = scores_actor(SPECS[kind], 1.0), torch.randn(256, 5)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(as_ids(act(actor, scores)[schema.ACTION], kind), scores.argmax(-1))
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(as_ids(act(actor, scores)[schema.ACTION], kind), scores.argmax(-1))
    assert not torch.equal(as_ids(act(actor, scores)[schema.ACTION], kind), scores.argmax(-1))  # the default


@pytest.mark.parametrize("kind", SPECS)
def test_epsilon_greedy_is_appended(kind):
    spec = SPECS[kind]
    explore = EGreedyModule(spec=spec, eps_init=0.5, eps_end=0.5, annealing_num_steps=1)
    policy = TensorDictSequential(scores_actor(spec), explore)
    scores = torch.randn(4000, 5)
    greedy = as_ids(act(policy, scores)[schema.ACTION], kind) == scores.argmax(-1)
    assert 0.55 < greedy.float().mean() < 0.65  # expected 0.6, standard deviation 0.008
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(as_ids(act(policy, scores)[schema.ACTION], kind), scores.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nested_action_key(temperature):
    actor = scores_actor(SPECS["categorical"], temperature, action_key=("agent", "act"))
    assert act(actor, torch.randn(3, 5))["agent", "act"].shape == (3,)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", SPECS)
def test_actor_of_a_model(kind, temperature, make_model, random_steps):
    model = make_model(sp_head_kwargs={"hidden_dim": 8})
    steps = random_steps(3, 4)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for name in ("dqn", "sp"):
            actor = model.actor(SPECS[kind], head=name, temperature=temperature)
            for t in range(4):
                out = actor(steps[:, t].clone())
                assert torch.equal(out[name], model.head(name)(out.clone())[name])
                assert torch.equal(as_ids(out[schema.ACTION], kind), out[name].argmax(-1))


def test_configuration_chooses_the_head(make_model, random_steps):
    heads = {"dqn_head_kwargs": {"hidden_dim": 8}, "sp_head_kwargs": {"hidden_dim": 8}}
    steps = random_steps(3, 1)[:, 0]
    for action_head, first, other in ((None, "dqn", "sp"), ("sp", "sp", "dqn")):
        out = make_model(**heads, action_head=action_head).actor(SPECS["categorical"])(steps.clone())
        assert first in out
        assert other not in out


@pytest.mark.parametrize("spec", [Categorical(4), OneHot(6)], ids=["categorical", "one-hot"])
def test_another_number_of_actions(spec, make_model):
    with pytest.raises(ValueError, match=rf"must have the head's 5 actions, got {spec.space.n}\. Build the model with"):
        make_model().actor(spec)


@pytest.mark.parametrize(
    "spec", [Bounded(-1, 1, shape=(5,)), MultiCategorical([5, 5]), MultiOneHot([5, 5])], ids=lambda s: type(s).__name__
)
def test_other_spaces(spec, make_model):
    with pytest.raises(TypeError, match=rf"must be Categorical or OneHot, got {type(spec).__name__}"):
        make_model().actor(spec)
    with pytest.raises(TypeError, match=rf"must be Categorical or OneHot, got {type(spec).__name__}"):
        scores_actor(spec)


def test_bad_temperature_and_head(make_model):
    with pytest.raises(ValueError, match=r"temperature must be at least 0, got -0\.5"):
        scores_actor(SPECS["categorical"], -0.5)
    with pytest.raises(ValueError, match=r"temperature must be at least 0, got nan"):
        scores_actor(SPECS["categorical"], float("nan"))
    with pytest.raises(KeyError, match=r"head must be one of the model's \(dqn\), got 'sp'"):
        make_model().actor(SPECS["categorical"], head="sp")
    with pytest.raises(KeyError, match=r"head must be one of the model's \(none\), got ''"):
        make_model(dqn_head_kwargs=None).actor(SPECS["categorical"])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_every_head_acts(name, kind, temperature):
    network, hidden = HEADS[name](), torch.randn(256, 16)
    scores = head_scores(network, hidden)
    assert scores.shape == (256, 5)
    actor = head_actor(network, SPECS[kind], temperature=temperature)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        out = act(actor, hidden)
    assert torch.equal(as_ids(out[schema.ACTION], kind), scores.argmax(-1))
    assert torch.equal(out["head"], network(hidden))
    vectors = "vec" in name
    assert ("vec_dqn_scores" in out) == vectors
    if vectors:
        assert torch.equal(out["vec_dqn_scores"], scores)
    with set_exploration_type(ExplorationType.RANDOM):
        drawn = as_ids(act(actor, hidden)[schema.ACTION], kind)
    assert torch.equal(drawn, scores.argmax(-1)) == (temperature == 0)


def test_vectors_are_drawn_from_the_softmax_of_their_scores():
    network, hidden = VecDQNHead(16, 5, vec_dim=2), torch.randn(16)
    out = act(head_actor(network, Categorical(5), temperature=2.0), hidden.expand(20_000, -1))
    expected = (head_scores(network, hidden) / 2.0).softmax(-1)
    observed = torch.bincount(out[schema.ACTION], minlength=5) / 20_000
    torch.testing.assert_close(observed, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize(("num_actions", "reference"), [(None, "greedy_action"), (3, "greedy_action_first3")])
def test_vectors_choose_mouses_actions(num_actions, reference):
    directory = Path(__file__).parent / "reference" / "models" / "llama_concat"
    outputs, weights = (load_file(directory / f"{name}.safetensors") for name in ("outputs", "model"))
    network, prefix = VecDQNHead(16, 5, vec_dim=2, hidden_dim=8), "vec_dqn_head."
    network.load_state_dict({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    actor = head_actor(network, Categorical(num_actions or 5), num_actions=num_actions)
    assert act(actor, outputs["hidden"][:, -1])[schema.ACTION].tolist() == outputs[reference].tolist()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_actions_only(name, temperature):
    network, hidden = HEADS[name](), torch.randn(256, 16)
    for spec in (Categorical(3), OneHot(3, dtype=torch.int64)):
        actor = head_actor(network, spec, temperature=temperature, num_actions=3)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            out = act(actor, hidden)
        ids = out[schema.ACTION].argmax(-1) if isinstance(spec, OneHot) else out[schema.ACTION]
        assert torch.equal(ids, head_scores(network, hidden)[:, :3].argmax(-1))
        assert torch.equal(out["head"], network(hidden)), "the head's output is whole"
        assert act(actor, hidden)[schema.ACTION].max() <= 2
    assert (head_scores(network, hidden).argmax(-1) > 2).any()  # The others would have been chosen.


def test_number_of_actions_must_be_the_spaces():
    with pytest.raises(ValueError, match=r"make_actor: num_actions must be the action space's 5, got 3\."):
        head_actor(DQNHead(16, 5), Categorical(5), num_actions=3)
    with pytest.raises(ValueError, match=r"make_actor: num_actions must be the action space's 3, got 5\."):
        head_actor(DQNHead(16, 5), Categorical(3), num_actions=5)
    with pytest.raises(ValueError, match=r"make_actor: num_actions must be at most 5, got 6\."):
        head_actor(VecDQNHead(16, 5, vec_dim=2), Categorical(6), num_actions=6)
    with pytest.raises(TypeError, match=r"make_actor: num_actions must be an integer, got 3\.0\."):
        head_actor(DQNHead(16, 5), Categorical(3), num_actions=3.0)


@pytest.mark.parametrize("name", HEADS)
def test_number_of_actions_of_a_head_without_a_model(name):
    with pytest.raises(ValueError, match=r"make_actor: the action space must have the head's 5 actions, got 3\."):
        head_actor(HEADS[name](), Categorical(3))
    assert act(head_actor(HEADS[name](), Categorical(5)), torch.randn(4, 16))[schema.ACTION].shape == (4,)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_actions(name, kind, temperature):
    network, hidden, mask = HEADS[name](), torch.randn(512, 16), random_mask(512, 5)
    key = ("agent", "allowed")
    actor = head_actor(network, SPECS[kind], temperature=temperature, action_mask_key=key)
    scores = head_scores(network, hidden, mask)
    best = scores.masked_fill(~mask, -torch.inf).argmax(-1)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        out = act(actor, hidden, agent={"allowed": mask})
    assert torch.equal(as_ids(out[schema.ACTION], kind), best)
    assert not torch.equal(best, scores.argmax(-1))
    assert torch.equal(out["head"], network(hidden))
    if temperature == 0:
        assert torch.equal(out["chosen_action_value"], scores.gather(-1, best.unsqueeze(-1)))
    drawn = [as_ids(act(actor, hidden, agent={"allowed": mask})[schema.ACTION], kind) for _ in range(10)]
    assert all(mask.gather(-1, ids.unsqueeze(-1)).all() for ids in drawn)
    taken = torch.zeros_like(mask).scatter(-1, torch.stack(drawn, -1), True)
    assert (taken.sum(-1) > 1).any() == (temperature > 0)  # It draws among the allowed.


def test_masked_softmax_is_the_softmax_of_the_allowed():
    scores, mask = torch.tensor([0.3, -0.4, 9.0, 0.0]), torch.tensor([True, True, False, True])
    actor = scores_actor(Categorical(4), 0.5, action_mask_key=schema.ACTION_MASK)
    out = act(actor, scores.expand(20_000, -1), action_mask=mask.expand(20_000, -1))
    expected = (scores / 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    observed = torch.bincount(out[schema.ACTION], minlength=4) / 20_000
    torch.testing.assert_close(observed, expected, atol=0.015, rtol=0)
    assert observed[2] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vectors_outside_a_masked_space_move_no_score(temperature):
    network, hidden, mask = VecDQNHead(16, 5, vec_dim=4), torch.randn(64, 16), random_mask(64, 3)
    options = {"temperature": temperature, "num_actions": 3, "action_mask_key": schema.ACTION_MASK}
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        out = act(head_actor(network, Categorical(3), **options), hidden, action_mask=mask)
    best = vec_dqn_scores(network(hidden)[:, :3], mask).masked_fill(~mask, -torch.inf).argmax(-1)
    assert torch.equal(out[schema.ACTION], best)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_epsilon_greedy_takes_no_forbidden_action(kind, temperature):
    spec, mask, hidden = SPECS[kind].clone(), random_mask(2000, 5), torch.randn(2000, 16)
    options = {"action_mask_key": schema.ACTION_MASK}
    explore = EGreedyModule(spec, eps_init=0.9, eps_end=0.9, annealing_num_steps=1, **options)
    actor = head_actor(VecDQNHead(16, 5, vec_dim=2), SPECS[kind], temperature=temperature, **options)
    ids = as_ids(act(TensorDictSequential(actor, explore), hidden, action_mask=mask)[schema.ACTION], kind)
    assert mask.gather(-1, ids.unsqueeze(-1)).all()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        best = as_ids(act(actor, hidden, action_mask=mask)[schema.ACTION], kind)
    assert (ids != best).float().mean() > 0.2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["dqn", "vec_dqn"])
def test_bad_masks(name, temperature):
    hidden = torch.randn(4, 16)
    actor = head_actor(HEADS[name](), Categorical(5), temperature=temperature, action_mask_key=schema.ACTION_MASK)
    with pytest.raises(KeyError, match=r"entry 'action_mask' must be present"):
        act(actor, hidden)
    with pytest.raises(TypeError, match=r"entry 'action_mask' must be of bool type, got torch\.float32"):
        act(actor, hidden, action_mask=torch.ones(4, 5))
    with pytest.raises(
        ValueError, match=r"'action_mask' must hold a flag for each of the space's 5 actions, got shape"
    ):
        act(actor, hidden, action_mask=torch.ones(4, 1, dtype=torch.bool))
    # A frame at which nothing can be done, such as an episode's end, does not stop the other rows.
    mask = torch.tensor([[False] * 5, *[[False, True, False, False, False]] * 3])
    ids = act(actor, hidden, action_mask=mask)[schema.ACTION]
    assert (ids[1:] == 1).all()
    assert 0 <= ids[0] < 5


def frames(rows, action, previous, step=1):
    entries = {"action": action, "previous": {"action": previous}, "episode_step": torch.full((rows, 1), step)}
    return TensorDict(entries, [rows])


def different(rows, one_hot):
    """Actions, and other previous ones."""
    both = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.int64)
    return [torch.nn.functional.one_hot(ids, 3) for ids in both] if one_hot else both


@pytest.mark.parametrize("one_hot", [False, True])
def test_sticky_actions_repeat_at_their_rate(one_hot):
    torch.manual_seed(0)
    action, previous = different(4000, one_hot)
    chosen = StickyActions(0.3)(frames(4000, action, previous))["action"]
    assert chosen.shape == action.shape
    repeated = (chosen == previous).reshape(4000, -1).all(-1)
    assert ((chosen == action).reshape(4000, -1).all(-1) ^ repeated).all()
    assert repeated.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_sticky_actions_rest_at_first_frames_and_without_exploration():
    action, previous = torch.zeros(200, dtype=torch.int64), torch.ones(200, dtype=torch.int64)
    sticky = StickyActions(0.9)
    assert not sticky(frames(200, action, previous, step=0))["action"].any()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert not sticky(frames(200, action, previous))["action"].any()
    assert sticky(frames(200, action, previous))["action"].any()


@pytest.mark.parametrize("one_hot", [False, True])
def test_sticky_actions_repeat_only_what_is_allowed(one_hot):
    torch.manual_seed(0)
    action, previous = different(400, one_hot)
    steps = frames(400, action, previous)
    steps["allowed"] = (torch.arange(400) < 200).unsqueeze(-1) | torch.tensor([True, False, True])
    chosen = StickyActions(0.5, action_mask_key="allowed")(steps)["action"]
    repeated = (chosen == previous).reshape(400, -1).all(-1)
    assert repeated[:200].any()
    assert not repeated[200:].any()


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_sticky_probability_out_of_range(probability):
    with pytest.raises(ValueError, match=r"StickyActions: probability must lie in \[0, 1\)"):
        StickyActions(probability)


def test_sticky_actions_in_a_collector():
    torch.manual_seed(0)
    env = TaskEnv(DarkRoomEnv([0, 8, 40]), steps_per_task=200)
    embedding = {"max_num_actions": 5, "max_num_obs_continuous": 2}
    model = MouseModel(MouseConfig(hidden_dim=16, embedding_kwargs=embedding, dqn_head_kwargs={}))
    actor = TensorDictSequential(
        model.actor(env.action_spec_unbatched, temperature=1e6),
        StickyActions(0.5),
    )
    collector = Collector(env, actor, frames_per_batch=600, total_frames=600)
    (batch,) = collector
    collector.shutdown()
    moved = batch["episode_step"].squeeze(-1) > 0
    same = (batch["action"] == batch["previous", "action"])[moved]
    assert same.float().mean().item() == pytest.approx(0.5 + 0.5 / 5, abs=0.08)


@pytest.mark.parametrize("kind", SPECS)
def test_categorical_policy_draws_and_gives_the_log_probability(kind):
    head = TensorDictModule(SwiGLUHead(16, 5), [schema.HIDDEN], ["sp"])
    policy = categorical_policy(head, SPECS[kind])
    hidden = torch.randn(1, 16).expand(20_000, 16)
    out = policy(TensorDict({schema.HIDDEN: hidden}, [20_000]))
    ids = as_ids(out[schema.ACTION], kind)
    log_policy = head.module(hidden).log_softmax(-1)
    torch.testing.assert_close(out["action_log_prob"], log_policy.gather(-1, ids.unsqueeze(-1)).squeeze(-1))
    observed = torch.bincount(ids, minlength=5) / 20_000
    assert (observed - log_policy[0].exp()).abs().max() < 0.02  # five standard deviations
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        best = as_ids(policy(TensorDict({schema.HIDDEN: hidden[:1]}, [1]))[schema.ACTION], kind)
    assert best == log_policy[0].argmax()


@pytest.mark.parametrize(
    ("network", "spec", "error", "match"),
    [
        (VectorHead(16, 5, vec_dim=2), Categorical(5), TypeError, r"must write logits \[\*, A\], got VectorHead"),
        (SwiGLUHead(16, 4), Categorical(5), ValueError, "categorical_policy: the action space must have the head's 4"),
        (SwiGLUHead(16, 5), Bounded(-1, 1, (5,)), TypeError, "categorical_policy: the action spec must be Categorical"),
    ],
)
def test_categorical_policy_refuses(network, spec, error, match):
    with pytest.raises(error, match=match):
        categorical_policy(TensorDictModule(network, [schema.HIDDEN], ["sp"]), spec)
