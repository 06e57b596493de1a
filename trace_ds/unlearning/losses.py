"""The losses, as pure functions; each says its formula, source and what we were unsure of.

Token losses return one value per token, sequence losses a *sum* over this rank's sequences; none is averaged over
tokens or rows: the job divides by global counts, so the result does not depend on how rows are sharded.

Shape legend: B sequences (rows), S positions, D hidden size, V vocabulary, N tokens. Counted positions are the
loss-bearing ones: position t carries the hidden state and the loss of predicting token t+1. ℓ = −log p is the NLL of
the target in nats; p its probability; z the logits. All arithmetic is fp32 whatever the logits' type.

Cross-entropy is computed here: ``outputs.loss`` of Hugging Face MoE models may contain the load-balancing loss, which
gradient ascent would then maximise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.models.token_nll import nll

# --- one value a token, from its logits -------------------------------------------------------------------------------


def wga(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """WGA, weighted gradient ascent: −p ℓ with p held constant (β = 1) (Wang et al., arXiv 2502.19301), [N].

    Tokens that are forgotten already (small p) are ascended no further.
    """
    loss_N = nll(logits_NV, targets_N)
    return -torch.exp(-loss_N.detach()) * loss_N


def satimp(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """SatImp: −p^β₁ (1 − p)^β₂ ℓ with the weight held constant (Yang et al., arXiv 2505.11953), [N].

    β₁ = 5, β₂ = 1, those of the OpenUnlearning benchmark.
    """
    loss_N = nll(logits_NV, targets_N)
    probability_N = torch.exp(-loss_N.detach())
    return -(probability_N**5) * (1 - probability_N) * loss_N


UNDIAL_STRENGTH = 10.0


def undial(logits_NV: torch.Tensor, targets_N: torch.Tensor, frozen_logits_NV: torch.Tensor) -> torch.Tensor:
    """UNDIAL: cross-entropy to the frozen model's distribution with the target's logit lowered by 10, [N].

    −Σ_v q_v log p_v, q = softmax(z^ref − 10 · onehot(target)) (Dong et al., arXiv 2402.10052); 10 as in the
    OpenUnlearning benchmark.
    """
    lowered_NV = (
        frozen_logits_NV.detach()
        .float()
        .scatter_add(1, targets_N[:, None], torch.full_like(targets_N[:, None], -UNDIAL_STRENGTH, dtype=torch.float32))
    )
    return _cross_entropy(torch.softmax(lowered_NV, dim=1), logits_NV)


def ceu(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """CE-U: cross-entropy to the model's own distribution without the target (Yang, arXiv 2503.01224), [N].

    −Σ_v q_v log p_v with q = softmax(z with z_target = −∞), detached. The authors leave out the first token of an
    answer; here every counted token takes part (our decision).
    """
    without_NV = logits_NV.detach().float().scatter(1, targets_N[:, None], float("-inf"))
    return _cross_entropy(torch.softmax(without_NV, dim=1), logits_NV)


def pdu(logits_NV: torch.Tensor) -> torch.Tensor:
    """PDU's forget loss: (max_v z_v − mean_v z_v)², zero when the logits are all equal, [N].

    Entesari et al., *Constrained Entropic Unlearning* (arXiv 2506.05314); the square is as in the OpenUnlearning
    benchmark's form of it.
    """
    logits_NV = logits_NV.float()
    return (logits_NV.amax(dim=1) - logits_NV.mean(dim=1)).square()


def kl_to_frozen(logits_NV: torch.Tensor, frozen_logits_NV: torch.Tensor) -> torch.Tensor:
    """KL(p^ref ‖ p) = Σ_v p^ref_v (log p^ref_v − log p_v) over the whole vocabulary (Maini et al., 2401.06121), [N]."""
    frozen_NV = torch.log_softmax(frozen_logits_NV.detach().float(), dim=1)
    return (frozen_NV.exp() * (frozen_NV - torch.log_softmax(logits_NV.float(), dim=1))).sum(dim=1)


def _cross_entropy(target_NV: torch.Tensor, logits_NV: torch.Tensor) -> torch.Tensor:
    return -(target_NV * torch.log_softmax(logits_NV.float(), dim=1)).sum(dim=1)


# --- sums over sequences, from the token losses -----------------------------------------------------------------------


@dataclass(frozen=True)
class SequenceNLL:
    """Input of the sequence losses: token losses [B, S] of the forget rows, 0 where nothing is counted.

    Attributes:
        nll_BS, reference_nll_BS: under the trained and under the frozen model.
        counted_BS: bool.
        preferred_nll_BS, preferred_reference_nll_BS: the same of the paired rows of ``data.alternative``, or None.
    """

    nll_BS: torch.Tensor
    reference_nll_BS: torch.Tensor
    counted_BS: torch.Tensor
    preferred_nll_BS: torch.Tensor | None = None
    preferred_reference_nll_BS: torch.Tensor | None = None


def npo_forget_sum(
    nll_BS: torch.Tensor, reference_nll_BS: torch.Tensor, counted_BS: torch.Tensor, beta: float
) -> torch.Tensor:
    """NPO (Zhang et al., arXiv 2404.05868, eq. 3): Σ over sequences of −(2/β) log σ(β [NLL_θ(y) − NLL_ref(y)]).

    NLL(y) is the *sum* over the sequence's tokens, as in the paper; with the default β of 0.1 the sigmoid saturates,
    and gradients vanish, where the difference of a long sequence is large.
    Rows with no counted token add nothing.
    """
    return _preference_sum((nll_BS - reference_nll_BS).sum(dim=1), counted_BS, beta)


def simnpo_forget_sum(nll_BS: torch.Tensor, counted_BS: torch.Tensor, beta: float) -> torch.Tensor:
    """SimNPO (Fan et al., arXiv 2410.07163, eq. 4): Σ over sequences of −(2/β) log σ(β NLL_θ(y)/|y|).

    Default β = 4.5; δ is 0. The authors also weight the forget loss, γ = 0.125: here ``unlearning.gamma``, by default 1
    under every loss.
    """
    mean_B = nll_BS.sum(dim=1) / counted_BS.sum(dim=1).clamp(min=1)
    return _preference_sum(mean_B, counted_BS, beta)


def dpo_forget_sum(rows: SequenceNLL, beta: float) -> torch.Tensor:
    """DPO: Σ over pairs of −(2/β) log σ(β [(NLL_θ(y) − NLL_ref(y)) − (NLL_θ(y⁺) − NLL_ref(y⁺))]).

    y is the forget row, y⁺ the row preferred to it; refusals as y⁺ make it IdkDPO (Rafailov et al., arXiv 2305.18290;
    for unlearning Zhang et al., 2404.05868, and Maini et al., 2401.06121). NLLs are sums. The factor 2/β, as in NPO
    and the OpenUnlearning benchmark, is not in the DPO paper. Default β = 0.1.
    """
    assert rows.preferred_nll_BS is not None and rows.preferred_reference_nll_BS is not None
    forget_B = (rows.nll_BS - rows.reference_nll_BS).sum(dim=1)
    preferred_B = (rows.preferred_nll_BS - rows.preferred_reference_nll_BS).sum(dim=1)
    return _preference_sum(forget_B - preferred_B, rows.counted_BS, beta)


def _preference_sum(margin_B: torch.Tensor, counted_BS: torch.Tensor, beta: float) -> torch.Tensor:
    loss_B = -(2.0 / beta) * functional.logsigmoid(beta * margin_B)
    return (loss_B * counted_BS.any(dim=1)).sum()


# --- the tables: a loss is one function above and one line here -------------------------------------------------------

# (settings, logits [C, V], targets [C], the frozen model's logits [C, V] where needs.py says so) -> values [C]
TokenLoss = Callable[[UnlearningConfig, torch.Tensor, torch.Tensor, Any], torch.Tensor]
TOKEN_LOSSES: dict[str, TokenLoss] = {
    "nll": lambda s, z, y, frozen: nll(z, y),
    "kl": lambda s, z, y, frozen: kl_to_frozen(z, frozen),
    "graddiff": lambda s, z, y, frozen: -nll(z, y),
    "wga": lambda s, z, y, frozen: wga(z, y),
    "satimp": lambda s, z, y, frozen: satimp(z, y),
    "undial": lambda s, z, y, frozen: undial(z, y, frozen),
    "ceu": lambda s, z, y, frozen: ceu(z, y),
    "pdu": lambda s, z, y, frozen: pdu(z),
}
SEQUENCE_LOSSES: dict[str, Callable[[UnlearningConfig, SequenceNLL], torch.Tensor]] = {
    "npo": lambda s, rows: npo_forget_sum(rows.nll_BS, rows.reference_nll_BS, rows.counted_BS, s.npo.beta),
    "simnpo": lambda s, rows: simnpo_forget_sum(rows.nll_BS, rows.counted_BS, s.simnpo.beta),
    "dpo": lambda s, rows: dpo_forget_sum(rows, s.dpo.beta),
}


# --- hidden states ----------------------------------------------------------------------------------------------------


def hidden_mse(hidden_BSD: torch.Tensor, target_BSD: torch.Tensor) -> torch.Tensor:
    """Mean over D of the squared difference, per position, fp32, [B, S]."""
    return (hidden_BSD.float() - target_BSD.float()).square().mean(dim=-1)


def rmu_target(hidden_size: int, seed: int, length: float) -> torch.Tensor:
    """RMU's steering target c·u (Li et al., *The WMDP Benchmark*, arXiv 2403.03218, eq. 2), fp32 [D].

    u is uniform in [0, 1)^D scaled to unit length, as in the authors' code; ``length`` is c in the units of the hidden
    states (we set it to a multiple of their median norm, since a fixed c does nothing where hidden states are large: 3
    times by default, our choice).
    """
    direction = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return direction / direction.norm() * length


def adaptive_rmu_target(target_D: torch.Tensor, frozen_BSD: torch.Tensor) -> torch.Tensor:
    """Adaptive RMU's target: ``target_D`` times the norm of the frozen hidden state of each position, fp32 [B, S, D].

    c_t = β ‖h_t^ref‖ (Huu-Tien et al., arXiv 2408.06223); ``target_D`` is β·u. Our reading: one norm per
    token. The paper's abstract leaves open whether it is that or a mean over the batch. Default β = 3, as for
    the median norm (our choice).
    """
    return frozen_BSD.detach().float().norm(dim=-1, keepdim=True) * target_D


# --- PDU's dual update ------------------------------------------------------------------------------------------------


def dual_update(multiplier: float, retain_loss: float, bound: float) -> float:
    """PDU's multiplier after a step: λ ← max(0, λ + L_retain − ε) (Entesari et al., arXiv 2506.05314).

    The job minimises γ L_forget + λ L_retain; where the retain loss exceeds its bound ε, λ grows. Ours: step
    size 1, ε = 1.05 times the retain loss of the first step, λ begins at α.
    """
    return max(0.0, multiplier + retain_loss - bound)
