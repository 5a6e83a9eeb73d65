"""One token per character of the toy task's alphabet."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from async_opd.toy.task import ALPHABET

PAD, EOS = 0, 1  # ids
VOCABULARY = ("<pad>", "<eos>", "<unk>", *ALPHABET)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer that pads on the left. Decoding joins the characters with nothing between
    them."""
    core = Tokenizer(
        models.WordLevel(
            {token: index for index, token in enumerate(VOCABULARY)}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
