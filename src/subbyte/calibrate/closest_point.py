"""Codes closest to real weights in the metric of a Hessian: for every output channel, the `v` with least `(w* - s v)^T H (w* - s v)`,
where `s` is one step for all weights or one for each of them.

Three ways, from cheap to exact: error feedback (Babai's nearest plane), greedy coordinate descent from any codes, and a tree search that
keeps the best partial codes and, where there are few unknowns, finds the optimum. All output channels at once; codes have their zero-point
subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subbyte.quantizers.granularity import column_groups, group_count, group_sums

COLUMN_BLOCK = 64
STEP_SWEEPS = 20  # of a fit of steps to codes, at most
STEP_NUMBERS = 1 << 24  # of the equations that are solved at once


def tree_search(optimum: Tensor, hessian: Tensor, step: Tensor, low: Tensor, high: Tensor, paths: int) -> tuple[Tensor, Tensor]:
    """The best codes that a search over the columns finds: of all partial codes, the `paths` best go on to the next column.

    With `H = R^T R`, `R` upper triangular, the objective is a sum over columns whose terms know the later columns only, so that partial
    codes from the last column up bound the objective from below. What was left behind is remembered: if the result is not above its bound,
    it is the optimum.

    Args:
        optimum: `w*`, float64 (G, O, n).
        hessian: `H`, float64 (G, n, n), positive definite.
        step: `s`, float32 (G, O, 1), or one for each weight (G, O, n).
        low: smallest code, zero-point subtracted, float32, the shape of `step`.
        high: largest code, likewise, the shape of `step`.
        paths: partial codes to keep for each output channel.

    Returns:
        Codes `v`, float32 (G, O, n), integer-valued; bool (G, O), whether they are proved optimal.

    Source:
        Sphere decoding (Fincke, Pohst 1985), as the K-best decoder of Guo and Nilsson 2006, with the bound of what it discards.
    """
    groups, outputs, n = optimum.shape
    factor = torch.linalg.cholesky(hessian, upper=True)[:, None, None]  # (G, 1, 1, n, n)
    steps, lows, highs = (values.double().expand(-1, -1, n)[:, :, None] for values in (step, low, high))  # (G, O, 1, n)
    offsets = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0], dtype=torch.float64, device=optimum.device)
    target = optimum[:, :, None]  # (G, O, 1, n)
    levels = optimum.new_zeros(groups, outputs, 1, n)
    cost = optimum.new_zeros(groups, outputs, 1)
    discarded = optimum.new_full((groups, outputs), torch.inf)
    for j in reversed(range(n)):
        rest = (factor[..., j, j + 1 :] * (target[..., j + 1 :] - steps[..., j + 1 :] * levels[..., j + 1 :])).sum(dim=-1)
        diagonal, here = factor[..., j, j], steps[..., j]
        centre = (target[..., j] + rest / diagonal) / here  # (G, O, P)
        nearest = torch.minimum(torch.maximum(centre.round(), lows[..., j]), highs[..., j])
        towards = torch.where(centre >= nearest, 1.0, -1.0)
        choices = nearest[..., None] + towards[..., None] * offsets  # nearest first; every other code is farther away than these
        inside = (choices >= lows[..., j, None]) & (choices <= highs[..., j, None])
        grown = cost[..., None] + ((diagonal * here)[..., None] * (centre[..., None] - choices)).square()
        missed = grown.amax(dim=-1)  # no code that is not among the choices costs less than the dearest of them
        discarded = torch.minimum(discarded, missed.amin(dim=-1))
        flat = torch.where(inside, grown, torch.inf).flatten(2)
        keep = min(paths, flat.shape[2])
        cost, at = flat.topk(keep + (keep < flat.shape[2]), dim=2, largest=False)
        if keep < flat.shape[2]:
            discarded = torch.minimum(discarded, cost[..., keep])
            cost, at = cost[..., :keep], at[..., :keep]
        parent = at // len(offsets)
        levels = levels.gather(2, parent[..., None].expand(-1, -1, -1, n))
        levels[..., j] = choices.flatten(2).gather(2, at)
    return levels[:, :, 0].float(), cost[..., 0] <= discarded


def error_feedback(optimum: Tensor, hessian: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes column by column: each is rounded, and its error is passed on to the columns that are still free.

    With `U` the upper Cholesky factor of `H^-1`: `v_j = clip(round(w_j / s))`, `w_k -= (w_j - s v_j) U_jk / U_jj` for `k > j`.

    Args:
        optimum: `w*`, float64 (G, O, n).
        hessian: `H`, float64 (G, n, n), positive definite.
        step: `s`, float32 (G, O, 1), or one for each weight (G, O, n).
        low: smallest code, zero-point subtracted, float32, the shape of `step`.
        high: largest code, likewise, the shape of `step`.

    Returns:
        Codes `v`, zero-point subtracted, float32 (G, O, n), integer-valued.

    Source:
        GPTQ (Frantar et al. 2022, arXiv 2210.17323), algorithm 1; the order by decreasing `H_jj` is its "act-order", and steps that
        are known before it starts its "static groups".
    """
    groups, outputs, n = optimum.shape
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    sorted_hessian = hessian.gather(1, order[:, :, None].expand(-1, -1, n)).gather(2, order[:, None, :].expand(-1, n, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(sorted_hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    factor = (factor / factor.diagonal(dim1=1, dim2=2)[:, :, None]).float().contiguous()
    rest = optimum.gather(2, order[:, None, :].expand(-1, outputs, -1)).float().permute(2, 0, 1).contiguous()  # (n, G, O): columns are rows
    levels = torch.empty_like(rest)
    steps, lows, highs = (_in_order(values, order) for values in (step, low, high))
    for start in range(0, n, COLUMN_BLOCK):
        end = min(start + COLUMN_BLOCK, n)
        errors = torch.empty_like(rest[start:end])
        for j in range(start, end):
            level = torch.clamp((rest[j] / steps[j]).round_(), lows[j], highs[j], out=levels[j])
            error = torch.addcmul(rest[j], level, steps[j], value=-1, out=errors[j - start])
            if j + 1 < end:
                rest[j + 1 : end].addcmul_(factor[:, j, j + 1 : end].T[:, :, None], error, value=-1)
        if end < n:  # lazily: what the block's errors mean for all columns behind it
            rest[end:] -= torch.einsum("gjk,jgo->kgo", factor[:, start:end, end:], errors)
    back = order.argsort(dim=1)
    return levels.permute(1, 2, 0).gather(2, back[:, None, :].expand(-1, outputs, -1))


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    """(G, O, 1) or (G, O, n) as (n, G, O), columns in the order (G, n)."""
    groups, outputs, _ = values.shape
    if values.shape[2] > 1:
        values = values.gather(2, order[:, None, :].expand(-1, outputs, -1))
    columns = values.permute(2, 0, 1).contiguous()
    return columns.expand(order.shape[1], groups, outputs)


def coordinate_descent(levels: Tensor, optimum: Tensor, hessian: Tensor, step: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, float]:
    """Lower `(w* - s v)^T H (w* - s v)` by single codes: in every output channel the best move of all, until none lowers it.

    Moving code `j` by `t` steps changes the objective by `t^2 s_j^2 H_jj - 2 t s_j g_j` with `g = H (w* - s v)`; the best whole `t` inside
    the grid is `round(g_j / (s_j H_jj))`, clipped.

    Args:
        levels: codes `v`, zero-point subtracted, float32 (G, O, n); unchanged.
        optimum: `w*`, float32 (G, O, n).
        hessian: `H`, float32 (G, n, n).
        step: `s`, float32 (G, O, 1), or one for each weight (G, O, n).
        low: smallest code, zero-point subtracted, float32, the shape of `step`.
        high: largest code, likewise, the shape of `step`.

    Returns:
        The new codes, and the share of all codes that moved.

    Source:
        CDQuant (Nair, Suggala 2024, arXiv 2406.17542), its greedy variant.
    """
    before = levels
    groups, outputs, n = levels.shape
    levels = levels.reshape(-1, n).clone()
    gradient = ((optimum - before * step) @ hessian).reshape(-1, n)
    step, low, high = (values.flatten(0, 1) for values in (step, low, high))
    group = torch.arange(groups, device=levels.device).repeat_interleave(outputs)
    diagonal = hessian.diagonal(dim1=1, dim2=2)[group]
    curvature = step.square() * diagonal
    slope = gradient * step
    active = torch.arange(len(levels), device=levels.device)
    done, unasked = torch.empty_like(levels), moves_unasked(levels.device)
    for k in range(4 * n):
        move = (torch.clamp(levels + torch.round(slope / curvature), low, high)) - levels
        gain = move * (2 * slope - move * curvature)
        best, at = gain.max(dim=1)
        going = best > 1e-6 * (curvature.gather(1, at[:, None])[:, 0])
        if k % unasked == 0 and not bool(going.all()):
            done[active] = levels
            if not bool(going.any()):
                break
            keep = torch.nonzero(going)[:, 0]
            active, group, step, low, high = active[keep], group[keep], step[keep], low[keep], high[keep]
            levels, slope, curvature, move = levels[keep], slope[keep], curvature[keep], move[keep]
            at, going = at[keep], going[keep]
        taken = torch.where(going[:, None], move.gather(1, at[:, None]), 0.0)
        levels.scatter_add_(1, at[:, None], taken)
        slope -= taken * (step.expand(-1, n).gather(1, at[:, None]) * step) * hessian[group, at]
    else:
        done[active] = levels
    result = done.view(groups, outputs, n)
    return result, float((result != before).float().mean())


def moves_unasked(device: torch.device) -> int:
    """How many moves coordinate descent makes before it asks which channels still move; the codes are the same for any number.

    Args:
        device: on the CPU the answer is at hand and saves work; an accelerator keeps the host waiting for it.

    Example:
        >>> moves_unasked(torch.device("cpu"))
        1
    """
    return 1 if device.type == "cpu" else 16


def closed_form_step(levels: Tensor, optimum: Tensor, hessian: Tensor, scale: Tensor, group: int | None) -> Tensor:
    """The steps that fit given codes best: `s = v^T H w* / v^T H v`; the old one where that is not positive.

    With column groups, the `s_k` that minimise `(w* - sum_k s_k v_k)^T H (w* - sum_k s_k v_k)`, `v_k` the codes of group `k`: `A s = b`
    with `A_kl = v_k^T H v_l`, `b_k = v_k^T H w*`. Where one of these is not positive, each step is minimised in turn instead, and stays
    where its minimiser is not positive. The objective never rises.

    Args:
        levels: codes `v`, zero-point subtracted, float32 (G, O, n).
        optimum: `w*`, float32 (G, O, n).
        hessian: `H`, float32 (G, n, n).
        scale: the old `s`, float32 (G, O), or with column groups (G, O, K).
        group: weights that share a step; None: all of an output channel.

    Returns:
        The new `s`, the shape of `scale`.
    """
    most = max(1, STEP_NUMBERS // group_count(levels.shape[2], group) ** 2)
    parts = zip(*(values.split(most, dim=1) for values in (levels, optimum, scale)), strict=True)  # output channels are independent
    return torch.cat([_fitted(v, w, hessian, s, group) for v, w, s in parts], dim=1)


def _fitted(levels: Tensor, optimum: Tensor, hessian: Tensor, scale: Tensor, group: int | None) -> Tensor:
    groups = column_groups(levels.shape[2], group)
    products = [levels[..., columns] @ hessian[:, columns] for columns in groups]
    right = torch.stack([(product * optimum).sum(dim=2) for product in products], dim=2).double()  # b, (G, O, K)
    matrix = torch.stack([group_sums(product * levels, group) for product in products], dim=2).double()  # A, (G, O, K, K)
    found = scale.view(right.shape).double()
    if len(groups) > 1:
        found = _solved(matrix, right, found)
    for _ in range(STEP_SWEEPS if len(groups) > 1 else 1):
        before = found.clone()
        for k in range(len(groups)):
            below = matrix[..., k, k]
            slope = right[..., k] - (matrix[..., k, :] * found).sum(dim=2)
            fitted = found[..., k] + slope / below.clamp(min=torch.finfo(below.dtype).tiny)
            found[..., k] = torch.where((below > 0) & (fitted > 0), fitted, found[..., k])
        if bool(((found - before).abs() <= 1e-4 * before).all()):
            break
    return found.float().clamp(min=torch.finfo(torch.float32).tiny).view(scale.shape)


def _solved(matrix: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """The solution of `A s = b` where all of it is positive and it has the lower objective, elsewhere `old`; float64 (G, O, K)."""
    dead = matrix.diagonal(dim1=2, dim2=3) <= 0  # a group of codes that are all zero
    factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(dead.double()))
    solved = torch.cholesky_solve(torch.where(dead, old, right)[..., None], factor)[..., 0]

    def objective(steps: Tensor) -> Tensor:
        return (((matrix @ steps[..., None])[..., 0] - 2 * right) * steps).sum(dim=2)

    better = (failed == 0) & (solved > 0).all(dim=2) & (objective(solved) <= objective(old))
    return torch.where(better[..., None], solved, old)
