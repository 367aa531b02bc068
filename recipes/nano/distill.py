"""Distill nano-base into nano: eight steps of the pingpong sampler without guidance instead of fifty guided ones.

    python recipes/nano/distill.py WORK --minutes 15      # WORK/base-cool.pt from base.py; resumes WORK/post.pt

Trajectory regression: the guided base goes from noise to data in 16 Euler steps, and the student learns to predict
the end from any point on the way. A pool of trajectories is refilled during training. Text encoder and conditioner stay
those of the base. Shapes: B items, C latent channels, T latent frames, K points of a trajectory.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from parts import WHOLE, Average, Batch, Corpus, Nano, load_silence, optimizers, set_rate, state_of, tokenizer_of
from speed import autocast, fast_cpu_blocks
from torch import Tensor, nn

from sa3train.core.files import replace_file
from sa3train.diffusion.guidance import Condition, Guidance, compute_guided_velocity
from sa3train.diffusion.schedule import build_schedule
from sa3train.models.conditioners import Conditioning

WALK_STEPS = 16
POOL = 24  # batches of walks kept
LESSONS = 10  # student steps per new batch of walks
GUIDANCE = Guidance(cfg_scale=4.0)


@dataclass
class Walks:
    """A batch of trajectories: points, their noise levels, ends, and conditions."""

    points_KBCT: Tensor
    levels_K: Tensor
    ends_BCT: Tensor
    condition: Conditioning
    real_BT: Tensor
    local_BCT: Tensor


@torch.no_grad()
def walk(teacher: Nano, batch: Batch, generator: torch.Generator) -> Walks:
    """Compute the teacher's guided trajectories for the prompts and lengths of a batch; its latents are not used."""
    device = batch.latents_BCT.device
    with autocast(device.type):
        asked = teacher.condition(batch)
    size, channels, frames = batch.latents_BCT.shape
    local_BCT = torch.zeros(size, channels + 1, frames, device=device)
    real_BT = torch.ones(size, frames, dtype=torch.bool, device=device)
    condition = Condition(asked.cross_attn_cond_BLD, asked.global_cond_BD, local_BCT, real_BT)
    levels = build_schedule(WALK_STEPS)
    x_BCT = torch.randn(size, channels, frames, generator=generator).to(device)
    points = []
    for t, t_next in itertools.pairwise(levels):
        points.append(x_BCT.half())
        with autocast(device.type):
            v_BCT = compute_guided_velocity(teacher.dit, x_BCT, t.expand(size), condition, GUIDANCE)
        x_BCT = x_BCT + (t_next - t).to(device) * v_BCT.float()
    return Walks(torch.stack(points), levels[:-1].to(device), x_BCT.half(), asked, real_BT, local_BCT)


def lesson(student: nn.Module, walks: Walks, generator: torch.Generator) -> Tensor:
    """Compute the mean squared error of ends predicted from one random point per item, weighted by 1/t."""
    size = walks.ends_BCT.shape[0]
    device = walks.ends_BCT.device
    picks_B = torch.randint(len(walks.levels_K), (size,), generator=generator).to(device)
    x_BCT = walks.points_KBCT[picks_B, torch.arange(size, device=device)].float()
    t_B = walks.levels_K[picks_B]
    with autocast(device.type):
        v_BCT = student(
            x_BCT,
            t_B,
            cross_attn_cond_BLD=walks.condition.cross_attn_cond_BLD,
            global_cond_BD=walks.condition.global_cond_BD,
            local_add_cond_BCT=walks.local_BCT,
            attention_mask_BT=walks.real_BT,
        )
    named_BCT = x_BCT - t_B[:, None, None] * v_BCT.float()
    error_B = (named_BCT - walks.ends_BCT.float()).square().mean((1, 2))
    return (error_B / t_B).mean()


class Run:
    """A resumable distillation with a time limit in minutes."""

    def __init__(self, work: Path, minutes: float, rate: float) -> None:
        self.work, self.total, self.rate = work, 60 * minutes, rate
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer, self.silence_C = tokenizer_of(work), load_silence(work)
        self.teacher = Nano(len(self.tokenizer), len(self.silence_C)).to(self.device).requires_grad_(False)
        cooled = work / "base-cool.pt"
        base = torch.load(cooled if cooled.exists() else work / "base.pt", weights_only=True, map_location=self.device)
        self.teacher.load_state_dict(base["average"])
        self.student = copy.deepcopy(self.teacher.dit).requires_grad_(True)
        if self.device.type == "cpu":
            for model in (self.teacher.dit, self.student):
                fast_cpu_blocks(model.transformer.layers)
        self.optimizers = optimizers(nn.ModuleDict({"dit": self.student}), rate)
        self.average = Average(self.student, 0.99)
        self.step, self.seconds = 0, 0.0
        self.path = work / "post.pt"
        if self.path.exists():
            self._load(torch.load(self.path, weights_only=True, map_location=self.device))

    def _load(self, saved: dict[str, Any]) -> None:
        self.student.load_state_dict(saved["model"])
        for number, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(saved[f"optimizer{number}"])
        self.average.state, self.average.count = saved["average"], saved["count"]
        self.step, self.seconds = saved["step"], saved["seconds"]

    def save(self) -> None:
        """Save everything needed to resume but the pool, which is refilled."""
        saved = state_of(model=self.student, **{f"optimizer{i}": each for i, each in enumerate(self.optimizers)})
        saved |= {"average": self.average.state, "count": self.average.count}
        with replace_file(self.path) as path:
            torch.save(saved | {"step": self.step, "seconds": self.seconds}, path)

    def train(self) -> None:
        """Train until the time is over."""
        caps = [cap._replace(items=cap.items // 2) for cap in WHOLE]
        corpus = Corpus(self.work, "train", self.tokenizer, self.silence_C)
        batches = corpus.batches(10_000 + self.step, caps)
        generator, rng = torch.Generator().manual_seed(self.step), random.Random(self.step)
        pool: list[Walks] = []
        mark = time.monotonic()
        recent: list[float] = []
        while self.seconds < self.total:
            if self.step % LESSONS == 0:
                pool = [*pool[-POOL + 1 :], walk(self.teacher, next(batches).to(self.device), generator)]
            for optimizer in self.optimizers:
                set_rate(optimizer, self.rate * min(1.0, 0.02 + 2 * (1 - self.seconds / self.total)))
                optimizer.zero_grad(set_to_none=True)
            loss = lesson(self.student, rng.choice(pool), generator)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(self.student)
            self.step += 1
            recent.append(float(loss.detach()))
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if self.step % 20 == 0:
                loss_now = round(sum(recent) / len(recent), 4)
                line = json.dumps({"step": self.step, "seconds": round(self.seconds), "loss": loss_now})
                print(line, flush=True)
                with (self.work / "post.jsonl").open("a") as file:
                    file.write(line + "\n")
                recent = []
            if self.step % 100 == 0:
                self.save()
        self.save()


def main() -> None:
    """Distill, or resume."""
    parser = argparse.ArgumentParser(description="distil nano-base into nano")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--rate", type=float, default=7e-4)
    args = parser.parse_args()
    Run(args.work, args.minutes, args.rate).train()


if __name__ == "__main__":
    main()
