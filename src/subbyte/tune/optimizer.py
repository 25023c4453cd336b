"""Optimisers as values: which one, with which settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from subbyte.errors import OptionError


class Optimizer(ABC):
    """What moves parameters along their gradients. Implementations are frozen dataclasses that hold their settings.

    Example:
        >>> isinstance(Adam(), Optimizer)
        True
    """

    @abstractmethod
    def over(self, groups: list[tuple[Tensor, float]]) -> torch.optim.Optimizer:
        """An optimiser of torch over some parameters.

        Args:
            groups: each parameter, float32 of any shape, and its rate.
        """


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam: a step's size depends on the rate, hardly on the loss's scale.

    Args:
        betas: decay of the running means of the gradient and of its square.
        epsilon: what is added to the root of the latter.

    Raises:
        OptionError: if a decay is not from 0 to below 1, or epsilon not above 0.

    Source:
        Kingma, Ba 2015, arXiv 1412.6980.

    Example:
        >>> Adam().over([(torch.zeros(2, requires_grad=True), 0.1)]).param_groups[0]["lr"]
        0.1
    """

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas) or not self.epsilon > 0:
            raise OptionError(f"Adam needs betas from 0 to below 1 and an epsilon above 0, not {self}")

    def over(self, groups: list[tuple[Tensor, float]]) -> torch.optim.Optimizer:
        """See `Optimizer`.

        Args:
            groups: each parameter, float32 of any shape, and its rate.
        """
        return torch.optim.Adam([{"params": [tensor], "lr": rate} for tensor, rate in groups], betas=self.betas, eps=self.epsilon)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum.

    Args:
        momentum: share of the last step that is made again; 0: none.

    Raises:
        OptionError: if the momentum is not from 0 to below 1.

    Source:
        Sutskever et al. 2013, *On the importance of initialization and momentum in deep learning*.

    Example:
        >>> SGD(momentum=0.0).over([(torch.zeros(2, requires_grad=True), 0.1)]).param_groups[0]["momentum"]
        0.0
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise OptionError(f"SGD needs a momentum from 0 to below 1, not {self}")

    def over(self, groups: list[tuple[Tensor, float]]) -> torch.optim.Optimizer:
        """See `Optimizer`.

        Args:
            groups: each parameter, float32 of any shape, and its rate.
        """
        return torch.optim.SGD([{"params": [tensor], "lr": rate} for tensor, rate in groups], momentum=self.momentum, lr=0.0)
