"""Loading models and scoring tokens: the layer every metric stands on. Also builds the models of the other files."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trace_ds.errors import UserError
from trace_ds.evaluation.language_model import (
    LanguageModel,
    ModelSettings,
    Sequence,
    open_language_model,
)

WORDS = [f"w{number}" for number in range(60)]
SETTINGS = ModelSettings("fp32", add_bos=True, add_eos=True, batch_rows=4)


def save_tokenizer(path: Path, words: list[str] = WORDS) -> Any:
    """A word-level tokenizer with <s> (0), </s> (1), <unk> (2) and the words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(path)
    return tokenizer


def save_model(path: Path, seed: int = 0, words: list[str] = WORDS, dtype: torch.dtype = torch.float32) -> Path:
    """A random Mixtral with two MoE layers of four experts, top-2, sharp enough to have opinions."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=len(words) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    model: Any = MixtralForCausalLM(config)
    model.to(dtype).save_pretrained(path)
    save_tokenizer(path, words)
    return path


def opened(path: Path, settings: ModelSettings = SETTINGS) -> Any:
    """The model in a directory, loaded with its own tokenizer."""
    from transformers import AutoTokenizer

    return open_language_model(str(path), AutoTokenizer.from_pretrained(path), settings)


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """``change`` the tensors of a model directory in place."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with opened(save_model(tmp_path_factory.mktemp("model"))) as language_model:
        yield language_model


def random_sequences(count: int, seed: int = 0) -> list[Sequence]:
    generator = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        size = int(generator.integers(2, 30))
        ids = (0, *generator.integers(3, 63, size).tolist())
        sequences.append(Sequence(tuple(int(i) for i in ids), int(generator.integers(1, len(ids)))))
    return sequences


def test_scores_equal_a_float64_reference(model: LanguageModel) -> None:
    """Each sequence alone through the model, log-softmax in float64; in any order and any size of batches, and a rerun
    gives the same bits."""
    sequences = random_sequences(25)
    advanced: list[int] = []
    results = model.score(sequences, advanced.append)
    assert sum(advanced) == 25
    for sequence, scores in zip(sequences, results, strict=True):
        with torch.no_grad():
            logits = model.model(torch.tensor([sequence.ids]), use_cache=False).logits[0].double()
        log_prob_SV = torch.log_softmax(logits, -1)[sequence.first - 1 : -1]
        target_S = torch.tensor(sequence.ids[sequence.first :])
        assert np.allclose(scores.log_prob, log_prob_SV.gather(1, target_S[:, None])[:, 0], atol=1e-5)
        assert scores.is_argmax.tolist() == (log_prob_SV.argmax(-1) == target_S).tolist()
    again = model.score(sequences)
    assert all(a.log_prob.tobytes() == b.log_prob.tobytes() for a, b in zip(results, again, strict=True))
    for rows in (1, 40):
        other = LanguageModel(model.model, model.tokenizer, dataclasses.replace(model.settings, batch_rows=rows))
        for ours, expected in zip(other.score(sequences), results, strict=True):
            assert np.abs(ours.log_prob - expected.log_prob).max() < 1e-5
            assert ours.is_argmax.tolist() == expected.is_argmax.tolist()


def test_what_sequences_share_is_computed_once(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions after the same examples, with choices of one, two and three tokens; the scores of each alone."""
    examples, choices = tuple(range(20, 40)), [(10,), (11,), (12, 13, 14), (12, 15), (16, 13, 14)]
    questions = [(0, *examples, 9, 8, 7), (0, *examples, 9, 5)]
    sequences = [Sequence(question + choice, len(question)) for question in questions for choice in choices]
    inputs: list[tuple[int, ...]] = []
    forward = model.model.forward

    def counted(**arguments: Any) -> Any:
        inputs.append(tuple(arguments["input_ids"].shape))
        return forward(**arguments)

    monkeypatch.setattr(model.model, "forward", counted)
    together = model.score(sequences)
    prefixes = {sequence.ids[:end] for sequence in sequences for end in range(1, len(sequence.ids))}
    assert inputs == [(1, len(prefixes))]
    for sequence, ours in zip(sequences, together, strict=True):
        alone = model.score([sequence])[0]
        assert ours.is_argmax.tolist() == alone.is_argmax.tolist()
        np.testing.assert_allclose(ours.log_prob, alone.log_prob, atol=1e-5)


def test_transformers_own_attention_scores_alike(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = random_sequences(25)
    expected = model.score(sequences)
    monkeypatch.setattr(model.model.config, "_attn_implementation", "sdpa")
    for ours, theirs in zip(model.score(sequences), expected, strict=True):
        np.testing.assert_allclose(ours.log_prob, theirs.log_prob, atol=1e-5)


@pytest.mark.parametrize("eos", [1, None])
def test_greedy_continuation_equals_one_by_one_without_a_cache(model: LanguageModel, eos: int | None) -> None:
    """Cut before EOS: the tokenizer's, and a word that the model does generate."""
    generator = np.random.default_rng(4)
    prompts = [[0, *generator.integers(3, 63, size).tolist()] for size in (2, 9, 5, 5, 14, 3)]
    lengths = [6, 12, 1, 12, 9, 4]
    if eos is None:
        eos = model.continue_greedily(prompts[1:2], [3])[0][2]
        tokenizer = copy.deepcopy(model.tokenizer)
        tokenizer.eos_token = WORDS[eos - 3]
        model = LanguageModel(model.model, tokenizer, model.settings)
    continuations = model.continue_greedily(prompts, lengths)
    for prompt, length, continuation in zip(prompts, lengths, continuations, strict=True):
        ids = list(prompt)
        while len(ids) - len(prompt) < length:
            with torch.no_grad():
                token = int(model.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == eos:
                break
            ids.append(token)
        assert continuation == ids[len(prompt) :]
    if eos != 1:
        assert len(continuations[1]) <= 2


def test_generation_settings_of_the_directory_are_ignored(tmp_path: Path) -> None:
    """A model that ships sampling or repetition penalties is still continued greedily."""
    path = save_model(tmp_path / "model")
    plain: list[list[int]] = []
    penalised: list[list[int]] = []
    for results in (plain, penalised):
        with opened(path) as model:
            results += model.continue_greedily([[0, 7, 8, 9]], [20])
        (path / "generation_config.json").write_text(
            json.dumps({"repetition_penalty": 5.0, "do_sample": True, "temperature": 2.0, "min_new_tokens": 3})
        )
    assert plain == penalised


def test_a_token_across_the_boundary_is_scored() -> None:
    """Byte-pair tokens may merge over the cut; the merged token was not known from the prompt."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), bos_token="<s>"
    )

    class Stub:
        class config:
            max_position_embeddings = 10

    model = LanguageModel(Stub(), tokenizer, SETTINGS)
    assert model.encode_completion("ca", "bc", "here") == Sequence((0, 4, 3, 4), 2)


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    tokenizer = save_tokenizer(tmp_path / "other", [*WORDS, "more"])
    with (
        pytest.raises(UserError, match="64 tokens and the model 63"),
        open_language_model(str(path), tokenizer, SETTINGS),
    ):
        pass
