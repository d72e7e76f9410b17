"""MOUSE on PEARL's tasks: a transformer that reads a task's episodes one after the other, in place of an encoder.

Each training task has a code of few numbers, learned as what tells its rewards; policy and action values read it beside
the observation, and learn by TorchRL's SAC as if tasks were known. A small transformer sees observations, actions and
rewards of all episodes of a task, and learns to tell the code: at each step it has a belief, a Gaussian. The agent acts
on a draw from it: to adapt is to have read more (Humplik et al. 2019, arXiv:1905.06424). The training tasks are those
of `pearl.py`, and so is the metric, the return of a test's last episode without chance in actions; there are no more
steps than there. The control is the same agent with its context cleared at every episode. An interrupted run resumes
from its newest checkpoint.

    python examples/pearl_mouse.py --env point-robot --seed 42       # 10 minutes on one core, others half an hour
    python examples/pearl_mouse.py --env point-robot --budget small  # 3 minutes: fewer updates
    python examples/pearl_mouse.py --env point-robot --budget smoke  # seconds, to see it run
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from create_dataset import at_least
from pearl_benchmark import BUDGETS, Benchmark, make_env, make_tasks, regret, save
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torchrl.collectors import Collector
from torchrl.data import Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import EnvBase, ObservationNorm, Transform, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import LossModule, SACLoss, SoftUpdate, ValueEstimators
from torchrl.record import CSVLogger

from torchrl_mouse import schema
from torchrl_mouse.data.saving import replace_json
from torchrl_mouse.envs import ClearContext, DecisionMask, HalfCheetahVelEnv, PointRobotEnv, TaskEnv
from torchrl_mouse.evaluation import EpisodeReturns, plot_curves
from torchrl_mouse.functional import standard_normal_kl
from torchrl_mouse.models import MouseModel
from torchrl_mouse.modules import SwiGLUHead
from torchrl_mouse.objectives import CombinedLoss
from torchrl_mouse.recipes import claim, online_trainer, run, warmup_cosine

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torchrl.data import TensorSpec

HIDDEN = 64  # of the transformer
LAYERS = 2
HEADS = 4
CODE_DIM = 5  # as many numbers as PEARL's latent has
WIDTH = 128  # of the other networks
WEIGHT_DECAY = 0.01
TAU = 0.02
BELIEF_WEIGHT = 0.01  # of the beliefs' surprise among the losses
ACTION_BLUR = 0.5
REPEATS = 10  # Each test task is met that often, PEARL's once: starts are random, and the mean is the same.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an environment's tasks are played and learned from."""

    rows: int  # tasks played side by side, once between updates
    updates: int  # after each time
    batch_size: int  # tasks in an update
    learning_rate: float
    gamma: float
    trace: float  # lambda of the values' targets: how far rewards count by themselves before values say what follows
    entropy_weight: float
    kl_weight: float  # of the codes
    blur: float  # of observations, for the transformer
    encoder: str = "linear"  # of observations and actions; "fourier" sees better where a reward was met
    # of Fourier features, rewards' too: what they resolve and how far they go
    extent: tuple[float, float] = (0.1, 10.0)
    scales: tuple[float, ...] = ()  # what observations are divided by, if they are


_POINT = Recipe(
    rows=40,
    updates=200,
    batch_size=16,
    learning_rate=3e-3,
    gamma=0.9,
    trace=0.0,
    entropy_weight=0.01,
    kl_weight=1e-4,
    blur=0.05,
)
RECIPES = {
    "point-robot": _POINT,
    "sparse-point-robot": dataclasses.replace(
        _POINT, rows=20, updates=150, batch_size=4, blur=0.1, encoder="fourier", extent=(0.05, 4.0)
    ),
    "cheetah-vel": Recipe(
        rows=10,
        updates=800,
        batch_size=1,
        learning_rate=1e-3,
        gamma=0.99,
        trace=0.8,
        entropy_weight=0.05,
        kl_weight=0.01,
        blur=0.05,
        # positions, velocities, place
        scales=(1.0,) * 8 + (2.0, 1.0, 2.0) + (8.0,) * 6 + (10.0, 1.0, 1.0),
    ),
}
SMALL_SHARE = 0.25  # of the updates
SMOKE = {"rows": 2, "updates": 2, "batch_size": 2}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=RECIPES, default="point-robot", help="the tasks")
    parser.add_argument("--budget", choices=BUDGETS, default="benchmark", help="small has fewer updates")
    parser.add_argument("--seed", type=at_least(0), default=42, help="of weights, tasks, actions and starts")
    parser.add_argument("--output", type=Path, help="folder of the run; by default runs/pearl/ENV/mouse-BUDGET-SEED")
    parser.add_argument("--restart", action="store_true", help="delete what an earlier run has left")
    arguments = parser.parse_args()
    if arguments.output is None:
        arguments.output = Path("runs/pearl") / arguments.env / f"mouse-{arguments.budget}-{arguments.seed}"
    return arguments


def network(in_features: int, out_features: int, **options: Any) -> MLP:
    """Makes a network of two hidden layers."""
    return MLP(in_features, out_features, num_cells=[WIDTH, WIDTH], activation_class=torch.nn.ReLU, **options)


# Normalised layers keep predictions sane where nothing has been seen yet.
NORM = {"norm_class": torch.nn.LayerNorm, "norm_kwargs": {"normalized_shape": WIDTH}}


class Codes(torch.nn.Module):
    """What each training task is known by: location and scale of a Gaussian."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(num_tasks, 2 * CODE_DIM)
        self.table.weight.data.mul_(0.01)
        self.extract = NormalParamExtractor()

    def forward(self, task: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads ``[*, 1]``, writes twice ``[*, CODE_DIM]``."""
        # A row has its turn in few updates: ten times the others' step lets it keep up.
        loc, scale = self.extract(10 * self.table(task.squeeze(-1)))
        return loc, scale


class Draw(torch.nn.Module):
    """The code that the agent takes a task to have."""

    def forward(self, loc: torch.Tensor, scale: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draws, ``[*, CODE_DIM]``."""
        return loc + scale * noise


class EpisodeNoise(Transform):
    """Writes what a belief is drawn with: normal, and kept for an episode, so that one guess is followed to its end.

    Args:
        scale: of the noise; 0 takes the belief's mean.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(in_keys=[], out_keys=["noise"])
        self.scale = scale

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        noise = self.scale * torch.randn(*tensordict_reset.shape, CODE_DIM)
        return tensordict_reset.set("noise", noise)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        noise = tensordict["noise"]
        begins = next_tensordict[schema.EPISODE_STEP] == 0
        return next_tensordict.set("noise", torch.where(begins, self.scale * torch.randn_like(noise), noise))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the entry's spec."""
        observation_spec["noise"] = Unbounded((*observation_spec.shape, CODE_DIM))
        return observation_spec


class TaskNumber(Transform):
    """Writes which of the training tasks a row plays."""

    def __init__(self, tasks: torch.Tensor) -> None:
        super().__init__(in_keys=[], out_keys=["task"])
        self.tasks = tasks.reshape(len(tasks), -1)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        env: Any = self.parent.base_env.base_env  # inside TransformedEnv and TaskEnv
        now = env.velocity if isinstance(env, HalfCheetahVelEnv) else env.goal
        same = (now.reshape(next_tensordict.numel(), 1, -1) == self.tasks).all(-1)
        return next_tensordict.set("task", same.int().argmax(-1).reshape(*next_tensordict.shape, 1))

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Adds the entry's spec."""
        observation_spec["task"] = Unbounded((*observation_spec.shape, 1), dtype=torch.int64)
        return observation_spec


class Blur(torch.nn.Module):
    """Noise in what the transformer reads, while it learns.

    It would else know each of the few tasks in the buffer again by its exact places and actions.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds it to both."""
        blurred = observation + self.scale * torch.randn_like(observation)
        return blurred, action + ACTION_BLUR * torch.randn_like(action)


class BeliefLoss(LossModule):
    """What is known about tasks, and believed at each step.

    A code, drawn from a Gaussian near the prior as in a variational autoencoder, tells the reward of its task's
    transitions. A belief is wrong by the negative logarithm of the density that it gives to the code.

    Args:
        head: reads ``hidden``, writes location and scale of the belief.
        codes: reads ``task``, writes location and scale of the code.
        rewards: reads ``drawn``, a code, and the transition; writes ``predicted``, its reward.
        kl_weight: of the codes' distance from the prior.
    """

    in_keys = (
        schema.HIDDEN,
        "task",
        "code",
        schema.OBSERVATION,
        schema.ACTION,
        ("next", schema.OBSERVATION),
        ("next", "reward"),
        schema.MASK,
    )
    out_keys = ("loss_reward", "loss_kl", "loss_belief")
    head: TensorDictModule
    head_params: TensorDictParams
    target_head_params: TensorDictParams
    codes: TensorDictModule
    codes_params: TensorDictParams
    target_codes_params: TensorDictParams
    rewards: TensorDictModule
    rewards_params: TensorDictParams
    target_rewards_params: TensorDictParams

    def __init__(
        self, head: TensorDictModule, codes: TensorDictModule, rewards: TensorDictModule, *, kl_weight: float
    ) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        for name, module in (("head", head), ("codes", codes), ("rewards", rewards)):
            self.convert_to_functional(module, name, create_target_params=False)

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Has nothing to forward, as there is no value estimator."""

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Reads steps ``[B, T]``, each row of one task; ``code`` is what policy and values know."""
        steps = tensordict.copy()
        with self.codes_params.to_module(self.codes, preserve_module_state=False):
            self.codes(steps)
        loc, scale = steps["code_loc"], steps["code_scale"]
        steps["drawn"] = loc + scale * torch.randn_like(loc)
        with self.rewards_params.to_module(self.rewards, preserve_module_state=False):
            self.rewards(steps)
        with self.head_params.to_module(self.head, preserve_module_state=False):
            self.head(steps)
        belief = torch.distributions.Normal(steps["belief_loc"], steps["belief_scale"])
        decisions = steps[schema.MASK]
        error = (steps["predicted"] - steps["next", "reward"])[decisions]
        kl = standard_normal_kl(loc, scale.square()).sum(-1)
        surprise = -belief.log_prob(steps["code"]).sum(-1)[decisions]
        return TensorDict(
            {
                "loss_reward": error.square().mean(),
                "loss_kl": self.kl_weight * kl.mean(),
                "loss_belief": BELIEF_WEIGHT * surprise.mean(),
            }
        )


def task_env(env: EnvBase, episodes: int, recipe: Recipe) -> TransformedEnv:
    """Joins episodes to tasks, and scales observations."""
    env = TransformedEnv(TaskEnv(env, episodes_per_task=episodes))
    if recipe.scales:
        scale = torch.tensor(recipe.scales)
        env.append_transform(ObservationNorm(0.0, scale, in_keys=[schema.OBSERVATION], standard_normal=True))
    return env


def training_env(name: str, tasks: torch.Tensor, benchmark: Benchmark, recipe: Recipe) -> TransformedEnv:
    """Makes rows that draw a training task each time, and write what belongs to it."""
    sizes = {"batch_size": recipe.rows, "max_steps": benchmark.max_steps}
    if name == "cheetah-vel":
        env = HalfCheetahVelEnv(tasks, **sizes)
    else:
        env = PointRobotEnv(tasks, **sizes, sparse=benchmark.sparse)
    env = task_env(env, benchmark.test_episodes, recipe)
    env.append_transform(EpisodeNoise())
    env.append_transform(TaskNumber(tasks))
    return env


class Agent:
    """The model, its losses, and how it is tested."""

    def __init__(self, name: str, benchmark: Benchmark, recipe: Recipe) -> None:
        self.name, self.benchmark, self.recipe = name, benchmark, recipe
        self.episodes = benchmark.test_episodes
        # A terminal frame between two episodes is one more step, at which nothing is done.
        self.task_steps = self.episodes * (benchmark.max_steps + 1) - 1
        tasks, _ = make_tasks(name, benchmark)
        env = task_env(make_env(name, tasks, benchmark), self.episodes, recipe)
        spec: TensorSpec = env.action_spec_unbatched
        observation_dim, action_dim = env.observation_spec[schema.OBSERVATION].shape[-1], spec.shape[-1]
        self.trunk = MouseModel.from_specs(
            env,
            # The agent sees how good a step was where the benchmark says so; the critics always do.
            keys={"reward": "sparse_reward"} if benchmark.sparse else {},
            hidden_dim=HIDDEN,
            window=self.task_steps + 1,
            embedding_kwargs={
                "std": 0.3,
                "continuous_encoder": recipe.encoder,
                "fourier_in_min": recipe.extent[0],
                "fourier_in_max": recipe.extent[1],
                "max_num_time_steps": benchmark.max_steps + 1,
            },
            backbone_kwargs={"kind": "llama", "num_layers": LAYERS, "num_heads": HEADS},
        ).trunk
        head = torch.nn.Sequential(SwiGLUHead(HIDDEN, 2 * CODE_DIM, num_layers=1), NormalParamExtractor())
        belief = TensorDictModule(head, [schema.HIDDEN], ["belief_loc", "belief_scale"])
        draw = TensorDictModule(Draw(), ["belief_loc", "belief_scale", "noise"], ["code"])
        known = [schema.OBSERVATION, "code"]
        size = observation_dim + CODE_DIM
        parameters = TensorDictModule(network(size, 2 * action_dim), known, ["parameters"])
        extract = TensorDictModule(NormalParamExtractor(), ["parameters"], ["loc", "scale"])
        policy = ProbabilisticActor(
            TensorDictSequential(parameters, extract),
            in_keys=["loc", "scale"],
            spec=spec,
            distribution_class=TanhNormal,
            return_log_prob=True,
            default_interaction_type=ExplorationType.RANDOM,
        )
        self.actor = ProbabilisticTensorDictSequential(self.trunk, belief, draw, *policy)
        self.sac = SACLoss(
            policy,
            ValueOperator(network(size + action_dim, 1, **NORM), in_keys=[*known, schema.ACTION]),
            action_spec=spec,
            num_qvalue_nets=2,
            alpha_init=recipe.entropy_weight,
            fixed_alpha=True,
        )
        target = {"value_type": ValueEstimators.TDLambda, "lmbda": recipe.trace} if recipe.trace else {}
        self.sac.make_value_estimator(gamma=recipe.gamma, **target)
        # Nothing that is done in an episode changes what the next one's start is worth.
        self.sac.set_keys(done=schema.PREVIOUS_TRUNCATED, terminated=schema.PREVIOUS_TRUNCATED)
        self.sac.state_dict()  # Makes a buffer that loading a checkpoint would miss: TorchRL makes it on first use.
        self.codes = TensorDictModule(Codes(len(tasks)), ["task"], ["code_loc", "code_scale"])
        transition = [schema.OBSERVATION, schema.ACTION, ("next", schema.OBSERVATION)]
        rewards = network(size + action_dim + observation_dim, 1, **NORM)
        rewards = TensorDictModule(rewards, ["drawn", *transition], ["predicted"])
        blurred = [schema.OBSERVATION, schema.PREVIOUS_ACTION]
        self.loss = CombinedLoss(
            TensorDictSequential(TensorDictModule(Blur(recipe.blur), blurred, blurred), self.trunk),
            {"sac": self.sac, "belief": BeliefLoss(belief, self.codes, rewards, kl_weight=recipe.kl_weight)},
        )

    @torch.no_grad()
    def tell(self, steps: TensorDictBase) -> TensorDictBase:
        """Writes a draw of each task's code into steps ``[B, T]``: all that policy and values learn of it."""
        self.codes(steps)
        loc, scale = steps["code_loc"], steps["code_scale"]
        steps["code"] = steps["next", "code"] = loc + scale * torch.randn_like(loc[:, :1])
        return steps

    @torch.no_grad()
    def test(self, tasks: torch.Tensor, *, clear: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Meets each of the tasks anew, as the benchmark's metric asks: without chance in the actions.

        Args:
            tasks: what sets them apart.
            clear: clear the context at each episode, the control.

        Returns:
            The episodes' returns, and their first observations, ``[tasks, episodes, *]``.
        """
        env = task_env(make_env(self.name, tasks, self.benchmark), self.episodes, self.recipe)
        # Where rewards are only met near a goal, the agent has to guess, also in a test.
        env.append_transform(EpisodeNoise(1.0 if self.benchmark.sparse else 0.0))
        if clear:
            env.append_transform(ClearContext())
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            steps = env.rollout(self.task_steps, self.actor, break_when_any_done=False)
        self.trunk.forget(steps[schema.STREAM][:, 0])
        if self.benchmark.sparse:
            steps["next", "reward"] = steps["next", "sparse_reward"]
        returns = EpisodeReturns(len(tasks), self.episodes)
        returns.add(steps)
        first = steps[schema.EPISODE_STEP].squeeze(-1) == 0
        return returns.values, steps[schema.OBSERVATION][first].unflatten(0, (len(tasks), self.episodes))


class Run:
    """Training and tests of an agent."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.benchmark = BUDGETS[arguments.budget][arguments.env]
        self.recipe = RECIPES[arguments.env]
        if arguments.budget != "benchmark":
            less = {"updates": int(SMALL_SHARE * self.recipe.updates)} if arguments.budget == "small" else SMOKE
            self.recipe = dataclasses.replace(self.recipe, **less)
        self.tasks, test_tasks = make_tasks(arguments.env, self.benchmark)
        self.meetings = 1 if self.benchmark.sparse else REPEATS  # Sparse tasks always begin at the origin.
        self.test_tasks = test_tasks.repeat(self.meetings, *[1] * (test_tasks.ndim - 1))
        torch.manual_seed(arguments.seed)
        self.agent = Agent(arguments.env, self.benchmark, self.recipe)
        self.file = arguments.output / "history.json"

    @property
    def frames(self) -> tuple[int, int]:
        """The environment steps between updates, and all of them: no more than PEARL has, one batch at least."""
        each = self.recipe.rows * self.agent.episodes * self.benchmark.max_steps
        return each, max(1, self.benchmark.training_steps // each) * each

    def train(self) -> None:
        """Plays, learns and is tested in turns, from the newest checkpoint if there is one."""
        agent, recipe, arguments = self.agent, self.recipe, self.arguments
        each, total = self.frames
        env = training_env(arguments.env, self.tasks, self.benchmark, recipe)
        collector = Collector(
            env,
            agent.actor,
            frames_per_batch=recipe.rows * agent.task_steps,  # whole tasks
            total_frames=-1,
            postproc=DecisionMask(),  # The trainer counts the steps that it leaves.
        )
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(total // each * recipe.rows), batch_size=recipe.batch_size
        )
        self.buffer.append_transform(agent.tell)
        optimizer = torch.optim.AdamW(
            agent.loss.parameters(), lr=recipe.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        updates = total // each * recipe.updates
        trainer = online_trainer(
            agent.loss,
            collector,
            agent.actor,
            self.buffer,
            optimizer,
            total_frames=total,
            updates_per_batch=recipe.updates,
            directory=arguments.output,
            target_updaters=(SoftUpdate(agent.sac, tau=TAU),),
            scheduler=warmup_cosine(optimizer, updates, warmup=min(100, updates // 10), floor=0.05),
            evaluate=self.evaluate,
            evaluation_interval=1,
            checkpoint_interval=1,
            logger=CSVLogger("log", log_dir=str(arguments.output)),
            seed=arguments.seed,
        )
        run(trainer)

    def evaluate(self) -> dict[str, float]:
        """Meets all tasks anew; notes the outcome under the number of tasks played until then."""
        entry = {"environment_steps": len(self.buffer) * self.agent.episodes * self.benchmark.max_steps}
        for kind, tasks in (("train", self.tasks), ("test", self.test_tasks)):
            returns, starts = self.agent.test(tasks)
            entry[f"{kind}_return"] = returns[:, -1].mean().item()
        entry["first_episode"] = returns[:, 0].mean().item()
        if self.arguments.env == "point-robot":
            entry["regret"] = regret(returns, starts, self.test_tasks)
        # A run that was killed after this comes here again, with the checkpoint before it.
        replace_json(self.file, {**self.history, str(len(self.buffer)): entry})
        return entry

    @property
    def history(self) -> dict[str, dict[str, float]]:
        """The tests so far, by the number of tasks played."""
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    def finish(self) -> dict[str, float]:
        """Tests the agent and its control, writes all results, and returns those that count."""
        arguments, agent = self.arguments, self.agent
        options = {"environment": arguments.env, "agent": "MOUSE", "budget": arguments.budget, "seed": arguments.seed}
        options["meetings"] = self.meetings  # with each test task
        results = save(options, list(self.history.values()), arguments.output)
        torch.manual_seed(arguments.seed)
        returns = {
            "agent": agent.test(self.test_tasks)[0],
            "context cleared": agent.test(self.test_tasks, clear=True)[0],
        }
        plot_curves({"test tasks": returns}, arguments.output / "episodes.png", title=f"{arguments.env}, MOUSE")
        means = {name: values.mean(0).tolist() for name, values in returns.items()}
        replace_json(arguments.output / "episodes.json", means)
        for name, values in means.items():
            for number in sorted({1, 2, len(values)}):
                results[f"episode {number}, {name}"] = values[number - 1]
        return results


def main() -> None:
    """Trains, or goes on, and prints the results."""
    arguments = parse_arguments()
    try:
        training = Run(arguments)
    except ImportError as error:  # of MuJoCo
        raise SystemExit(f"{error} (--env)") from None
    read = ("num_train", "num_test", "max_steps", "test_episodes", "training_steps", "sparse")
    options = {name: getattr(arguments, name) for name in ("env", "budget", "seed")}
    options |= {name: getattr(training.benchmark, name) for name in read}
    options["recipe"] = dataclasses.asdict(training.recipe) | {
        "hidden": HIDDEN,
        "layers": LAYERS,
        "heads": HEADS,
        "code": CODE_DIM,
        "width": WIDTH,
        "weight_decay": WEIGHT_DECAY,
        "tau": TAU,
        "belief_weight": BELIEF_WEIGHT,
        "action_blur": ACTION_BLUR,
    }
    try:
        claim(arguments.output, options, restart=arguments.restart)
    except ValueError as error:
        raise SystemExit(f"{error} (--restart, --output)") from None
    training.train()
    torch.save(training.agent.actor.state_dict(), arguments.output / "actor.pt")
    for name, value in training.finish().items():
        print(f"{name}: {value:.3f}")
    print(f"Results, plots, actor, log and checkpoints are in {arguments.output}.")


if __name__ == "__main__":
    main()
