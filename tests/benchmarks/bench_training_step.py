"""Cost of a training step against a bare `transformers` Llama on the same tokens, in one run.

Run it with ``python tests/benchmarks/bench_training_step.py``. A step is a forward and a backward pass over windows of
32 x 120 tokens, 4 layers of width 64, one thread. Each round times every variant once, in turn; printed is the median
over rounds of the ratio to the baseline of the same round.
"""

import statistics
import time

import torch
from tensordict import TensorDict

from torchrl_mouse import schema
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.modules.trunk import segment_mask, segment_positions
from torchrl_mouse.objectives import CombinedLoss, MouseDQNLoss, SupervisedPolicyLoss, SupervisedValueLoss

BATCH, WINDOW, WIDTH, ROUNDS = 32, 120, 64, 25
HEAD = {"hidden_dim": WIDTH, "num_layers": 2}


def make_steps(second_task: int | None) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    records = {
        "action": torch.randint(5, (BATCH, WINDOW + 1), generator=generator),
        "reward": torch.randn(BATCH, WINDOW + 1, generator=generator),
        "done": torch.zeros(BATCH, WINDOW + 1, dtype=torch.int64),
        "time": torch.arange(WINDOW + 1).remainder(21).repeat(BATCH, 1),
        "obs_continuous": torch.randn(BATCH, WINDOW + 1, 2, generator=generator),
        "q_star": torch.rand(BATCH, WINDOW + 1, 5, generator=generator),
    }
    steps = schema.from_mouse_records(TensorDict(records, [BATCH, WINDOW + 1]))[:, :WINDOW]
    if second_task is not None:
        steps[schema.IS_INIT][:, second_task] = True
    return steps


def make_model() -> MouseModel:
    torch.manual_seed(0)
    return MouseModel(
        MouseConfig(
            hidden_dim=WIDTH,
            window=WINDOW,
            embedding_kwargs={"max_num_actions": 5, "max_num_obs_continuous": 2, "max_num_time_steps": 21},
            backbone_kwargs={"kind": "llama", "num_layers": 4, "num_heads": 4},
            dqn_head_kwargs=HEAD,
            sp_head_kwargs=HEAD,
            sv_head_kwargs=HEAD,
        )
    )


def main() -> None:
    torch.set_num_threads(1)
    model = make_model()
    parts = {
        "dqn": MouseDQNLoss(model.head("dqn"), cql_weight=0.5, delay_value=False),
        "sp": SupervisedPolicyLoss(model.head("sp")),
        "sv": SupervisedValueLoss(model.head("sv")),
    }
    losses = {count: CombinedLoss(model.trunk, dict(list(parts.items())[:count])) for count in (1, 2, 3)}
    one_task, two_tasks = make_steps(None), make_steps(50)
    backbone = model.trunk.backbone
    is_init = two_tasks[schema.IS_INIT].squeeze(-1)
    mask, positions = segment_mask(is_init), segment_positions(is_init)
    tokens = torch.randn(BATCH, WINDOW, WIDTH, requires_grad=True)

    def bare(mask: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        mask = None if mask is None else mask.unsqueeze(1)
        out = backbone.model(inputs_embeds=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        out.last_hidden_state.square().mean().backward()

    def ours(count: int, steps: TensorDict) -> None:
        out = losses[count](steps)
        sum(value for key, value in out.items() if key.startswith("loss")).backward()

    variants = {
        "bare Llama, causal": lambda: bare(None, None),
        "bare Llama, 4-D mask": lambda: bare(mask, positions),
        "DQN + CQL, one task per window": lambda: ours(1, one_task),
        "DQN + CQL, two tasks per window": lambda: ours(1, two_tasks),
        "and SP": lambda: ours(2, one_task),
        "and SV": lambda: ours(3, one_task),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 3):
        for name, step in variants.items():
            began = time.perf_counter()
            step()
            if turn >= 3:
                times[name].append(time.perf_counter() - began)

    def ratio(name: str, baseline: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))

    for name, baseline in (
        ("DQN + CQL, one task per window", "bare Llama, causal"),
        ("DQN + CQL, two tasks per window", "bare Llama, 4-D mask"),
        ("bare Llama, 4-D mask", "bare Llama, causal"),
        ("and SP", "DQN + CQL, one task per window"),
        ("and SV", "and SP"),
    ):
        print(f"{name:<34}{ratio(name, baseline):>6.2f} x {baseline}")


if __name__ == "__main__":
    main()
