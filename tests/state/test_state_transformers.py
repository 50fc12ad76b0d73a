"""A published checkpoint goes into the stages without a process that holds it all, and comes back to its own class."""

from __future__ import annotations

import pytest
import torch

import pipeoptim as po

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
TOKENIZER = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
)
IDS = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(0))
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40,
            n_positions=8,
            n_embd=16,
            n_layer=4,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            use_cache=False,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, use_cache=False
        )
    ),
}


def loss_fn(output, target):
    logits = output.logits if hasattr(output, "logits") else output["logits"] if isinstance(output, dict) else output
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


@pytest.mark.parametrize("name", MODELS)
def test_pretrained_in_and_from_pretrained_out(tmp_path, name):
    torch.manual_seed(1)
    published = MODELS[name]().eval()
    published.save_pretrained(tmp_path / "published")
    torch.manual_seed(2)
    cut = po.partition(MODELS[name](), 3, (IDS,), pins=[1, 3])
    for stage in cut.stages:
        po.load_weights(stage, tmp_path / "published")
    whole = cut.full_state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in published.state_dict().items())

    pipe = po.Emulator(cut, lambda p: torch.optim.SGD(p, lr=0.1), loss_fn)
    before = float(pipe.eval_step(IDS, target=IDS))
    assert before == pytest.approx(loss_fn(published(IDS), IDS).item(), rel=1e-5)
    po.check_export(pipe, tmp_path / "out", also_save=[TOKENIZER])
    for _ in range(2):
        pipe.step(IDS, target=IDS)
    po.save_weights(pipe, tmp_path / "out", also_save=[TOKENIZER])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model) is type(published)
    assert loss_fn(model(IDS), IDS).item() == pytest.approx(float(pipe.eval_step(IDS, target=IDS)), rel=1e-5)
    again, full = model.state_dict(), po.full_state_dict(pipe)
    assert full.keys() == again.keys()
    assert all(torch.equal(full[key], again[key]) for key in full)
    assert TOKENIZER.get_vocab() == transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert any(not torch.equal(full[key], value) for key, value in published.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_values_is_filled_stage_by_stage_and_computes_what_was_published(tmp_path, name):
    empty = pytest.importorskip("accelerate").init_empty_weights
    torch.manual_seed(1)
    published = MODELS[name]().eval()
    published.save_pretrained(tmp_path / "published")
    with empty(include_buffers=False):  # rotary frequencies and the like are in no checkpoint
        model = MODELS[name]()
    model.tie_weights()
    assert all(p.is_meta for p in model.parameters())
    cut = po.partition(model, 3, (IDS,), pins=[1, 3])
    for stage in cut.stages:
        po.load_weights(stage, tmp_path / "published")
    pipe = po.Emulator(cut.stages, lambda p: torch.optim.SGD(p, lr=0.1), loss_fn)
    assert float(pipe.eval_step(IDS, target=IDS)) == pytest.approx(loss_fn(published(IDS), IDS).item(), rel=1e-5)
    before = po.full_state_dict(pipe)
    pipe.step(IDS, target=IDS)
    pipe.drain()
    assert all(torch.isfinite(value).all() for value in cut.full_state_dict().values())
    assert any(not torch.equal(value, before[key]) for key, value in cut.full_state_dict().items())
