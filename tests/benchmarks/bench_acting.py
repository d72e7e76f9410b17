"""Cost of a sequential step against `transformers`' DynamicCache and against a fresh pass over the window, in one run.

Run it with ``python tests/benchmarks/bench_acting.py`` (about four minutes, 7 GB at most). A step is one new step, of
one token, in each row; 4 layers of width 64, 4 heads, one thread, and one window (4,160 steps) for all contexts.
Variants take turns, and the best round of each counts. Where the time goes is measured in rounds of its own, since
the timers cost some too.

DynamicCache makes new tensors at each step. Beyond 32 MB glibc hands each back to the system, and a step then mostly
waits for fresh pages (``faults`` below). What the design of the cache costs is seen with an allocator that keeps them::

    GLIBC_TUNABLES=glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184 python ...
"""

import math
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from tensordict import TensorDict
from torch.nn import functional
from torchrl.modules import set_recurrent_mode
from transformers import DynamicCache

from torchrl_mouse import schema
from torchrl_mouse.models import MouseConfig, MouseModel
from torchrl_mouse.modules import Trunk, backbone, kv_cache

WIDTH, LAYERS, HEADS, WINDOW = 64, 4, 4, 4_096 + 64
ROWS, CONTEXTS = (1, 16, 256), (128, 1_024, 4_096)
MOST_RECOMPUTED = 300_000  # tokens of a pass; more takes minutes
BURST, ROUNDS, BUDGET = 8, 40, 4.0  # steps of a round; rounds, and seconds, of all variants of a combination

BARE, EMBEDDED = "DynamicCache", "embedder + DynamicCache"
OURS, COMPILED, SHUFFLED, RECOMPUTED = "trunk", "trunk, compiled", "trunk, rows shuffled", "recomputed window"

Step = Callable[[], object]


def make_steps(rows: int, num: int) -> TensorDict:
    """Steps ``num`` of one task in each row, without its first."""
    generator = torch.Generator().manual_seed(0)
    records = {
        "action": torch.randint(5, (rows, num), generator=generator),
        "reward": torch.randn(rows, num, generator=generator),
        "done": torch.zeros(rows, num, dtype=torch.int64),
        "time": torch.arange(num).remainder(21).repeat(rows, 1),
        "obs_continuous": torch.randn(rows, num, 2, generator=generator),
    }
    records = {name: torch.cat([value[:, :1], value], 1) for name, value in records.items()}
    steps = schema.from_mouse_records(TensorDict(records, [rows, num + 1]))[:, :num]
    steps[schema.IS_INIT] = torch.zeros(rows, num, 1, dtype=torch.bool)
    steps[schema.STREAM] = torch.arange(rows).reshape(-1, 1, 1).repeat(1, num, 1)
    return steps


def make_trunk() -> Trunk:
    torch.manual_seed(0)
    model = MouseModel(
        MouseConfig(
            hidden_dim=WIDTH,
            window=WINDOW,
            embedding_kwargs={"max_num_actions": 5, "max_num_obs_continuous": 2, "max_num_time_steps": 21},
            backbone_kwargs={
                "kind": "llama",
                "num_layers": LAYERS,
                "num_heads": HEADS,
                "max_position_embeddings": WINDOW,
            },
            dqn_head_kwargs={},
        )
    )
    return model.trunk


def fill(trunk: Trunk, history: TensorDict, rows: int) -> None:
    """Gives every row the same history, which is encoded once."""
    first = make_steps(rows, 1)[:, 0]
    first[schema.IS_INIT][:] = True
    trunk(first)  # all slots at once
    trunk.append(history)
    streams = torch.arange(1, rows)
    trunk.copy_context(torch.zeros_like(streams), streams)


def make_variants(trunk: Trunk, rows: int, context: int) -> dict[str, Step]:
    """A call per variant that makes one further step after a context; contexts grow until :func:`rewind`."""
    history = make_steps(1, context)
    history[schema.IS_INIT][:, 0] = True
    fill(trunk, history, rows)
    step = make_steps(rows, 1)[:, 0]
    shuffled = step[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    embed = trunk.embedder(trunk.read(step))
    model = trunk.backbone.model
    cache = DynamicCache()
    model(inputs_embeds=trunk.embedder(trunk.read(history)).flatten(1, 2), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)

    def ours(steps: TensorDict) -> torch.Tensor:
        if trunk._cache.length[0] == context + BURST:
            trunk._cache.length[:] = context
        return trunk(steps)[schema.HIDDEN]

    def compiled() -> torch.Tensor:
        trunk.compiled = True
        hidden = ours(step)
        trunk.compiled = False
        return hidden

    def bare(embed: torch.Tensor) -> torch.Tensor:
        if cache.get_seq_length() == context + BURST:
            cache.crop(-BURST)  # a negative number is how many to remove
        return model(inputs_embeds=embed, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    variants = {
        BARE: lambda: bare(embed),
        EMBEDDED: lambda: bare(trunk.embedder(trunk.read(step))),
        OURS: lambda: ours(step),
        COMPILED: compiled,
        SHUFFLED: lambda: ours(shuffled),
    }
    if rows == 1:
        del variants[SHUFFLED]
    if rows * context <= MOST_RECOMPUTED:
        past = history.exclude(schema.HIDDEN).expand(rows, context)
        window = torch.cat([past, step.unsqueeze(1)], 1)

        def recompute() -> torch.Tensor:
            with set_recurrent_mode(True):
                return trunk(window)[schema.HIDDEN][:, -1]

        variants[RECOMPUTED] = recompute
    return variants


def seconds_per_step(variants: dict[str, Step]) -> dict[str, float]:
    """Best round of each variant; slow ones have fewer steps in a round, and fewer rounds."""
    best, count = {}, {}
    for name, step in variants.items():
        began = time.perf_counter()
        step()
        best[name] = time.perf_counter() - began
        count[name] = BURST if best[name] < 0.2 else 1
    spent = Counter()
    for _ in range(ROUNDS):
        for name, step in variants.items():
            if spent[name] + best[name] * count[name] > BUDGET / len(variants) and spent[name]:
                continue
            began = time.perf_counter()
            for _ in range(count[name]):
                step()
            spent[name] += (took := time.perf_counter() - began)
            best[name] = min(best[name], took / count[name])
    return best


@contextmanager
def timers(trunk: Trunk) -> Iterator[Counter]:
    """Adds up the seconds spent in the parts of a step, by name; the parts of a backbone also count to it."""
    spent = Counter()

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - began
            return result

        return call

    with ExitStack() as stack:
        for name, owner, attribute in (
            ("read", trunk, "read"),
            ("embed", trunk.embedder, "forward"),
            ("find", kv_cache.KVCache, "locate"),
            ("find", kv_cache.KVCache, "key_values"),
            ("room", trunk, "_make_room"),
            ("remember", kv_cache.KVCache, "remember"),
            ("backbone", trunk.backbone.model, "forward"),
            ("backbone", backbone, "decode_in_parts"),  # which writes keys and values itself: they count to the layers
            ("key-value", DynamicCache, "update"),
            ("attention", functional, "scaled_dot_product_attention"),
        ):
            # Through the class for methods of classes, so that `self` is passed on.
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield spent


def split(trunk: Trunk, step: Step, per_step: float) -> dict[str, float]:
    """Milliseconds of the parts of a step, and its page faults: the round with the least total counts."""
    best: dict[str, float] = {"total": math.inf}
    for _ in range(min(100, max(3, round(0.6 / per_step)))):
        with timers(trunk) as spent:
            began, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            step()
            total = time.perf_counter() - began
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        if total * 1e3 < best["total"]:
            rest = spent["backbone"] - spent["key-value"] - spent["attention"]
            parts = {
                "embedding": spent["read"] + spent["embed"],
                "key-value": spent["key-value"],
                "attention": spent["attention"],
                "layers": rest,
                "contexts": spent["find"] + spent["room"] + spent["remember"],
            }
            best = {**parts, "other": total - sum(parts.values()), "total": total}
            best = {name: value * 1e3 for name, value in best.items()} | {"faults": faults}
    return best


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    times: dict[tuple[int, int], dict[str, float]] = {}
    splits: dict[tuple[int, int, str], dict[str, float]] = {}
    for rows in ROWS:
        trunk = make_trunk()
        for context in CONTEXTS:
            variants = make_variants(trunk, rows, context)
            hidden = variants[OURS]()
            # Zero for the first is no mistake: it runs the same kernels. The other is the independent check.
            trunk._cache.length[:] = context  # the compiled step is of the same context
            errors = {name: hidden - variants[name]() for name in (BARE, COMPILED, RECOMPUTED) if name in variants}
            errors = ", ".join(f"{error.abs().max():.1e} to {name}" for name, error in errors.items())
            times[rows, context] = seconds_per_step(variants)
            for name in (BARE, OURS, SHUFFLED):
                if name in variants:
                    splits[rows, context, name] = split(trunk, variants[name], times[rows, context][name])
            print(f"{rows} x {context}: largest differences {errors}", flush=True)
            del variants
    report(times, splits)


def report(
    times: dict[tuple[int, int], dict[str, float]], splits: dict[tuple[int, int, str], dict[str, float]]
) -> None:
    names = (BARE, EMBEDDED, OURS, COMPILED, SHUFFLED, RECOMPUTED)
    print(f"\nGLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}")
    print("\nmilliseconds per step\n" + " " * 12 + "".join(f"{name:>25}" for name in names))
    for (rows, context), best in times.items():
        cells = (f"{best[name] * 1e3:25.2f}" if name in best else f"{'-':>25}" for name in names)
        print(f"{rows:>4} x {context:<5}" + "".join(cells))
    print("\nratios (target: at most 1.05 x DynamicCache with the embedder, less beyond 1,024; compiled 1.5 x as fast)")
    for (rows, context), best in times.items():
        ours, recomputed = best[OURS], best.get(RECOMPUTED, math.nan)
        shuffled = best.get(SHUFFLED, math.nan)
        print(
            f"{rows:>4} x {context:<5} trunk {ours / best[BARE]:6.2f} x {BARE}, "
            f"{ours / best[EMBEDDED]:6.2f} x {EMBEDDED}, {ours / recomputed:7.4f} x {RECOMPUTED}, "
            f"{ours / times[rows, CONTEXTS[0]][OURS]:6.2f} x itself at {CONTEXTS[0]}; "
            f"shuffled {shuffled / ours:5.2f} x trunk; compiled {ours / best[COMPILED]:5.2f} x as fast"
        )
    print("\nwhere the milliseconds go (with timers)")
    parts = ("embedding", "key-value", "attention", "layers", "contexts", "other", "total", "faults")
    print(" " * 33 + "".join(f"{part:>11}" for part in parts))
    for (rows, context, name), spent in splits.items():
        print(
            f"{rows:>4} x {context:<5} {name:<21}"
            + "".join(f"{spent[part]:11.{2 * (part != 'faults')}f}" for part in parts)
        )


if __name__ == "__main__":
    main()
