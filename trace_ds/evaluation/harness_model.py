"""A loaded model as lm-evaluation-harness wants it, its forward passes shared out between the processes of a job.

Imports lm-eval, so this module is imported at use. Every process builds all requests of a task and all get all
answers; only the forward passes are shared out. A batch is the one that the harness itself would make of all
requests, so the numbers are those of one process and of the ``lm_eval`` command.
"""

from __future__ import annotations

import math

from lm_eval.models.huggingface import HFLM

from trace_ds.evaluation.language_model import Diverged, LanguageModel

Request = tuple[tuple[str, str], list[int], list[int]]  # (texts, tokens of the context, tokens of the continuation)
Answer = tuple[float, bool]  # summed log-probability of the continuation, and whether greedy decoding gives it


class SharedLM(HFLM):
    """The harness's own model around one that is loaded."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(
            pretrained=model.model, tokenizer=model.tokenizer, batch_size=model.settings.batch_rows, backend="causal"
        )
        self._shared = model

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        batches = plan_requests(requests, override_bs or self.batch_size)

        def answer(batch: list[int]) -> list[Answer]:
            part = [requests[index] for index in batch]
            found: list[Answer] = super(SharedLM, self)._loglikelihood_tokens(part, True, override_bs)
            if not all(math.isfinite(log_prob) for log_prob, _ in found):
                raise Diverged
            return found

        return self._shared.in_order(batches, answer)


def plan_requests(requests: list[Request], rows: int) -> list[list[int]]:
    """Indices of the requests of each forward pass, as lm-eval's Collator makes them of all requests.

    Requests that differ in their last token only share a row (one pass answers all letters of a question); rows go
    longest first, ``rows`` at a time.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        sharing.setdefault(tuple(context + continuation[:-1]), []).append(index)

    def order(group: list[int]) -> tuple[int, tuple[int, ...]]:
        _, context, continuation = requests[max(group, key=lambda index: len(requests[index][2]))]
        tokens = tuple(context + continuation)
        return -len(tokens), tokens

    groups = sorted(sharing.values(), key=order)
    return [
        [index for group in groups[begin : begin + rows] for index in group] for begin in range(0, len(groups), rows)
    ]
