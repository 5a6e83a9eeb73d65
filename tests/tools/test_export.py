import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.config.load import load, read_run
from async_opd.core.lora import LoraConfig
from async_opd.driver.checkpoints import Checkpoints, RunState, find
from async_opd.roles.learner import lora
from async_opd.roles.learner.checkpoint import (
    RankState,
    read_source,
    save,
    save_adapter,
    save_rank,
)
from async_opd.roles.learner.weights import StudentWeights
from async_opd.tools.export import model_card
from async_opd.toy.tokenizer import build_tokenizer

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def run(tmp_path, finished) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_lm) -> Path:
    """A run with checkpoints of steps 2, the best, and 4."""
    folder = tmp_path_factory.mktemp("finished")
    run_dir, source = folder / "run", folder / "source"
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    checkpoints = Checkpoints(run_dir, keep=3)
    for step, score in ((2, 0.9), (4, 0.5)):
        model = tiny_lm(seed=step, vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0)
        folder = checkpoints.begin(step)
        save(model, dict(model.named_parameters()), read_source(str(source)), folder / "model")
        counters = {"before": [30, 20, 120], "dropped": {}}
        checkpoints.commit(
            step,
            RunState(version=step, position={}, outstanding=[], score=score, counters=counters),
        )
    config = msgspec.to_builtins(
        load(DEMO, ["learner.warmup_steps=0", "run.steps=4", "run.max_lag_steps=3"])
    )
    config["objective"] = {"tag": "dear", "p": 0.2, "q": 0.3}
    config["student"]["model"], config["data"]["path"] = "Qwen/Qwen3-1.7B", "owner/problems"
    config["teacher"]["model"] = "/somewhere/else/my-teacher"  # not on this machine
    (run_dir / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": step, "tokens": 100.0 + step, "tokens_taught": 7.0, "lag_max": float(step - 1)}
        for step in range(1, 5)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "version": 4,
        "accuracy_before": 0.3,
        "accuracy_after": 0.625,
        "teacher_accuracy": 0.875,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    (run_dir / "environment.json").write_text(
        json.dumps({"commit": "abc123", "versions": {"torch": "2.13.0"}})
    )
    return run_dir


def card(folder: Path) -> tuple[dict, str, dict[str, str]]:
    """Front matter, text, and the cells of its tables."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    cells = [
        line.strip("| ").split(" | ")
        for line in text.splitlines()
        if line.startswith("| ") and line != "| | |"
    ]
    return yaml.safe_load(front), text, dict(cells)


def test_an_exported_folder_loads_with_the_logits_of_its_checkpoint(run, tmp_path, capsys):
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 0
    newest = run / "checkpoints" / "000004"
    assert (
        capsys.readouterr().out == f"{tmp_path / 'out'}: the student after step 4, from {newest}\n"
    )
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (tmp_path / "out", newest / "model")
        )
    torch.testing.assert_close(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "1+2="}], tokenize=False)
        == "1+2="
    )
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 1
    assert not list(tmp_path.glob(".*.partial"))


def test_the_best_or_the_named_checkpoint_is_exported(run, tmp_path, capsys):
    for number, which in enumerate((["--checkpoint", "best"], ["--checkpoint", "2"])):
        assert main(["export", str(run), "-o", str(tmp_path / f"{number}"), *which]) == 0
    assert main(["export", str(run / "checkpoints" / "000002"), "-o", str(tmp_path / "2")]) == 0
    weights = run / "checkpoints" / "000002" / "model" / "model.safetensors"
    wanted = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {
        hashlib.sha256((tmp_path / name / weights.name).read_bytes()).hexdigest() for name in "012"
    } == {wanted}
    assert main(["export", str(run), "--checkpoint", "3"]) == 2
    folder = run / "checkpoints"
    assert f"no checkpoint '3' in {folder}; there are: 2 (best), 4\n" in capsys.readouterr().err


def test_the_card_names_the_ends_that_the_model_s_own_files_do_not(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["rollout"]["stop"] = ["<|im_end|>", 7, "\n\n"]
    (run / "config.json").write_text(json.dumps(config))
    assert main(["export", str(run), "-o", str(tmp_path / "mine")]) == 0
    cells = card(tmp_path / "mine")[2]
    assert cells["ends besides its own"] == r"""`"<\|im_end\|>"`, `7`, `"\n\n"`"""


def test_the_card_names_every_set_with_its_weight(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    sources = {"math": {"path": "owner/math", "weight": 3, "subset": "main"}}
    config["data"] |= {"path": "", "sources": sources | {"code": {"path": "/somewhere/code.jsonl"}}}
    (run / "config.json").write_text(json.dumps(config))
    assert main(["export", str(run), "-o", str(tmp_path / "mine")]) == 0
    front, text, cells = card(tmp_path / "mine")
    assert front["datasets"] == ["owner/math"] and "/somewhere" not in text
    math, code = "`owner/math`, `main`, `train`, weight 3", "`code.jsonl`, `train`, weight 1"
    assert cells["data"] == f"{math}; {code}"


def test_the_card_says_what_the_files_of_the_run_say(run, tmp_path):
    assert main(["export", str(run), "-o", str(tmp_path / "mine")]) == 0
    front, text, cells = card(tmp_path / "mine")
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-1.7B",
        "datasets": ["owner/problems"],
        "tags": ["async-opd", "on-policy-distillation", "dear"],
    }
    assert "`Qwen/Qwen3-1.7B`, distilled on-policy from `my-teacher` by async-opd." in text
    assert "/somewhere" not in text
    assert cells["optimizer steps"] == "4 of 4"
    assert cells["weights"] == "float32"  # of the model: the config has no dtype
    # 101 + 102 + 103 + 104, and 7 of the teacher's own a step
    assert cells["trained tokens"] == "438"
    assert (
        cells["largest lag seen"] == "3 steps"
        and cells["staleness bound"] == "3 steps; what is older is masked"
    )
    # 30 of 100 decided
    assert cells["held-out problems"].startswith("120 of ") and cells["before"] == "25.0%"
    assert cells["after"] == "62.5%" and cells["teacher"] == "87.5%"
    assert cells["p"] == "`0.2`" and cells["q"] == "`0.3`"
    assert "(DEAR, [arXiv:2606.22830](https://arxiv.org/abs/2606.22830))" in text
    assert "EXACT, Eq. 2 REPAIRED" in text  # how certain the formula is
    assert cells["commit"] == "abc123" and cells["torch"] == "2.13.0"
    assert 'from_pretrained("mine")' in text and "vllm serve mine" in text


def test_what_no_file_says_is_left_out_of_the_card(run, tmp_path):
    assert main(["export", str(run), "-o", str(tmp_path / "early"), "--checkpoint", "2"]) == 0
    _, _, cells = card(tmp_path / "early")
    # Up to its step.
    assert cells["trained tokens"] == "217" and cells["largest lag seen"] == "1 steps"
    assert cells["before"] == "25.0%" and "after" not in cells  # which is of step 4
    for name in ("summary.json", "metrics.jsonl", "environment.json"):  # killed, or copied in part
        (run / name).unlink()
    assert main(["export", str(run), "-o", str(tmp_path / "killed")]) == 0
    _, text, cells = card(tmp_path / "killed")
    assert (
        not {"after", "teacher", "trained tokens", "largest lag seen", "commit", "torch"}
        & cells.keys()
    )
    assert cells["before"] == "25.0%" and "Made with" not in text


def test_a_damaged_checkpoint_is_named_and_nothing_is_left(run, tmp_path, capsys):
    weights = run / "checkpoints" / "000004" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        "checkpoint " + str(weights.parent.parent) in error
        and "model/model.safetensors is damaged" in error
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_nothing_is_overwritten(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 2
    error = (
        f"async-opd: DataError: {tmp_path / 'out'}: is there already; name another folder with -o,"
        " or remove it\n"
    )
    assert capsys.readouterr().err == error
    assert list((tmp_path / "out").iterdir()) == []
    assert main(["export", str(run)]) == 0 and (run / "export" / "README.md").exists()


def test_an_export_that_was_killed_is_no_hindrance(run, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").touch()
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "half").exists() and not (tmp_path / ".out.partial").exists()


def test_a_folder_that_cannot_be_made_is_named(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["export", str(run), "-o", str(tmp_path / "file" / "out")]) == 2
    assert f"cannot be copied to {tmp_path / 'file' / 'out'}: " in capsys.readouterr().err


def test_a_run_without_a_checkpoint_or_no_run_at_all_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert f"RunMissing: {tmp_path}: no config.json in it" in capsys.readouterr().err
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(load(DEMO)))
    assert main(["export", str(tmp_path)]) == 2
    assert (
        f"CheckpointError: {tmp_path}: no complete checkpoint in {tmp_path / 'checkpoints'}"
        in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


@pytest.fixture(params=["float32", "bfloat16"])
def adapted(request, tmp_path, run, tiny_lm):
    """A run of one checkpoint with an adapter, and the weights that left its learner."""
    dtype, base = request.param, tmp_path / "base"
    tokenizer = build_tokenizer()
    vocabulary = dict(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0)
    tiny_lm(seed=1, **vocabulary).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    settings = LoraConfig(rank=3, alpha=4.0, target_modules=("q_proj", "down_proj"))
    lora.wrap(lm, settings, seed=0)
    for adapter in lora.adapters(lm).values():
        torch.nn.init.normal_(adapter.b_OR, std=0.1)
    weights = StudentWeights(lm, 4096, lambda weights: nullcontext())
    shutil.rmtree(run / "checkpoints")
    checkpoints = Checkpoints(run, keep=3)
    folder = checkpoints.begin(4)
    save_adapter(lm, weights.adapter(keep=True), read_source(str(base)), folder / "model")
    (folder / "learner").mkdir()
    zero = dict(ranks=1, zero_stage=1, version=4, running={}, random={})
    save_rank(RankState(dtype=dtype, lora=settings, **zero), folder / "learner", 0)
    checkpoints.commit(4, RunState(version=4, position={}, outstanding=[]))
    config = json.loads((run / "config.json").read_text())
    config["student"] |= {"model": str(base), "lora": settings.written_out()}
    (run / "config.json").write_text(json.dumps(config))
    return run, lm, weights.copied(keep=True)


def test_an_adapter_is_exported_as_peft_loads_it(adapted, tmp_path):
    run, lm, _ = adapted
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    ids = torch.tensor([[3, 4, 5, 6]])
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=lm.dtype)
    with torch.inference_mode():
        gap = (theirs(ids).logits - lm.eval()(ids).logits).abs().max()
    assert gap < (1e-5 if lm.dtype == torch.float32 else 0.1)  # peft computes it in float32
    front, text, cells = card(tmp_path / "out")
    assert front["library_name"] == "peft" and "lora" in front["tags"]
    assert cells["adapter"] == "LoRA of rank 3, scaled by 1.33333, on `q_proj`, `down_proj`"
    assert cells["weights"] == f"{lm.dtype}".removeprefix("torch.")
    assert 'AutoPeftModelForCausalLM.from_pretrained("out")' in text
    assert "vllm serve base --enable-lora --max-lora-rank 8 --lora-modules student=out" in text
    # the path that peft needs here is of no use to others, which is said without it
    assert "names `base` by where it lay on the machine of the run" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("rank", "served"), [(1, "--max-lora-rank 1 "), (300, "--max-lora-rank 320 "), (513, "")]
)
def test_a_card_serves_an_adapter_at_a_rank_that_vllm_has(run, rank, served):
    config = read_run(run)
    student = msgspec.structs.replace(
        config.student, model="HuggingFaceTB/SmolLM2-135M", lora=LoraConfig(rank=rank)
    )
    config = msgspec.structs.replace(config, student=student)
    text = model_card.card(run, config, find(run), "out")
    assert (served in text) if served else ("vllm serve" not in text)
    assert "adapter_config.json" not in text  # which names the hub's


def test_merged_it_is_one_model_with_the_weights_that_left_the_learner_to_the_bit(
    adapted, tmp_path, capsys
):
    run, lm, left = adapted
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--merged"]) == 0
    assert capsys.readouterr().err == ""  # no bars
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == lm.dtype
    for name, weight in theirs.named_parameters():
        assert torch.equal(weight, left[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    front, text, _ = card(tmp_path / "out")
    assert front["library_name"] == "transformers" and "vllm serve out" in text


def test_there_is_nothing_to_merge_where_every_weight_was_trained(run, tmp_path, capsys):
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--merged"]) == 2
    model = run / "checkpoints" / "000004" / "model"
    error = f"DataError: --merged: {model} is a whole model: every weight was trained\n"
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_gone_is_named_and_nothing_is_left(adapted, tmp_path, capsys):
    run, *_ = adapted
    shutil.rmtree(tmp_path / "base")
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--merged"]) == 2
    assert f"{tmp_path / 'base'}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
