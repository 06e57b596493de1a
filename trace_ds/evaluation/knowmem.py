"""Knowledge memorisation (KnowMem of MUSE): does the model answer questions about the text?

Higher means more known: bad for the forget side, good for the retain side. A model that never saw the text guesses some
words, so compare with one (``gold``). The prompt holds ten solved questions (``examples``) and then the question::

    Question: …\\nAnswer: …\\n\\n  (ten times)  Question: …\\nAnswer:␣

and the answer ends before the first empty line or the next "Question". Reference: Shi et al., *MUSE*, arXiv 2407.06460,
section 3.1, and its authors' code (``knowmem``): ``rouge-score`` without stemming, F-measure. Answers of published
data may be lists of accepted texts; here the best one counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trace_ds.evaluation.items import QuestionItem
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.evaluation.outcome import Outcome, item_logs
from trace_ds.evaluation.verbatim import rouge_l

NEW_TOKENS = 32
EXAMPLES = 10
ENDS = ("\n\n", "\nQuestion", "Question:")


def prompt_of(question: str, examples: list[QuestionItem]) -> str:
    """The few-shot prompt of one question; a model's tokenizer sees it with its own special tokens."""
    shots = "".join(f"Question: {item.question}\nAnswer: {item.answers[0]}\n\n" for item in examples[:EXAMPLES])
    return f"{shots}Question: {question}\nAnswer: "


def cut(text: str) -> str:
    """The answer proper: what comes before the model goes on to another question."""
    for end in ENDS:
        text = text.split(end)[0]
    return text


def evaluate_knowmem(
    model: LanguageModel,
    items: list[QuestionItem],
    examples: list[QuestionItem],
    where: str,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Answer every question greedily; ``advance`` counts items."""
    prompts = [model.encode(prompt_of(item.question, examples)) for item in items]
    for item, ids in zip(items, prompts, strict=True):
        model.check_length(len(ids) + NEW_TOKENS, f"{where} item {item.id}")
    continuations = model.continue_greedily(prompts, [NEW_TOKENS] * len(items), advance)
    answers = [cut(str(model.tokenizer.decode(ids, skip_special_tokens=True))) for ids in continuations]
    pairs = zip(items, answers, strict=True)
    columns = {"rouge_l": np.array([max(rouge_l(answer, found) for answer in item.answers) for item, found in pairs])}
    questions, references = [item.question for item in items], [item.answers[0] for item in items]
    logs = item_logs(items, columns, prompt=questions, reference=references, continuation=answers)
    return Outcome(columns, logs, [item.source for item in items])
