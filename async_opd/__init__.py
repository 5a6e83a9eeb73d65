"""Asynchronous on-policy distillation of language models on Ray, vLLM and DeepSpeed.

async_opd/          what stands below never imports what stands above it
  cli/              the command line; a file a command
  tools/            what reads a run directory or a config and starts nothing: plan, report,
                    trace, audit, explain, export, cluster files
  evaluation/       avg@k, pass@k and maj@k of one model
  launch/           from a config to a run directory: inputs, checked; the demo's models
  driver/           the one asyncio process: the main loop, queue, pools, weight publication,
                    ledger, checkpoints
  runtime/          all that imports ray: roles as actors, where they are placed, jobs
  telemetry/        rows and what they mean, spans, the live screen, wandb, TensorBoard,
                    Prometheus
  config/           the whole config, its rules, and what is wrong, in words
  roles/            what runs in other processes: rollout, teacher, verifier, learner;
                    weight_sync and models, which they share
  objectives/       one file a method
  maths/, toy/      pure functions; the demo's task, tokenizer and weights
  core/             messages, ports, errors, the run directory
configs/            the demo, recipes, one file for each paper
cluster/            placing roles; the Grafana dashboard
benchmarks/         one script a table, and what was measured
tests/              mirrors the package; rules/ keeps the design, ray/ and e2e/ run the real
                    stack, faults/ hurts it
"""
