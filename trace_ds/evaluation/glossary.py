"""What each metric means, in one line: range, chance, and what to compare it with (the report shows them)."""

from __future__ import annotations

MEANINGS = {
    "accuracy": "share of questions whose right choice has the largest log-probability; 0 … 1, chance 0.25",
    "accuracy_norm": "the same per character of the choice; 0 … 1, chance 0.25",
    "exact_match": "share of questions answered word for word by greedy decoding; 0 … 1, chance 0",
    "acc": "lm-eval's accuracy, zero-shot by letter; 0 … 1, chance 0.25",
    "acc_norm": "lm-eval's accuracy per character of the choice; 0 … 1, chance 0.25",
    "rouge_l": "ROUGE-L F1 of the greedy text against the true one; 0 … 1, compare with a model that never saw it",
    "exact_tokens": "share of tokens of the true continuation that greedy decoding gives; 0 … 1",
    "perplexity": "exp of the mean loss per token; 1 … ∞, lower is better on text to keep, compare with the original",
    "extraction_strength": "share of a text that greedy decoding completes exactly from the shortest beginning; 0 … 1",
    "priv_leak": "MUSE's PrivLeak, %: −100 not unlearned, above 0 over-unlearned; 0, the retrained model, is best",
    "auc_min_k": "Min-40 % attack, AUC of forget against unseen text; 0 … 1, chance 0.5, best: the retrained's",
    "auc_min_k_plus": "Min-40 %++ attack, AUC; 0 … 1, chance 0.5, best: the retrained's",
    "auc_loss": "attack by mean log-probability, AUC; 0 … 1, chance 0.5, best: the retrained's",
    "auc_zlib": "attack by log-probability per compressed byte, AUC; 0 … 1, chance 0.5, best: the retrained's",
}
ATTACKS = {
    "forced": "after sending the questions through other experts (the highest of the ways tried)",
    "relearned": "after a few steps of fine-tuning on a share of the forget text",
}


def meaning(metric: str) -> str | None:
    """One line on a metric of a result; None for one that is not ours."""
    prefix, _, attacked = metric.partition("_")
    if prefix in ATTACKS and attacked in MEANINGS:
        return f"{attacked} {ATTACKS[prefix]}; a model that forgot stays where it was"
    return MEANINGS.get(metric)
