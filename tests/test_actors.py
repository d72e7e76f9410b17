"""Actors act on a head's scores through TorchRL's own modules."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import EGreedyModule, QValueModule

from torchrl_mouse import schema
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.modules import DQNHead, StickyActions, SwiGLUHead
from torchrl_mouse.modules.actors import make_actor

SPECS = {"categorical": Categorical(5), "one-hot": OneHot(5, dtype=torch.int64)}


def scores_actor(spec, temperature=0.0, **options):
    """An actor whose scores are the observation: trunk and head pass it on."""
    trunk = TensorDictModule(torch.nn.Identity(), [schema.OBSERVATION], [schema.HIDDEN])
    head = TensorDictModule(torch.nn.Identity(), [schema.HIDDEN], ["dqn"])
    return make_actor(trunk, head, spec, temperature=temperature, **options)


def act(actor, scores):
    return actor(TensorDict({schema.OBSERVATION: scores}, scores.shape[:-1]))


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


@pytest.mark.parametrize("head_class", [SwiGLUHead, DQNHead])
def test_number_of_actions_of_a_head_without_a_model(head_class):
    trunk = TensorDictModule(torch.nn.Identity(), [schema.OBSERVATION], [schema.HIDDEN])
    head = TensorDictModule(head_class(16, 3), [schema.HIDDEN], ["scores"])
    with pytest.raises(ValueError, match=r"make_actor: the action space must have the head's 3 actions, got 5\."):
        make_actor(trunk, head, Categorical(5))
    assert act(make_actor(trunk, head, Categorical(3)), torch.randn(4, 16))[schema.ACTION].shape == (4,)


def frames(rows, action, previous, step=1):
    entries = {"action": action, "previous": {"action": previous}, "episode_step": torch.full((rows, 1), step)}
    return TensorDict(entries, [rows])


@pytest.mark.parametrize("one_hot", [False, True])
def test_sticky_actions_repeat_at_their_rate(one_hot):
    torch.manual_seed(0)
    action, previous = torch.zeros(4000, dtype=torch.int64), torch.ones(4000, dtype=torch.int64)
    if one_hot:
        action, previous = (torch.nn.functional.one_hot(ids, 3) for ids in (action, previous))
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
