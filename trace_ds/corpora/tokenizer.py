"""The tokenizer of a run: loading without remote code, and a fingerprint of its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trace_ds.errors import UserError
from trace_ds.run.files import canonical_json, sha256_file, sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)


def tokenizer_fingerprint(path: str | Path) -> str:
    """SHA-256 over the files that define how text becomes tokens; :class:`UserError` when there are none."""
    directory = Path(path)
    found = {name: sha256_file(directory / name) for name in TOKENIZER_FILES if (directory / name).is_file()}
    if not found:
        raise UserError(
            "there is no tokenizer here (tokenizer.json or tokenizer.model)", str(path), "set model.tokenizer"
        )
    return sha256_text(canonical_json(found))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory; never executes code that ships with it."""
    from transformers import AutoTokenizer

    tokenizer_fingerprint(path)  # a clear error when there is none
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the tokenizer cannot be loaded ({reason})", str(path), "set model.tokenizer") from None


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id used to fill rows of a batch; any valid id does, since filled positions are never counted."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    return 0
