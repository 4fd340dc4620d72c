"""A teacher's top-k, on the student's own samples or on text: one forward of the head gives every id's log-prob.

The teacher (a server's `prompt_logprobs`, or a model that is run once) hands over K ids and their log-probs a token;
-100 ends a shorter list. The loss is the KL divergence of the student from the teacher over K + 1 outcomes: each of the
K ids, and any other token (docs/maths.md, eq. 33). Here teacher and student are heads on the same random states.

    python examples/topk_distillation.py
"""

import torch
from torch import Tensor

from flowrl_kernels import linear_logprob


def topk_distillation_loss(logp: Tensor, teacher_logp: Tensor, ids: Tensor) -> Tensor:
    """KL(teacher || student) of each row, in nats, over the row's K ids and one outcome for all others.

    logp: [N, K] the student's, with its gradient. teacher_logp: [N, K], over the teacher's whole vocabulary. ids:
    [N, K], -100 where there is none. Returns [N].
    """
    listed = ids >= 0
    q = torch.where(listed, teacher_logp.exp(), 0.0)
    rest_q = (1.0 - q.sum(-1)).clamp_min(1e-6)
    rest_p = (1.0 - torch.where(listed, logp.exp(), 0.0).sum(-1)).clamp_min(1e-6)
    listed_part = (q * torch.where(listed, teacher_logp - logp, 0.0)).sum(-1)
    return listed_part + rest_q * (rest_q.log() - rest_p.log())


def main(steps: int = 200, k: int = 16) -> list[float]:
    """The mean loss at each tenth of the steps."""
    torch.manual_seed(0)
    hidden = torch.randn(256, 32)
    with torch.no_grad():
        teacher_logp, ids = torch.log_softmax(hidden @ torch.randn(1000, 32).T, -1).topk(k)
    student = torch.nn.Linear(32, 1000)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for step in range(steps):
        logp = linear_logprob(hidden, student.weight, ids, bias=student.bias).logp  # [N, K]
        loss = topk_distillation_loss(logp, teacher_logp, ids).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % max(1, steps // 10) == 0:
            losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    print("KL from the teacher, nats a token:", " ".join(f"{loss:.3f}" for loss in main()))
