"""An embedder's sizes, read from the specs of environments of many kinds."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    NonTensor,
    OneHot,
    Unbounded,
)
from torchrl.envs import EnvBase, GymEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.modules import set_recurrent_mode

from torchrl_mouse import schema
from torchrl_mouse.envs import DarkRoomEnv, FrozenLakeEnv, TaskEnv
from torchrl_mouse.modules import StepEmbedder, Trunk, embedding_kwargs_from_specs

PLAIN = {"include_action_token": False, "include_reward_token": False, "include_done_token": False}
TASK = dict.fromkeys(PLAIN, True)


class Spaces(EnvBase):
    """An environment of the given spaces, whose frames are all zero."""

    def __init__(self, entries: dict, action=None, batch_size: tuple[int, ...] = ()) -> None:
        super().__init__(batch_size=batch_size)
        self.observation_spec = Composite(entries).expand(batch_size)
        self.action_spec = (Categorical(3) if action is None else action).expand(
            *batch_size, *(() if action is None else action.shape)
        )
        self.reward_spec = Unbounded((*batch_size, 1))

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        return self.observation_spec.zero()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        ends = self.full_done_spec.zero()
        return self.observation_spec.zero().update(self.full_reward_spec.zero()).update(ends)

    def _set_seed(self, seed: int | None) -> None: ...


def task(env: EnvBase) -> TaskEnv:
    return TaskEnv(env, steps_per_task=20)


def cart_pole(**options: object) -> GymEnv:
    return GymEnv("CartPole-v1", **options)


PENDULUM = {"max_num_action_continuous": 1, "max_num_obs_continuous": 3}
CART_POLE = {"max_num_actions": 2, "max_num_obs_continuous": 4}
DARK_ROOM = {"max_num_actions": 5, "max_num_obs_continuous": 2, "max_num_obs_discrete": 81}
FROZEN_LAKE = {"max_num_actions": 4, "max_num_obs_discrete": 16}
IMAGE = Bounded(0, 255, shape=(3, 4, 5), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (cart_pole, {**CART_POLE, **PLAIN}),
        (lambda: task(cart_pole()), {**CART_POLE, **TASK}),
        (lambda: task(cart_pole(categorical_action_encoding=True)), {**CART_POLE, **TASK}),
        (lambda: task(GymEnv("Pendulum-v1")), {**PENDULUM, **TASK}),
        (lambda: task(DarkRoomEnv([0, 80], batch_size=())), {**DARK_ROOM, **TASK}),
        (lambda: task(DarkRoomEnv([0, 80, 4])), {**DARK_ROOM, **TASK}),
        (lambda: task(FrozenLakeEnv()), {**FROZEN_LAKE, **TASK}),
        (lambda: Spaces({"pixels": IMAGE}), {"max_num_actions": 3, "max_num_obs_image": 60, **PLAIN}),
        (
            lambda: task(Spaces({"pixels": Unbounded((4, 5), dtype=torch.uint8)}, batch_size=(2, 3))),
            {"max_num_actions": 3, "max_num_obs_image": 20, **TASK},
        ),
        (
            lambda: Spaces({"observation": Unbounded((2, 3))}, Bounded(-1, 1, shape=(2, 2)), batch_size=(4,)),
            {"max_num_action_continuous": 4, "max_num_obs_continuous": 6, **PLAIN},
        ),
    ],
    ids=[
        "CartPole",
        "CartPole task",
        "CartPole task, categorical",
        "Pendulum task",
        "Dark Room",
        "Dark Room, batched",
        "Frozen Lake",
        "pixels",
        "pixels, batched",
        "matrices, batched",
    ],
)
def test_sizes(make, expected):
    assert embedding_kwargs_from_specs(make()) == expected


@pytest.mark.parametrize(("base", "expected"), [(lambda: GymEnv("Pendulum-v1"), PENDULUM), (cart_pole, CART_POLE)])
def test_batch_of_workers(base, expected):
    env = SerialEnv(2, lambda: task(base()))
    assert embedding_kwargs_from_specs(env) == {**expected, **TASK}
    env.close(raise_if_closed=False)


@pytest.mark.parametrize(
    ("spec", "num"),
    [
        (Bounded(0, 20, shape=(1,), dtype=torch.int64), 21),
        (Bounded(-1, 20, shape=(), dtype=torch.int32), 21),  # -1 is "absent"
        (Categorical(21), 21),
        (Categorical(21, shape=(1,)), 21),
        (OneHot(21), 21),
        (Unbounded((1,), dtype=torch.int64), None),
        (Bounded(0, torch.iinfo(torch.int64).max, shape=(1,), dtype=torch.int64), None),
        (Bounded(0, 20, shape=(1,), dtype=torch.float32), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_number_of_time_steps(spec, num):
    kwargs = embedding_kwargs_from_specs(Spaces({"episode_step": spec, "observation": Unbounded((2,))}))
    assert kwargs.get("max_num_time_steps") == num


def test_counter_of_steps_has_no_bound():
    env = TransformedEnv(cart_pole(), StepCounter(max_steps=30))
    assert embedding_kwargs_from_specs(env, keys={"time": "step_count"}) == {**CART_POLE, **PLAIN}


@pytest.mark.parametrize("space", [OneHot(16), Categorical(16), Categorical(16, shape=(1,)), OneHot(16, dtype=bool)])
def test_ids_in_either_encoding(space):
    kwargs = embedding_kwargs_from_specs(Spaces({"observation_discrete": space}, space))
    assert kwargs == {"max_num_actions": 16, "max_num_obs_discrete": 16, **PLAIN}


def test_entries_of_any_nesting():
    entries = {
        "sensors": Composite(position=Unbounded((3,)), deep=Composite(cell=OneHot(7))),
        "camera": IMAGE,
        "clock": Categorical(11),
        "last": Composite(
            move=Unbounded((2,)), gain=Unbounded((1,)), end=Composite(terminated=Binary(1), truncated=Binary(1))
        ),
    }
    keys = {
        "time": "clock",
        "action": ("last", "move"),
        "continuous": ("sensors", "position"),
        "discrete": ("sensors", "deep", "cell"),
        "image": "camera",
        "reward": ("last", "gain"),
        "done": ("last", "end"),
    }
    env = Spaces(entries, Unbounded((2,)))
    assert embedding_kwargs_from_specs(env, keys=keys) == {
        "max_num_time_steps": 11,
        "max_num_action_continuous": 2,
        "max_num_obs_continuous": 3,
        "max_num_obs_discrete": 7,
        "max_num_obs_image": 60,
        **TASK,
    }
    embedder = StepEmbedder.from_specs(env, 16, keys=keys)
    assert list(embedder.modalities) == list(keys)
    some = {name: keys[name] for name in ("continuous", "reward")}
    assert list(StepEmbedder.from_specs(env, 16, keys=some).modalities) == ["continuous", "reward"]


def test_an_entry_given_to_one_modality_is_no_other_modality_s():
    env = GymEnv("FrozenLake-v1")
    kwargs = embedding_kwargs_from_specs(env, keys={"discrete": "observation"})
    assert kwargs == {**FROZEN_LAKE, **PLAIN}
    with pytest.raises(
        TypeError, match=r"entry 'observation' must hold floating-point .*, got OneHot .*Map it .* with keys="
    ):
        embedding_kwargs_from_specs(env)
    shown = Spaces({"observation": Unbounded((2,)), "position": Unbounded((4,))})
    assert embedding_kwargs_from_specs(shown, keys={"continuous": "position"})["max_num_obs_continuous"] == 4


@pytest.mark.parametrize("absent", ["action", "reward", "terminated", "truncated"])
def test_absent_parts_of_the_previous_transition(absent):
    flag = Categorical(2, shape=(1,), dtype=torch.bool)
    previous = {
        "action": Unbounded((), dtype=torch.int64),
        "reward": Unbounded((1,)),
        "terminated": flag,
        "truncated": flag,
    }
    assert embedding_kwargs_from_specs(Spaces({"previous": Composite(previous)})) == {"max_num_actions": 3, **TASK}
    del previous[absent]
    kwargs = embedding_kwargs_from_specs(Spaces({"previous": Composite(previous)}))
    modality = absent if absent in ("action", "reward") else "done"
    assert kwargs == {"max_num_actions": 3, **TASK, f"include_{modality}_token": False}


# The embedder reads what the environment writes


@pytest.mark.parametrize(
    "base",
    [
        cart_pole,
        lambda: cart_pole(categorical_action_encoding=True),
        lambda: GymEnv("Pendulum-v1"),
        FrozenLakeEnv,
        lambda: DarkRoomEnv([0, 80, 4]),
        lambda: Spaces({"pixels": IMAGE}),
    ],
    ids=["CartPole", "CartPole categorical", "Pendulum", "Frozen Lake", "Dark Room", "pixels"],
)
def test_rollout_through_the_embedder(base):
    env = task(base())
    embedder = StepEmbedder.from_specs(env, 16, max_num_time_steps=21)
    assert {"time", "action", "reward", "done"} < set(embedder.modalities)
    steps = env.rollout(12)
    with set_recurrent_mode(True):
        hidden = Trunk(embedder, None, window=16)(steps)[schema.HIDDEN]
    assert hidden.shape == (*steps.shape, 16)
    assert hidden.isfinite().all()


def test_options_override_what_is_read():
    env = task(cart_pole())
    embedder = StepEmbedder.from_specs(
        env, 16, max_num_actions=9, include_obs_continuous=False, include_done_token=False, token_data_len=2
    )
    assert list(embedder.modalities) == ["action", "reward"]
    assert embedder.num_ids("action") == 9
    assert embedder.tokens_per_step == 2
    assert list(StepEmbedder.from_specs(env, 16).modalities) == ["action", "continuous", "reward", "done"]


# Errors


@pytest.mark.parametrize(
    ("entry", "spec"),
    [
        ("observation", Categorical(3)),
        ("observation", OneHot(3)),
        ("observation", Binary(3)),
        ("observation", Bounded(0, 255, shape=(3, 4, 5), dtype=torch.uint8)),
        ("observation", Unbounded((2,), dtype=torch.int64)),
        ("observation", NonTensor(())),
        ("observation", Composite(position=Unbounded((2,)))),
        ("observation_discrete", Unbounded((1,), dtype=torch.int64)),
        ("observation_discrete", MultiCategorical([2, 3])),
        ("observation_discrete", MultiOneHot([2, 3])),
        ("observation_discrete", Binary(3)),
        ("observation_discrete", Categorical(3, shape=(2,))),
        ("observation_discrete", Categorical(-1)),
        ("observation_discrete", Categorical(2, dtype=torch.bool)),
        ("observation_discrete", OneHot(3, shape=(2, 3))),
        ("observation_discrete", NonTensor(())),
        ("pixels", Bounded(0, 1, shape=(3, 4, 5), dtype=torch.float32)),
        ("pixels", Bounded(0, 255, shape=(3, 4, 5), dtype=torch.int64)),
        ("pixels", NonTensor(())),
        ("action", MultiCategorical([2, 3])),
        ("action", MultiOneHot([2, 3])),
        ("action", Binary(3)),
        ("action", Bounded(0, 5, shape=(1,), dtype=torch.int64)),
        ("action", Categorical(2, dtype=torch.bool)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{type(value).__name__} {tuple(value.shape)} {value.dtype}",
)
@pytest.mark.parametrize("batch_size", [(), (2,)], ids=["alone", "batched"])
def test_refused_spaces(entry, spec, batch_size):
    entries = {"observation": Unbounded((2,)), **({} if entry == "action" else {entry: spec})}
    env = Spaces(entries, spec if entry == "action" else None, batch_size)
    with pytest.raises(TypeError, match=rf"entry '{entry}' must hold .*, got {type(spec).__name__} of shape"):
        embedding_kwargs_from_specs(env)


def test_two_actions():
    env = Spaces({"observation": Unbounded((2,))})
    env.action_spec = Composite(walk=Categorical(3), talk=Categorical(2))
    with pytest.raises(TypeError, match=r"entry '(walk|talk)', '(walk|talk)' must hold an id .*, got Composite"):
        embedding_kwargs_from_specs(env)


def test_nothing_to_embed():
    env = Spaces({"position": Unbounded((2,)), "inner": Composite(cell=Categorical(3))})
    with pytest.raises(ValueError, match=r"must have an entry to embed, got \('inner', 'cell'\), position\. Name"):
        embedding_kwargs_from_specs(env)
    assert embedding_kwargs_from_specs(env, keys={"discrete": ("inner", "cell")})["max_num_obs_discrete"] == 3


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("continuous", "posiion"),
        ("discrete", ("position", "cell")),
        ("done", "last"),
        ("action", "last_action"),
        ("time", "clock"),
    ],
)
def test_named_entry_that_does_not_exist(name, key):
    env = Spaces({"position": Unbounded((2,)), "observation": Unbounded((2,))})
    with pytest.raises(KeyError, match=rf"keys\['{name}'\] must be an entry of env.* It has observation, position"):
        embedding_kwargs_from_specs(env, keys={name: key})


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"keys must name modalities \(time, action, .*\), got \['observation'\]"):
        embedding_kwargs_from_specs(Spaces({}), keys={"observation": "state"})
    with pytest.raises(TypeError, match="env must be a torchrl EnvBase, got TensorDict"):
        StepEmbedder.from_specs(TensorDict(), 16)
