"""Per-token losses from hidden states, without materialising the logits of a batch.

Shape legend: B rows, S positions, N counted positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional

LOGITS_ELEMENTS = 1 << 26


def nll(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """ℓ, the negative log-likelihood of each token's target, [N]."""
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


@torch.no_grad()
def chunked_nll(
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    logits_elements: int = LOGITS_ELEMENTS,
) -> torch.Tensor:
    """Negative log-likelihood −log softmax(W h + b)[target] in nats, fp32 [N], forward only.

    At most ``logits_elements`` logits exist at a time (in the type of the weights, and once more in fp32): a quarter
    of a gigabyte in fp32 by default, whatever the vocabulary and the batch.
    """
    nll_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    step = max(1, logits_elements // len(weight_VD))
    for begin in range(0, len(hidden_ND), step):
        part = slice(begin, begin + step)
        logits = functional.linear(hidden_ND[part], weight_VD, bias_V).float()
        chosen = logits.gather(1, targets_N[part, None]).squeeze(1)
        nll_N[part] = torch.logsumexp(logits, dim=1) - chosen
    return nll_N
