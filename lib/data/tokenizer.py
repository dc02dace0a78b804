"""Text to token ids and back: the small tokenizer that a dataset trains for itself, or a released one.

The small one is byte-pair encoding in Gemma's dress: its control tokens, `▁` for a space, and 256 byte
tokens for whatever it never saw, so that any text survives a round trip (but for `▁` itself, which comes
back as a space). Words and numbers of one or two digits that the dataset repeats become one token each:

    >>> tokenizer = train_tokenizer(["you hold the queen of spades, value 12"] * 5)
    >>> tokenizer.pieces(tokenizer.encode(" queen of spades"))
    ['▁queen', '▁of', '▁spades']

Format: the `tokenizer.json` of Hugging Face tokenizers, which every Gemma release carries too.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from lib.data.renderer import CONTROL_TOKENS
from lib.errors import RequestError
from lib.files import atomic_write

VOCAB_SIZE = 768
TEXTS_TO_TRAIN_ON = 10_000

# An added token of every Gemma 3 tokenizer, in the place of a picture. The embedding of the models that only read
# ends right before it, and a text that spells it means the characters.
PICTURE_TOKEN = "<image_soft_token>"

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_WORDS = Regex(r"▁?\p{L}+|▁?\p{N}{1,2}|\n|▁+|[^\s▁\p{L}\p{N}]+|\s")


class Tokenizer:
    """Token ids of text, and the ids of the control tokens that the chat template needs."""

    def __init__(self, backend: HuggingFaceTokenizer, origin: str):
        self._backend = backend
        ids = {token: backend.token_to_id(token) for token in CONTROL_TOKENS}
        missing = [token for token, index in ids.items() if index is None]
        if missing:
            raise RequestError(f"{origin}: not a Gemma tokenizer, it has no {', '.join(missing)}")
        self.vocab_size = 1 + max(backend.get_vocab().values())  # what an embedding needs, whatever gaps there are
        self.pad_id, self.bos_id, self.eos_id = ids["<pad>"], ids["<bos>"], ids["<eos>"]
        self.end_of_turn_id = ids["<end_of_turn>"]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a control token written in it becomes its id. No `<bos>` is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def count_tokens(self, texts: list[str]) -> list[int]:
        """How many ids `encode` gives each text; on all cores."""
        return [len(found) for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, without the control tokens in it."""
        return self._backend.decode(tokens, skip_special_tokens=True)

    def pieces(self, tokens: list[int]) -> list[str]:
        """Each token as the vocabulary spells it, for looking at."""
        return [self._backend.id_to_token(token) or f"<{token}>" for token in tokens]

    def to_json(self) -> str:
        return self._backend.to_str(pretty=True)

    def save(self, path: Path) -> None:
        atomic_write(path, self.to_json())


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`. Raises RequestError where it is missing or not Gemma's kind."""
    if not path.is_file():
        raise RequestError(
            f"{path}: no tokenizer there; build the dataset first (python -m lib dataset build), "
            "or fetch the released model again"
        )
    try:
        backend = _without_pictures(HuggingFaceTokenizer.from_file(str(path)))
        backend.no_truncation()  # as some are saved with: a text would end early and nobody be told
        backend.no_padding()
    except Exception as error:  # the library raises bare Exception
        raise RequestError(f"{path}: not a readable tokenizer.json ({error})") from None
    return Tokenizer(backend, str(path))


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-pair tokenizer of at most `vocab_size` tokens, or as many as the texts have different characters.

    The same texts give the same tokenizer.
    """
    special = [*CONTROL_TOKENS, *_BYTES]
    learner = _gemma_like(models.BPE())
    options = {"initial_alphabet": ["▁"], "show_progress": False}  # ▁: or texts without a space could teach none
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, **options)
    learner.train_from_iterator(texts, trainer)
    tokenizer = _gemma_like(_with_byte_fallback(learner))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return Tokenizer(tokenizer, "the tokenizer just trained")


def _without_pictures(tokenizer: HuggingFaceTokenizer) -> HuggingFaceTokenizer:
    if tokenizer.token_to_id(PICTURE_TOKEN) is None:
        return tokenizer
    about = json.loads(tokenizer.to_str())
    about["added_tokens"] = [token for token in about["added_tokens"] if token["content"] != PICTURE_TOKEN]
    about["model"]["vocab"].pop(PICTURE_TOKEN, None)
    return HuggingFaceTokenizer.from_str(json.dumps(about))


def _gemma_like(model: models.BPE) -> HuggingFaceTokenizer:
    tokenizer = HuggingFaceTokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_WORDS, behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _with_byte_fallback(learner: HuggingFaceTokenizer) -> models.BPE:
    """The learned vocabulary with byte fallback on; the byte tokens are plain entries, never matched in text."""
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True)
