"""Fine-tuning a causal language model of Hugging Face Transformers, one part of it in each process, and exporting it.

Run it:  torchrun --nproc-per-node 2 examples/huggingface_causal_lm.py [folder of the export]
A real run loads weights with AutoModelForCausalLM.from_pretrained; here they are random and the text is made on the fly.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from transformers import GPT2Config, GPT2LMHeadModel

import pipeoptim as po

STEPS, BATCH, LENGTH, LAYERS = int(os.environ.get("STEPS", "60")), 8, 32, 4
TEXT = " ".join(f"{a} plus {b} is {a + b}." for a in range(40) for b in range(40))
LETTERS = sorted(set(TEXT))


def build_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": len(LETTERS), "n_positions": LENGTH, "n_embd": 48, "n_layer": LAYERS, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0))


def cut(model: GPT2LMHeadModel, depth: int) -> list[nn.Module]:
    # All processes must cut at the same places: named here. Without pins the cut is measured; do that once, not in each process.
    pins = [f"transformer.h.{k * LAYERS // depth}" for k in range(1, depth)]
    return po.partition(model, depth, (torch.zeros(1, LENGTH, dtype=torch.long),), pins=pins).stages


def loss_fn(output, ids):
    return nn.functional.cross_entropy(output.logits[:, :-1].mT, ids[:, 1:])


def batches(seed: int, count: int):
    ids, generator = torch.tensor([LETTERS.index(c) for c in TEXT]), torch.Generator().manual_seed(seed)
    for starts in torch.randint(len(ids) - LENGTH, (count, BATCH), generator=generator):
        yield torch.stack([ids[s : s + LENGTH] for s in starts])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group()
    k, depth = dist.get_rank(), dist.get_world_size()
    first, last = k == 0, k == depth - 1
    part = cut(build_model(), depth)[k]
    stage = PipelineStage(part, k, depth, torch.device("cpu"))
    optimizer = torch.optim.AdamW(part.parameters(), lr=3e-3)
    schedule = po.Schedule(stage, optimizer, loss_fn, microbatches=2, clip=po.Clip(1.0, "global"))
    for folder in sys.argv[1:]:
        po.check_export(schedule, folder)  # better told now than after training

    for step, ids in enumerate(batches(1, STEPS)):
        schedule.step(*([ids] if first else []), target=ids if last else None)
        if (step + 1) % (STEPS // 3) == 0:  # validation in between, on the latest weights of each stage
            ids = next(batches(2, 1))
            loss = schedule.eval_step(*([ids] if first else []), target=ids if last else None, drain=False)
            if last:
                print(f"step {step + 1}: validation loss {loss:.4f}", flush=True)
    schedule.drain()
    for folder in sys.argv[1:]:
        po.save_weights(schedule, folder)
        ids = next(batches(2, 1))
        loss = schedule.eval_step(*([ids] if first else []), target=ids if last else None)
        if last:  # what anybody can do with the folder
            model = GPT2LMHeadModel.from_pretrained(folder).eval()
            print(f"exported: loss {loss:.4f}, from_pretrained: loss {loss_fn(model(ids), ids):.4f}", flush=True)
    schedule.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
