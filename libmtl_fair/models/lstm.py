"""An LSTM as an ordered list of layers, and heads that read every step or the last one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from libmtl_fair import functional as F
from libmtl_fair.errors import DataError, HostError, RecipeError
from libmtl_fair.models.encoders import registered
from libmtl_fair.models.heads import Heads
from libmtl_fair.tasks import SequenceTask, Task, at_steps


class LSTMLayer(nn.Module):
    """One LSTM layer: [B, L, F] -> [B, L, d], zeros where there is no step; dropout is of its input.

    Steps are those of :func:`libmtl_fair.functional.valid_steps`. What is computed at padded steps reaches none before them, so that
    the outputs are those of packed sequences, without asking the device for lengths.
    """

    def __init__(self, in_features: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(in_features, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden state at every step."""
        steps = F.valid_steps(x)
        out: Tensor = self.lstm(self.dropout(x))[0]
        return out * steps[..., None]


@registered("lstm", dims=2)
class LSTM(nn.Module):
    """A stack of LSTM layers for sequences padded with zeros. Input [B, L, in_features], output [B, L, hidden].

    Parameters
    ----------
    in_features : int
        Features of a step.
    hidden : int, default 256
        Width of every layer.
    layers : int, default 2
        How many.
    dropout : float, default 0.3
        Between layers, in [0, 1).
    every_step : bool, default True
        Give the state at every step; False: that of the last step alone, [B, hidden], for tasks of whole sequences.

    Notes
    -----
    The defaults are those of ReLiF's clinical experiments. ``blocks`` is the ordered list of layers, which FairBranch branches at.

    Examples
    --------
    >>> import torch
    >>> LSTM(5, hidden=4)(torch.ones(2, 3, 5)).shape, LSTM(5, hidden=4, every_step=False)(torch.ones(2, 3, 5)).shape
    (torch.Size([2, 3, 4]), torch.Size([2, 4]))
    """

    def __init__(
        self, in_features: int, hidden: int = 256, layers: int = 2, dropout: float = 0.3, every_step: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("layers", layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"encoder 'lstm': {name} must be a whole number of at least 1, found {value!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise RecipeError(f"encoder 'lstm': dropout must be in [0, 1), found {dropout!r}")
        if not isinstance(every_step, bool):
            raise RecipeError(f"encoder 'lstm': every_step must be true or false, found {every_step!r}")
        self.blocks = nn.ModuleList(
            LSTMLayer(hidden if i else in_features, hidden, dropout if i else 0.0) for i in range(layers)
        )
        if not every_step:
            self.blocks.append(Last())
        self.out_features = hidden

    def forward(self, x: Tensor) -> Tensor:
        """Return the representation of every step, or of the last one."""
        if x.dim() != 3 or not x.shape[1]:
            raise DataError(
                f"encoder 'lstm' takes sequences [B, L, features] of at least one step, found {list(x.shape)}"
            )
        for block in self.blocks:
            x = block(x)
        return x


class Last(nn.Module):
    """The last step of a sequence: [B, L, d] -> [B, d]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the last step that there is."""
        return F.last_step(x, F.valid_steps(x))


class EveryStep(nn.Module):
    """A linear head at every step: [B, L, d] -> logits [B, L] or [B, L, C], minus infinity where there is no step."""

    def __init__(self, in_features: int, out_features: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logit at every step.

        Raises
        ------
        HostError
            A representation that has no steps.
        """
        if h.dim() != 3:
            raise HostError(
                f"a head for every step takes a representation [B, L, d], found {list(h.shape)}: the encoder has to keep the steps "
                "(encoder lstm with every_step: true)"
            )
        logits: Tensor = self.linear(h)
        return at_steps(logits.squeeze(-1) if logits.shape[-1] == 1 else logits, F.valid_steps(h))


class LastStep(nn.Module):
    """A linear head at the last step: [B, L, d] -> [B, out]; of [B, d] it is a linear layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, h: Tensor) -> Tensor:
        """Return the outputs, [B, out]."""
        found: Tensor = self.linear(F.last_step(h, F.valid_steps(h)) if h.dim() == 3 else h)
        return found


def sequence_heads(tasks: Iterable[Task], in_features: int) -> nn.ModuleDict:
    """Return task name -> head for an encoder of sequences: of every step for :class:`SequenceTask`, else of the last one."""
    return Heads(
        {t.name: (EveryStep if isinstance(t, SequenceTask) else LastStep)(in_features, t.out_features) for t in tasks}
    )
