"""Rebuilds the shipped weights: `python -m async_opd.toy.build`. A few minutes on two cores;
seeded."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from async_opd.toy import STUDENT, TEACHER, WEIGHTS
from async_opd.toy.task import (
    ALPHABET,
    MAX_PROMPT,
    MAX_RESPONSE,
    Problem,
    answer,
    dataset,
    draw,
    next_char,
    prompt,
)
from async_opd.toy.tokenizer import EOS, PAD, VOCABULARY, build_tokenizer

TOKENIZER = build_tokenizer()
CONTEXT = 256  # positions; a parity probe is longer than one cache block of 128
IGNORED = -100  # the label of positions without a target
STUDENT_START = 0.22  # greedy accuracy at which the student's training stops


def new_model(width: int, mlp_width: int, tied: bool) -> Qwen3ForCausalLM:
    """Make a model of three layers, heads of 32."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=width,
            intermediate_size=mlp_width,
            num_hidden_layers=3,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=tied,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
            dtype="float32",
        )
    )


def sample(rng: Random, noise: float) -> tuple[Problem, str, list[str]]:
    """Draw a problem, a response in which `noise` of the characters are random, and the right
    character at each place.

    The target answers what is really there (`next_char`), so the teacher stays a teacher on a
    student's mistakes.
    """
    problem = draw(rng)
    written = ""
    wanted = []
    while len(wanted) < MAX_RESPONSE:
        wanted.append(next_char(problem, written))
        char = rng.choice(ALPHABET) if rng.random() < noise else wanted[-1]
        if not char:
            break
        written += char
    return problem, written, wanted


def batch(rng: Random, rows: int, max_noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Make input ids and labels, each [rows, MAX_PROMPT + MAX_RESPONSE], padded on the right;
    labels are already shifted."""
    ids = torch.full((rows, MAX_PROMPT + MAX_RESPONSE), PAD)
    labels = torch.full_like(ids, IGNORED)
    index = {"": EOS} | {token: i for i, token in enumerate(VOCABULARY)}
    for row in range(rows):
        problem, written, wanted = sample(rng, noise=rng.uniform(0, max_noise))
        question = prompt(problem)
        text = [index[char] for char in question + written]
        ids[row, : len(text)] = torch.tensor(text)
        first = len(question) - 1
        labels[row, first : first + len(wanted)] = torch.tensor([index[char] for char in wanted])
    return ids, labels


def train(
    model: Qwen3ForCausalLM, rng: Random, steps: int, rows: int, rate: float, max_noise: float
) -> Iterator[int]:
    """Train by given targets, `rows` responses a step, each with a share of random characters of up
    to `max_noise`.

    Yields after each step, counted from 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in range(steps):
        model.train()
        ids, labels = batch(rng, rows, max_noise)
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield step + 1


def train_teacher() -> Qwen3ForCausalLM:
    """Train the teacher on twice the noise the student sees: it has to continue whatever the
    student writes."""
    torch.manual_seed(1)
    model = new_model(width=128, mlp_width=256, tied=False)
    for step in train(model, Random("teacher"), steps=500, rows=64, rate=3e-3, max_noise=0.2):
        if step % 100 == 0:
            print(f"teacher: step {step}", flush=True)
    return model


def train_student() -> Qwen3ForCausalLM:
    """Train the student, and stop early, by the greedy accuracy on training problems. Run to the
    last step it would know the task."""
    torch.manual_seed(2)
    seen = dataset(heldout=False)[:256]
    model = new_model(width=64, mlp_width=192, tied=True)
    for step in train(model, Random("student"), steps=800, rows=32, rate=1.5e-3, max_noise=0.1):
        if step % 10 == 0 and accuracy(model, seen) >= STUDENT_START:
            print(f"student: stopped at step {step}", flush=True)
            break
    return model


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, problems: list[Problem]) -> float:
    """Measure the share of problems whose greedy response ends with the right boxed answer."""
    model.eval()
    inputs = TOKENIZER([prompt(problem) for problem in problems], padding=True, return_tensors="pt")
    # transformers types `self` by a protocol that its own models do not fulfil
    outputs = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **inputs, do_sample=False, max_new_tokens=MAX_RESPONSE, eos_token_id=EOS, pad_token_id=PAD
    )
    texts = TOKENIZER.batch_decode(outputs, skip_special_tokens=True)
    right = [
        text.endswith(f"\\boxed{{{answer(p)}}}") for text, p in zip(texts, problems, strict=True)
    ]
    return sum(right) / len(right)


def write_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write a whole Hugging Face directory: config, generation config, weights and tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def write_checksums() -> None:
    """Write `SHA256SUMS`, as `sha256sum -c` reads it in the weights folder."""
    files = sorted(path for folder in (STUDENT, TEACHER) for path in folder.iterdir())
    lines = (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(WEIGHTS).as_posix()}"
        for path in files
    )
    (WEIGHTS / "SHA256SUMS").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    heldout = dataset(heldout=True)
    for folder, trained in ((STUDENT, train_student), (TEACHER, train_teacher)):
        model = trained()
        write_model(model, folder)
        print(
            f"{folder.name}: {model.num_parameters():,} parameters, held-out accuracy"
            f" {accuracy(model, heldout):.3f}"
        )
    write_checksums()


if __name__ == "__main__":
    main()
