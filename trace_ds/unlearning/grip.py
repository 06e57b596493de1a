"""GRIP (Zhu et al., arXiv 2601.16905), its method A: each update of a router is projected onto what retain text allows.

What we could read: the abstract, notes on version 1, and a public port of version 3 to another kind of model, which has
the order of steps and the constants; neither version 3 nor the authors' code. For each MoE layer, x_t are inputs of the
frozen router at retain tokens, s_t its logits, and of each expert e

    U_e   the right singular vectors with S² > 1e-2 of the inputs that selected e
    τ_et  the least logit of a selected expert minus e's, of each input that did not select e

After every optimizer step (clipping, moments and weight decay are in it) the update δ of row e becomes

    1.  δ ← δ − U_e U_eᵀ δ
    2.  unless δ·x_t ≤ τ_et − 1e-2 for all t, by randomised Kaczmarz: 100 times draw one of them in proportion to ‖x_t‖²
        and, where it does not hold, δ ← δ − (δ·x_t − τ_et + 1e-2) x_t / ‖x_t‖²

and the row is what it was before the step plus δ. So read, the margins are the frozen model's at every step, however
far the router has come; 2. may leave the null space of 1.; and inputs nearer to a tie than 1e-2 are pushed off it each
time.

Ours: the inputs (``tokens`` a layer, spread evenly over the retain rows of the first ``steps`` steps); what a token
selected is what its router said, also where a correction bias or groups had a say, and an expert that was left out
with a higher logit has no margin to keep; a router that did not move at all stays; a bias that is added to the logits
is not constrained.

Every rank runs those rows; the layers are shared among the ranks, L·(1 + K)·tokens·D·4 bytes over all of them, and a
step puts the projected updates together in one all-reduce. Random numbers are a function of seed, step and layer.

Shape legend: L MoE layers, E experts, D hidden size, T inputs, K = top-k, N protected directions, I iterations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trace_ds.config.sections.unlearning import GRIPConfig
from trace_ds.models import autoep
from trace_ds.models.routers import find_routers, record_routing, router_weight
from trace_ds.parallel.device import to_device
from trace_ds.parallel.world import World, quiet_deepspeed
from trace_ds.routing.collection import whole_head
from trace_ds.unlearning.batches import GRIP_STREAM, Batches, generator
from trace_ds.unlearning.forward import forward

PROTECTED_SQUARE = 1e-2  # of a singular value
MARGIN = 1e-2
ITERATIONS = 100


@dataclass(frozen=True)
class LayerConstraints:
    """The constraints on the updates of one router; see the module's docstring.

    Attributes:
        inputs_TD: fp32.
        bases: of each expert its protected directions, fp32 [D, N].
        limits_ET: float64, τ − 1e-2; infinite where there is no margin to keep.
        chances_ET: float64, cumulative ‖x‖² of the inputs with a margin.
    """

    inputs_TD: torch.Tensor
    bases: list[torch.Tensor]
    limits_ET: torch.Tensor
    chances_ET: torch.Tensor

    @classmethod
    def of(cls, inputs_TD: torch.Tensor, logits_TE: torch.Tensor, experts_TK: torch.Tensor) -> LayerConstraints:
        """From inputs of the frozen router, its logits and the experts that were selected."""
        selected_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, experts_TK.long(), True)
        margins_TE = logits_TE.masked_fill(~selected_TE, torch.inf).amin(1, keepdim=True).double() - logits_TE
        kept_ET = (~selected_TE & (margins_TE >= 0)).T
        squares_T = inputs_TD.double().square().sum(1)
        return cls(
            inputs_TD.float(),
            [protected_directions(inputs_TD[selected_T]) for selected_T in selected_TE.T],
            (margins_TE.T - MARGIN).masked_fill(~kept_ET, torch.inf),
            (kept_ET * squares_T).cumsum(1),
        )

    def project(self, update_ED: torch.Tensor, uniform_EI: torch.Tensor) -> torch.Tensor:
        """The update that is made instead, float64 [E, D].

        Args:
            uniform_EI: float64 in [0, 1), which input each iteration draws.
        """
        bases = (basis.double() for basis in self.bases)
        rows = [row - basis @ (basis.T @ row) for row, basis in zip(update_ED.double(), bases, strict=True)]
        update_ED, inputs_TD = torch.stack(rows), self.inputs_TD.double()
        broken_E = (update_ED @ inputs_TD.T > self.limits_ET).any(1)
        if not broken_E.any():
            return update_ED
        squares_T = inputs_TD.square().sum(1)
        places_EI = torch.searchsorted(self.chances_ET, uniform_EI * self.chances_ET[:, -1:], right=True)
        for place_E in places_EI.clamp(max=len(inputs_TD) - 1).T:
            drawn_ED = inputs_TD[place_E]
            over_E = (update_ED * drawn_ED).sum(1) - self.limits_ET.gather(1, place_E[:, None]).squeeze(1)
            step_E = torch.where(broken_E & (over_E > 0), over_E / squares_T[place_E], 0.0)
            update_ED = update_ED - step_E[:, None] * drawn_ED
        return update_ED


def protected_directions(inputs_TD: torch.Tensor) -> torch.Tensor:
    """Orthonormal directions that the inputs reach into, fp32 [D, N]."""
    _, values_N, directions_ND = torch.linalg.svd(inputs_TD.double(), full_matrices=False)
    return directions_ND[values_N.square() > PROTECTED_SQUARE].T.float().contiguous()


class Projection:
    """Keeps the updates of all routers to their constraints (collective, all of it).

    It is made while the engine holds the frozen weights.
    """

    def __init__(self, engine: Any, batches: Batches, world: World, settings: GRIPConfig, seed: int) -> None:
        self._world, self._seed = world, seed
        logits_of = [_logits(router) for router in find_routers(engine.module)]
        of_a_pass = -(-settings.tokens // (settings.steps * batches.micro_batches_per_step(1)))
        own_layers = range(world.rank, len(logits_of), world.size)
        parts: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in own_layers}
        for passed in retain_inputs(engine, batches, world, settings.steps):
            for layer in parts:
                inputs_TD, experts_TK = passed[layer]
                spread = slice(None, None, max(1, len(inputs_TD) // of_a_pass))
                parts[layer].append((inputs_TD[spread][:of_a_pass].float(), experts_TK[spread][:of_a_pass]))
        self._layers = {}
        for layer in list(parts):
            inputs_TD, experts_TK = (torch.cat(each)[: settings.tokens] for each in zip(*parts.pop(layer), strict=True))
            self._layers[layer] = LayerConstraints.of(inputs_TD, logits_of[layer](inputs_TD), experts_TK)

    def begin(self, engine: Any) -> None:
        """Remember the routers' weights before the first step of this process."""
        self._before_LED = master_weights(engine)

    def after_update(self, engine: Any, step: int) -> None:
        """Project the routers' updates after the optimizer step of the 0-based ``step``."""
        before_LED, after_LED = self._before_LED, master_weights(engine)
        moved_L = (after_LED != before_LED).flatten(1).any(1).tolist()
        updates_LED = torch.zeros_like(after_LED)
        for layer, constraints in self._layers.items():
            if moved_L[layer]:
                random = generator(self._seed, GRIP_STREAM, step * len(moved_L) + layer)
                uniform_EI = torch.from_numpy(random.random((after_LED.shape[1], ITERATIONS)))
                update_ED = after_LED[layer] - before_LED[layer]
                updates_LED[layer] = constraints.project(update_ED, to_device(uniform_EI, self._world.device))
        # each rank has projected the layers it holds constraints of, and zeros of the others
        self._world.sum_in_place(updates_LED)
        self._before_LED = before_LED + updates_LED
        set_router_weights(
            engine, {layer: self._before_LED[layer] for layer, moved in enumerate(moved_L) if moved}, self._world
        )


def retain_inputs(
    engine: Any, batches: Batches, world: World, steps: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Run the retain rows of the first ``steps`` steps, the same on every rank (collective), and yield for each
    micro-batch, by layer, the router's inputs [T, D] at the counted tokens and the experts [T, K] it selected."""
    routers = find_routers(engine.module)
    engine.eval()
    for step in range(steps):
        for batch in batches.at(step, 0, 1).micro_batches:
            retain = slice(batch.forget_rows, None)
            counted_T = to_device(batch.counted_BS[retain].reshape(-1).nonzero().squeeze(1), world.device)
            ids_BS = to_device(batch.input_ids_BS[retain], world.device)
            with _router_inputs(routers) as seen, torch.no_grad(), record_routing(engine.module) as recorder:
                forward(engine, ids_BS, batch.position_ids_BS[retain], last=True)
            yield [(inputs_TD[counted_T], recorder.layer(n)[1][counted_T]) for n, inputs_TD in enumerate(seen)]
    engine.train()


@contextlib.contextmanager
def _router_inputs(routers: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs [T, D] (detached) of the routers, in the order in which they run, inside the block."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any) -> None:
        seen.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))

    with contextlib.ExitStack() as stack:
        for router in routers:
            stack.enter_context(router.register_forward_pre_hook(keep))
        yield seen


def _logits(router: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The logits [T, E] of inputs [T, D] in fp32, as the router's weights are now (collective)."""
    layer: Any = router.gate if autoep.is_autoep_router(router) else router
    with whole_head(layer) as parameters:
        copies = [parameter.detach().float().clone() for parameter in parameters if parameter is not None]
    return lambda inputs_TD: functional.linear(inputs_TD.float(), *copies)


def router_weights(engine: Any) -> list[Any]:
    return [router_weight(router) for router in find_routers(engine.module)]


def master_weights(engine: Any) -> torch.Tensor:
    """The optimizer's fp32 weights of all routers [L, E, D], whole on every rank (collective)."""
    read = quiet_deepspeed().utils.safe_get_full_fp32_param
    return torch.stack([read(weight).detach().clone() for weight in router_weights(engine)])


def set_router_weights(engine: Any, values: dict[int, torch.Tensor], world: World) -> None:
    """Set routers, in the model and in the optimizer, to fp32 ``values`` [E, D] by layer, the same on all ranks
    (collective)."""
    zero, utils = quiet_deepspeed().zero, quiet_deepspeed().utils
    weights = {layer: router_weights(engine)[layer] for layer in values}
    partitioned = any(hasattr(weight, "ds_id") for weight in weights.values())
    # the module's weights are read by the next forward pass, the optimizer's fp32 masters by its next step
    with torch.no_grad(), zero.GatheredParameters(list(weights.values()), modifier_rank=0, enabled=partitioned):
        for layer, weight in weights.items():
            weight.data.copy_(values[layer])
    for layer, weight in weights.items():
        if partitioned:
            size = weight.ds_tensor.numel()  # a rank's share; the last one is padded
            flat = values[layer].flatten()
            shares = functional.pad(flat, (0, size * world.size - len(flat))).view(world.size, size)
            utils.safe_set_local_fp32_param(weight, shares[world.rank])
        else:
            utils.safe_set_full_fp32_param(weight, values[layer])
