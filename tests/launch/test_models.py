"""Models of others are trained and saved, or refused in words before anything starts."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, dynamic_module_utils

from async_opd.config.evaluation import load_eval, run_config
from async_opd.config.load import load
from async_opd.config.paths import context
from async_opd.core.errors import AsyncOpdError, ConfigError, DataError
from async_opd.core.lora import LoraConfig
from async_opd.core.wire import Needs
from async_opd.launch import models
from async_opd.launch.inputs import read_problems
from async_opd.launch.toy_models import resolve_toy
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.learner import checkpoint
from async_opd.roles.models import causal_lm
from async_opd.toy import STUDENT
from async_opd.toy.tokenizer import build_tokenizer

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Gemma", "GPT2", "GPTNeoX")
KEY, CPU = "student.model", torch.device("cpu")
WEIGHT = "model.layers.0.mlp.up_proj.weight"
ENDS = {"eos_token_id": 1, "pad_token_id": 0}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the shipped student."""
    return shutil.copytree(STUDENT, tmp_path / "model")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def saved(folder: Path, trust_remote_code: bool = False) -> Path:
    """The checkpoint that the learner makes of a student."""
    model = causal_lm.load(folder, "float32", CPU, trust_remote_code=trust_remote_code)
    source = checkpoint.read_source(str(folder), trust_remote_code)
    checkpoint.save(model, dict(model.named_parameters()), source, folder / "out")
    return folder / "out"


UNSAVABLE = [
    {"temperature": 0.6},
    {"do_sample": False, "temperature": 0.6, "top_p": 0.95},
    {"do_sample": False, "temperature": 0.0},
    {"top_k": 20},
    {"min_p": 0.1},
    {"length_penalty": 0.8},
    {"early_stopping": True},
    {"pad_token_id": -1},
]


@pytest.mark.parametrize("values", UNSAVABLE, ids=str)
def test_a_generation_config_that_transformers_will_not_save_is_saved_as_it_came(folder, values):
    text = json.dumps(ENDS | values, indent=3)
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="Fix these issues"):
        GenerationConfig.from_pretrained(folder).save_pretrained(folder / "theirs")
    models.check_student(KEY, str(folder), False)
    out = saved(folder)
    assert (out / "generation_config.json").read_text() == text
    loaded = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert {name: getattr(loaded, name) for name in values} == values


@pytest.mark.parametrize("family", FAMILIES)
def test_students_of_other_families_are_saved_with_their_generation_config(
    tiny_lm, tmp_path, family
):
    model = tiny_lm(family, **ENDS)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    text = json.dumps(ENDS | UNSAVABLE[0])
    (tmp_path / "generation_config.json").write_text(text)
    models.check_student(KEY, str(tmp_path), False)
    out = saved(tmp_path)
    assert (out / "generation_config.json").read_text() == text
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for (name, after), (_, before) in zip(
        loaded.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(after, before), name


def test_where_there_is_no_generation_config_that_of_the_config_is_saved(folder):
    (folder / "generation_config.json").unlink()
    models.check_student(KEY, str(folder), False)
    assert models.generation_config(KEY, str(folder)) is None
    assert GenerationConfig.from_pretrained(saved(folder)).eos_token_id == 1


UNREADABLE = {
    "{": "Expecting property name",
    "[]": "'list' object",
    "null": "'NoneType' object",
    "7": "'int' object",
    '{"num_return_sequences": 2}': "Greedy methods",
    '{"max_new_tokens": 0}': "must be greater than 0",
    '{"max_new_tokens": "10"}': "'<=' not supported",
    '{"cache_implementation": "none such"}': "Invalid `cache_implementation`",
    "\x80": "",
}


@pytest.mark.parametrize(("text", "why"), UNREADABLE.items(), ids=UNREADABLE)
def test_a_generation_config_that_cannot_be_read_is_named(folder, text, why):
    (folder / "generation_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError) as raised:
        models.generation_config("teacher.model", str(folder))
    line = str(raised.value)
    assert line.startswith(f"teacher.model = '{folder}': its generation_config.json: ")
    assert why in line and "\n" not in line


def cut(folder: Path, end: int | None) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:end])


def reweigh(folder: Path, **weights: torch.Tensor | None) -> None:
    held = load_file(folder / "model.safetensors") | {WEIGHT: weights["weight"]}
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))


# What is done to a model; its message; whether vLLM, which loads more, must see the same.
DAMAGE = {
    "cut short": (lambda f: cut(f, -1000), "model.safetensors: SafetensorError", True),
    "empty": (lambda f: cut(f, 0), "model.safetensors: SafetensorError", True),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec"),
        "model.safetensors: SafetensorError",
        True,
    ),
    "a file short": (index, "1 of 2 files that model.safetensors.index.json names are", True),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "model.safetensors.index.json: TypeError",
        True,
    ),
    "a weight short": (
        lambda f: reweigh(f, weight=None),
        f"its files lack 1 weights, such as {WEIGHT}",
        True,
    ),
    "another shape": (
        lambda f: reweigh(f, weight=torch.zeros(3, 3)),
        rf"1 weights have another shape .*{WEIGHT}: \[3, 3\], not \[192, 64\]",
        True,
    ),
    "another width": (
        lambda f: edit(f / "config.json", hidden_size=72),
        "weights have another shape than its config says",
        True,
    ),
    "padding beyond": (lambda f: edit(f / "config.json", pad_token_id=24), "Padding_idx", False),
    "no such layers": (lambda f: edit(f / "config.json", layer_types="x"), "", True),
    "sliding": (
        lambda f: edit(f / "config.json", layer_types=["sliding_attention"] * 3),
        "only full causal attention is",
        False,
    ),
}


def demo(tmp_path, *settings: str):
    return resolve_toy(load("configs/demo.toml", [f"run.dir={tmp_path}/run", *settings]), tmp_path)


@pytest.mark.parametrize("name", [name for name, (_, _, all_see) in DAMAGE.items() if all_see])
def test_an_evaluation_s_model_that_cannot_be_loaded_whole_is_refused(folder, tmp_path, name):
    config = run_config(load_eval(str(folder), ["data.path=toy:heldout"]))
    config = resolve_toy(config, tmp_path)
    damage, message, _ = DAMAGE[name]
    read_problems(config, 1)
    damage(folder)
    with pytest.raises(DataError, match=f"^{KEY} = '{folder}': .*{message}"):
        read_problems(config, 1)


@pytest.mark.parametrize("role", ["student", "teacher", "reference", "teacher on vLLM"])
@pytest.mark.parametrize(("damage", "message", "seen_by_all"), DAMAGE.values(), ids=DAMAGE)
def test_a_model_that_cannot_be_loaded_whole_is_refused(
    folder, tmp_path, capfd, monkeypatch, damage, message, seen_by_all, role
):
    section, _, vllm = role.partition(" on ")
    if section == "reference":
        monkeypatch.setattr(TopkKl, "needs", lambda self: Needs(reference=True))
    settings = ["teacher.backend=vllm"] if vllm else []
    config = demo(tmp_path, f"{section}.model={folder}", *settings)
    damage(folder)
    if vllm and not seen_by_all:
        models.check_models(config)
        return
    with pytest.raises(
        AsyncOpdError, match=f"^{section}.model = '{folder}': .*{message}"
    ) as raised:
        models.check_models(config)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_weights_of_torch_s_own_format_are_looked_at_too(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    models.check_student(KEY, str(folder), False)
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"^student.model = '{folder}': "):
        models.check_student(KEY, str(folder), False)


def test_a_student_of_quantized_weights_is_refused(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(DataError, match="its weights are quantized; a student's must not be"):
        models.check_student(KEY, str(folder), False)


TOKENIZERS = {
    "next to no words": (None, "{}", "knows no words, only special tokens"),
    "empty vocabulary": ("", None, "knows no words, only special tokens"),
    "not JSON": ("{", None, "Expecting property name"),
    "a list": ("[]", None, "TypeError"),
    "an empty object": ("{}", None, "KeyError"),
    "settings no JSON": (None, "{", "Expecting property name"),
    "settings a list": (None, "[]", "AttributeError"),
}


@pytest.mark.parametrize(("core", "settings", "why"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(folder, capfd, core, settings, why):
    file = folder / "tokenizer.json"
    if core == "":
        tree = json.loads(file.read_text())
        tree["model"]["vocab"] = {}
        core = json.dumps(tree)
    if core is not None:
        file.write_text(core)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(settings)
        if settings == "{}":
            file.unlink()
    with pytest.raises(DataError, match=f"^{KEY} = '{folder}': its tokenizer.*{why}") as raised:
        models.tokenizer_of(KEY, str(folder), False)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma", "qwen2"])
def test_a_tokenizer_made_up_for_a_family_without_its_files_is_refused(tiny_lm, tmp_path, family):
    names = dict(llama="Llama", gpt2="GPT2", gpt_neox="GPTNeoX", gemma="Gemma", qwen2="Qwen2")
    tiny_lm(names[family]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="its tokenizer"):
        models.tokenizer_of(KEY, str(tmp_path), False)


def test_a_tokenizer_in_python_is_refused_for_who_decodes_and_read_for_who_does_not(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    tokenizer = models.tokenizer_of("teacher.model", str(folder), False)
    assert tokenizer.get_vocab()["a"] == ord("a") + 3
    with pytest.raises(DataError, match="its tokenizer is a ByT5Tokenizer, in Python; needed is"):
        models.fast(KEY, str(folder), tokenizer)


def test_a_tokenizer_of_added_words_alone_has_words(folder):
    tokenizer = build_tokenizer()
    words = [word for word in tokenizer.get_vocab() if not word.startswith("<")]
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["vocab"] = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    file.write_text(json.dumps(tree))
    AutoTokenizer.from_pretrained(folder).add_tokens(words)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)
    assert models.tokenizer_of(KEY, str(folder), False).get_vocab().keys() >= set(words)


def composite(folder: Path) -> Path:
    """A model of text and images, as its config has it."""
    text = dict(vocab_size=77, hidden_size=32, max_position_embeddings=99)
    config = transformers.Gemma3Config(text_config=text)
    config.save_pretrained(folder)
    return folder


def test_settings_of_text_are_read_where_they_lie(folder):
    config = models.text_config("teacher.model", str(composite(folder)), False)
    assert (config.vocab_size, config.hidden_size) == (77, 32)
    assert context(json.loads((folder / "config.json").read_text())) == 99
    assert context({"max_position_embeddings": 5, "text_config": None}) == 5
    assert context({"n_positions": 7}) == 7


def test_an_evaluation_knows_the_context_that_lies_deeper(folder, tmp_path):
    config = demo(tmp_path, "eval.problems=1")
    composite(folder)
    student = type(config.student)(model=str(folder))
    data = type(config.data)(path=config.data.path)
    config = type(config)(
        **{name: getattr(config, name) for name in config.__struct_fields__}
        | {"student": student, "data": data}
    )
    assert read_problems(config, 1).context == 99


def test_a_student_of_text_and_images_is_refused(folder):
    composite(folder)
    with pytest.raises(DataError, match=r"config \(gemma3\) holds a text model beside others"):
        models.check_student(KEY, str(folder), False)


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"max_position_embeddings": "far"}', '{"rope_scaling": "yarn"}']
)
def test_a_config_that_is_not_a_model_s_is_refused(folder, tmp_path, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"^{KEY} = '{folder}': its config.json is not a model's"):
        demo(tmp_path, f"student.model={folder}")


CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM

class OwnConfig(Qwen3Config):
    model_type = "own"

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_of_its_own_code_is_saved_with_it_or_refused(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    (folder / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit(folder / "config.json", model_type="own", auto_map=classes)
    models.check_student(KEY, str(folder), True)
    out = saved(folder, trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    with pytest.raises(DataError, match="contains custom code") as raised:
        models.check_student(KEY, str(folder), False)
    assert raised.value.__notes__ == ["run.trust_remote_code = true has it run"]
    (folder / "own.py").write_text("import none_such\n")
    with pytest.raises(DataError, match="none_such"):
        models.check_student(KEY, str(folder), True)


def test_reading_leaves_bars_and_logs_as_they_were(folder):
    log = logging.getLogger("transformers")
    before = log.level, transformers.utils.logging.is_progress_bar_enabled()
    models.check_student(KEY, str(folder), False)
    assert (log.level, transformers.utils.logging.is_progress_bar_enabled()) == before


def test_an_adapter_does_not_travel_alone_to_a_model_with_experts(tiny_lm, tmp_path):
    tiny_lm("Qwen3Moe").save_pretrained(tmp_path)
    with pytest.raises(DataError) as refused:
        models.check_adapter_alone(KEY, str(tmp_path), False, LoraConfig(rank=4))
    assert f"{refused.value}" == (
        f"sync.lora = 'adapter': student.model = '{tmp_path}' has experts, for which vLLM chooses"
        " other kernels once there are places for an adapter; must be 'merged'"
    )


@pytest.mark.parametrize("lora", [None, "merged", "adapter"])
def test_a_run_asks_vllm_for_a_place_only_where_the_adapter_travels_alone(
    monkeypatch, tmp_path, lora
):
    asked = []
    monkeypatch.setattr(models, "check_adapter_alone", lambda *args: asked.append(args[1]))
    overrides = ["student.lora.rank=4", f"run.dir={tmp_path}/run"]
    overrides += [f"sync.lora={lora}"] if lora else []
    config = resolve_toy(load("configs/demo.toml", overrides), tmp_path)
    models.check_models(config)
    assert bool(asked) is (lora == "adapter")
