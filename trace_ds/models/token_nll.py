"""The loss of every token from hidden states, without ever holding the logits of a batch.

Shape legend: B rows, S positions, N counted positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional

LOGITS_ELEMENTS = 1 << 26


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
