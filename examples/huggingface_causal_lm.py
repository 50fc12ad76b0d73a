"""Fine-tuning a causal language model of Hugging Face Transformers, one part of it in each process.

Run it:  torchrun --nproc-per-node 2 examples/huggingface_causal_lm.py
A real run loads weights with AutoModelForCausalLM.from_pretrained; here they are random and the text is made on the fly.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from transformers import GPT2Config, GPT2LMHeadModel

import pipeoptim as po

STEPS, BATCH, LENGTH = int(os.environ.get("STEPS", "60")), 8, 32
TEXT = " ".join(f"{a} plus {b} is {a + b}." for a in range(40) for b in range(40))
LETTERS = sorted(set(TEXT))


def build_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(LETTERS), "n_positions": LENGTH, "n_embd": 48, "n_layer": 4, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0))


class Part(nn.Module):
    """Stage ``k``: its blocks, the embeddings before the first, the head after the last. Names stay the model's."""

    def __init__(self, model: GPT2LMHeadModel, k: int, depth: int) -> None:
        super().__init__()
        body, n, self.first, self.last = model.transformer, len(model.transformer.h), k == 0, k == depth - 1
        blocks = {str(i): body.h[i] for i in range(k * n // depth, (k + 1) * n // depth)}
        before = {"wte": body.wte, "wpe": body.wpe, "drop": body.drop} if self.first else {}
        self.transformer = nn.ModuleDict({"h": nn.ModuleDict(blocks), **before})
        if self.last:
            self.transformer["ln_f"], self.lm_head = body.ln_f, model.lm_head

    def forward(self, x):  # token ids at first, then hidden states
        body = self.transformer
        if self.first:
            x = body["drop"](body["wte"](x) + body["wpe"](torch.arange(x.shape[1], device=x.device)))
        for block in body["h"].values():
            x = block(x)
        return self.lm_head(body["ln_f"](x)) if self.last else x


def loss_fn(logits, ids):
    return nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:])


def batches(seed: int, count: int):
    ids, generator = torch.tensor([LETTERS.index(c) for c in TEXT]), torch.Generator().manual_seed(seed)
    for starts in torch.randint(len(ids) - LENGTH, (count, BATCH), generator=generator):
        yield torch.stack([ids[s : s + LENGTH] for s in starts])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group()
    k, depth = dist.get_rank(), dist.get_world_size()
    part = Part(build_model(), k, depth)
    stage, optimizer = PipelineStage(part, k, depth, torch.device("cpu")), torch.optim.AdamW(part.parameters(), lr=3e-3)
    schedule = po.Schedule(stage, optimizer, loss_fn, microbatches=2, clip=1.0)
    for step, ids in enumerate(batches(1, STEPS)):
        schedule.step(*([ids] if k == 0 else []), target=ids if k == depth - 1 else None)
        if (step + 1) % (STEPS // 3) == 0:  # validation in between, on the latest weights of each stage
            ids = next(batches(2, 1))
            loss = schedule.eval_step(*([ids] if k == 0 else []), target=ids, drain=False)
            if k == depth - 1:
                print(f"step {step + 1}: validation loss {loss:.4f}", flush=True)
    schedule.drain()
    schedule.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
