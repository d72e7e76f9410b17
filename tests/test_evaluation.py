"""Returns by episode, their summaries, and plots."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.image import imread
from tensordict import TensorDict
from torchrl.envs import ExplorationType
from torchrl.envs.utils import exploration_type
from torchrl.modules import set_recurrent_mode

from torchrl_mouse import evaluation
from torchrl_mouse.envs import DarkRoomEnv, TaskEnv, oracle_policy
from torchrl_mouse.evaluation import EpisodeReturns, Run, evaluate, nauc, plot_curves, save_results, summarize
from torchrl_mouse.models import MouseConfig, MouseModel


def transitions(rewards, terminated, truncated):
    shape = (*torch.tensor(rewards).shape, 1)
    following = {
        "reward": torch.tensor(rewards, dtype=torch.float32).reshape(shape),
        "previous": {
            "terminated": torch.tensor(terminated).reshape(shape),
            "truncated": torch.tensor(truncated).reshape(shape),
        },
    }
    following["done"] = torch.zeros(shape, dtype=torch.bool)
    return TensorDict({"next": following}, shape[:-1])


@st.composite
def histories(draw):
    """Rewards (whole numbers, so that sums are exact), ends, borders of batches, and episodes to record."""
    rows, steps = draw(st.integers(1, 3)), draw(st.integers(1, 12))

    def table(element):
        return draw(st.lists(st.lists(element, min_size=steps, max_size=steps), min_size=rows, max_size=rows))

    history = table(st.integers(-3, 3)), table(st.booleans()), table(st.booleans())
    return history, sorted(draw(st.sets(st.integers(1, steps)))), draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None, database=None)
@given(histories())
def test_returns_are_sums_by_episode_however_batched(case):
    (rewards, terminated, truncated), borders, episodes = case
    expected, ended = [[0] * episodes for _ in rewards], [0] * len(rewards)
    for row, values in enumerate(rewards):
        for step, reward in enumerate(values):
            if ended[row] < episodes:
                expected[row][ended[row]] += reward
            ended[row] += terminated[row][step] or truncated[row][step]
    batch = transitions(rewards, terminated, truncated)
    whole, parts = EpisodeReturns(len(rewards), episodes), EpisodeReturns(len(rewards), episodes)
    whole.add(batch)
    for first, last in zip([0, *borders], [*borders, batch.shape[1]], strict=True):
        parts.add(batch[:, first:last])
    for returns in (whole, parts):
        assert returns.values.tolist() == expected
        assert returns.complete == min([*ended, episodes])


def test_rewards_of_other_dtypes():
    batch = transitions([[1, 2]], [[True, True]], [[False, False]])
    batch["next", "reward"] = batch["next", "reward"].double()
    returns = EpisodeReturns(1, 2)
    returns.add(batch)
    assert returns.values.dtype == torch.float32
    assert returns.values.tolist() == [[1.0, 2.0]]


def test_task_with_too_few_episodes():
    env = TaskEnv(DarkRoomEnv([0, 1], size=3, teacher=True), episodes_per_task=2)
    with pytest.raises(ValueError, match=r"a task must last 3 episodes, got one that ended after 2 in row \d"):
        evaluate(oracle_policy(), env, 3, progress_bar=False)


def test_batch_without_episode_ends():
    with pytest.raises(KeyError, match=r"entry \('previous', 'terminated'\) must be present"):
        EpisodeReturns(1, 1).add(TensorDict({"next": {"reward": torch.zeros(1, 2, 1)}}, [1, 2]))


GOALS, DISTANCES = [4, 0, 8, 5, 2], [0, 2, 2, 1, 2]  # In a 3 x 3 room, from its centre.


@pytest.mark.parametrize("steps_per_batch", [1, 7, 64])
def test_optimal_policy_stays_on_the_goal(monkeypatch, steps_per_batch):
    base = DarkRoomEnv(GOALS, size=3, max_steps=4, terminate_on_goal=False, teacher=True)
    env, closed = TaskEnv(base, episodes_per_task=3), []
    env.is_closed = False
    monkeypatch.setattr(env, "close", lambda **_: closed.append(1))
    expected = [4 - max(distance, 1) + 1 for distance in DISTANCES]
    for _ in range(2):  # The environment is the caller's, and can be used again.
        returns = evaluate(oracle_policy(), env, 3, steps_per_batch=steps_per_batch, progress_bar=False)
        assert returns.tolist() == [[float(value)] * 3 for value in expected]
    assert not closed


def test_rows_that_finish_early_wait_for_the_others():
    # On the goal after 1 or 2 steps, an episode of another row takes longer: their next tasks are not recorded.
    base = DarkRoomEnv(GOALS, size=3, max_steps=6, teacher=True)
    returns = evaluate(oracle_policy(), TaskEnv(base, episodes_per_task=2), 2, progress_bar=False)
    assert returns.tolist() == [[1.0, 1.0]] * 5


def test_fewer_episodes_than_a_task_holds():
    base = DarkRoomEnv(GOALS, size=3, max_steps=4, terminate_on_goal=False, teacher=True)
    returns = evaluate(oracle_policy(), TaskEnv(base, episodes_per_task=5), 2, progress_bar=False)
    assert returns.shape == (5, 2)


def test_a_single_row():
    base = DarkRoomEnv([0], batch_size=(), size=3, max_steps=4, terminate_on_goal=False, teacher=True)
    assert base.batch_size == ()
    returns = evaluate(oracle_policy(), TaskEnv(base, episodes_per_task=2), 2, progress_bar=False)
    assert returns.tolist() == [[3.0, 3.0]]


def test_policies_draw_actions_without_gradient():
    seen = []

    def policy(steps):
        seen.append((exploration_type(), torch.is_grad_enabled()))
        return oracle_policy()(steps)

    env = TaskEnv(DarkRoomEnv([4], size=3, max_steps=2, teacher=True), episodes_per_task=1)
    evaluate(policy, env, 1, progress_bar=False)
    assert set(seen) == {(ExplorationType.RANDOM, False)}


def test_no_episode():
    env = TaskEnv(DarkRoomEnv([4], size=3), episodes_per_task=1)
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        evaluate(oracle_policy(), env, 0, progress_bar=False)


def test_nauc_is_the_mean_share_of_the_expert():
    returns = torch.tensor([[0.0, 1.0, 2.0], [2.0, 2.0, 2.0]])
    assert nauc(returns, 2.0).tolist() == [0.5, 1.0]
    assert nauc(returns, torch.tensor([1.0, 4.0])).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("expert", [0.0, -1.0, torch.tensor([1.0, -1.0])])
def test_nauc_of_no_expert(expert):
    with pytest.raises(ValueError, match=r"expert must be positive, got (0|-1)\.0"):
        nauc(torch.ones(2, 3), expert)


def test_summary_by_hand():
    returns = torch.stack([torch.arange(12.0), torch.full((12,), 4.0)])
    summary = summarize(returns, expert=8.0)
    assert summary == {
        "nauc": pytest.approx((5.5 + 4) / 16),
        "nauc_std_over_tasks": pytest.approx((5.5 - 4) / 8 / math.sqrt(2)),
        "nauc_min_over_tasks": pytest.approx(0.5),
        "first_episode": 2.0,
        "first_10_episodes": pytest.approx((4.5 + 4) / 2),
        "last_10_episodes": pytest.approx((6.5 + 4) / 2),
        "num_tasks": 2,
        "curve": [(episode + 4) / 2 for episode in range(12)],
    }


def test_summary_of_one_task():
    assert summarize(torch.ones(1, 3), expert=1.0)["nauc_std_over_tasks"] == 0.0


def test_plot_is_a_picture_with_lines(tmp_path):
    file = tmp_path / "curves.png"
    curves = {"agent": torch.rand(4, 20), "random": torch.zeros(1, 20)}
    plot_curves({"train": curves, "held out": curves}, file, ylabel="reward", title="Dark Room")
    picture = imread(file)
    height, width, _ = picture.shape
    assert width > 2 * height
    assert (width, height) == (round(5.2 * 2 * 120), 480)
    colours = {tuple(pixel) for pixel in (picture[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {(31, 119, 180), (255, 127, 14)} <= colours, "both curves are drawn"


def lines_of(monkeypatch):
    """Collects what is drawn: label, style and height of each line, by panel."""
    drawn, plot, set_ = {}, Axes.plot, Axes.set
    lines = {}

    def recording(axis, x, y, **options):
        lines.setdefault(axis, []).append((options["label"], options["linestyle"], float(y[0])))
        return plot(axis, x, y, **options)

    def naming(axis, **options):
        drawn[options["title"]] = lines.pop(axis)
        return set_(axis, **options)

    monkeypatch.setattr(Axes, "plot", recording)
    monkeypatch.setattr(Axes, "set", naming)
    return drawn


def test_runs_stand_beside_each_other(monkeypatch, tmp_path):
    for number, label in enumerate(("gru", "none", "none")):
        panels = {"train": {"agent": torch.full((4, 20), number + 1.0)}}
        if number == 0:
            panels["held out"] = {"a, b": torch.full((2, 20), 9.0).expand(2, 20).T.contiguous().T}
        (tmp_path / str(number)).mkdir()
        Run(label, panels).save(tmp_path / str(number))
    others = [Run.load(tmp_path / str(number)) for number in range(3)]
    assert torch.equal(others[0].panels["held out"]["a, b"], torch.full((2, 20), 9.0))
    drawn = lines_of(monkeypatch)
    own = {"agent": torch.zeros(4, 20)}
    plot_curves({"train": own, "held out": own, "elsewhere": own}, tmp_path / "curves.png", others=others)
    mine = ("agent", "-", 0.0)
    assert drawn == {
        # Two runs with one label are both there.
        "train": [mine, ("agent, gru", "--", 1.0), ("agent, none", "--", 2.0), ("agent, none", "--", 3.0)],
        "held out": [mine, ("a, b, gru", "--", 9.0)],
        "elsewhere": [mine],
    }


def test_results_are_plotted_beside_other_runs(monkeypatch, tmp_path):
    drawn = lines_of(monkeypatch)
    others = [Run("gru", {"maps": {"agent": torch.ones(2, 20)}})]
    table = save_results(tmp_path, "maps", {"agent": torch.zeros(2, 20)}, expert=1.0, others=others)
    assert drawn == {"maps": [("agent", "-", 0.0), ("agent, gru", "--", 1.0)]}
    assert "gru" not in table, "the table is of this run"


def test_a_folder_without_returns(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold the results of a run, got no returns.safetensors in it"):
        Run.load(tmp_path)


def test_damaged_returns_and_what_a_failed_save_leaves(tmp_path, monkeypatch):
    run = Run("mine", {"held out": {"agent": torch.ones(2, 20)}})
    run.save(tmp_path)

    def fail(returns, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(evaluation, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        run.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["returns.safetensors"]
    assert Run.load(tmp_path).label == "mine"
    (tmp_path / "returns.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"Run.load: .*returns.safetensors must be readable, got: "):
        Run.load(tmp_path)


def test_evaluation_is_sequential_and_leaves_no_context():
    embedding = {"max_num_actions": 5, "max_num_obs_continuous": 2}
    model = MouseModel(MouseConfig(hidden_dim=16, embedding_kwargs=embedding, dqn_head_kwargs={}))
    for _ in range(3):
        env = TaskEnv(DarkRoomEnv([0, 1], size=3), episodes_per_task=2)
        actor = model.actor(env.action_spec_unbatched)
        with set_recurrent_mode(True):  # Where a training loop may well stand.
            evaluate(actor, env, 2, progress_bar=False)
        assert len(model.trunk._cache) == 0
        assert len(model.trunk._cache.length) == 2  # The slots of the first evaluation serve the others.
