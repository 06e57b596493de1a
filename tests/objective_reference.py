"""Independent references of the objectives in float64: other algebra, plain transformers, plain AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jobs
import numpy as np
import torch

from trace_ds.config.load import load_config
from trace_ds.run.directory import RunDirectory

# name -> f(p [N, V] with gradient, z [N, V], y [N], p_ref [N, V], settings) -> [N]
FORMULAS: dict[str, Callable[..., torch.Tensor]] = {
    "nll": lambda p, z, y, r, s: -chosen(p, y).log(),
    "graddiff": lambda p, z, y, r, s: chosen(p, y).log(),
    "kl": lambda p, z, y, r, s: (r * (r / p).log()).sum(1),
    "wga": lambda p, z, y, r, s: chosen(p, y).detach() * chosen(p, y).log(),
    "satimp": lambda p, z, y, r, s: chosen(p, y).detach() ** 5 * (1 - chosen(p, y).detach()) * chosen(p, y).log(),
    "undial": lambda p, z, y, r, s: -(normalised(scaled(r, y, float(torch.tensor(-10.0).exp()))) * p.log()).sum(1),
    "ceu": lambda p, z, y, r, s: -(normalised(scaled(p.detach(), y, 0.0)) * p.log()).sum(1),
    "pdu": lambda p, z, y, r, s: (z.max(1).values - z.sum(1) / z.shape[1]) ** 2,
}


def chosen(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return p[torch.arange(len(y)), y]


def scaled(p: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
    result = p.clone()
    result[torch.arange(len(y)), y] *= factor
    return result


def normalised(p: torch.Tensor) -> torch.Tensor:
    return p / p.sum(1, keepdim=True)


def token_values(name: str, z: torch.Tensor, y: torch.Tensor, z_ref: torch.Tensor, settings: Any) -> torch.Tensor:
    p, r = (logits.exp() / logits.exp().sum(1, keepdim=True) for logits in (z, z_ref))
    return FORMULAS[name](p, z, y, r, settings)


def reference_run(config_path: str, run_dir: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """The job in one process and float64, no code of ours but the choice of rows: losses [(forget, retain)] by step
    and the weights in the hub layout."""
    from transformers import AutoModelForCausalLM

    from trace_ds.stages.unlearn import check as check_unlearn
    from trace_ds.stages.unlearn import make_unlearn_batches

    config, directory = load_config(config_path, overrides, run_dir)
    settings = config.unlearning
    batches = make_unlearn_batches(check_unlearn(config, RunDirectory.at(directory), config.distributed.ep))
    model, frozen = (
        AutoModelForCausalLM.from_pretrained(
            config.model.path, dtype=torch.float32, experts_implementation="eager"
        ).double()
        for _ in range(2)
    )
    frozen.requires_grad_(False)
    layer = model.config.num_hidden_layers // 2
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.optimizer.lr,
        betas=(0.9, 0.99),
        eps=settings.optimizer.eps,
        weight_decay=settings.optimizer.weight_decay,
    )
    direction = torch.rand(model.config.hidden_size, generator=torch.Generator().manual_seed(config.seed)).double()
    direction /= direction.norm()
    unit = median_norm(frozen, batches, layer) if settings.rmu.scale == "median_norm" else 1.0
    direction *= settings.rmu.coefficient * unit
    alpha, bound, losses = settings.alpha, None, []
    grip = GripReference(model, batches, settings.grip, config.seed) if settings.grip is not None else None
    for step in range(steps):
        data = batches.at(step, 0, 1)
        assert len(data.micro_batches) == 1
        forget, retain = reference_losses(model, frozen, data.micro_batches[0], settings, layer, direction)
        optimizer.zero_grad()
        (settings.gamma * forget + alpha * retain).backward()
        if settings.optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clipping)
        optimizer.step()
        if grip is not None:
            grip.after_update(step)
        losses.append((float(forget.detach()), float(retain.detach())))
        if settings.forget_loss == "pdu":
            bound = 1.05 * losses[0][1]
            alpha = max(0.0, alpha + losses[-1][1] - bound)
    broken = {"broken": grip.broken} if grip is not None else {}
    return {"losses": losses, "weights": jobs.saved_weights(model.float()), **broken}


class GripReference:
    """GRIP's projection as published (2601.16905v3) on the model that is trained, one expert and one input after the
    other in numpy. ``broken``: inputs whose margins Kaczmarz' iterations found broken."""

    def __init__(self, model: Any, batches: Any, settings: Any, seed: int) -> None:
        self.model, self.batches, self.settings, self.seed = model, batches, settings, seed
        self.routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
        self.before = self.weights()
        self.broken: list[int] = []
        quota = -(-settings.tokens // settings.steps)
        self.layers = [self.constraints(passes, quota) for passes in self.look()]

    def weights(self) -> list[np.ndarray]:
        return [router.weight.detach().numpy().copy() for router in self.routers]

    def look(self) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """By layer and pass: inputs [T, D], logits [T, E] and experts [T, K] of the counted retain tokens."""
        inputs: dict[int, Any] = {}
        hooks = [
            router.register_forward_pre_hook(lambda _m, given, number=number: inputs.__setitem__(number, given[0]))
            for number, router in enumerate(self.routers)
        ]
        results: list[list[Any]] = [[] for _ in self.routers]
        for step in range(self.settings.steps):
            batch = self.batches.at(step, 0, 1).micro_batches[0]
            rows = slice(batch.forget_rows, None)
            where = batch.counted_BS[rows].flatten().numpy()
            with torch.no_grad():
                self.model(
                    input_ids=batch.input_ids_BS[rows], position_ids=batch.position_ids_BS[rows], use_cache=False
                )
            for number, router in enumerate(self.routers):
                x = inputs[number].flatten(0, -2).numpy()[where]
                logits = x @ router.weight.detach().numpy().T
                results[number].append((x, logits, np.argsort(-logits)[:, : self.model.config.num_experts_per_tok]))
        for hook in hooks:
            hook.remove()
        return results

    def constraints(self, passes: list[Any], quota: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        spread = [[each[:: max(1, len(each) // quota)][:quota] for each in looked] for looked in passes]
        return self.constraints_of(
            *(np.concatenate(each)[: self.settings.tokens] for each in zip(*spread, strict=True))
        )

    @staticmethod
    def constraints_of(
        x: np.ndarray, logits: np.ndarray, chosen: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each expert: the projection [D, D] off what selected it, the inputs that did not, their margins."""
        results = []
        for expert in range(logits.shape[1]):
            its = np.array([expert in k for k in chosen])
            values, vectors = np.linalg.eigh(x[its].T @ x[its])
            kept = vectors[:, values > 1e-2]
            margins = [min(z[e] for e in k) - z[expert] for z, k in zip(logits[~its], chosen[~its], strict=True)]
            results.append((np.eye(x.shape[1]) - kept @ kept.T, x[~its], np.array(margins)))
        return results

    def after_update(self, step: int) -> None:
        trained = self.weights()
        for number, (before, after) in enumerate(zip(self.before, trained, strict=True)):
            draws = np.random.Generator(
                np.random.Philox(key=[self.seed, 4], counter=[0, 0, 0, step * len(trained) + number])
            ).random((len(before), 100))
            rows = [
                self.projected(after[e] - before[e], *self.layers[number][e], draws[e], self.broken)
                for e in range(len(before))
            ]
            self.set(number, before + rows)
        self.before = self.weights()

    @staticmethod
    def projected(
        update: np.ndarray, off: np.ndarray, x: np.ndarray, margins: np.ndarray, draws: np.ndarray, broken: list[int]
    ) -> np.ndarray:
        update = off @ update
        if all(update @ one <= margin - 1e-2 for one, margin in zip(x, margins, strict=True)):
            return update
        shares = np.cumsum([one @ one for one in x])
        for draw in draws:
            place = next(t for t, share in enumerate(shares) if share > draw * shares[-1])
            over = update @ x[place] - (margins[place] - 1e-2)
            if over > 0:
                update = update - over / (x[place] @ x[place]) * x[place]
                broken.append(place)
        return update

    def set(self, number: int, value: np.ndarray) -> None:
        self.routers[number].weight.data.copy_(torch.from_numpy(np.asarray(value)))


def median_norm(frozen: Any, batches: Any, layer: int) -> float:
    """Lower median length of the frozen hidden states over the forget tokens of the first four steps."""
    lengths = []
    for step in range(4):
        for batch in batches.at(step, 0, 1).micro_batches:
            ids, positions = batch.input_ids_BS, batch.position_ids_BS
            out = frozen(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=True)
            for row in range(batch.forget_rows):
                states = out.hidden_states[layer + 1][row, batch.counted_BS[row]]
                lengths += [math.sqrt(sum(value * value for value in state)) for state in states.tolist()]
    return sorted(lengths)[(len(lengths) - 1) // 2]


def reference_losses(
    model: Any,
    frozen: Any,
    batch: Any,
    settings: Any,
    layer: int,
    target: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(forget, retain) of one micro-batch that is the whole step, row by row."""

    def states(net: Any, part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = net(
            input_ids=part.input_ids_BS,
            position_ids=part.position_ids_BS,
            use_cache=False,
            output_hidden_states=True,
        )
        return out.logits, out.hidden_states[layer + 1]

    def row_values(name: str, logits: Any, reference: Any, part: Any, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        where = part.counted_BS[row].nonzero().squeeze(1)
        targets = part.input_ids_BS[row, where + 1]
        return where, token_values(name, logits[row, where], targets, reference[row, where], settings)

    split, loss = batch.forget_rows, settings.forget_loss
    (logits, hidden), (reference, frozen_hidden) = states(model, batch), states(frozen, batch)
    retain_name = settings.retain_loss or ("hidden_mse" if loss == "rmu" else "nll")
    retain, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in range(split, len(batch.counted_BS)):
        where = batch.counted_BS[row].nonzero().squeeze(1)
        if retain_name == "hidden_mse":
            values = ((hidden[row, where] - frozen_hidden[row, where]) ** 2).mean(1)
        else:
            _, values = row_values(retain_name, logits, reference, batch, row)
        retain = retain + (values * batch.weights_BS[row, where].double()).sum()
        tokens += len(where)
    parts = []
    if loss == "dpo":
        other_logits, other_reference = states(model, batch.alternative)[0], states(frozen, batch.alternative)[0]
    for row in range(split):
        where = batch.counted_BS[row].nonzero().squeeze(1)
        if loss == "rmu":
            length = 1.0
            if settings.rmu.scale == "adaptive":
                length = (frozen_hidden[row, where] ** 2).sum(1, keepdim=True).sqrt()
            parts.append(((hidden[row, where] - length * target) ** 2).mean(1))
        elif loss in ("npo", "simnpo"):
            nll, before = (row_values("nll", z, reference, batch, row)[1].sum() for z in (logits, reference))
            beta = getattr(settings, loss).beta
            margin = nll - before if loss == "npo" else nll / len(where)
            parts.append((2 / beta * torch.log1p(torch.exp(-beta * margin)))[None])
        elif loss == "dpo":
            margin = sum(
                row_values("nll", z, reference, batch, row)[1].sum() * sign
                for z, sign in ((logits, 1), (reference, -1))
            )
            for z, sign in ((other_logits, -1), (other_reference, 1)):
                margin = margin + sign * row_values("nll", z, other_reference, batch.alternative, row)[1].sum()
            parts.append((2 / settings.dpo.beta * torch.log1p(torch.exp(-settings.dpo.beta * margin)))[None])
        else:
            parts.append(row_values(loss, logits, reference, batch, row)[1])
    return torch.cat(parts).mean(), retain / tokens
