"""PEARL on point-robot, sparse-point-robot or cheetah-vel, at the budget of the benchmark that compares its encoders.

An agent meta-trains on some tasks: it plays with latents that it draws from its belief about the task, and learns to
infer that belief from transitions. After every iteration it meets test tasks, and what it reaches in its last episode
there is the metric, ``meta_test_return``. A run that was stopped resumes from its last finished iteration.

    python examples/pearl.py --env point-robot --encoder mlp --seed 42       # a bit over an hour on one core
    python examples/pearl.py --env point-robot --encoder mlp --budget small  # ten minutes
    python examples/pearl.py --env point-robot --encoder my_encoder.py       # a file with a CustomContextEncoder
    python examples/pearl.py --env point-robot --budget smoke                # seconds, to see it run
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from functools import partial
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import torch
from create_dataset import at_least
from pearl_benchmark import (
    BUDGETS,
    LATENT_DIM,
    Benchmark,
    as_context,
    make_env,
    make_tasks,
    meta_test,
    play,
    regret,
    save,
)
from tensordict import TensorDict
from torchrl import torchrl_logger
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler, SliceSampler
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger
from tqdm import tqdm

from torchrl_mouse import schema
from torchrl_mouse.data.saving import replacing
from torchrl_mouse.modules import (
    CONTEXT_ENCODERS,
    ContextPosterior,
    latent_actor,
    latent_qvalue,
    latent_value,
    make_context_encoder,
    sample_latent,
)
from torchrl_mouse.objectives import PEARLLoss
from torchrl_mouse.recipes import claim

if TYPE_CHECKING:
    from tensordict import TensorDictBase

HIDDEN_SIZES = [200, 200, 200]  # of the encoder
LEARNING_RATE = 3e-4
TAU = 0.005
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=BUDGETS["benchmark"], default="point-robot", help="the tasks")
    kinds = ", ".join(CONTEXT_ENCODERS)
    parser.add_argument("--encoder", default="mlp", help=f"{kinds}, or a file with a CustomContextEncoder")
    parser.add_argument("--budget", choices=BUDGETS, default="benchmark", help="small has fewer rows in an update")
    parser.add_argument("--seed", type=at_least(0), default=42, help="of weights, latents, actions and starts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where all of it runs")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of products in gradient steps; bfloat16 is slow where a CPU has no instructions for it",
    )
    parser.add_argument("--output", type=Path, help="folder; by default runs/pearl/ENV/ENCODER-BUDGET-SEED[-PRECISION]")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--test", action="store_true", help="let the agent of a run meet the test tasks again")
    earlier.add_argument("--restart", action="store_true", help="delete what an earlier run has left")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that this torch can use, and there is none: leave it out")
    if arguments.output is None:
        run = f"{Path(arguments.encoder).stem}-{arguments.budget}-{arguments.seed}"
        run += "" if arguments.precision == "float32" else f"-{arguments.precision}"
        arguments.output = Path("runs/pearl") / arguments.env / run
    return arguments


class Agent:
    """The networks, and how they are used."""

    def __init__(
        self, encoder: str, observation_dim: int, action_dim: int, benchmark: Benchmark, device: str = "cpu"
    ) -> None:
        self.benchmark, self.device = benchmark, device
        size = observation_dim + action_dim + 1
        with torch.device(device):  # where a file's own states are made
            network = make_context_encoder(
                encoder, hidden_sizes=HIDDEN_SIZES, input_size=size, output_size=2 * LATENT_DIM
            )
        self.recurrent = getattr(network, "IS_RECURRENT", False)
        self.posterior = ContextPosterior(network).to(device)
        self.sample = sample_latent()
        self.actor = latent_actor(observation_dim, action_dim, LATENT_DIM).to(device)
        self.loss = PEARLLoss(
            self.posterior,
            self.actor,
            [latent_qvalue(observation_dim, action_dim, LATENT_DIM).to(device) for _ in range(2)],
            latent_value(observation_dim, LATENT_DIM).to(device),
            gamma=benchmark.gamma,
            reward_scale=benchmark.reward_scale,
            kl_weight=benchmark.kl_weight,
        )

    def forget(self, num_tasks: int) -> None:
        """Begins anew with other tasks."""
        self.num_tasks = num_tasks
        self.posterior.reset(num_tasks)

    def infer(self, context: TensorDict | None) -> torch.Tensor:
        """Draws latents ``[tasks, Z]`` from the belief after a context ``[tasks, N]``; without one, from the prior."""
        if context is None:
            return torch.randn(self.num_tasks, LATENT_DIM, device=self.device)
        belief = self.posterior(TensorDict({"context": context}, [len(context)]))
        remedy = "The first index is the task. Look at the encoder."
        for key in self.posterior.out_keys:  # here, before actions made of it are blamed
            schema.check_finite(belief[key], key, "pearl.py", remedy)
        return self.sample(belief)["latent"]


class Experience:
    """What has been seen in each training task: all of it for the critics, the newest for the context."""

    def __init__(self, benchmark: Benchmark, *, recurrent: bool, device: str = "cpu") -> None:
        self.benchmark, self.device = benchmark, device
        self.replay = [self._buffer(benchmark.rows, RandomSampler()) for _ in range(benchmark.num_train)]
        self.context = []
        for _ in range(benchmark.num_train):
            rows, sampler = benchmark.context_rows, RandomSampler()
            if recurrent:  # whole episodes in their order, in as many rows at least
                episodes = -(-rows // benchmark.max_steps)
                rows = episodes * benchmark.max_steps
                sampler = SliceSampler(num_slices=episodes, end_key=("next", "done"))
            self.context.append(self._buffer(rows, sampler))

    def _buffer(self, rows: int, sampler: Any) -> TensorDictReplayBuffer:
        storage = LazyTensorStorage(self.benchmark.most_steps, device=self.device)
        return TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=rows)

    def draw(self) -> TensorDict:
        """Draws tasks, and for each transitions and a context, as :class:`PEARLLoss` reads them."""
        tasks = torch.randint(self.benchmark.num_train, [self.benchmark.meta_batch]).tolist()
        batch = torch.stack([self.replay[task].sample() for task in tasks])
        context = torch.stack([self.context[task].sample() for task in tasks])[:, : self.benchmark.context_rows]
        batch = TensorDict(batch.select("observation", "action", "next"), [len(tasks)])
        return batch.set("context", as_context(context, self.benchmark))

    def remember(self, ids: torch.Tensor, steps: TensorDictBase) -> None:
        """Adds transitions ``[len(ids), N]`` of tasks."""
        for task, rows in zip(ids.tolist(), steps, strict=True):
            self.replay[task].extend(rows)

    def renew_context(self, ids: torch.Tensor, steps: TensorDictBase) -> None:
        """Makes transitions ``[len(ids), N]`` the only context of their tasks; of a task that comes twice, the last."""
        for task, rows in zip(ids.tolist(), steps, strict=True):
            self.context[task].empty()
            self.context[task].extend(rows)

    def state_dict(self) -> dict[str, Any]:
        """Returns all transitions."""
        # Copies: what is saved of a part of a storage is else all of it.
        return {
            name: [buffer[:].clone() if len(buffer) else None for buffer in getattr(self, name)]
            for name in ("replay", "context")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the transitions of a :meth:`state_dict`."""
        for name, tasks in state.items():
            for buffer, steps in zip(getattr(self, name), tasks, strict=True):
                buffer.empty()
                if steps is not None:
                    buffer.extend(steps)


@torch.no_grad()
def collect(
    agent: Agent, name: str, tasks: torch.Tensor, ids: torch.Tensor, experience: Experience, *, first: bool
) -> None:
    """Plays training tasks, those of ``ids``, all at once.

    Args:
        agent: draws latents and actions.
        name: of the environment.
        tasks: all training tasks.
        ids: which of them; one may come twice, and its context is then what was seen at the last time.
        experience: where transitions go.
        first: play the steps before the first iteration, with latents from the prior.
    """
    benchmark = agent.benchmark
    length = benchmark.max_steps
    prior = (benchmark.initial_steps if first else benchmark.prior_steps) // length
    env = make_env(name, tasks[ids.repeat_interleave(prior)], benchmark, agent.device)
    agent.forget(len(ids) * prior)
    steps = play(env, agent.actor, agent.infer(None), benchmark)
    seen = steps.reshape(len(ids), prior * length)
    experience.remember(ids, seen)
    env = make_env(name, tasks[ids], benchmark, agent.device)
    phases = () if first else ((benchmark.posterior_steps, True), (benchmark.extra_steps, False))
    for budget, for_context in phases:
        agent.forget(len(ids))
        for episode in range(budget // length):
            latent = agent.infer(draw_context(seen, agent) if episode else None)
            steps = play(env, agent.actor, latent, benchmark)
            experience.remember(ids, steps)
            if for_context:
                seen = torch.cat([seen, steps], 1)
    experience.renew_context(ids, seen)


def draw_context(seen: TensorDictBase, agent: Agent) -> TensorDict:
    """Draws a context of the training's size from transitions ``[tasks, N]``, as training itself does."""
    rows, length = agent.benchmark.context_rows, agent.benchmark.max_steps
    tasks, num = seen.shape
    if agent.recurrent:
        first = torch.randint(num // length, (tasks, -(-rows // length), 1)) * length
        index = (first + torch.arange(length)).flatten(1)[:, :rows]
    else:
        index = torch.randint(num, (tasks, rows))
    return as_context(seen[torch.arange(tasks).unsqueeze(-1), index], agent.benchmark)


class Run:
    """Meta-training, one iteration after the other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.benchmark = BUDGETS[arguments.budget][arguments.env]
        self.tasks, self.test_tasks = make_tasks(arguments.env, self.benchmark)
        torch.manual_seed(arguments.seed)
        env = make_env(arguments.env, self.tasks[:1], self.benchmark)
        sizes = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
        self.agent = Agent(arguments.encoder, *sizes, self.benchmark, arguments.device)
        self.experience = Experience(self.benchmark, recurrent=self.agent.recurrent, device=arguments.device)
        self.optimizer = torch.optim.Adam(self.agent.loss.parameters(), lr=LEARNING_RATE, fused=True)
        self.updater = SoftUpdate(self.agent.loss, tau=TAU)
        self.history: list[dict[str, float]] = []
        self.file = arguments.output / "checkpoint.pt"

    def train(self) -> dict[str, float]:
        """Trains to the end, from the last checkpoint if there is one; returns the results."""
        self.logger = CSVLogger("log", log_dir=str(self.arguments.output))
        if self.file.exists():
            self.load()
        else:
            ids = torch.arange(self.benchmark.num_train)
            collect(self.agent, self.arguments.env, self.tasks, ids, self.experience, first=True)
        updates = self.benchmark.iterations * self.benchmark.updates
        with tqdm(total=updates, initial=len(self.history) * self.benchmark.updates, unit="update") as bar:
            while len(self.history) < self.benchmark.iterations:
                self.iterate(bar)
                self.save()
                for name, value in self.history[-1].items():  # after saving, so that none is logged twice
                    self.logger.log_scalar(name, value, step=len(self.history) - 1)
                self.report()
        return self.report()

    def report(self) -> dict[str, float]:
        """Writes results and plot; returns the figures that count."""
        names = ("encoder", "budget", "seed", "precision")
        options = {"environment": self.arguments.env} | {name: getattr(self.arguments, name) for name in names}
        return save(options, self.history, self.arguments.output)

    def iterate(self, bar: tqdm) -> None:
        """Plays, learns and is tested."""
        agent, benchmark = self.agent, self.benchmark
        agent.loss.eval()
        ids = torch.randint(benchmark.num_train, [benchmark.tasks_per_iteration])
        collect(agent, self.arguments.env, self.tasks, ids, self.experience, first=False)
        agent.loss.train()
        sums: dict[str, float] = {}
        for _ in range(benchmark.updates):
            for name, value in self.update().items():
                sums[name] = sums.get(name, 0.0) + float(value) / benchmark.updates
            if wrong := [name for name, value in sums.items() if not math.isfinite(value)]:
                raise ValueError(
                    f"pearl.py: {', '.join(wrong)} must be finite, got {sums[wrong[0]]} in iteration "
                    f"{len(self.history) + 1}, of which nothing is saved. Look at the encoder."
                )
            bar.update()
        agent.loss.eval()
        steps = sum(len(buffer) for buffer in self.experience.replay)
        entry = {"environment_steps": steps, **sums, **self.test()}
        self.history.append(entry)
        bar.set_postfix({"iteration": len(self.history), "test return": f"{entry['test_return']:.2f}"})

    def update(self) -> TensorDictBase:
        """Makes a gradient step: encoder and critics first, then state value and actor."""
        loss, device = self.agent.loss, self.arguments.device
        precision = PRECISIONS[self.arguments.precision]
        low = partial(torch.autocast, device, precision, enabled=precision != torch.float32)
        batch = self.experience.draw()
        with low():
            critic = loss.critic_loss(batch)
        self.optimizer.zero_grad()
        (critic["loss_kl"] + critic["loss_qvalue"]).backward()
        self.optimizer.step()
        with low():
            actor = loss.actor_loss(batch)
        self.optimizer.zero_grad()
        (actor["loss_value"] + actor["loss_actor"]).backward()
        self.optimizer.step()
        self.updater.step()
        return critic.update(actor).detach()

    def test(self) -> dict[str, float]:
        """Meets all tasks anew."""
        results = {}
        for kind, tasks in (("train", self.tasks), ("test", self.test_tasks)):
            self.agent.forget(len(tasks))
            env = make_env(self.arguments.env, tasks, self.benchmark, self.arguments.device)
            returns, starts = meta_test(env, self.agent.actor, self.agent.infer, self.benchmark)
            results[f"{kind}_return"] = returns[:, -1].mean().item()
        results["first_episode"] = returns[:, 0].mean().item()
        if self.arguments.env == "point-robot":
            results["regret"] = regret(returns, starts, self.test_tasks)
        return results

    def meet(self) -> str:
        """Lets the agent of the last checkpoint meet the test tasks; returns a table of returns by episode."""
        self.load()
        self.agent.loss.eval()
        self.agent.forget(len(self.test_tasks))
        env = make_env(self.arguments.env, self.test_tasks, self.benchmark, self.arguments.device)
        returns, _ = meta_test(env, self.agent.actor, self.agent.infer, self.benchmark)
        lines = [f"{'test task':<24}return of each episode"]
        for task, row in zip(self.test_tasks.reshape(len(returns), -1).tolist(), returns.tolist(), strict=True):
            name = ", ".join(f"{value:.2f}" for value in task)
            lines.append(f"{name:<24}" + " ".join(f"{value:8.2f}" for value in row))
        return "\n".join([*lines, f"{'mean':<24}" + " ".join(f"{value:8.2f}" for value in returns.mean(0).tolist())])

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in ("experience", "optimizer")}
        state |= {"loss": self.agent.loss.state_dict(), "history": self.history, "random": torch.get_rng_state()}
        state["cuda_random"] = torch.cuda.get_rng_state_all()  # of no devices where there is none
        with replacing(self.file) as partial:
            torch.save(state, partial)

    def load(self) -> None:
        """Goes on from the checkpoint."""
        state = torch.load(self.file, weights_only=False, map_location="cpu")
        self.agent.loss.load_state_dict(state["loss"])
        for name in ("experience", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.history = state["history"]
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["cuda_random"])


def main() -> None:
    """Trains, or goes on, and prints the results."""
    arguments = parse_arguments()
    torchrl_logger.setLevel("WARNING")  # Else each of the buffers announces itself.
    options = {name: getattr(arguments, name) for name in ("env", "encoder", "budget", "seed", "precision")}
    options |= dataclasses.asdict(BUDGETS[arguments.budget][arguments.env])
    if arguments.encoder.endswith(".py") and Path(arguments.encoder).is_file():
        options["encoder"] = Path(arguments.encoder).name  # wherever it is
        options["encoder file"] = hashlib.sha256(Path(arguments.encoder).read_bytes()).hexdigest()
    try:
        run = Run(arguments)
        if arguments.test and not run.file.exists():
            raise ValueError(
                f"pearl.py: --output must be the folder of a run with a finished iteration, got {arguments.output}. "
                "Train first, without --test."
            )
        claim(arguments.output, options, restart=arguments.restart)
    except (ValueError, TypeError, OSError, ImportError) as error:
        # What went wrong inside an encoder's file is to be seen with its lines.
        file = Path(arguments.encoder).resolve()
        if any(Path(frame.filename).resolve() == file for frame in extract_tb(error.__traceback__)):
            raise
        raise SystemExit(f"{error} (--env, --encoder, --output, --restart)") from None
    if arguments.test:
        print(run.meet())
        return
    results = run.train()
    for name, value in results.items():
        print(f"{name}: {value:.3f}")
    print(f"Results, plot, log and checkpoint are in {arguments.output}.")


if __name__ == "__main__":
    main()
