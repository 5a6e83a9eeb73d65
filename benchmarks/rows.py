"""How long it takes to judge 100,000 rows before a start: chat prompts of 200 tokens through a
template, types, lengths and references, and once more, when the result is kept.

Makes its own byte-level BPE tokenizer of 8,000 tokens and a template as of Qwen3's kind. Prints
seconds and CPU seconds of reading, of the first look and of the second.

    python benchmarks/rows.py [--rows 100000]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from random import Random

import datasets.config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.references import References

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """{%- if messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
{%- set index = (messages|length - 1) - loop.index0 %}
{%- if message.role == 'user' and ns.last == messages|length - 1 %}
{%- set ns.last = index %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.content is string %}{%- set content = message.content %}
{%- else %}{%- set content = '' %}{%- endif %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def main() -> None:
    """Print a line for each look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        random = Random(0)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        words = ["".join(random.choices(letters, k=random.randint(2, 9))) for _ in range(5000)]
        tokenizer = _tokenizer([" ".join(random.choices(words, k=150)) for _ in range(500)])
        path, length = _write(Path(folder), args.rows, words, tokenizer, random)
        config = DataConfig(path=str(path), chat_template=True, max_prompt_tokens=1024)
        with _timed(f"reading {args.rows} rows of {length:.0f} tokens"):
            source = PromptSource(config, tokenizer, seed=0, references=References(VerifyConfig()))
        for look in ("first", "second"):
            with _timed(f"{look} look"):
                source.survey()


class _timed:
    """Prints seconds and CPU seconds, children's too, of what is done inside."""

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        self._start, self._cpu = time.monotonic(), sum(os.times()[:4])

    def __exit__(self, *error: object) -> None:
        wall, cpu = time.monotonic() - self._start, sum(os.times()[:4]) - self._cpu
        print(f"{self._what}: {wall:.1f} s, {cpu:.1f} CPU-seconds", flush=True)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=8000,
            special_tokens=SPECIAL,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def _write(
    folder: Path, rows: int, words: list[str], tokenizer: PreTrainedTokenizerFast, random: Random
) -> tuple[Path, float]:
    """Write the rows; returns their file and the mean of tokens of the first thousand."""
    path, lengths = folder / "rows.jsonl", []
    with path.open("w") as file:
        for n in range(rows):
            text = " ".join(random.choices(words, k=88))
            messages = [
                {"role": "system", "content": "You are a careful mathematician."},
                {"role": "user", "content": text},
            ]
            file.write(json.dumps({"prompt": messages, "answer": f"{n}"}) + "\n")
            if n < 1000:
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
                lengths.append(len(ids["input_ids"]))
    return path, sum(lengths) / len(lengths)


if __name__ == "__main__":
    main()
