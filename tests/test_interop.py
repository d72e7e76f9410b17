"""Other people's data: Minari data sets, TorchRL's trajectories, Gymnasium's vector environments."""

import sys
import tempfile
from functools import partial

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector.episode_buffer import EpisodeBuffer
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.collectors.utils import split_trajectories
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter
from torchrl.envs import GymEnv, SerialEnv

from torchrl_mouse.data import DatasetStore
from torchrl_mouse.data.interop import from_minari, record_vector_env, to_minari
from torchrl_mouse.data.trajectories import from_trajectories

# Minari recommends, by warnings, to say who made a data set, and how.
pytestmark = pytest.mark.filterwarnings("ignore:.*(is set to None|env_spec is None):UserWarning:minari")
MODES = ["NextStep", "SameStep", "Disabled"]
BOX = gym.spaces.Box(-np.inf, np.inf, (2, 3), dtype=np.float32)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def write(episodes, observation_space=BOX, action_space=None):
    with tempfile.TemporaryDirectory() as name:  # a name that no other data set has
        dataset_id = name.rsplit("/", 1)[-1] + "-v0"
    buffers = [EpisodeBuffer(**episode) for episode in episodes]
    return minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        observation_space=observation_space,
        action_space=action_space or gym.spaces.Discrete(5),
        data_format="arrow",
    )


def an_episode(length, code=1, seed=0, space=BOX, actions=5):
    rng = np.random.default_rng(seed)
    last = np.arange(length) == length - 1
    if isinstance(space, gym.spaces.Discrete):
        observations = rng.integers(space.n, size=length + 1) + space.start
    else:
        observations = rng.standard_normal((length + 1, *space.shape)).astype(np.float32)
    return {
        "observations": observations,
        "actions": rng.integers(actions, size=length),
        "rewards": rng.standard_normal(length).astype(np.float32),
        "terminations": last & (code == 1),
        "truncations": last & (code == 2),
    }


def tasks_of(store):
    """The store's records as tasks of episodes, told apart one record at a time by the contract's words."""
    rows = store.to_dataset()
    rows = rows.rename_column("observation" if "observation" in rows.column_names else "observation_discrete", "obs")
    tasks, previous = [], None
    for row in rows:
        if previous is None or row["task"] != previous["task"]:
            tasks.append([])
        if not tasks[-1] or previous["done"]:
            assert (row["action"], row["reward"], row["done"], row["episode_step"]) == (0, 0.0, 0, 0)
            tasks[-1].append({"observations": [row["obs"]], "actions": [], "rewards": [], "codes": []})
        else:
            assert row["episode_step"] == previous["episode_step"] + 1
            episode = tasks[-1][-1]
            for name, column in {
                "observations": "obs",
                "actions": "action",
                "rewards": "reward",
                "codes": "done",
            }.items():
                episode[name].append(row[column])
        previous = row
    return tasks


def expected(episode, code=1, start=0, action_start=0):
    length = len(episode["rewards"])
    observations = np.asarray(episode["observations"])
    discrete = observations.ndim == 1
    return {
        "observations": (observations - start if discrete else observations.reshape(length + 1, -1)).tolist(),
        "actions": (np.asarray(episode["actions"]) - action_start).tolist(),
        "rewards": np.asarray(episode["rewards"]).tolist(),
        "codes": [0] * (length - 1) + [code],
    }


# Minari

DRAWN = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 2)), min_size=1, max_size=5)


@settings(max_examples=20, deadline=None)
@given(drawn=DRAWN, discrete=st.booleans(), start=st.integers(-2, 2), seed=st.integers(0, 99))
def test_minari_to_store_and_back(drawn, discrete, start, seed):
    space = gym.spaces.Discrete(7, start=start) if discrete else BOX
    action_space = gym.spaces.Discrete(5, start=start)
    episodes = [an_episode(*how, seed + number, space) for number, how in enumerate(drawn)]
    for episode in episodes:
        episode["actions"] += start
    dataset = write(episodes, space, action_space)
    store = from_minari(dataset)
    assert tasks_of(store) == [
        [expected(episode, code, start, start) for episode, (_, code) in zip(episodes, drawn, strict=True)]
    ]
    back = to_minari(store, dataset.id.replace("-v0", "-v1"), space, action_space)
    assert len(back) == len(episodes)
    assert (back.observation_space, back.action_space) == (space, action_space)
    for read, episode in zip(minari.load_dataset(back.id), episodes, strict=True):
        for name, value in episode.items():
            np.testing.assert_array_equal(getattr(read, name), value, err_msg=name)
        assert read.observations.dtype == space.dtype


@settings(max_examples=20, deadline=None)
@given(tasks=st.lists(DRAWN, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_store_to_minari_and_back(tasks, seed):
    rng = np.random.default_rng(seed)
    store = DatasetStore(5, max_obs_continuous_dim=6)
    for task, drawn in enumerate(tasks):
        for length, code in drawn:
            for step in range(length + 1):
                arrived = step > 0
                store.append(
                    {
                        "action": int(rng.integers(5)) * arrived,
                        "reward": float(rng.standard_normal()) * arrived,
                        "done": code * (step == length),
                        "episode_step": step,
                        "observation": rng.standard_normal(6),
                        "task": task,
                    }
                )
    with tempfile.TemporaryDirectory() as name:
        dataset = to_minari(store, name.rsplit("/", 1)[-1] + "-v0", BOX, gym.spaces.Discrete(5))
    again = from_minari(dataset)
    assert again.num_tasks == len(tasks)
    for key, value in store[:].items(include_nested=True, leaves_only=True):
        assert torch.equal(again[:][key], value), key


def test_sizes_are_those_of_the_spaces():
    store = from_minari(write([an_episode(3, space=gym.spaces.Discrete(9))], gym.spaces.Discrete(9)))
    with pytest.raises(ValueError, match=r"must lie in \[0, 5\), got 5"):
        store.append({"action": 5, "reward": 0.0, "done": 0, "episode_step": 0, "observation_discrete": 0})
    with pytest.raises(ValueError, match=r"must lie in \[0, 9\), got 9"):
        store.append({"action": 0, "reward": 0.0, "done": 0, "episode_step": 0, "observation_discrete": 9})
    assert from_minari(write([an_episode(3)]))[0]["observation"].shape == (6,)


def test_an_episode_cut_by_the_recording_is_truncated():
    episodes = [an_episode(2, code=0), an_episode(3, code=1, seed=1)]
    assert tasks_of(from_minari(write(episodes))) == [[expected(episodes[0], 2), expected(episodes[1], 1)]]


def test_an_episode_without_steps_is_left_out():
    one, other = an_episode(1), an_episode(2, seed=1)
    assert tasks_of(from_minari(write([one, an_episode(0), other]))) == [[expected(one), expected(other)]]


def test_terminated_wins_over_truncated():
    episode = an_episode(2)
    episode["truncations"] = episode["terminations"]
    assert tasks_of(from_minari(write([episode]))) == [[expected(episode, 1)]]


def test_tasks_of_a_data_set():
    episodes = [an_episode(length, seed=length) for length in (1, 2, 3, 4)]
    dataset = write(episodes)
    want = [expected(episode) for episode in episodes]
    store = DatasetStore(5, max_obs_continuous_dim=6)
    for short in (True, False):
        part = dataset.filter_episodes(lambda episode, short=short: (len(episode) < 3) == short)
        assert from_minari(part, store) is store
    assert tasks_of(store) == [want[:2], want[2:]]
    dataset.storage.update_episode_metadata([{"task": name} for name in (8, 3, 8, 3)], dataset.episode_indices)
    assert tasks_of(from_minari(dataset)) == [want[::2], want[1::2]]


def test_appended_tasks_are_kept_in_the_state():
    store, other = from_minari(write([an_episode(3)])), DatasetStore(5, max_obs_continuous_dim=6)
    other.load_state_dict(store.state_dict())
    assert tasks_of(other) == tasks_of(store)


def test_an_unfinished_task_of_the_store_goes_on():
    steps = from_minari(write([an_episode(3)]))[0:3]
    steps["stream"] = torch.full((3, 1), 5)
    store = DatasetStore(5, max_obs_continuous_dim=6)
    store.extend(steps[:1])
    from_minari(write([an_episode(2, seed=1)]), store)
    store.extend(steps[1:])
    assert [len(task[0]["actions"]) for task in tasks_of(store)] == [2, 3]


def test_frames_that_nothing_follows_do_not_reach_minari():
    store = DatasetStore(2, max_obs_discrete_dim=3)
    frame = {"action": 0, "reward": 0.0, "done": 0, "episode_step": 0, "observation_discrete": 1}
    store.append(frame)
    with pytest.raises(ValueError, match="store must hold a transition"):
        to_minari(store, "only-v0", gym.spaces.Discrete(3), gym.spaces.Discrete(2))
    store.append({**frame, "task": 1})
    store.append({**frame, "task": 1, "action": 1, "episode_step": 1})
    dataset = to_minari(store, "some-v0", gym.spaces.Discrete(3), gym.spaces.Discrete(2))
    assert len(dataset) == 1
    assert (dataset[0].truncations.tolist(), dataset[0].actions.tolist()) == ([True], [1])


def test_episode_that_minari_reads_in_part_is_refused():
    long = an_episode(33_000, space=gym.spaces.Discrete(2))
    with pytest.raises(ValueError, match="episode 0 must be read whole, got 32767 of 33000 steps"):
        from_minari(write([long, an_episode(2, space=gym.spaces.Discrete(2))], gym.spaces.Discrete(2)))


def test_minari_errors(monkeypatch):
    with pytest.raises(TypeError, match=r"must be a MinariDataset, got 'lake-v0'.*load_dataset"):
        from_minari("lake-v0")
    continuous = an_episode(2)
    continuous["actions"] = np.zeros((2, 1), np.float32)
    with pytest.raises(TypeError, match=r"action space must be Discrete, got Box.*finite set"):
        from_minari(write([continuous], action_space=gym.spaces.Box(-1, 1, (1,))))
    nested = an_episode(2)
    nested["observations"] = {"x": nested["observations"]}
    with pytest.raises(TypeError, match=r"must be Box or Discrete, got Dict.*FlattenObservation"):
        from_minari(write([nested], gym.spaces.Dict({"x": BOX})))
    for name, where in {"observations": (3, 0, 0), "rewards": 2}.items():
        broken = an_episode(4)
        broken[name][where] = np.nan
        with pytest.raises(
            ValueError, match=f"from_minari: column '{name[:-1]}' must be finite, .* in step 3 of episode 1"
        ):
            from_minari(write([an_episode(2), broken]))
    empty = write([an_episode(2)]).filter_episodes(lambda _: False)
    with pytest.raises(ValueError, match="dataset must have steps, got 0 episodes"):
        from_minari(empty)
    with pytest.raises(ValueError, match=r"column 'action' must lie in \[0, 2\)"):
        from_minari(write([an_episode(9)]), DatasetStore(2, max_obs_continuous_dim=6))

    store = from_minari(write([an_episode(9)]))
    with pytest.raises(KeyError, match="'observation_discrete' must be in the store"):
        to_minari(store, "a-v0", gym.spaces.Discrete(3), gym.spaces.Discrete(5))
    with pytest.raises(ValueError, match=r"must fill the space's shape \(4,\), got 6 values"):
        to_minari(store, "a-v0", gym.spaces.Box(0, 1, (4,)), gym.spaces.Discrete(5))
    with pytest.raises(ValueError, match=r"'action' must lie in \[0, 2\), got 4"):
        to_minari(store, "a-v0", BOX, gym.spaces.Discrete(2))
    with pytest.raises(TypeError, match="action space must be Discrete"):
        to_minari(store, "a-v0", BOX, BOX)
    with pytest.raises(RuntimeError, match="no rows"):
        to_minari(DatasetStore(), "a-v0", BOX, gym.spaces.Discrete(5))
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"torchrl-mouse\[minari\]"):
        to_minari(store, "a-v0", BOX, gym.spaces.Discrete(5))


# Vector environments


class Counter(gym.Env):
    """Episodes of 1, 2, 3, 1, ... steps, terminated and truncated in turn; ids start at 10, and actions at 5."""

    observation_space = gym.spaces.Discrete(100, start=10)
    action_space = gym.spaces.Discrete(3, start=5)

    def __init__(self):
        self.episode, self.step_count = -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return 10 + 5 * self.episode, {}

    def step(self, action):
        assert action in self.action_space
        self.step_count += 1
        over = self.step_count == self.episode % 3 + 1
        even = self.episode % 2 == 0
        return 10 + 5 * self.episode + self.step_count, float(action), over and even, over and not even, {}


def cart():
    return gym.make("CartPole-v1", max_episode_steps=40)


def lake():
    return gym.make("FrozenLake-v1", is_slippery=True, max_episode_steps=8)


def lean(observations):
    """Pushes the cart to where the pole leans, so that some episodes last until the limit."""
    return (observations[..., 2] > 0).astype(np.int64)


def wander(observations):
    return (3 * observations + 1) % 4


def play(make, policy, seed, steps):
    """Episodes of one environment alone, until a number of steps."""
    env, episodes, taken = make(), [], 0
    while taken < steps:
        observation, _ = env.reset(seed=seed if not episodes else None)
        episode = {"observations": [np.asarray(observation).tolist()], "actions": [], "rewards": [], "codes": [0]}
        while taken < steps and not episode["codes"][-1]:
            action = policy(np.asarray(observation))
            observation, reward, terminated, truncated, _ = env.step(int(action))
            episode["observations"].append(np.asarray(observation).tolist())
            episode["actions"].append(int(action))
            episode["rewards"].append(float(np.float32(reward)))
            episode["codes"].append(1 if terminated else 2 if truncated else 0)
            taken += 1
        episodes.append({**episode, "codes": episode["codes"][1:]})
    env.close()
    return episodes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("make", "policy"), [(cart, lean), (lake, wander)])
def test_recorded_is_what_each_environment_gives_alone(make, policy, mode):
    envs = SyncVectorEnv([make] * 3, autoreset_mode=mode, copy=False)
    store = record_vector_env(envs, policy, 120, seed=7, progress_bar=False)
    tasks = tasks_of(store)
    assert len(tasks) == 3
    codes = set()
    for number, task in enumerate(tasks):
        taken = sum(len(episode["actions"]) for episode in task)
        # A reset takes a call of its own in NEXT_STEP mode, unless it would be the last.
        assert taken == 120 if mode != "NextStep" else taken + len(task) - 1 in (119, 120)
        alone = play(make, policy, 7 + number, taken)
        assert task == alone
        assert [sum(episode["rewards"]) for episode in task] == [sum(episode["rewards"]) for episode in alone]
        codes |= {code for episode in task for code in episode["codes"]}
    assert codes == {0, 1, 2}
    envs.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", range(1, 9))
def test_recording_cut_anywhere(mode, steps):
    envs = SyncVectorEnv([Counter], autoreset_mode=mode)
    (task,) = tasks_of(record_vector_env(envs, lambda seen: seen % 3 + 5, steps, progress_bar=False))
    whole = [
        {"observations": [5 * e + i for i in range(e % 3 + 2)], "codes": [0] * (e % 3) + [1 + e % 2]} for e in range(9)
    ]
    resets = {1: 0, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2}[steps] if mode == "NextStep" else 0
    left = steps - resets
    for episode, full in zip(task, whole, strict=False):
        taken = min(left, len(full["codes"]))
        left -= taken
        assert episode["observations"] == full["observations"][: taken + 1]
        assert episode["codes"] == full["codes"][:taken]
        assert episode["actions"] == [(10 + seen) % 3 for seen in episode["observations"][:-1]]
        assert episode["rewards"] == [action + 5.0 for action in episode["actions"]]
    assert left == 0


def test_next_step_mode_asks_the_policy_at_the_last_observation_too():
    asked = []

    def policy(seen):
        asked.append(int(seen[0]))
        return np.full(1, 6)

    record_vector_env(SyncVectorEnv([Counter]), policy, 4, progress_bar=False)
    assert asked == [10, 11, 15, 16]


@pytest.mark.parametrize("kind", ["sync", "async", "native"])
def test_kinds_of_vector_environments(kind):
    if kind == "native":
        envs = gym.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point")
    else:
        envs = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[kind]([cart] * 2)
    try:
        store = record_vector_env(envs, None, 60, seed=3, progress_bar=False)
    finally:
        envs.close()
    for task in tasks_of(store):
        assert len(task) > 1
        for episode in task:
            first = np.abs(episode["observations"][0])
            assert (first <= 0.05).all()
            assert set(episode["rewards"]) == {1.0}
            assert set(episode["actions"]) == {0, 1} or len(episode["actions"]) < 9
            assert (np.abs(np.diff(np.array(episode["observations"])[:, 0])) > 0).all()


def test_random_actions_are_no_draws_of_the_environment():
    class Dice(Counter):
        def step(self, action):
            return 10, float(self.np_random.integers(3, size=1)[0] == action - 5), False, False, {}

    store = record_vector_env(SyncVectorEnv([Dice]), None, 300, seed=0, progress_bar=False)
    assert store[:]["previous", "reward"].mean().item() == pytest.approx(1 / 3, abs=0.12)


def test_random_actions_follow_the_seed_and_the_space():
    def record(seed):
        store = record_vector_env(SyncVectorEnv([Counter] * 2), None, 40, seed=seed, progress_bar=False)
        return [action for task in tasks_of(store) for episode in task for action in episode["actions"]]

    assert record(0) == record(0) != record(1)
    assert set(record(0)) == {0, 1, 2}


def test_recordings_follow_one_another_in_a_store():
    envs, store = SyncVectorEnv([lake] * 2), DatasetStore(4, max_obs_discrete_dim=16)
    for number in range(1, 4):
        assert record_vector_env(envs, wander, 5, store, seed=number, progress_bar=False) is store
        assert store.num_tasks == 2 * number
    assert tasks_of(store)[4] == play(lake, wander, 3, 5)


def test_recording_errors():
    envs = SyncVectorEnv([lake] * 2)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        record_vector_env(envs, None, 0)
    for wrong in (np.zeros(3, int), np.zeros((2, 1), int), np.zeros(2)):
        with pytest.raises(ValueError, match=r"policy must return integers of shape \(2,\)"):
            record_vector_env(envs, lambda _, wrong=wrong: wrong, 1, progress_bar=False)
    with pytest.raises(TypeError, match=r"action space must be Discrete.*TransformAction"):
        record_vector_env(SyncVectorEnv([lambda: gym.make("Pendulum-v1")]), None, 1)
    with pytest.raises(TypeError, match=r"must be Box or Discrete, got Tuple.*FlattenObservation"):
        record_vector_env(SyncVectorEnv([lambda: gym.make("Blackjack-v1")]), None, 1)
    broken = partial(gym.wrappers.TransformObservation, cart(), lambda seen: seen * np.nan, None)
    with pytest.raises(
        ValueError, match=r"record_vector_env: column 'observation' must be finite, got \[nan.* in step 0 of episode 0"
    ):
        record_vector_env(SyncVectorEnv([broken]), None, 1, progress_bar=False)


# TorchRL's trajectories


def transitions(lengths, trajectory=None, first=0):
    """One environment's transitions: episodes of some lengths, terminated and truncated in turn.

    Observations count up over everything, so that each says where it comes from.
    """
    rows = []
    for number, length in enumerate(lengths):
        for step in range(length):
            at, over = first + step, step == length - 1
            rows.append(
                TensorDict(
                    {
                        "observation": torch.tensor([at, -at]).float(),
                        "action": torch.tensor(at % 5),
                        "collector": {"traj_ids": torch.tensor(number if trajectory is None else trajectory + number)},
                        "next": {
                            "observation": torch.tensor([at + 1, -at - 1]).float(),
                            "reward": torch.tensor([at / 2]),
                            "done": torch.tensor([over]),
                            "terminated": torch.tensor([over and number % 2 == 0]),
                            "truncated": torch.tensor([over and number % 2 == 1]),
                        },
                    }
                )
            )
        first += length + 1
    return torch.stack(rows)


def told(rows):
    """Episodes as they must be stored, out of the adjacent transitions of one environment, row by row."""
    episodes = []
    for row in rows.unbind(0):
        if not episodes or episodes[-1]["codes"][-1]:
            episodes.append({"observations": [row["observation"].tolist()], "actions": [], "rewards": [], "codes": []})
        episode = episodes[-1]
        episode["observations"].append(row["next", "observation"].tolist())
        episode["actions"].append(int(row["action"]))
        episode["rewards"].append(float(row["next", "reward"]))
        flags = bool(row["next", "terminated"]), bool(row["next", "truncated"])
        episode["codes"].append(1 if flags[0] else 2 if flags[1] else 0)
    episodes[-1]["codes"][-1] = episodes[-1]["codes"][-1] or 2
    return episodes


def empty_store(**sizes):
    return DatasetStore(5, **({"max_obs_continuous_dim": 2} | sizes))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=6, max_size=9), min_size=1, max_size=3),
    time=st.integers(1, 4),
    size=st.integers(1, 30),
    form=st.sampled_from(["batches", "flat", "flat rows", "two dimensions"]),
)
def test_collected_in_batches_or_kept_in_a_ring(lengths, time, size, form):
    envs = [transitions(drawn, 100 * number, 1000 * number) for number, drawn in enumerate(lengths)]
    total = min(len(env) for env in envs) // time * time
    steps = torch.stack([env[:total] for env in envs])
    batches = steps.split(time, 1)
    if form == "batches":
        data, kept = batches, list(steps)
    elif form == "two dimensions":
        data = ReplayBuffer(storage=LazyTensorStorage(len(envs) * max(size, time), ndim=2))
        for batch in batches:
            data.extend(batch)
        kept = [env[-max(size, time) :] for env in steps]
    else:
        capacity = max(size, time * len(envs))
        data = ReplayBuffer(storage=LazyTensorStorage(capacity if form == "flat" else len(envs) * (size % 4 + 1)))
        for batch in batches:
            data.extend(batch.reshape(-1) if form == "flat" else batch)
        order = torch.arange(steps.numel()).reshape(len(batches), len(envs), time)
        alive = order >= steps.numel() - (capacity if form == "flat" else len(envs) * (size % 4 + 1) * time)
        kept = [env[alive[:, number].reshape(-1)] for number, env in enumerate(steps)]
    (task,) = tasks_of(from_trajectories(data, empty_store()))
    want = [episode for env in kept if len(env) for episode in told(env)]
    assert sorted(task, key=str) == sorted(want, key=str)


def test_order_of_appearance():
    one, two = transitions([2, 3], trajectory=9), transitions([2, 2], trajectory=3, first=50)
    (task,) = tasks_of(from_trajectories([one[:1], two[:3], one[1:], two[3:]], empty_store()))
    assert task == [*told(one)[:1], *told(two), *told(one)[1:]]


def test_rows_without_ids_are_trajectories():
    steps = torch.stack([transitions([2, 4]), transitions([3, 3], first=50)]).exclude("collector")
    want = [*told(steps[0]), *told(steps[1])]
    assert tasks_of(from_trajectories(steps, empty_store())) == [want]
    assert tasks_of(from_trajectories([steps[0], steps[1]], empty_store())) == [want]
    cut = from_trajectories(steps.split(3, 1), empty_store())
    assert tasks_of(cut) == [
        [episode for rows in (steps[:, :3], steps[:, 3:]) for row in rows for episode in told(row)]
    ]
    with pytest.raises(ValueError, match=r"must begin with the observation .* got another 'observation' at step 9 of"):
        from_trajectories(torch.cat([steps[1], steps[0, :3], steps[0, 4:]]), empty_store())


def test_named_trajectories_and_tasks():
    steps = transitions([2, 3, 1, 2]).exclude("collector")
    steps["mdp"] = torch.tensor([4, 4, 1, 1, 1, 4, 1, 1])
    steps["info", "id"] = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3]).unsqueeze(-1)
    one, two, three, four = told(steps)
    assert tasks_of(from_trajectories(steps, empty_store(), task="mdp")) == [[one, three], [two, four]]
    mixed = steps[torch.tensor([2, 0, 6, 3, 1, 5, 4, 7])]
    store = from_trajectories(mixed, empty_store(), trajectory=("info", "id"))
    assert tasks_of(store) == [[two, one, four, three]]
    mixed["episode"] = mixed["info", "id"]
    assert tasks_of(from_trajectories(mixed, empty_store())) == [[two, one, four, three]]


def test_trajectory_ids_may_come_again_in_another_task():
    one, two = transitions([4])[:2], transitions([4], first=50)[:3]
    one["mdp"], two["mdp"] = torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    want = [told(one), told(two)]
    assert [episodes[0]["codes"] for episodes in want] == [[0, 2], [0, 0, 2]]
    assert tasks_of(from_trajectories([one, two], empty_store(), task="mdp")) == want


def test_data_set_of_episodes():
    steps = transitions([2, 3, 4]).exclude("collector")
    steps["episode"] = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    dataset = TensorDictReplayBuffer(storage=TensorStorage(steps), writer=ImmutableDatasetWriter(), batch_size=2)
    assert tasks_of(from_trajectories(dataset, empty_store())) == [told(steps)]


def test_padding_is_left_out():
    steps = transitions([2, 5, 3])
    padded = split_trajectories(steps.unsqueeze(0))
    assert padded.shape == (3, 5)
    assert tasks_of(from_trajectories(padded, empty_store())) == [told(steps)]


def test_nested_keys_and_one_hot_vectors():
    steps = transitions([2, 4])
    want = tasks_of(from_trajectories(steps, empty_store()))
    for dtype in (torch.int64, torch.bool, torch.float32):
        other = steps.exclude("observation", "action", ("next", "observation"))
        other["agent", "move"] = torch.nn.functional.one_hot(steps["action"], 5).to(dtype)
        other["agent", "seen"], other["next", "agent", "seen"] = steps["observation"], steps["next", "observation"]
        got = from_trajectories(other, empty_store(), observation=("agent", "seen"), action=("agent", "move"))
        assert tasks_of(got) == want
        cells = [(steps[at]["observation"][:, 0] % 9).long() for at in (slice(None),)]
        other["cell"] = torch.nn.functional.one_hot(cells[0], 9).to(dtype)
        following = (steps["next", "observation"][:, 0] % 9).long()
        other["next", "cell"] = torch.nn.functional.one_hot(following, 9).to(dtype)
        store = empty_store(max_obs_continuous_dim=0, max_obs_discrete_dim=9)
        options = {"observation": None, "observation_discrete": "cell", "action": ("agent", "move")}
        (episodes,) = tasks_of(from_trajectories(other, store, **options))
        assert [seen for episode in episodes for seen in episode["observations"]] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_done_alone_is_a_termination():
    steps = transitions([2, 3]).exclude(("next", "terminated"), ("next", "truncated"))
    (task,) = tasks_of(from_trajectories(steps, empty_store()))
    assert [episode["codes"][-1] for episode in task] == [1, 1]


def test_collector_of_gymnasium_environments():
    makers = [partial(GymEnv, "CartPole-v1", categorical_action_encoding=number == 0) for number in range(2)]
    for make in makers:
        env = SerialEnv(2, make)
        collector = Collector(env, None, frames_per_batch=40, total_frames=120)
        batches = [batch.clone() for batch in collector]
        collector.shutdown()
        steps = torch.cat(batches, 1)
        (task,) = tasks_of(from_trajectories(batches, DatasetStore(2, max_obs_continuous_dim=4)))
        assert sum(len(episode["actions"]) for episode in task) == 120
        assert len(task) == steps["collector", "traj_ids"].unique().numel()
        returns = sorted(sum(episode["rewards"]) for episode in task)
        counts = steps["collector", "traj_ids"].unique(return_counts=True)[1]
        assert returns == sorted(counts.float().tolist())  # CartPole pays 1 a step


def test_trajectory_errors():
    steps = transitions([2, 3])
    with pytest.raises(KeyError, match=r"entry 'cell' must be present"):
        from_trajectories(steps, empty_store(), observation="cell")
    with pytest.raises(KeyError, match=r"\('next', 'reward'\)"):
        from_trajectories(steps.exclude(("next", "reward")), empty_store())
    for action in (torch.zeros(5), torch.zeros(5, 1), torch.full((5, 2), 0.5), torch.ones(5, 3, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"'action' must hold ids or one-hot vectors, got .*finite set"):
            from_trajectories(steps.clone().set("action", action), empty_store())
    with pytest.raises(ValueError, match=r"reward'\) must hold one value a step, got trailing shape \(2,\)"):
        from_trajectories(steps.clone().set(("next", "reward"), torch.zeros(5, 2)), empty_store())
    for data in ([], ReplayBuffer(storage=LazyTensorStorage(4))):
        with pytest.raises(ValueError, match="data must have steps, got none"):
            from_trajectories(data, empty_store())
    for data, got in ((["steps"], "str"), (steps[0], r"shape \(\)")):
        with pytest.raises(TypeError, match=rf"must be tensordicts \[\*, T\] or a replay buffer, got {got}"):
            from_trajectories(data, empty_store())
    broken = steps.clone()
    broken["next", "observation"][4] = torch.nan
    with pytest.raises(ValueError, match=r"'observation' must be finite, got .*nan.* in step 3 of episode 1, both"):
        from_trajectories(broken, empty_store())
    with pytest.raises(ValueError, match=r"from_trajectories: column 'observation' .* got max_obs_continuous_dim=0"):
        from_trajectories(steps, DatasetStore(5))
    store = empty_store()
    for action, rule in ((7, r"lie in \[0, 5\), got 7"), (-1, r"lie in \[0, 5\), got -1")):
        broken = steps.clone()
        broken["action"][3] = action
        message = rf"^from_trajectories: column 'action' must {rule} in step 2 of episode 1, both counted from 0\. "
        with pytest.raises(ValueError, match=message):
            from_trajectories(broken, store)
    assert not len(store)
    from_trajectories(steps, store)
    with pytest.raises(KeyError, match=r"from_trajectories: columns must be those in the store .* in observation\."):
        from_trajectories(steps, store, observation=None)
    assert store.num_tasks == 1
