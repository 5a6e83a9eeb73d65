"""What an objective with its weights costs, against the learner's step it belongs to.

16,384 response tokens in 8 trajectories, vocabulary 32,000, a Qwen3 student of width 1,024 and 4
layers with random weights, fp32, one micro-batch. The step is forward and backward of `opd`, once.
Each objective then runs on log-probs made at random in the shapes it needs: its `loss` and the
backward pass to them (median). Where a method needs a first pass, that is one forward more,
reported apart.

    python benchmarks/objectives.py --out objectives.json [--threads 2] [--repeat 5]
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from async_opd.core.wire import Needs
from async_opd.launch.new_run import environment
from async_opd.maths.advantages import Moments
from async_opd.maths.logprobs import Read
from async_opd.objectives import all_objectives
from async_opd.objectives.base import Objective
from async_opd.objectives.freshness import Freshness
from async_opd.objectives.modifiers import DriftGate, Position, RandomShare
from async_opd.objectives.sampled import Importance
from async_opd.roles.learner.batch import MicroBatch
from async_opd.roles.learner.step import (
    StepContext,
    Student,
    accumulate,
    batch_statistics,
    token_batch,
)
from async_opd.roles.models import causal_lm

TOKENS, TRAJECTORIES, WIDTH, LAYERS, VOCABULARY, K = 16_384, 8, 1024, 4, 32_000, 16
OPD, TOPK_KL, TOP_D = (all_objectives()[tag] for tag in ("opd", "topk_kl", "top_d"))
OBJECTIVES = {
    tag: cls(**({"k": K} if tag == "topk_kl" else {})) for tag, cls in all_objectives().items()
} | {
    "opd + weights": OPD(
        drift_gate=DriftGate(), position=Position(share=0.5), random=RandomShare(share=0.5)
    ),
    "opd + freshness": OPD(freshness=Freshness()),
    "opd, prefix": OPD(correction=Importance(ratio="prefix_normalised", narrowing=(7e-4, 9.5e-4))),
    "topk_kl, sampled": TOPK_KL(k=K, rest="sampled"),
    "top_d, groups": TOP_D(future=True, normalise=True),
}


def micro_batch(needs: Needs) -> MicroBatch:
    """Random ids and scores of every kind that `needs` names."""
    length = TOKENS // TRAJECTORIES
    candidates = needs.teacher_topk or needs.teacher_at_student_ids
    logp_NK = (
        torch.randn(TOKENS, VOCABULARY // 100).log_softmax(1)[:, :candidates]
        if candidates
        else None
    )
    return MicroBatch(
        ids_L=torch.randint(VOCABULARY, (TOKENS + 1,))[:-1],
        segment_lengths=[length] * TRAJECTORIES,
        rows_N=torch.arange(TOKENS),
        targets_N=torch.randint(VOCABULARY, (TOKENS,)),
        keep_N=torch.ones(TOKENS, dtype=torch.bool),
        lag_N=torch.ones(TOKENS, dtype=torch.int64),
        kv_lag_N=torch.zeros(TOKENS),
        segment_N=torch.arange(TRAJECTORIES).repeat_interleave(length),
        behaviour_logp_N=-torch.rand(TOKENS) * 3,
        teacher_logp_N=-torch.rand(TOKENS) * 3,
        key_S=torch.arange(TRAJECTORIES),
        group_S=torch.zeros(TRAJECTORIES, dtype=torch.int64),
        reward_S=(torch.arange(TRAJECTORIES) % 2).float(),
        group_reward_SG=(torch.arange(8) % 2).float().expand(TRAJECTORIES, 8),
        group_length_SG=torch.full((TRAJECTORIES, 8), float(length)),
        cap_S=torch.full((TRAJECTORIES,), 2.0 * length),
        candidate_ids_NK=torch.randint(VOCABULARY, (TOKENS, candidates)) if candidates else None,
        behaviour_logp_NK=logp_NK,
        teacher_logp_NK=logp_NK,
        teacher_tail_logp_N=-1 - torch.rand(TOKENS) if needs.tail else None,
        teacher_entropy_N=torch.rand(TOKENS) * 3,
        reference_logp_N=-torch.rand(TOKENS) * 3,
        from_teacher=False,
    )


def step_seconds(student: Student) -> dict[str, float]:
    """One forward and backward of `opd`, and one forward alone."""
    opd, micro = all_objectives()["opd"](), micro_batch(Needs())
    started = time.perf_counter()
    accumulate(
        student, lambda loss: loss.backward(), lambda tensor, op: None, opd, [micro], StepContext()
    )
    whole = time.perf_counter() - started
    started = time.perf_counter()
    with torch.no_grad():
        student(micro)
    return {"step_s": whole, "forward_s": time.perf_counter() - started}


def objective_seconds(objective: Objective) -> float:
    """`loss`, and backward to the log-probs it is a function of."""
    micro, needs = micro_batch(objective.needs()), objective.needs()
    logp_N = (-torch.rand(TOKENS) * 3).requires_grad_()
    candidates_NK = (
        None if micro.candidate_ids_NK is None else micro.teacher_logp_NK.clone().requires_grad_()
    )
    entropy_N = torch.rand(TOKENS) * 3 if needs.student_entropy else None
    hidden_ND = torch.randn(TOKENS, WIDTH) if needs.hidden_state else None
    tail_N = (-1 - torch.rand(TOKENS)).requires_grad_() if needs.tail else None
    read = Read(logp_N, entropy_N, candidates_NK, None, None, tail_N, hidden_ND)
    context = StepContext(
        step=11, running={name: Moments(100, 0.5, 25.0) for name in needs.running}
    )
    found = batch_statistics(lambda *_: read, lambda tensor, op: None, objective, [micro], context)
    started = time.perf_counter()
    objective.loss(token_batch(micro, read, context, found)).loss_N.sum().backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each objective")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = dict(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        intermediate_size=3 * WIDTH,
    )
    heads = dict(num_attention_heads=16, num_key_value_heads=8, head_dim=64)
    lm = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, attn_implementation=causal_lm.ATTENTION))
    found = step_seconds(Student(lm, temperature=1.0, chunk_rows=1024))
    del lm
    rows = []
    print(f"step {found['step_s']:.1f} s, of a first pass {found['forward_s']:.1f} s")
    for name, objective in OBJECTIVES.items():
        seconds = [objective_seconds(objective) for _ in range(args.repeat)]
        share = statistics.median(seconds) / found["step_s"]
        rows.append(
            {
                "objective": name,
                "seconds": seconds,
                "share": share,
                "first_pass": objective.needs().first_pass,
            }
        )
        print(
            f"{name:16}{share:8.2%}{'   and a first pass' if objective.needs().first_pass else ''}",
            flush=True,
        )
    machine = {
        "hardware": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
    }
    args.out.write_text(json.dumps(found | {"rows": rows} | machine | environment(), indent=2))


if __name__ == "__main__":
    main()
