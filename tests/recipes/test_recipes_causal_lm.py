"""Recipe ``causal_lm``: any model, any text, stage by stage, for ``from_pretrained`` at the end. All offline, on small models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError
from pipeoptim.train import run
from pipeoptim.train.recipes import get_recipe
from pipeoptim.train.set_options import with_set
from pipeoptim.train.setup import build_setup
from pipeoptim_zoo.data.text import packed_text
from pipeoptim_zoo.models.causal_lm import causal_lm

transformers = pytest.importorskip("transformers", "5.0", reason="recipe causal_lm needs Transformers 5")
datasets = pytest.importorskip("datasets", reason="recipe causal_lm needs datasets")

LLAMA = {**get_recipe("causal_lm", tiny=True).model.options["source"], "hidden_size": 16, "intermediate_size": 32}
LM = "pipeoptim_zoo.models.causal_lm:causal_lm"
PARAGRAPH = "It was a bright cold day in April, and the clocks were striking thirteen. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A GPT-2 with tied embeddings and its tokenizer, and a folder of text."""
    folder = tmp_path_factory.mktemp("causal_lm")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        transformers.set_seed(0)
        sizes = {
            "vocab_size": 259,
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 40,
            "bos_token_id": 1,
            "eos_token_id": 1,
        }
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder / "gpt2")
        transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "gpt2")
        (folder / "text").mkdir()
        (folder / "text" / "a.txt").write_text(PARAGRAPH * 12)
        (folder / "text" / "b.jsonl").write_text("".join(json.dumps({"text": PARAGRAPH, "n": n}) + "\n" for n in range(12)))
        yield folder


def config_for(folder: Path, *options: str, **changed: Any) -> TrainConfig:
    config = with_set(
        get_recipe("causal_lm"), [f"data.text={folder / 'text'}", "data.context=32", "data.validation=0.2", *options]
    )
    small = {"stages": 2, "batch_size": 4, "microbatches": 2, "steps": 5, "eval_every": 0, "checkpoint_every": 0}
    return replace(config, lr_schedule=Component("constant"), **{**small, **changed})


def exported_loss(config: TrainConfig, exported: Path) -> tuple[nn.Module, float]:
    """Of the model that ``from_pretrained`` makes, on the run's own validation batches."""
    model, about = transformers.AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(about.values())
    assert len(transformers.AutoTokenizer.from_pretrained(exported)) == 259
    setup = build_setup(config)
    with torch.no_grad():
        losses = [float(setup.task.loss(model.eval()(x), y)) for x, y in setup.validation]
    return model, sum(losses) / len(losses)


def test_a_folder_is_fine_tuned_and_exported(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, f"model.source={folder / 'gpt2'}")
    before = exported_loss(config, folder / "gpt2")[1]
    result = run(config, tmp_path / "run", progress=False)
    model, loss = exported_loss(config, tmp_path / "run" / "model")
    assert loss == pytest.approx(result.val_loss, rel=1e-5)
    assert loss < before - 0.05
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_export_names_the_tokenizers_special_tokens_and_gets_the_mode_of_any_file(folder: Path, tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "vocab_size": 259}
    config = replace(config_for(folder, steps=1, checkpoint_every=1), model=Component(LM, {"source": sizes}))
    mask = os.umask(0o027)
    try:
        run(config, tmp_path / "run", progress=False)
    finally:
        os.umask(mask)
    assert {oct(path.stat().st_mode) for path in (tmp_path / "run").rglob("*.*") if path.is_file()} == {"0o100640"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for told in (model.config, model.generation_config):  # GPT-2's defaults are 50256; ByT5's tokenizer has 1, and no beginning
        assert (told.bos_token_id, told.eos_token_id, told.pad_token_id) == (None, 1, 0)
    described = tmp_path / "run/model/config.json"
    described.write_text('{"eos_token_id": 7}')  # as a source has it that names 7 itself
    named = {"source": {**sizes, "eos_token_id": 7}}
    packed_text(str(folder / "text"), context=32, model_options=named).also_save[0].save_pretrained(described.parent)
    assert json.loads(described.read_text()) == {"bos_token_id": None, "eos_token_id": 7, "pad_token_id": 0}


def test_only_adapters_are_trained_and_the_export_has_them_merged(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = config_for(
        folder, f"model.source={folder / 'gpt2'}", "model.lora.r=2", "model.lora.lora_alpha=16", "optimizer.lr=0.01"
    )
    result = run(config, tmp_path / "run", progress=False)
    assert sum(stage.parameters for stage in result.stages) == 3 * 2 * (16 + 48)  # c_attn: 16 to 48, rank 2, three layers
    model, loss = exported_loss(config, tmp_path / "run" / "model")
    assert loss == pytest.approx(result.val_loss, rel=1e-5)
    assert result.stages[0].weight_bytes < 1.2 * 4 * sum(p.numel() for p in model.parameters())  # no copies of what is frozen
    begun = transformers.AutoModelForCausalLM.from_pretrained(folder / "gpt2").state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, begun[name])}
    assert moved == {f"transformer.h.{n}.attn.c_attn.weight" for n in range(3)}


def test_a_stage_is_read_without_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    read: list[str] = []

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None: ...

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    safe_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Counting)
    setup = build_setup(config_for(folder, f"model.source={folder / 'gpt2'}", stages=3))
    assert not read
    mine = setup.local_to(0, [1])
    assert sorted(read) == sorted(name.removeprefix("model.") for name in mine.stages[1].state_dict())
    assert all(name.startswith(("transformer.h.1", "transformer.h.2")) for name in read)
    assert not any(p.is_meta for p in mine.stages[1].parameters())
    assert all(p.is_meta for k in (0, 2) for p in setup.stages[k].parameters())


def test_what_is_drawn_is_the_same_for_any_number_of_stages_and_as_the_model_does_it(folder: Path) -> None:
    def drawn(stages: int, seed: int = 0) -> dict[str, Tensor]:
        config = config_for(folder, stages=stages, seed=seed)
        config = replace(config, model=Component(config.model.target, {"source": LLAMA}))
        setup, found = build_setup(config), {}
        for k in range(stages):  # each as in a process of its own
            stage = setup.local_to(0, [k]).stages[k]
            found |= {
                name.removeprefix("model."): value.detach()
                for name, value in (*stage.named_parameters(), *stage.named_buffers())
            }
        return found

    whole, pieces, other = drawn(1), drawn(4), drawn(1, seed=1)
    assert whole.keys() == pieces.keys() and len(whole) > 30
    assert all(torch.equal(value, pieces[name]) for name, value in whole.items())
    own = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**LLAMA))
    for name, value in {**own.state_dict(), **dict(own.named_buffers())}.items():
        constant = value.numel() < 2 or value.std() == 0 or name.endswith("inv_freq")
        assert (
            torch.equal(whole[name], value) if constant else whole[name].std() == pytest.approx(float(value.std()), rel=0.3)
        ), name
        assert constant or not torch.equal(whole[name], other[name]), name


def test_blocks_are_the_documents_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    documents = [f"{n} {PARAGRAPH * (n % 3)}" for n in range(30)]
    datasets.Dataset.from_dict({"body": documents}).to_parquet(tmp_path / "rows.parquet")
    task = packed_text(str(tmp_path / "rows.parquet"), context=16, column="body", validation=0.25)
    ids = [byte + 3 for document in documents for byte in [*document.encode(), -2]]  # ByT5: bytes from 3 on, 1 ends a document
    blocks = torch.tensor(ids[: len(ids) // 17 * 17]).view(-1, 17)
    x, y = task.train.batch(torch.arange(len(task.train)), None)
    held_out, _ = task.validation.batch(torch.arange(len(task.validation)), None)
    assert torch.equal(torch.cat([x, held_out]), blocks[:, :-1])
    assert torch.equal(y, blocks[: len(y), 1:])
    assert len(task.validation) == round(len(blocks) * 0.25)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["model.source={folder}/text", "data.tokenizer=bytes"], "no model.safetensors"),
        (["model.source={folder}/text", "model.scratch=true", "data.tokenizer=bytes"], "no configuration that can be read"),
        (["model.source={folder}/empty", "data.tokenizer=bytes"], "no model.safetensors"),
        (["model.source={folder}/empty"], "tokenizer .* has no tokens"),
        (['model.source={{"model_type": "llamb"}}'], "needs a model_type"),
        (["model.source={folder}/gpt2", "data.context=64"], "the model's context is 40, but the data .* has 64"),
        (["model.source.vocab_size=100"], "the model's vocab_size is 100, but the data .* has 259"),
        (["model.dtype=float33"], "dtype is 'float33'"),
        (["model.lora.rank=2"], "LoraConfig refuses"),
        (["data.text={folder}/text/b.jsonl", "data.column=words"], "not 'words'"),
        (["data.text={folder}/nowhere"], "is no file and no folder in"),
        (["data.text=here.txt"], "is no file and no folder in"),
        (["data.text=a/b/c"], "is no file and no folder in"),
        (["data.text={folder}/nothing"], "no file that ends in one of .txt"),
        (["data.text=[]"], r"text \[\] has no file"),
        (["data.text={folder}/gpt2/config.json"], "no file that ends in one of .txt"),
        (["data.context=2000"], "not enough to train"),
        (["data.tokenizer={folder}/text"], "tokenizer .* cannot be read"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, options: list[str], told: str) -> None:
    for name in ("empty", "nothing"):
        (folder / name).mkdir(exist_ok=True)
    transformers.GPT2Config().save_pretrained(folder / "empty")
    with pytest.raises(ConfigError, match=told):
        build_setup(config_for(folder, *(option.format(folder=folder) for option in options)))


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    model = causal_lm(str(folder / "gpt2"))
    other = causal_lm({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 259})
    with pytest.raises(ConfigError, match=r"shape \[259, 16\], must be of shape \[259, 8\]"):
        replace(other, read=model.read).whole()


@pytest.mark.parametrize("text", ["source=a", "model=a", "modell.source=a", "model.=a", "model.width"])
def test_what_is_set_wrongly_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        with_set(get_recipe("chars"), [text])
