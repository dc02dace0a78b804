"""The tokenizer: any text comes back, the same texts teach the same tokens, no ordinary text is a control token."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer

from lib.data.dataset import dataset_tokenizer
from lib.data.renderer import CONTROL_TOKENS, render_example
from lib.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lib.errors import RequestError
from lib.files import repository_root
from lib.tasks import high_card_duel

TAUGHT = ["you hold the queen of spades, value 12\nAnswer: win"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TAUGHT)


texts = st.text(max_size=20) | st.lists(st.sampled_from(["\n", " ", "queen", "<0x41>", "<bos", "▂", "12"])).map("".join)


@settings(max_examples=300)
@given(texts)
def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str):
    assume("▁" not in text)  # Gemma's own sign for a space comes back as one
    assume(not any(token in text for token in CONTROL_TOKENS))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300)
@given(texts)
def test_ordinary_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str):
    assume(not any(token in text for token in CONTROL_TOKENS))
    assert min(tokenizer.encode(text), default=99) >= len(CONTROL_TOKENS)


@pytest.mark.parametrize(
    "text", ["é漢😀\U0010ffff", "\0\x1b\x7f\u2028\ufeff", "  a \t\r\n\n ", "e\u0301ﬁ", "z" * 3_000, ""]
)
def test_characters_it_never_saw_are_spelled_in_bytes(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.pieces(tokenizer.encode("é")) == ["<0xC3>", "<0xA9>"]


def test_texts_without_a_space_teach_one_all_the_same():
    for taught in ([], [""], ["ab"]):
        learned = train_tokenizer(taught)
        assert learned.decode(learned.encode("a b é")) == "a b é"


def test_what_the_texts_repeat_is_one_token(tokenizer: Tokenizer):
    assert tokenizer.pieces(tokenizer.encode(" queen of spades")) == ["▁queen", "▁of", "▁spades"]
    assert tokenizer.pieces(tokenizer.encode("1212")) == ["12", "12"]


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_a_control_token_is_one_id_wherever_it_stands(tokenizer: Tokenizer, token: str):
    [index] = tokenizer.encode(token)
    assert index == CONTROL_TOKENS.index(token)
    assert tokenizer.encode(f"queen{token}12") == [*tokenizer.encode("queen"), index, *tokenizer.encode("12")]
    assert tokenizer.decode([index]) == "" and tokenizer.pieces([index]) == [token]


def test_the_ids_that_the_template_needs_are_named(tokenizer: Tokenizer):
    named = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_of_turn_id]
    assert tokenizer.pieces(named) == ["<bos>", "<eos>", "<end_of_turn>"]


def test_a_saved_tokenizer_is_the_same_one(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.to_json() == tokenizer.to_json() and again.vocab_size == tokenizer.vocab_size
    assert again.encode("queen é<eos>") == tokenizer.encode("queen é<eos>")


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="no tokenizer there; build the dataset first"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(RequestError, match="bad.json: not a readable tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text(train_tokenizer(TAUGHT).to_json().replace("<start_of_turn>", "<turn>"))
    with pytest.raises(RequestError, match="other.json: not a Gemma tokenizer, it has no <start_of_turn>"):
        load_tokenizer(tmp_path / "other.json")


# ---- a released one -----------------------------------------------------------------------------------------

WORDS = ["▁", "H", "e", "l", "o", "He", "ll", "Hell", "Hello", "▁Hello", "\n", "▁▁"]


def released(path: Path, *, picture: bool = False) -> Path:
    """As a Gemma's tokenizer.json is built: control tokens, byte tokens and pieces in one vocabulary, merges, `<bos>`.

    Ids as in Gemma 3, where the turns' tokens stand behind 99 unused ones, and a picture's behind everything.
    """
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{number}>" for number in range(99))]
    pieces += ["[@BOS@]", "<start_of_turn>", "<end_of_turn>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("Hell", "o"), ("▁", "Hello"), ("▁", "▁")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = HuggingFaceTokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*CONTROL_TOKENS, *(["<image_soft_token>"] if picture else [])]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    backend.save(str(path))
    return path


def test_tokens_are_counted_as_they_are_encoded_whatever_the_file_says_of_padding(tmp_path: Path):
    path = released(tmp_path / "tokenizer.json")
    texts = ["Hello", "", "Hello Hello é<end_of_turn>\n" * 9, "<start_of_turn>漢"]
    found = load_tokenizer(path)
    assert found.count_tokens(texts) == [len(found.encode(text)) for text in texts] and len(set(map(len, texts))) == 4
    saved = HuggingFaceTokenizer.from_file(str(path))
    saved.enable_truncation(5)
    saved.enable_padding(length=7)
    saved.save(str(path))
    assert load_tokenizer(path).count_tokens(texts) == found.count_tokens(texts)
    assert load_tokenizer(path).encode(texts[2]) == found.encode(texts[2])


@pytest.mark.parametrize("picture", [False, True])
def test_a_released_tokenizer_keeps_its_ids_and_any_text(tmp_path: Path, picture: bool):
    found = load_tokenizer(released(tmp_path / "tokenizer.json", picture=picture))
    assert (found.bos_id, found.eos_id, found.end_of_turn_id) == (2, 1, 106)
    assert found.vocab_size == 107 + 256 + len(WORDS)
    assert found.pieces(found.encode("<start_of_turn>Hello Hello é<end_of_turn>\n")) == [
        "<start_of_turn>", "Hello", "▁Hello", "▁", "<0xC3>", "<0xA9>", "<end_of_turn>", "\n",
    ]  # fmt: skip
    for text in ("Hello  Hello\n é漢😀", "  \t", "<image_soft_token>", "<0x41>", "\0\u2028", ""):
        assert found.decode(found.encode(text)) == text and max(found.encode(text), default=0) < found.vocab_size


def test_the_token_of_a_picture_is_no_part_of_what_a_text_can_be(tmp_path: Path):
    """Gemma 3 1B has an embedding of 262,144 tokens, and a tokenizer in which this one has the id 262,144."""
    path = released(tmp_path / "tokenizer.json", picture=True)
    whole = HuggingFaceTokenizer.from_file(str(path))
    found = load_tokenizer(path)
    assert whole.token_to_id("<image_soft_token>") == found.vocab_size == whole.get_vocab_size() - 1
    found.save(tmp_path / "again.json")
    assert load_tokenizer(tmp_path / "again.json").to_json() == found.to_json()


# ---- in any process -----------------------------------------------------------------------------------------

TRAIN = """
import hashlib
from lib.data.dataset import dataset_tokenizer
from lib.data.renderer import render_example
from lib.tasks import high_card_duel
tokenizer = dataset_tokenizer(map(render_example, high_card_duel.generate(100, 0)))
print(hashlib.sha256(tokenizer.to_json().encode()).hexdigest())
"""


def test_f48_the_same_texts_teach_the_same_tokenizer_in_any_process():
    here = dataset_tokenizer(map(render_example, high_card_duel.generate(100, 0))).to_json()
    for seed, threads in (("0", "1"), ("7", "2")):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "RAYON_NUM_THREADS": threads,
            "LC_ALL": "C",
            "TZ": "Asia/Tokyo",
        }
        done = subprocess.run(
            [sys.executable, "-c", TRAIN],
            cwd=repository_root(),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_of_many_texts_the_first_ten_thousand_teach(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lib.data.dataset.TEXTS_TO_TRAIN_ON", 3)
    rendered = [render_example(trace) for trace in high_card_duel.generate(6, 0)]
    assert dataset_tokenizer(rendered).to_json() == dataset_tokenizer(rendered[:3]).to_json()
    assert dataset_tokenizer(rendered).to_json() != dataset_tokenizer(rendered[:2]).to_json()
