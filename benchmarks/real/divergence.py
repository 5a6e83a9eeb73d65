"""How far models are from a teacher on held-out prompts: exact reverse KL over the whole vocabulary
on responses that each samples itself (temperature 1, a fixed seed), and how long these are.

    python -m benchmarks.real.divergence build/smollm2/teacher build/smollm2/chat_heldout.jsonl
        build/smollm2/student runs/smollm2_heal/checkpoint --out divergence.json
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

BATCH = 32  # prompts answered at once


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.no_grad()
def measure(
    model: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], longest: int
) -> tuple[Tensor, Tensor]:
    """Sample a response to each prompt of `batch`, padded on the left; returns KL(model | teacher)
    of every token, [B, T], and which of them are the responses'."""
    prompt = batch["input_ids"].shape[1]
    ids_BL = model.generate(**batch, max_new_tokens=longest, do_sample=True)
    response_BT = ids_BL[:, prompt:]
    ends_BT = response_BT == model.generation_config.eos_token_id
    kept_BT = ends_BT.cumsum(1) - ends_BT.long() == 0  # up to the first end, it included
    mask_BL = torch.cat([batch["attention_mask"], kept_BT.long()], 1)
    place_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    ours_BTV, theirs_BTV = (
        each(input_ids=ids_BL, attention_mask=mask_BL, position_ids=place_BL)
        .logits[:, prompt - 1 : -1]
        .float()
        .log_softmax(-1)
        for each in (model, teacher)
    )
    return (ours_BTV.exp() * (ours_BTV - theirs_BTV)).sum(-1), kept_BT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path, help="rows with message lists under `prompt`")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--longest", type=int, default=64, help="tokens of a response")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = args.data.read_text(encoding="utf-8").splitlines()[: args.problems]
    prompts = [json.loads(line)["prompt"] for line in lines]
    torch.set_num_threads(os.cpu_count() or 1)  # by itself it takes a thread for every two
    tokenizer, teacher = AutoTokenizer.from_pretrained(args.teacher), load(args.teacher)
    tokenizer.padding_side = "left"
    figures = {}
    for folder in args.models:
        torch.manual_seed(0)
        model, parts = load(folder), []
        for start in range(0, len(prompts), BATCH):
            batch = tokenizer.apply_chat_template(
                prompts[start : start + BATCH],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            parts.append(measure(model, teacher, batch, args.longest))
        kept = torch.cat([kept_BT.sum(1) for _, kept_BT in parts]).double()
        kl = torch.cat([kl_BT[kept_BT] for kl_BT, kept_BT in parts])
        figures[f"{folder}"] = {"kl": kl.mean().item(), "tokens": kept.mean().item()}
        print(f"{folder}: KL {kl.mean():.3f} nats a token, {kept.mean():.1f} tokens a response")
    args.out.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
