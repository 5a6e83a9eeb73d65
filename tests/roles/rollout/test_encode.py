"""Special tokens that a tokenizer adds by itself, of several families' post-processors."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from async_opd.roles.rollout.encode import Encoder

BOS, EOS = ("<s>", 0), ("</s>", 1)
FAMILIES = {
    "nothing": None,
    "begin (Llama, Gemma)": processors.TemplateProcessing(single="<s> $A", special_tokens=[BOS]),
    "end (add_eos_token)": processors.TemplateProcessing(single="$A </s>", special_tokens=[EOS]),
    "both": processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[BOS, EOS]),
    "BERT's": processors.BertProcessing(EOS, BOS),
    "RoBERTa's": processors.RobertaProcessing(EOS, BOS),
    "a sequence": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[BOS, EOS]),
        ]
    ),
}


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, "<unk>")
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if processor := FAMILIES[family]:
        backend.post_processor = processor
    backend.enable_truncation(3)  # of a tokenizer.json: not of a prompt
    backend.enable_padding(length=9)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a b a", [3, 4, 3]),
        ("<s> a b", [0, 3, 4]),  # rendered already
        ("a </s>", [3, 1]),  # the user's own
        ("a </s> b b b", [3, 1, 4, 4, 4]),
        ("", []),
    ],
)
def test_a_raw_prompt_begins_once_and_ends_by_what_the_user_wrote(family, text, ids):
    begins = any(word in family for word in ("begin", "both", "BERT", "RoBERTa", "sequence"))
    (raw,) = Encoder(tokenizer(family), raw=True)([text])
    expected = [0, *ids] if begins and ids and ids[0] != 0 else ids
    assert (raw.tolist(), raw.dtype) == (expected, "int32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_writes_its_own(family):
    (ids,) = Encoder(tokenizer(family), raw=False)(["<s> a b a </s> b"])
    assert ids.tolist() == [0, 3, 4, 3, 1, 4]
