"""A sampler with faults that can be put in one at a time: decoding by whole passes, apart from the trainer's code."""

import torch

from flowrl_kernels.trainer.rollout import Generated


class FaultyEngine:
    """Decodes with `model`; everything that is not its default is a fault."""

    def __init__(self, model, *, scale=1.0, cap=None, head=None, half_head=False, temperature=None, top_p=1.0, top_k=0,
                 penalty=1.0, bias=None, write=list, shift=0, drop_end=False, raw=False):  # fmt: skip
        self.model, self.scale, self.cap, self.head, self.half_head = model, scale, cap, head, half_head
        self.temperature, self.top_p, self.top_k, self.penalty, self.bias = temperature, top_p, top_k, penalty, bias
        self.write, self.shift, self.drop_end, self.raw = write, shift, drop_end, raw

    def update_weights(self, weights, version):
        raise AssertionError("the doctor looks at what is there")

    def logits(self, rows, starts):
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        count = torch.arange(width).expand(len(rows), -1)
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        positions = (count + self.shift * (count >= torch.tensor(starts)[:, None])).clamp(min=0)
        states = self.model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=(count < lengths).long(), use_cache=False
        ).last_hidden_state
        last = states[torch.arange(len(rows)), lengths[:, 0] - 1]
        weight = self.model.get_output_embeddings().weight if self.head is None else self.head
        if self.half_head:
            z = (last.bfloat16() @ weight.bfloat16().T).float()
        else:
            z = last.float() @ weight.float().T
        z = z * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    @torch.no_grad()
    def generate(self, prompts, n, sampling, seed, numbers=None):
        draw = torch.Generator().manual_seed(seed)
        prompts = [self.write(prompt) for prompt in prompts for _ in range(n)]
        rows, starts = [list(p) for p in prompts], [len(p) for p in prompts]
        logps, done = [[] for _ in rows], [False] * len(rows)
        heat = sampling.temperature if self.temperature is None else self.temperature
        for _ in range(sampling.max_new_tokens):
            z = self.logits(rows, starts)
            if self.penalty != 1.0:
                for b, row in enumerate(rows):
                    seen = list(set(row))
                    z[b, seen] = torch.where(z[b, seen] > 0, z[b, seen] / self.penalty, z[b, seen] * self.penalty)
            for token, by in (self.bias or {}).items():
                z[:, token] += by
            z = z / heat
            whole = z.log_softmax(-1)
            if self.top_k:
                z = z.masked_fill(z < z.topk(self.top_k).values[:, -1:], -torch.inf)
            if self.top_p < 1.0:
                p, order = z.softmax(-1).sort(-1, descending=True)
                gone = (p.cumsum(-1) - p) >= self.top_p
                z = z.scatter(1, order, z.gather(1, order).masked_fill(gone, -torch.inf))
            logp = z.log_softmax(-1)
            tokens = torch.multinomial(logp.exp(), 1, generator=draw)[:, 0].tolist()
            for b, token in enumerate(tokens):
                if not done[b]:
                    rows[b].append(token)
                    logps[b].append(float((whole if self.raw else logp)[b, token]))
                    done[b] = token in sampling.stop
            if all(done):
                break
        out = [row[start:] for row, start in zip(rows, starts)]
        if self.drop_end:
            out = [row[:-1] if end else row for row, end in zip(out, done)]
            logps = [row[:-1] if end else row for row, end in zip(logps, done)]
        width = max(map(len, out))
        return Generated(
            torch.tensor([row + [0] * (width - len(row)) for row in out]),
            torch.tensor([row + [0.0] * (width - len(row)) for row in logps]),
            torch.tensor([len(row) for row in out]),
            torch.tensor(done),
        )
