"""GRIP's method B (Zhu et al., arXiv 2601.16905): realign the routers once, after training.

Sources as for :mod:`trace_ds.unlearning.grip`. On retain tokens, Z are the scores of the frozen router on its own
inputs and X̃ the inputs of the router in the trained model, of all layers from one pass, before any is corrected. A
layer's weights become

    W = Z X̃ᵀ (X̃ X̃ᵀ + λ I)⁻¹,    λ = 1e-6

where the cosine between Z and W X̃, over all tokens and experts at once, is at least .95; elsewhere the layer stays as
it was trained. Nothing pulls W to the trained weights: where the tokens say nothing it is 0, so there have to be many
more of them than D.

Ours: the tokens are all counted retain tokens of the first ``steps`` steps; scores are without a bias that is added to
them; a router that training did not move stays. Only sums over tokens are kept, in float64, from which the cosine
follows too. Every rank runs the rows; the layers are shared among the ranks: over all of them the frozen scores
(L·T·E·4 bytes) wait in host memory, and the sums take L·D·(D + E)·8 on the devices at the end.

Shape legend: L MoE layers, E experts, D hidden size, T counted retain tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trace_ds.config.sections.unlearning import GRIPConfig
from trace_ds.parallel.world import World
from trace_ds.unlearning.batches import Batches
from trace_ds.unlearning.grip import RouterConstraint, masters, own_layers, replace, retain_inputs

RIDGE = 1e-6
ACCEPTED_COSINE = 0.95


class Sums:
    """What a layer's new weights follow from: X̃ X̃ᵀ [D, D], Z X̃ᵀ [E, D] and ‖Z‖², float64."""

    def __init__(self, experts: int, hidden: int, device: torch.device) -> None:
        self.gram_DD = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        self.cross_ED = torch.zeros(experts, hidden, dtype=torch.float64, device=device)
        self.square = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs_TD: torch.Tensor, scores_TE: torch.Tensor) -> None:
        inputs_TD, scores_TE = inputs_TD.double(), scores_TE.double()
        self.gram_DD += inputs_TD.T @ inputs_TD
        self.cross_ED += scores_TE.T @ inputs_TD
        self.square += scores_TE.square().sum()

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [E, D], cosine between the scores that they give and the frozen ones)."""
        ridged_DD = self.gram_DD + RIDGE * torch.eye(len(self.gram_DD), dtype=torch.float64, device=self.square.device)
        weights_ED = torch.linalg.solve(ridged_DD, self.cross_ED.T).T
        length = (weights_ED @ self.gram_DD * weights_ED).sum().sqrt()
        return weights_ED, (weights_ED * self.cross_ED).sum() / (length * self.square.sqrt())


class Realignment(RouterConstraint):
    """Method B; ``say`` hears which routers were accepted."""

    def __init__(
        self, engine: Any, batches: Batches, world: World, settings: GRIPConfig, say: Callable[[str], None]
    ) -> None:
        self._batches, self._world, self._steps, self._say = batches, world, settings.steps, say
        self._frozen_LED = masters(engine)
        self._own = own_layers(world, len(self._frozen_LED))
        self._scores = [  # by micro-batch and own layer, fp32 [T, E] on the CPU
            {layer: (found[layer][0].float() @ self._frozen_LED[layer].T).cpu() for layer in self._own}
            for found in retain_inputs(engine, batches, world, self._steps)
        ]

    def finish(self, engine: Any) -> bool:
        trained_LED = masters(engine)
        layers, experts, hidden = trained_LED.shape
        moved_L = (trained_LED != self._frozen_LED).flatten(1).any(1).tolist()
        sums = {n: Sums(experts, hidden, trained_LED.device) for n in self._own if moved_L[n]}
        found_of_all = retain_inputs(engine, self._batches, self._world, self._steps)
        for found, scores in zip(found_of_all, self._scores, strict=True):
            for layer, of_layer in sums.items():
                of_layer.add(found[layer][0], scores[layer].to(trained_LED.device))
        realigned_LED, cosine_L = torch.zeros_like(trained_LED), trained_LED.new_zeros(layers)
        for layer, of_layer in sums.items():
            realigned_LED[layer], cosine_L[layer] = of_layer.solve()
        self._world.sum_in_place(realigned_LED)
        self._world.sum_in_place(cosine_L)
        accepted = [n for n, cosine in enumerate(cosine_L.tolist()) if moved_L[n] and cosine >= ACCEPTED_COSINE]
        replace(engine, {layer: realigned_LED[layer] for layer in accepted}, self._world)
        told = ", ".join(f"{cosine:.3f}" for cosine, moved in zip(cosine_L.tolist(), moved_L, strict=True) if moved)
        self._say(
            f"GRIP realigned {len(accepted)} of {sum(moved_L)} routers that moved; cosines of their scores: {told}"
        )
        return bool(accepted)
