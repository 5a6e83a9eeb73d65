"""What a model's folder holds, read before anything starts: tokenizer, config, and whether its
weights can be read, trained and saved."""

import json
import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as bars

from async_opd.config.schema import Config
from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.core.lora import LoraConfig
from async_opd.core.process_wide import environment, log_level
from async_opd.roles.learner import checkpoint, lora
from async_opd.roles.learner.weights import AdapterAlone
from async_opd.roles.models import causal_lm
from async_opd.roles.weight_sync import checkpoint_names

FILES_OF_MODELS = {
    "weights": ("*.safetensors", "*.bin"),
    "tokenizer": ("tokenizer*", "vocab*", "*.model", "tekken.json"),
}
ANY = "float32"  # of weights of which only names and shapes are looked at
KINDS = {AutoConfig: "config", AutoTokenizer: "tokenizer"}


def tokenizer_of(
    key: str, model: str, trust_remote_code: bool, *, weights: bool = True
) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model that can be loaded too, `weights` and all. Where its files are
    missing or damaged transformers may make one of next to no words: that is refused. Raises
    DataError."""
    folder = Path(model)
    for what, names in FILES_OF_MODELS.items():
        if what == "weights" and not weights:
            continue
        if folder.is_dir() and not any(file for name in names for file in folder.glob(name)):
            raise DataError(f"{key} = {model!r}: holds no {what} ({', '.join(names)})")
    load(key, AutoConfig, model, trust_remote_code)
    tokenizer = load(key, AutoTokenizer, model, trust_remote_code)
    with _reading(f"{key} = {model!r}: its tokenizer"):
        special = {token for token in tokenizer.added_tokens_decoder.values() if token.special}
        words = tokenizer.get_vocab().keys() - set(map(str, special))
        words -= set(tokenizer.all_special_tokens)
    if not words:
        raise DataError(f"{key} = {model!r}: its tokenizer knows no words, only special tokens")
    return tokenizer


def fast(key: str, model: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """Give the tokenizer by which responses are decoded in other processes. Raises DataError for
    one that is written in Python."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"{key} = {model!r}: its tokenizer is a {type(tokenizer).__name__}, in Python; needed"
            " is one of the tokenizers library, with a tokenizer.json"
        )
    return tokenizer


def load(
    key: str, kind: type[AutoConfig] | type[AutoTokenizer], model: str, trust_remote_code: bool
) -> Any:
    """Read the config or the tokenizer of a model. Raises DataError."""
    try:
        with _reading(f"{key} = {model!r}: its {KINDS[kind]}"):
            return kind.from_pretrained(model, trust_remote_code=trust_remote_code)
    except DataError as e:
        if "custom code" in f"{e}":
            e.add_note("run.trust_remote_code = true has it run")
        raise


def text_config(key: str, model: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Read what a model's config says of text, which lies deeper in one of several kinds of input.
    Raises DataError."""
    config = load(key, AutoConfig, model, trust_remote_code)
    with _reading(f"{key} = {model!r}: its config"):
        return config.get_text_config(decoder=True)


def generation_config(key: str, model: str) -> GenerationConfig | None:
    """Read the generation config of a model; None where it has none. Raises DataError for one that
    transformers does not read: without a word it would take a damaged one for none."""
    with _reading(f"{key} = {model!r}: its generation_config.json"):
        file = checkpoint.generation_config_file(model)
        if file is None:
            return None
        return GenerationConfig.from_dict(json.loads(file.read_bytes()))


def heads(config: Config) -> dict[str, tuple[int, int]]:
    """Count the attention heads of queries and of keys of what runs on transformers, by section.
    Raises DataError."""
    counts: dict[str, tuple[int, int]] = {}
    for section, model in config.on_transformers.items():
        text = text_config(f"{section}.model", model, config.run.trust_remote_code)
        queries = getattr(text, "num_attention_heads", None) or 0
        counts[section] = queries, getattr(text, "num_key_value_heads", None) or queries
    return counts


def check_models(config: Config) -> None:
    """Refuse, before anything starts, what the learner cannot load and save as it will, and what
    teachers and reference cannot load."""
    key, model = "student.model", config.student.model
    check_student(key, model, config.run.trust_remote_code, config.student.lora)
    if config.student.lora and config.sync.lora == "adapter":
        check_adapter_alone(key, model, config.run.trust_remote_code, config.student.lora)
    for section, scorer in config.scorers.items():
        key, model = f"{section}.model", config.models[section]
        generation_config(key, model)
        if scorer.backend == "transformers":
            check_files(key, model)
            read_head(key, model, config.run.trust_remote_code)
        elif scorer.backend == "vllm":
            check_on_vllm(key, model, config.run.trust_remote_code)


def check_student(
    key: str, model: str, trust_remote_code: bool, adapter: LoraConfig | None = None
) -> None:
    """Refuse a student that cannot be trained, or not be saved as it will be at the end, and an
    `adapter` of what it has not."""
    called = f"{key} = {model!r}"
    config = load(key, AutoConfig, model, trust_remote_code)
    with _reading(f"{called}: its config"):
        alone = config.get_text_config(decoder=True) is config
    if not alone:
        raise DataError(
            f"{called}: its config ({config.model_type}) holds a text model beside others; a"
            " student must be a text model alone, saved as one"
        )
    if getattr(config, "quantization_config", None):
        raise DataError(f"{called}: its weights are quantized; a student's must not be")
    check_files(key, model)
    lm = read_head(key, model, trust_remote_code)
    if adapter:
        lora.targets(lm, adapter, called)
    with _reading(called), TemporaryDirectory() as folder:
        source = checkpoint.read_source(model, trust_remote_code)
        with foreign(f"{called}: cannot be saved"):
            lm.config.save_pretrained(folder)
            checkpoint_names.pieces(lm)
            loaded = getattr(lm, "generation_config", None)
            checkpoint.write_beside(loaded, source, Path(folder))
        with foreign(f"{called}: cannot be loaded again once it is saved"):
            AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if again.get_vocab() != source.tokenizer.get_vocab():
        raise DataError(f"{called}: its tokenizer has other tokens once it is saved and loaded")


def check_adapter_alone(key: str, model: str, trust_remote_code: bool, adapter: LoraConfig) -> None:
    """Refuse a student whose adapter vLLM does not take beside weights that stay."""
    called = f"sync.lora = 'adapter': {key} = {model!r}"
    lm = read_head(key, model, trust_remote_code)
    if any(name.endswith(".experts") for name, _ in lm.named_modules()):
        raise DataError(
            f"{called} has experts, for which vLLM chooses other kernels once there are places for"
            " an adapter; must be 'merged'"
        )
    layers = {name.rpartition(".")[2] for name in lora.targets(lm, adapter, called)}
    lora.wrap(lm, adapter, 0)
    AdapterAlone(lm, 1, lambda _: nullcontext())
    with environment(VLLM_CONFIGURE_LOGGING="0"):
        from async_opd.roles.weight_sync.adapter import takes_adapters

        architectures = lm.config.architectures or [type(lm).__name__]
        if not all(takes_adapters(each, layers) for each in architectures):
            raise DataError(
                f"{called} is a {architectures[0]}, in which vLLM has no place for an adapter"
                f" of {', '.join(sorted(layers))}; must be 'merged'"
            )


def read_head(key: str, model: str, trust_remote_code: bool) -> PreTrainedModel:
    """Read a model as the learner and teachers on transformers do, but for its weights' values.
    Raises DataError and ConfigError as they will."""
    called = f"{key} = {model!r}"
    with _reading(called):
        return causal_lm.read(
            called, model, ANY, trust_remote_code=trust_remote_code, weights=False
        )


def check_on_vllm(key: str, model: str, trust_remote_code: bool) -> None:
    """Refuse files that vLLM cannot load, or from which it would lack weights without a word. What
    is quantized, or of more than text, it reads in its own way. Raises DataError."""
    check_files(key, model)
    called = f"{key} = {model!r}"
    config = load(key, AutoConfig, model, trust_remote_code)
    if getattr(config, "quantization_config", None):
        return
    with _reading(called):
        if config.get_text_config(decoder=True) is config:
            causal_lm.check_weights(called, model, ANY, trust_remote_code=trust_remote_code)


def check_files(key: str, model: str) -> None:
    """Refuse files of weights that are damaged, or not all there: of each its head is read. Raises
    DataError."""
    folder = Path(model)
    for index in folder.glob("*.safetensors.index.json"):
        with foreign(f"{key} = {model!r}: {index.name}"):
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
        if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise DataError(
                f"{key} = {model!r}: {len(absent)} of {len(shards)} files that {index.name} names"
                f" are missing, such as {absent[0]}"
            )
    for file in sorted(folder.glob("*.safetensors")):
        with foreign(f"{key} = {model!r}: {file.name}"), safe_open(file, "pt"):
            pass


@contextmanager
def _reading(called: str) -> Generator[None]:
    """Name what is read in what transformers raises, and keep it from bars and logs meanwhile: what
    it logs of a broken file, it raises too."""
    with ExitStack() as undo:
        undo.enter_context(log_level(logging.CRITICAL, logging.getLogger("transformers")))
        if bars.is_progress_bar_enabled():
            undo.callback(bars.enable_progress_bar)
            bars.disable_progress_bar()
        undo.enter_context(foreign(called))
        yield
