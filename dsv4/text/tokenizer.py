"""Byte-level BPE with control tokens kept apart from text (the only file that imports `tokenizers`).

A control token (`<｜User｜>`, `<think>`, `｜DSML｜` ...) is an id, never a spelling: `encode` tokenises with the added
vocabulary removed, so a user who types `<｜User｜>` gets ordinary pieces. Encoding a rendered prompt in one pass would
let user text open a turn of its own. The prompt codec inserts control tokens by id, from `Tokenizer.special`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM = ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
CHAT = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>"]
TASKS = ["<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>"]
CONTROL = [*FIM, *CHAT, *TASKS, "<｜extracted_url｜>", "<｜read_url｜>"]
"""Control tokens of a tokenizer trained here, besides BOS, EOS and pad, in the order of the official ids."""

DIGITS = {"single": r"\p{N}", "triples": r"\p{N}{1,3}"}
KANA_AND_HAN = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


class Tokenizer:
    """A `tokenizer.json` (the official file or one of ours), given as its JSON text.

    special     control tokens: text -> id. Every added token of the file counts as one.
    vocab_size  rows an embedding needs: highest id + 1.
    """

    def __init__(self, text: str) -> None:
        data = json.loads(text)
        if data.get("model", {}).get("type") != "BPE" or "added_tokens" not in data:
            raise ValueError("not a byte-level BPE tokenizer.json: it needs model.type 'BPE' and added_tokens")
        self._text = text
        self.special: dict[str, int] = {token["content"]: token["id"] for token in data["added_tokens"]}
        missing = [token for token in (BOS, EOS) if token not in self.special]
        if missing:
            raise ValueError(f"tokenizer.json lacks the control tokens {missing}")
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps(data | {"added_tokens": [], "post_processor": None}))
        byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
        self._bytes = {id: token.encode() for token, id in self.special.items()}
        for token, id in data["model"]["vocab"].items():
            self._bytes.setdefault(id, bytes(byte_of[character] for character in token if character in byte_of))
        self._control_ids = frozenset(self.special.values())
        self._control = re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))))
        self.vocab_size = max(self._bytes) + 1
        self.bos_id, self.eos_id = self.special[BOS], self.special[EOS]
        self.pad_id = self.special.get(PAD, self.eos_id)

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Ids of `text`. With `control`, spellings of control tokens become their ids: for trusted text only."""
        if not control:
            return self._bpe.encode(_valid(text)).ids
        ids: list[int] = []
        start = 0
        for match in self._control.finditer(text):
            ids += self.encode(text[start : match.start()])
            ids.append(self.special[match.group()])
            start = match.end()
        return ids + self.encode(text[start:])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, in parallel."""
        return [encoding.ids for encoding in self._bpe.encode_batch([_valid(text) for text in texts])]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves control tokens out."""
        return b"".join(self.token_bytes(id, skip_special) for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int, skip_special: bool = False) -> bytes:
        """The bytes one id stands for (part of a character, often). Ids without a token give nothing."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} outside the vocabulary of {self.vocab_size}")
        return b"" if skip_special and id in self._control_ids else self._bytes.get(id, b"")

    def stream_decoder(self, skip_special: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (readable by transformers) into an existing folder."""
        token = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        config: dict[str, Any] = {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": token | {"content": BOS},
            "eos_token": token | {"content": EOS},
            "pad_token": token | {"content": PAD if PAD in self.special else EOS},
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1048576,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        Path(folder, "tokenizer.json").write_text(self._text, encoding="utf-8")
        text = json.dumps(config, ensure_ascii=False, indent=2)
        Path(folder, "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


class StreamDecoder:
    """Joins the bytes of ids until they make whole characters, so that no piece ends inside one."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that `id` completes; "" while one is still open."""
        return self._decoder.decode(self._tokenizer.token_bytes(id, self._skip))

    def flush(self) -> str:
        """At the end of the text: U+FFFD if the last character never became whole."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a model folder or a tokenizer.json."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no tokenizer at {file}")
    try:
        return Tokenizer(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, digits: Literal["single", "triples"] = "single", progress: bool = False
) -> Tokenizer:
    """Byte-level BPE over `texts` with the official splits, BOS 0, EOS 1, pad 2 and the other control tokens last.

    `digits="triples"` is the official split of numbers; "single" makes every digit a token, which small models need
    for arithmetic. Text too small to fill `vocab_size` leaves placeholder tokens, so that the size is always met.
    """
    least = 3 + 256 + len(CONTROL)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is below {least}: 256 bytes and {3 + len(CONTROL)} control tokens")
    if digits not in DIGITS:
        raise ValueError(f"digits {digits!r} is none of {list(DIGITS)}")
    bpe = tokenizers.Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in (DIGITS[digits], KANA_AND_HAN, WORDS)
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    bpe.train_from_iterator(texts, trainer)
    data = json.loads(bpe.to_str())
    learned = len(data["model"]["vocab"])
    blanks = [f"<｜place▁holder▁no▁{n}｜>" for n in range(vocab_size - len(CONTROL) - learned)]
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"] = [
        {"id": id, "content": content, **shared, "special": id < 3}
        for id, content in [*enumerate((BOS, EOS, PAD)), *enumerate([*blanks, *CONTROL], start=learned)]
    ]
    return Tokenizer(json.dumps(data, ensure_ascii=False))


def _valid(text: str) -> str:
    """JSON can carry lone surrogates, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode() if re.search("[\ud800-\udfff]", text) else text


def _byte_alphabet() -> Iterator[str]:
    """The printable character that byte-level BPE writes for each byte 0..255 (GPT-2's table)."""
    spare = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte:
            yield chr(byte)
        else:
            yield chr(spare)
            spare += 1
