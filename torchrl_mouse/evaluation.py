"""Learning inside the context, measured: returns episode by episode, NAUC, controls, plots."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode
from tqdm.auto import tqdm

from torchrl_mouse import schema
from torchrl_mouse.data.saving import replace_json, replacing
from torchrl_mouse.modules.trunk import Trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tensordict import TensorDictBase
    from torchrl.envs import EnvBase

_EDGE = 10  # Episodes that "first" and "last" mean in a summary.
_RETURNS = "returns.safetensors"


class EpisodeReturns:
    """Sums rewards by episode of the task, over the batches of a collector.

    Args:
        rows: number of environment rows ``B``.
        episodes: number of episodes to record per row; later ones are ignored.

    Examples:
        >>> from tensordict import TensorDict
        >>> ends = torch.tensor([[[True], [False], [True]]])
        >>> following = {"reward": torch.tensor([[[1.0], [0.0], [2.0]]])}
        >>> following["previous"] = {"terminated": ends, "truncated": torch.zeros_like(ends)}
        >>> following["done"] = torch.zeros_like(ends)
        >>> returns = EpisodeReturns(1, 2)
        >>> returns.add(TensorDict({"next": following}, [1, 3]))
        >>> returns.values.tolist(), returns.complete
        ([[1.0, 2.0]], 2)
    """

    def __init__(self, rows: int, episodes: int) -> None:
        self.values = torch.zeros(rows, episodes)
        self._ended = torch.zeros(rows, 1, dtype=torch.int64)

    @property
    def complete(self) -> int:
        """Number of episodes that every row has finished."""
        return min(int(self._ended.min()), self.values.shape[1])

    def add(self, batch: TensorDictBase) -> None:
        """Adds a batch of transitions ``[B, T]`` that follows the last one.

        Raises:
            ValueError: a row's task ended before its episodes were recorded.
        """
        reward = schema.require(batch, ("next", "reward")).squeeze(-1).to(self.values)
        ends = schema.is_terminal_frame(batch["next"]).to(self.values.device)
        # Reward belongs to the episode it ends; what comes after an end to the next one.
        index = self._ended + ends.cumsum(1) - ends.long()
        inside = index < self.values.shape[1]
        done = schema.require(batch, ("next", "done")).squeeze(-1).to(self.values.device)
        short = done & (index + ends.long() < self.values.shape[1])
        if short.any():
            row, step = short.nonzero()[0].tolist()
            raise ValueError(
                f"EpisodeReturns: a task must last {self.values.shape[1]} episodes, got one that ended after "
                f"{int(index[row, step]) + 1} in row {row}. Give TaskEnv as many episodes_per_task."
            )
        self.values.scatter_add_(1, index.clamp(max=self.values.shape[1] - 1), torch.where(inside, reward, 0.0))
        self._ended += ends.sum(1, keepdim=True)


def evaluate(
    policy: Callable[[TensorDictBase], TensorDictBase],
    env: EnvBase,
    episodes: int,
    *,
    steps_per_batch: int = 64,
    progress_bar: bool = True,
    description: str = "evaluation",
) -> torch.Tensor:
    """Plays every task for a number of episodes with the context growing all along, and returns the returns.

    Args:
        policy: acts; module policies act from their key-value cache.
        env: a :class:`~torchrl_mouse.envs.TaskEnv`, one task per row (or a single row), ``episodes_per_task`` at least
            ``episodes``.
        episodes: number of episodes per task.
        steps_per_batch: steps per row that the collector gathers at a time.
        progress_bar: show one.
        description: its label.

    Returns:
        float32 ``[B, episodes]``.

    Raises:
        ValueError: fewer than one episode, or tasks of fewer episodes.

    Examples:
        >>> from torchrl.collectors import RandomPolicy
        >>> from torchrl_mouse.envs import DarkRoomEnv, TaskEnv
        >>> env = TaskEnv(DarkRoomEnv(torch.tensor([0, 40]), seed=0), episodes_per_task=3)
        >>> evaluate(RandomPolicy(env.full_action_spec), env, 3, progress_bar=False).shape
        torch.Size([2, 3])
    """
    if episodes < 1:
        raise ValueError(f"evaluate: episodes must be at least 1, got {episodes}.")
    rows = env.batch_size.numel()
    returns = EpisodeReturns(rows, episodes)
    with set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(False), torch.no_grad():
        collector = Collector(
            env,
            policy,
            frames_per_batch=rows * steps_per_batch,
            total_frames=-1,
            exploration_type=ExplorationType.RANDOM,
            auto_register_policy_transforms=False,
            trust_policy=True,
        )
        try:
            with tqdm(total=episodes, desc=description, unit="episode", disable=not progress_bar) as bar:
                for batch in collector:
                    returns.add(batch.reshape(rows, -1))
                    bar.update(returns.complete - bar.n)
                    if returns.complete == episodes:
                        break
        finally:
            collector.shutdown(close_env=False)
    if isinstance(policy, nn.Module):  # These contexts are of no use to anybody now.
        for module in policy.modules():
            if isinstance(module, Trunk):
                module.forget(batch[schema.STREAM])
    return returns.values


def nauc(returns: torch.Tensor, expert: float | torch.Tensor) -> torch.Tensor:
    """Computes the normalised area under the curve of return over in-context episodes.

    Args:
        returns: ``[*, E]``.
        expert: the expert's return per episode, a number or ``[*]``, positive.

    Returns:
        ``[*]``; 1 is the expert from the first episode on (arXiv:2502.17666).

    Raises:
        ValueError: the expert's return is not positive.

    Examples:
        >>> nauc(torch.tensor([[0.0, 0.5, 1.0]]), expert=1.0).tolist()
        [0.5]
    """
    expert = torch.as_tensor(expert, dtype=returns.dtype)
    if bool((expert <= 0).any()):
        raise ValueError(f"nauc: expert must be positive, got {expert.min().item()}. Shift the returns first.")
    return returns.mean(-1) / expert


def summarize(returns: torch.Tensor, expert: float) -> dict[str, Any]:
    """Summarises the returns of several tasks.

    Args:
        returns: ``[B, E]``.
        expert: the expert's return per episode.

    Returns:
        NAUC (mean, standard deviation and minimum over tasks), the mean return of the first episode, of the first and
        of the last ten, and the mean curve ``[E]``.

    Examples:
        >>> summarize(torch.ones(2, 20), expert=1.0)["nauc"]
        1.0
    """
    areas = nauc(returns, expert)
    return {
        "nauc": areas.mean().item(),
        "nauc_std_over_tasks": areas.std().item() if len(areas) > 1 else 0.0,
        "nauc_min_over_tasks": areas.min().item(),
        "first_episode": returns[:, 0].mean().item(),
        "first_10_episodes": returns[:, :_EDGE].mean().item(),
        "last_10_episodes": returns[:, -_EDGE:].mean().item(),
        "num_tasks": len(returns),
        "curve": [round(value, 4) for value in returns.mean(0).tolist()],
    }


@dataclass(frozen=True)
class Run:
    """What the figures of other runs show of a run: the returns of its agents.

    Args:
        label: what tells it from other runs, for instance its backbone.
        panels: by panel's title and by agent, each ``[B, E]``.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Run("gru", {"held-out goals": {"agent": torch.ones(3, 20)}}).save(folder)
        ...     run = Run.load(folder)
        >>> run.label, run.panels["held-out goals"]["agent"].shape
        ('gru', torch.Size([3, 20]))
    """

    label: str
    panels: Mapping[str, Mapping[str, torch.Tensor]]

    def save(self, directory: str | Path) -> None:
        """Writes ``returns.safetensors`` into a folder, which is made where there is none."""
        returns = {
            json.dumps([panel, agent]): values.contiguous()
            for panel, curves in self.panels.items()
            for agent, values in curves.items()
        }
        with replacing(Path(directory, _RETURNS)) as partial:
            save_file(returns, partial, {"label": self.label})

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder holds no returns.
            ValueError: the file cannot be read.
        """
        file = Path(directory, _RETURNS)
        if not file.exists():
            raise FileNotFoundError(
                f"Run.load: {directory} must hold the results of a run, got no {file.name} in it. Let that run finish."
            )
        panels: dict[str, dict[str, torch.Tensor]] = {}
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it cannot be iterated over
                    panel, agent = json.loads(name)
                    panels.setdefault(panel, {})[agent] = opened.get_tensor(name)
                return cls(opened.metadata()["label"], panels)
        except SafetensorError as error:
            raise ValueError(f"Run.load: {file} must be readable, got: {error}. Let that run finish again.") from error


def plot_curves(
    panels: Mapping[str, Mapping[str, torch.Tensor]],
    path: str | Path,
    *,
    others: Sequence[Run] = (),
    ylabel: str = "return",
    title: str | None = None,
) -> None:
    """Draws return against episode inside the task, and saves the figure.

    Args:
        panels: for each panel's title, the curves by label, each ``[B, E]`` (the mean over tasks is drawn, with a band
            of one standard error).
        path: where to save; the suffix chooses the format.
        others: runs to compare with; what they have of each panel is drawn with dashes, and their label.
        ylabel: label of the vertical axis.
        title: above all panels.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (``pip install torchrl-mouse[examples]``).

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_curves({"held-out goals": {"agent": torch.rand(3, 20)}}, Path(folder, "curves.png"))
        ...     Path(folder, "curves.png").exists()
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, own) in zip(axes, panels.items(), strict=True):
        lines = [(agent, "-", returns) for agent, returns in own.items()]
        for run in others:
            lines += [(f"{agent}, {run.label}", "--", values) for agent, values in run.panels.get(name, {}).items()]
        for label, style, returns in lines:
            mean = returns.mean(0)
            error = returns.std(0, correction=min(1, len(returns) - 1)) / len(returns) ** 0.5
            episode = torch.arange(1, len(mean) + 1)
            (line,) = axis.plot(episode, mean, label=label, linewidth=1.5, linestyle=style)
            axis.fill_between(episode, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=name, xlabel="episode inside the task")
        axis.locator_params(axis="x", integer=True)  # There is no episode between two.
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(frameon=False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=120)


def save_results(
    directory: str | Path,
    tasks: str,
    returns: Mapping[str, torch.Tensor],
    *,
    expert: float,
    title: str | None = None,
    others: Sequence[Run] = (),
) -> str:
    """Writes ``results.json``, what :func:`summarize` says of each agent, and ``curves.png``.

    Args:
        directory: where to write; is made where there is none.
        tasks: what the agents played.
        returns: by agent, each ``[B, E]``.
        expert: the expert's return per episode.
        title: of the plot.
        others: runs that the plot shows as well.

    Returns:
        The results as a table, to be printed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(save_results(folder, "fresh maps", {"agent": torch.ones(2, 20)}, expert=1.0))
        fresh maps                    NAUC  first 10   last 10
        agent                        1.000     1.000     1.000
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    results = {name: summarize(values, expert) for name, values in returns.items()}
    plot_curves({tasks: returns}, directory / "curves.png", others=others, title=title)
    replace_json(directory / "results.json", results)
    lines = [f"{tasks:<26}{'NAUC':>8}{'first 10':>10}{'last 10':>10}"]
    for name, result in results.items():
        numbers = (result["nauc"], result["first_10_episodes"], result["last_10_episodes"])
        lines.append("{:<26}{:>8.3f}{:>10.3f}{:>10.3f}".format(name, *numbers))
    return "\n".join(lines)
