"""Do interactions between layers make better allocations than the sum of what each layer does by itself?

The programme's allocation from Fisher's table, beside two that know of interactions, at no more bytes:

* *pairs*: to second order, layers at options k do together `E[(sum_l s_lk)^2]`, with `s_lk = g . dy` of one sample and draw (see
  `allocate/fisher.py`): all pairwise terms come with the table, at no cost. Local search from the programme's allocation, by changes of one
  layer and exchanges between two, until none lowers it.
* *remeasured*: the programme again, with a table of what each option of a layer does while all others are as the programme chose.

Each is calibrated as ever, in sequence, and measured on held-out samples and on the test set.

    python studies/interactions.py digits --bits 4,3,2.5 --inputs same --threads 1
    python studies/interactions.py resnet20 --bits 4,3,2.5 --inputs same --threads 1

Source: pairwise terms measured by forwards: CLADO (Deng et al. 2023, arXiv 2307.05657).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

import subbyte
from subbyte import Bank, Budget, Choices, Fisher, Recipe, Widths
from subbyte.allocate.allocation import allocate
from subbyte.allocate.sensitivity import LayerOptions, Sensitivity
from subbyte.calibrate.kept import Kept, run_digest
from subbyte.calibrate.loss import measure
from subbyte.calibrate.models import Models, at_option, prepare, state_of
from subbyte.calibrate.reconstruct import reconstruct
from subbyte.export.packed import LIBRARY_VERSION
from subbyte.model.batches import call, probes
from subbyte.model.clipping import find_clips
from subbyte.model.layers import survey
from subbyte.plan import Plan
from subbyte.run.events import ignore
from subbyte.tasks import TASKS, Task, kl_divergence
from subbyte.widths import Option

FISHER = Fisher(draws=2)
Array = npt.NDArray[np.float64]
Allocated = dict[str, Option]


def main() -> None:
    parser = argparse.ArgumentParser(description="Allocations with and without interactions between layers.")
    parser.add_argument("network", choices=sorted(TASKS))
    parser.add_argument("--bits", default="4,3,2.5")
    parser.add_argument("--inputs", choices=("8", "same"), default="same")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    choices = Choices() if options.inputs == "same" else Choices(activation_bits=(8,))
    for seed in map(int, options.seeds.split(",")):
        task, bank = TASKS[options.network](seed=seed), Bank()
        print(f"{task.name}, seed {seed}, inputs {options.inputs}, float {task.score(task.model):.2f} %", flush=True)
        for bits in map(float, options.bits.split(",")):
            compare(task, Budget(average_bits=bits, choices=choices), seed, bank)


def compare(task: Task, budget: Budget, seed: int, bank: Bank) -> None:
    """All three allocations within one budget."""
    result = subbyte.quantize(task.model, task.calibration, budget=budget, seed=seed, bank=bank)
    assert result.plan is not None
    plan, (models, layers) = result.plan, layer_options(result, bank)
    chosen = dict(plan.allocation.options)
    told(task, "programme", result, plan.allocation.predicted)
    pairs, together = searched(plan, layers, result, chosen)
    print(f"    together, to second order: {together[0]:.4g}; after the search {together[1]:.4g}", flush=True)
    told(task, "pairs", quantized(task, pairs, seed, bank), plan.sensitivity.total(pairs))
    again = remeasured(plan, layers, result, models, chosen)
    told(task, "remeasured", quantized(task, again, seed, bank), plan.sensitivity.total(again))


def quantized(task: Task, options: Allocated, seed: int, bank: Bank) -> subbyte.Result:
    return subbyte.quantize(task.model, task.calibration, widths=Widths(pinned=options), seed=seed, bank=bank)


def told(task: Task, name: str, result: subbyte.Result, predicted: float) -> None:
    tests = f"top-1 {task.score(result.model):.2f} %, KL {kl_divergence_of(task, result):.4f}"
    print(f"  {name:<10} {result.size_bytes:>9,} bytes: {tests}; held out {result.loss:.4g}, predicted {predicted:.4g}", flush=True)


def kl_divergence_of(task: Task, result: subbyte.Result) -> float:
    return float(kl_divergence(task.model, result.model, task.test_inputs, preprocess=task.preprocess, batch_size=task.batch_size))


def layer_options(result: subbyte.Result, bank: Bank) -> tuple[Models, list[LayerOptions]]:
    """Every layer at each of its options, as the run solved them: all of it is in the bank."""
    assert result.plan is not None
    original, data, recipe, options = result.original, result.calibration, Recipe(), result.plan.market.options
    found, _ = survey(original, data.batches)
    clips = find_clips(original, found.multiplying, probes(data.batches))
    models = prepare(original, found.layers, {name: row[0] for name, row in options.items()}, clips, {}, recipe.weights)
    kept = Kept(bank, run_digest(original, data, recipe.method, LIBRARY_VERSION))
    solved = reconstruct(models, options, data, recipe.method, kept, ignore)
    layers = []
    for item in models.layers:
        row = solved[item.layer.name]
        layers.append(LayerOptions(item, {option: state_of(at_option(item, option), judged.solution) for option, judged in row.items()}))
    return models, layers


def searched(plan: Plan, layers: list[LayerOptions], result: subbyte.Result, start: Allocated) -> tuple[Allocated, tuple[float, float]]:
    """The allocation that local search ends at, and what the start and it do together to second order."""
    blocks, below = [], 0.0
    for index, batch in enumerate(result.calibration.batches):
        generator = torch.Generator().manual_seed(index)
        changes, denominator = FISHER.changes(result.original, layers, batch, Recipe().loss, generator)
        blocks.append(torch.cat([change.transpose(1, 2).flatten(0, 1) for change in changes.values()], dim=1).numpy())
        below += denominator
    s = np.concatenate(blocks) / np.sqrt(below * FISHER.draws)  # (draws and samples, layers and options)
    names, sizes = [layer.item.layer.name for layer in layers], plan.market.costs.layers
    rows = [list(layer.states) for layer in layers]
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    size = np.array([float(sizes[name].bytes(option)) for name, row in zip(names, rows, strict=True) for option in row])
    first = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    at = np.array([first[index] + row.index(start[name]) for index, (name, row) in enumerate(zip(names, rows, strict=True))])
    limit, gram = size[at].sum(), s.T @ s
    begun = float(gram[np.ix_(at, at)].sum())
    while (better := step(gram, size, owner, at, limit)) is not None:
        at = better
    chosen = {name: rows[index][at[index] - first[index]] for index, name in enumerate(names)}
    return chosen, (begun, float(gram[np.ix_(at, at)].sum()))


def step(gram: Array, size: Array, owner: npt.NDArray[np.int64], at: npt.NDArray[np.int64], limit: float) -> npt.NDArray[np.int64] | None:
    """The best change of one layer or of two, or None if none lowers what all layers do together."""
    pull, old = gram[:, at].sum(axis=1), at[owner]
    # of one layer: 2 (s_k - s_old) . total + |s_k - s_old|^2; of two, beside both: twice the product of their changes
    own = 2 * (pull - pull[old]) + np.diag(gram) + gram[old, old] - 2 * gram[np.arange(len(old)), old]
    cross = gram - gram[:, old] - gram[old] + gram[np.ix_(old, old)]
    gains = own[:, None] + own[None, :] + 2 * cross
    room = limit - size[at].sum()
    saved = size[old] - size
    allowed = (owner[:, None] != owner[None, :]) & (saved[:, None] + saved[None, :] + room >= 0)
    gains = np.where(allowed, gains, np.inf)  # an option that stays is among them: changes of one layer are changes of two
    a, b = np.unravel_index(int(gains.argmin()), gains.shape)
    if gains[a, b] > -1e-9 * gram[np.ix_(at, at)].sum():
        return None
    better = at.copy()
    better[owner[a]], better[owner[b]] = a, b
    return better


def remeasured(plan: Plan, layers: list[LayerOptions], result: subbyte.Result, models: Models, start: Allocated) -> Allocated:
    """The programme's allocation from what each option does beside the others' chosen ones, at no more bytes."""
    batches = result.calibration.batches
    with torch.no_grad():
        references = [call(result.original, batch) for batch in batches]
    for layer in layers:
        layer.item.quantized.assign_(layer.states[start[layer.item.layer.name]])
    losses: dict[str, dict[Option, float]] = {}
    for layer in layers:
        name, row = layer.item.layer.name, {}
        for option, state in layer.states.items():
            layer.item.quantized.assign_(state)
            row[option] = measure(models.quantized, batches, references, Recipe().loss)
        layer.item.quantized.assign_(layer.states[start[name]])
        losses[name] = {option: loss - row[start[name]] for option, loss in row.items()}
    table = Sensitivity(losses, plan.sensitivity.loss_name, "remeasured")
    return dict(allocate(replace(plan.market, sensitivity=table), Budget(bytes=plan.allocation.size_bytes)).options)


if __name__ == "__main__":
    main()
