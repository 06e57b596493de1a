"""The losses, as pure functions that return *sums* over this rank's tokens or sequences.

The job divides by global counts and never averages averages, so the result does not depend on how rows are sharded.

Shape legend: B sequences (rows), S positions, D hidden size, V vocabulary. Counted positions are the loss-bearing
ones: position t carries the hidden state and the loss of predicting token t+1.

Cross-entropy is computed here: ``outputs.loss`` of Hugging Face MoE models may contain the load-balancing loss, which
gradient ascent would then maximise.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def nll(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats) of each token's target, softmax in fp32, [N]."""
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def token_nll(logits_BSV: torch.Tensor, input_ids_BS: torch.Tensor, counted_BS: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats, fp32) of the next token at counted positions, 0 elsewhere, [B, S].

    From whole logits, for training loops of one's own; the job uses :mod:`trace_ds.unlearning.forward`.
    """
    rows, columns = counted_BS.nonzero(as_tuple=True)
    nll_N = nll(logits_BSV[rows, columns], input_ids_BS[rows, columns + 1])
    return torch.zeros(counted_BS.shape, dtype=torch.float32, device=nll_N.device).index_put((rows, columns), nll_N)


def weighted_sum(values_BS: torch.Tensor, weights_BS: torch.Tensor) -> torch.Tensor:
    """Σ_t w_t v_t, the numerator of every retain loss: L_retain = Σ w_t ℓ_t / n over the global batch of n tokens.

    The divisor is n, not Σ w: the weights have mean 1 over the corpus, and renormalising each batch would cancel the
    between-document part of the weights (our decision).
    """
    return (values_BS * weights_BS).sum()


def hidden_mse(hidden_BSD: torch.Tensor, target_BSD: torch.Tensor) -> torch.Tensor:
    """Mean over D of the squared difference, per position, fp32, [B, S]."""
    return (hidden_BSD.float() - target_BSD.float()).square().mean(dim=-1)


def rmu_target(hidden_size: int, seed: int, length: float) -> torch.Tensor:
    """RMU's steering target c·u (Li et al., *The WMDP Benchmark*, arXiv 2403.03218, eq. 2), fp32 [D].

    u is uniform in [0, 1)^D scaled to unit length, as in the authors' code; ``length`` is c in the units of the hidden
    states (we set it to a multiple of their mean norm, since a fixed c does nothing where hidden states are large).
    """
    direction = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return direction / direction.norm() * length


def graddiff_forget_sum(nll_BS: torch.Tensor) -> torch.Tensor:
    """Gradient ascent: −Σ ℓ over forget tokens (GradDiff, Liu et al., arXiv 2203.12817; Maini et al., 2401.06121)."""
    return -nll_BS.sum()


def npo_forget_sum(
    nll_BS: torch.Tensor, reference_nll_BS: torch.Tensor, counted_BS: torch.Tensor, beta: float
) -> torch.Tensor:
    """NPO (Zhang et al., arXiv 2404.05868, eq. 3): Σ over sequences of −(2/β) log σ(β [NLL_θ(y) − NLL_ref(y)]).

    NLL(y) is the *sum* over the sequence's tokens, as in the paper; a β of 0.1 saturates on long sequences. Rows with
    no counted token add nothing.
    """
    difference_B = (nll_BS - reference_nll_BS).sum(dim=1)
    loss_B = -(2.0 / beta) * functional.logsigmoid(beta * difference_B)
    return (loss_B * counted_BS.any(dim=1)).sum()


def simnpo_forget_sum(nll_BS: torch.Tensor, counted_BS: torch.Tensor, beta: float, delta: float) -> torch.Tensor:
    """SimNPO (Fan et al., arXiv 2410.07163, eq. 4): Σ over sequences of −(2/β) log σ(β [NLL_θ(y)/|y| − δ])."""
    lengths_B = counted_BS.sum(dim=1)
    mean_B = nll_BS.sum(dim=1) / lengths_B.clamp(min=1)
    loss_B = -(2.0 / beta) * functional.logsigmoid(beta * (mean_B - delta))
    return (loss_B * (lengths_B > 0)).sum()
