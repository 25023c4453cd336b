"""Solutions in the bank: what was solved once, for a layer at one option, is not solved again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from subbyte.calibrate.gather import CalibrationSet
from subbyte.calibrate.guard import Judged
from subbyte.calibrate.models import CalibratedLayer
from subbyte.calibrate.problem import LayerSolution
from subbyte.run.bank import Bank, Entry, digest

_TENSORS = ("codes", "scale", "zero_point", "bias")


@dataclass(frozen=True, eq=False)
class Kept:
    """Solutions of one run in a bank.

    Args:
        bank: where they are.
        run: digest of what all of them depend on, see `run_digest`.
    """

    bank: Bank
    run: str

    def by(self, method: object) -> Kept:
        """Solutions of the same run by another method.

        Args:
            method: settings whose `repr` says all.
        """
        return Kept(self.bank, digest(self.run, method))

    def recall(self, item: CalibratedLayer, before: object = ()) -> Judged | None:
        """What was found for a layer at its grids, or None.

        Args:
            item: the layer.
            before: what else its problem depends on: in the sequential flavour the options of the layers before it.
        """
        entry = self.bank.get(self._key(item, before))
        return None if entry is None else _judged(entry)

    def keep(self, item: CalibratedLayer, judged: Judged, before: object = ()) -> None:
        """Put what was found into the bank.

        Args:
            item: the layer.
            judged: what was found.
            before: as for `recall`.
        """
        self.bank.put(self._key(item, before), _entry(judged))

    def _key(self, item: CalibratedLayer, before: object) -> str:
        return digest("solution with gap", self.run, item.layer.name, item.weight_grid, item.activation_grid, item.clip, before)


def run_digest(model: nn.Module, data: CalibrationSet, method: object, version: str) -> str:
    """Digest of what every solution of a run depends on: the model's numbers and structure, the data, the settings, the library.

    Args:
        model: float model, batch norms folded.
        data: calibration set.
        method: settings whose `repr` says all.
        version: of the library.
    """
    modules = [(name, type(module).__qualname__, module.extra_repr()) for name, module in model.named_modules()]
    return digest(version, modules, dict(model.state_dict()), data.batches, data.held_out, data.seed, method)


def _entry(judged: Judged) -> Entry:
    tensors: dict[str, Tensor] = {}
    for role, solution in (("kept", judged.solution), ("baseline", judged.baseline)):
        tensors |= {f"{role}.{name}": getattr(solution, name).clone() for name in _TENSORS}
        if solution.activation is not None:
            scale, zero_point = solution.activation
            tensors |= {f"{role}.activation_scale": scale.clone(), f"{role}.activation_zero_point": zero_point.clone()}
    facts = {
        "solver": judged.solution.solver,
        "baseline_solver": judged.baseline.solver,
        "group": judged.solution.group,
        "rejected": judged.rejected,
        "error": judged.error,
        "baseline_error": judged.baseline_error,
        "unknowns": judged.unknowns,
        "equations": judged.equations,
        "gap": judged.gap,
    }
    return Entry(tensors, facts)


def _judged(entry: Entry) -> Judged:
    facts = entry.facts
    baseline = _solution(entry, "baseline", facts["baseline_solver"])
    solution = baseline if facts["rejected"] else _solution(entry, "kept", facts["solver"])
    return Judged(solution, baseline, facts["error"], facts["baseline_error"], facts["unknowns"], facts["equations"], facts["gap"])


def _solution(entry: Entry, role: str, solver: str) -> LayerSolution:
    tensors = entry.tensors
    codes, scale, zero_point, bias = (tensors[f"{role}.{name}"] for name in _TENSORS)
    activation = None
    if f"{role}.activation_scale" in tensors:
        activation = (tensors[f"{role}.activation_scale"], tensors[f"{role}.activation_zero_point"])
    return LayerSolution(codes, scale, zero_point, bias, activation, solver, entry.facts["group"])
