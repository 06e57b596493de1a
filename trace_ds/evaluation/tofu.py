"""TOFU: questions about invented authors; is the true answer likelier than false ones that look like it?

| metric         | what                                                                             | range | on      |
|----------------|----------------------------------------------------------------------------------|-------|---------|
| probability    | mean P(answer)^(1/tokens); without a paraphrase its share among all answers      | 0 … 1 | all     |
| rouge_l_recall | mean ROUGE-L recall of the greedy answer                                         | 0 … 1 | all     |
| truth          | mean max(0, 1 − R), R the truth ratio                                            | 0 … 1 | all     |
| forget_quality | p-value of the Kolmogorov-Smirnov test: R here against R of the retrained model  | 0 … 1 | forget  |
| model_utility  | harmonic mean of the first three over all utility tasks (with three sets: nine)  | 0 … 1 | utility |

Truth ratio of a question: R = mean over the false answers of P(false)^(1/tokens), divided by P(paraphrased true
answer)^(1/tokens); the answer itself where there is no paraphrase (real authors, world facts). Near 0: the model knows
the truth; about 1 and above: it does not tell it from the false. Forget quality above 0.05: by their R, the unlearned
model cannot be told from one that never saw the forget set. A p-value says nothing when there are few questions.

Prompt and answer: ``Question: …\\nAnswer:`` and ``" " + answer``, the tokens of the answer without an end of text.
Reference: Maini et al., *TOFU*, arXiv 2401.06121, section 2.2. The authors' code takes the geometric mean over the
false answers where the paper's equation has the arithmetic one, which is what is computed here.

Shape legend: I items, F false answers of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from trace_ds.evaluation.items import TofuItem
from trace_ds.evaluation.kinds import cut
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.evaluation.outcome import Outcome, item_logs

KNOWN = ("probability", "rouge_l_recall", "truth")
PROMPT = "Question: {}\nAnswer:"


def truth_ratio(true: float, false_F: np.ndarray) -> float:
    """R of one question.

    Args:
        true: P(paraphrased answer)^(1/tokens), above 0.
        false_F: the same of the false answers.
    """
    return float(np.mean(false_F)) / true


def forget_quality(ratios: Iterable[float], retrained: Iterable[float]) -> float:
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test that both models' R have one distribution."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(list(ratios), list(retrained)).pvalue)


def model_utility(values: Iterable[float]) -> float:
    """The harmonic mean; 0 when one of the values is 0."""
    array = np.array(list(values), dtype=np.float64)
    return float(len(array) / np.sum(1 / array)) if (array > 0).all() else 0.0


def rouge_l_recall(reference: str, text: str) -> float:
    """ROUGE-L recall of the ``rouge-score`` package with stemming, as TOFU's code has it."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, text)["rougeL"].recall)


def evaluate_tofu(
    model: LanguageModel,
    items: list[TofuItem],
    max_new_tokens: int,
    where: str,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Score every question's answers and answer it greedily; ``advance`` counts questions."""
    prompts = [PROMPT.format(item.question) for item in items]
    texts = [[item.answer, item.paraphrase or item.answer, *item.false] for item in items]
    sequences = [
        model.encode_completion(prompt, f" {text}", f"{where} item {item.id}")
        for item, prompt, answers in zip(items, prompts, texts, strict=True)
        for text in answers
    ]
    means = iter([float(np.exp(scores.log_prob.mean(dtype=np.float64))) for scores in model.score(sequences)])
    likely = [[next(means) for _ in answers] for answers in texts]
    ids = [model.encode(prompt) for prompt in prompts]
    for item, prompt_ids in zip(items, ids, strict=True):
        model.check_length(len(prompt_ids) + max_new_tokens, f"{where} item {item.id}")
    continuations = model.continue_greedily(ids, [max_new_tokens] * len(items), advance)
    answers = [cut(text).strip() for text in model.decode(continuations)]
    references = [item.answer for item in items]
    ratios_I = np.array([truth_ratio(each[1], np.array(each[2:])) for each in likely])
    columns = {
        "probability": np.array(
            [
                each[0] if item.paraphrase else each[0] / (each[0] + sum(each[2:]))
                for item, each in zip(items, likely, strict=True)
            ]
        ),
        "rouge_l_recall": np.array([rouge_l_recall(*pair) for pair in zip(references, answers, strict=True)]),
        "truth": np.maximum(0, 1 - ratios_I),
    }
    questions = [item.question for item in items]
    shown = {"prompt": questions, "reference": references, "continuation": answers, "truth_ratio": ratios_I.tolist()}
    logs = item_logs(items, columns, **shown)
    return Outcome(columns, logs, [item.source for item in items])
