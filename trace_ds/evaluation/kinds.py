"""The kinds of tasks whose scores are those of one model; TOFU and membership: ``retrained.py``.

| type       | asks                                                                        | more of it means |
|------------|-----------------------------------------------------------------------------|------------------|
| choice     | four-choice questions by the log-likelihood of the completions (WMDP, MMLU) | more known       |
| verbatim   | does the model continue a passage word for word (VerbMem of MUSE)?          | more memorised   |
| knowmem    | does it answer questions about the text (KnowMem of MUSE)?                  | more known       |
| perplexity | how surprised is it by running text?                                        | less known       |

More known is bad for forget tasks and good for utility tasks. A model that never saw a text guesses some of its words,
so compare with one (``gold``). Greedy decoding gives a text exactly if and only if every one of its tokens is the
argmax given the true tokens before it, so exact_match needs one forward pass and no generation. MUSE: Shi
et al., arXiv 2407.06460, section 3, and its authors' code: greedy, ``rouge-score`` without stemming, F-measure.

Shape legend: I items, C choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trace_ds.corpora.read import Document
from trace_ds.errors import UserError
from trace_ds.evaluation.items import CHOICES, ChoiceItem, QuestionItem, VerbatimItem, beginning
from trace_ds.evaluation.language_model import LanguageModel, OnProgress, Sequence
from trace_ds.models.attention import common_prefix_length

NEW_TOKENS, KNOWMEM_EXAMPLES = 32, 10  # of knowmem: tokens of an answer, solved questions in the prompt
ENDS = ("\n\n", "\nQuestion", "Question:")


@dataclass(frozen=True)
class Outcome:
    """Scores of the items of a task.

    Attributes:
        columns: float64 [I] by name; the metrics are their means.
        logs: one JSON-ready record per item.
        sources: of each item; empty: there are no scores by source.
    """

    columns: dict[str, np.ndarray]
    logs: list[dict[str, Any]]
    sources: list[str] = field(default_factory=list)

    def metrics(self, chosen_I: np.ndarray | None = None) -> dict[str, float]:
        """Over all items, or over those of a bool mask [I]."""
        return {name: float(np.mean(self.chosen(name, chosen_I))) for name in self.columns}

    def count(self, chosen_I: np.ndarray | None = None) -> int:
        """How many items the metrics are made of."""
        return len(self.chosen(next(iter(self.columns)), chosen_I))

    def chosen(self, name: str, chosen_I: np.ndarray | None) -> np.ndarray:
        """A column at the items of a mask (None: all)."""
        return self.columns[name] if chosen_I is None else self.columns[name][chosen_I]

    def by_source(self) -> dict[str, dict[str, float]]:
        """The count and the finite metrics of each source that has any, sorted by name."""
        sources_I, by_name = np.array(self.sources), {}
        for source in map(str, np.unique(sources_I)):
            chosen_I = sources_I == source
            if n := self.count(chosen_I):
                metrics = {name: value for name, value in self.metrics(chosen_I).items() if math.isfinite(value)}
                by_name[source] = {"n": n, **metrics}
        return by_name


def rounded(value: Any) -> float:
    """A score as it stands in a log."""
    return round(float(value), 6)


def item_logs(items: SequenceOf[Any], columns: dict[str, np.ndarray], **texts: SequenceOf[Any]) -> list[dict[str, Any]]:
    """A record for each item: its id and source, its own of ``texts``, and its scores."""
    scores = {name: list(map(rounded, values_I)) for name, values_I in columns.items()}
    keys = {"id": [item.id for item in items], "source": [item.source for item in items], **texts, **scores}
    return [dict(zip(keys, row, strict=True)) for row in zip(*keys.values(), strict=True)]


def evaluate_choice(
    model: LanguageModel, items: list[ChoiceItem], where: str, progress: OnProgress | None = None
) -> Outcome:
    """Score all choices of all items; ``progress`` counts completions. Ties go to the first choice.

    Scored is ``prompt + " " + choice``, with a BOS token before it where ``data.add_bos`` puts one before the documents
    of the run. The harness leaves that to the tokenizer: where the two differ, its numbers are those of another text,
    which a model can find harder. Where texts begin alike, accuracy and accuracy_norm are its ``acc`` and ``acc_norm``
    (multiple_choice). accuracy sits at a ceiling long before exact_match does, the stricter one; choice_probability
    does not: softmax over the choices of their log-probabilities (our decision: summed over tokens, as accuracy
    compares them).
    """
    from scipy.special import softmax

    sequences = [
        model.encode_completion(item.prompt, " " + choice, f"{where} item {item.id}")
        for item in items
        for choice in item.choices
    ]
    scores = model.score(sequences, progress)
    log_prob_IC = np.array([score.log_prob.sum(dtype=np.float64) for score in scores]).reshape(-1, CHOICES)
    characters_IC = np.array([[len(choice) for choice in item.choices] for item in items], dtype=np.float64)
    exact_IC = np.array([bool(score.is_argmax.all()) for score in scores]).reshape(-1, CHOICES)
    answer_I = np.array([item.answer for item in items])
    predicted_I, predicted_norm_I = log_prob_IC.argmax(1), (log_prob_IC / characters_IC).argmax(1)
    exact_I = exact_IC[np.arange(len(items)), answer_I]
    logs = item_logs(
        items,
        {},
        prompt=[item.prompt for item in items],
        choices=[list(item.choices) for item in items],
        answer=answer_I.tolist(),
        predicted=predicted_I.tolist(),
        predicted_norm=predicted_norm_I.tolist(),
        correct=(predicted_I == answer_I).tolist(),
        exact=exact_I.tolist(),
        log_prob=[[rounded(value) for value in row_C] for row_C in log_prob_IC],
    )
    columns = {
        "accuracy": predicted_I == answer_I,
        "accuracy_norm": predicted_norm_I == answer_I,
        "exact_match": exact_I,
        "choice_probability": softmax(log_prob_IC, axis=1)[np.arange(len(items)), answer_I],
    }
    return Outcome(columns, logs, [item.source for item in items])


def rouge_l(reference: str, continuation: str) -> float:
    """ROUGE-L F1 of the ``rouge-score`` package without stemming (longest common subsequence of words). It keeps only
    the letters a-z and digits: a passage without any scores 0."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=False).score(reference, continuation)["rougeL"].fmeasure)


def exact_tokens(reference: list[int], continuation: list[int]) -> float:
    """Share of the reference's positions at which ``continuation`` has the same token."""
    return sum(a == b for a, b in zip(reference, continuation, strict=False)) / len(reference)


def boundary(prompt: str, continuation: str) -> tuple[str, str]:
    """The passage cut where tokens do not straddle: white space between the two belongs to the continuation."""
    joined = prompt if prompt[-1:].isspace() or continuation[:1].isspace() else prompt + " "
    stripped = joined.rstrip()
    return stripped, joined[len(stripped) :] + continuation


def evaluate_verbatim(
    model: LanguageModel,
    items: list[VerbatimItem],
    max_new_tokens: int,
    where: str,
    progress: OnProgress | None = None,
) -> Outcome:
    """Continue every prompt greedily and compare; ``progress`` counts items.

    MUSE cuts the true continuation to 128 tokens. Our decision: the model's is also cut to the length of a true one
    that is *shorter* than ``max_new_tokens``, so that perfect recall scores 1; with longer ones nothing differs.
    """
    prompts, references = [], []
    for item in items:
        prompt, continuation = boundary(item.prompt, item.continuation)
        ids, passage = model.encode(prompt), model.encode(prompt + continuation)
        # as in encode_completion; a token that spans the boundary belongs to the reference
        shared = max(min(common_prefix_length(passage, ids), len(passage) - 1), 0)
        prompts.append(passage[:shared] if shared else ids)
        references.append(passage[shared : shared + max_new_tokens])
        model.check_length(len(prompts[-1]) + len(references[-1]), f"{where} item {item.id}")
    pairs = zip(prompts, references, strict=True)
    scores = model.score([Sequence((*prompt, *reference), len(prompt)) for prompt, reference in pairs])
    continuations = model.continue_greedily(prompts, [len(reference) for reference in references], progress)
    reference_texts, texts = model.decode(references), model.decode(continuations)
    columns = {
        "rouge_l": np.array([rouge_l(*pair) for pair in zip(reference_texts, texts, strict=True)]),
        "exact_tokens": np.array([exact_tokens(*pair) for pair in zip(references, continuations, strict=True)]),
        "token_probability": np.array([np.exp(score.log_prob).mean(dtype=np.float64) for score in scores]),
    }
    beginnings = [item.prompt for item in items]
    logs = item_logs(items, columns, prompt=beginnings, reference=reference_texts, continuation=texts)
    return Outcome(columns, logs, [item.source for item in items])


def prompt_of(question: str, examples: list[QuestionItem]) -> str:
    """The few-shot prompt of one question; a model's tokenizer sees it with its own special tokens."""
    shots = "".join(f"Question: {item.question}\nAnswer: {item.answers[0]}\n\n" for item in examples[:KNOWMEM_EXAMPLES])
    return f"{shots}Question: {question}\nAnswer: "


def cut_answer(text: str) -> str:
    """The answer proper: what comes before the model goes on to another question."""
    for end in ENDS:
        text = text.split(end)[0]
    return text


def evaluate_knowmem(
    model: LanguageModel,
    items: list[QuestionItem],
    examples: list[QuestionItem],
    where: str,
    progress: OnProgress | None = None,
) -> Outcome:
    """Answer every question greedily; ``progress`` counts items. Of a list of accepted answers the best one counts."""
    prompts = [model.encode(prompt_of(item.question, examples)) for item in items]
    for item, ids in zip(items, prompts, strict=True):
        model.check_length(len(ids) + NEW_TOKENS, f"{where} item {item.id}")
    answers = list(map(cut_answer, model.decode(model.continue_greedily(prompts, [NEW_TOKENS] * len(items), progress))))
    pairs = zip(items, answers, strict=True)
    columns = {"rouge_l": np.array([max(rouge_l(answer, given) for answer in item.answers) for item, given in pairs])}
    questions, references = [item.question for item in items], [item.answers[0] for item in items]
    logs = item_logs(items, columns, prompt=questions, reference=references, continuation=answers)
    return Outcome(columns, logs, [item.source for item in items])


@dataclass(frozen=True)
class PerplexityOutcome(Outcome):
    """Its columns, by document: ``nll``, summed (float64, nats), and ``tokens``, counted."""

    def metrics(self, chosen_I: np.ndarray | None = None) -> dict[str, float]:
        """exp(Σ NLL / counted tokens) over all documents or those of a mask (never a mean of means), infinite on
        overflow; a uniform guess scores the vocabulary's size. Comparable only between models with one tokenizer."""
        try:
            return {"perplexity": math.exp(float(self.chosen("nll", chosen_I).sum()) / self.count(chosen_I))}
        except OverflowError:
            return {"perplexity": math.inf}

    def count(self, chosen_I: np.ndarray | None = None) -> int:
        """Counted tokens."""
        return int(self.chosen("tokens", chosen_I).sum())


def windows(ids: list[int], context_length: int) -> list[Sequence]:
    """Cut a document into windows that share one token: every token but the first is scored exactly once (the "disjoint
    windows" of ``loglikelihood_rolling`` in lm-evaluation-harness)."""
    return [
        Sequence(tuple(ids[start : start + context_length]), 1) for start in range(0, len(ids) - 1, context_length - 1)
    ]


def evaluate_perplexity(
    model: LanguageModel, documents: list[Document], context_length: int, where: str, progress: OnProgress | None = None
) -> Outcome:
    """Score every document, with BOS and EOS as the run adds them; ``progress`` counts documents.

    Raises:
        UserError: no document has two tokens.
    """
    limit = model.max_tokens(context_length)
    cuts = [windows(model.encode_document(document.text), limit) for document in documents]
    if not any(cuts):
        raise UserError("no document has two tokens", where, "a perplexity of nothing: add text")
    scores = iter(model.score([window for group in cuts for window in group]))
    if progress is not None:
        progress(len(documents))
    logs, nll, tokens = [], [], []
    for number, (document, group) in enumerate(zip(documents, cuts, strict=True)):
        mine = [next(scores) for _ in group]
        nll.append(-math.fsum(float(score.log_prob.sum(dtype=np.float64)) for score in mine))
        tokens.append(sum(len(score.log_prob) for score in mine))
        log = {"id": str(number), "source": document.source, "text": beginning(document.text)}
        logs.append(log | {"nll": rounded(nll[-1]), "tokens": tokens[-1]})
    columns = {"nll": np.array(nll, dtype=np.float64), "tokens": np.array(tokens, dtype=np.int64)}
    return PerplexityOutcome(columns, logs, [document.source for document in documents])
