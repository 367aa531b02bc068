"""Train nano-base: DiT and text encoder together, by flow matching on the encoded corpus (docs/model.md, section 6).

    python recipes/nano/base.py WORK --minutes 600           # WORK/latents from targets.py; resumes WORK/base.pt
    python recipes/nano/base.py WORK --cool 15               # from there 15 minutes down to rate 0: WORK/base-cool.pt

The rate is constant after a warm-up, so a run can stop and resume at any time. `--cool` trains a copy with a falling
rate, which is the one to measure and ship; its tails are as long as those of generation (`parts.WHOLE`). `--long` uses
longer clips and silences (`parts.LONG`): for the later part.

Shapes: B items, C latent channels, T latent frames.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from parts import (
    LONG,
    SHORT,
    WHOLE,
    Average,
    Batch,
    Cap,
    Corpus,
    Nano,
    load_silence,
    optimizers,
    set_rate,
    state_of,
    tokenizer_of,
)
from speed import autocast, fast_cpu_blocks
from torch import Tensor, nn

from sa3train.core.files import replace_file
from sa3train.diffusion.masks import draw_inpainting_masks
from sa3train.diffusion.objective import (
    add_noise,
    compute_losses,
    compute_squared_error,
    compute_velocity_target,
    match_noise,
    sample_trunc_logit_normal,
)
from sa3train.diffusion.schedule import shift_full

DROPPED = 0.1  # items without a prompt, for guidance
SAVE_SECONDS = 240.0


def flow_loss(
    model: Nano, batch: Batch, rng: random.Random, generator: torch.Generator, drop: float = DROPPED
) -> Tensor:
    """Compute the training loss of a batch: over generated frames plus over inpainting context."""
    data_BCT = batch.latents_BCT
    size = len(data_BCT)
    t_B = sample_trunc_logit_normal(size, generator)
    t_B = shift_full(t_B, batch.frames_B.cpu()).to(data_BCT.device)
    noise_BCT = torch.randn(data_BCT.shape, generator=generator).to(data_BCT.device)
    noise_BCT = noise_BCT[match_noise(data_BCT, noise_BCT)]
    inpaint_B1T = draw_inpainting_masks(batch.real_BT, rng)
    drop_B = (torch.rand(size, generator=generator) < drop).to(data_BCT.device)
    with autocast(data_BCT.device.type):
        condition = model.condition(batch, drop_B)
        velocity_BCT = model.dit(
            add_noise(data_BCT, noise_BCT, t_B),
            t_B,
            cross_attn_cond_BLD=condition.cross_attn_cond_BLD,
            global_cond_BD=condition.global_cond_BD,
            local_add_cond_BCT=torch.cat((inpaint_B1T, data_BCT * inpaint_B1T), 1),
            attention_mask_BT=batch.real_BT,
        )
    error_BCT = compute_squared_error(velocity_BCT.float(), compute_velocity_target(data_BCT, noise_BCT))
    return sum(compute_losses(error_BCT, inpaint_B1T, batch.real_BT), torch.zeros(()))


class Run:
    """A resumable run with a time limit in minutes."""

    def __init__(self, work: Path, minutes: float, rate: float, long: bool = False, cool: bool = False) -> None:
        self.work, self.rate, self.cool, self.caps = work, rate, cool, WHOLE if cool else LONG if long else SHORT
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.tokenizer, self.silence_C = tokenizer_of(work), load_silence(work)
        self.model = Nano(len(self.tokenizer), len(self.silence_C)).to(self.device)
        if self.device.type == "cpu":
            fast_cpu_blocks(self.model.dit.transformer.layers)
        self.optimizers = optimizers(self.model, rate)
        self.average = Average(self.model, 0.998)
        self.step, self.seconds, self.began = 0, 0.0, 0.0
        self.path = work / ("base-cool.pt" if cool else "base.pt")
        start = self.path if self.path.exists() else work / "base.pt"
        if start.exists():
            saved = torch.load(start, weights_only=True, map_location=self.device)
            self.model.load_state_dict(saved["model"])
            for number, optimizer in enumerate(self.optimizers):
                optimizer.load_state_dict(saved[f"optimizer{number}"])
            self.average.state, self.average.count = saved["average"], saved["count"]
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.began = saved["began"] if start == self.path else self.seconds
        self.total = (self.began if cool else 0.0) + 60 * minutes

    def share(self) -> float:
        """Compute the factor of the rate: warm-up over 100 steps, then constant; linear down to 1 % when cooling."""
        if self.cool:
            return max(0.01, (self.total - self.seconds) / (self.total - self.began))
        return min(1.0, (self.step + 1) / 100)

    def save(self) -> None:
        """Save everything needed to resume."""
        saved = state_of(model=self.model, **{f"optimizer{i}": each for i, each in enumerate(self.optimizers)})
        saved |= {
            "average": self.average.state,
            "count": self.average.count,
            "step": self.step,
            "seconds": self.seconds,
            "began": self.began,
        }
        with replace_file(self.path) as path:
            torch.save(saved, path)

    def log(self, **values: float) -> None:
        """Log a line to the screen and to WORK/base.jsonl."""
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **values})
        print(line, flush=True)
        with (self.work / "base.jsonl").open("a") as file:
            file.write(line + "\n")

    @torch.no_grad()
    def validate(self, corpus: Corpus) -> float:
        """Compute the loss of the EMA weights on 128 held-out clips with fixed noise, noise levels and masks."""
        current = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.state)
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        total = 0.0
        for start in range(0, 128, 64):
            picks = [pick % len(corpus.latents) for pick in range(start, start + 64)]
            batch = corpus.batch(picks, Cap(48, 64, 16, 1.0, 1.0), rng).to(self.device)
            total += float(flow_loss(self.model, batch, rng, generator, drop=0.0)) / 2
        self.model.load_state_dict(current)
        return total

    def train(self) -> None:
        """Train until the time is over; a later start with more minutes resumes."""
        batches = Corpus(self.work, "train", self.tokenizer, self.silence_C).batches(self.step, self.caps)
        held_out = Corpus(self.work, "val", self.tokenizer, self.silence_C)
        rng, generator = random.Random(self.step), torch.Generator().manual_seed(self.step)
        mark, saved_at = time.monotonic(), self.seconds
        recent: list[float] = []
        while self.seconds < self.total:
            for optimizer in self.optimizers:
                set_rate(optimizer, self.rate * self.share())
                optimizer.zero_grad(set_to_none=True)
            loss = flow_loss(self.model, next(batches).to(self.device), rng, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(self.model)
            self.step += 1
            recent.append(float(loss.detach()))
            now = time.monotonic()
            self.seconds, mark = self.seconds + min(60.0, now - mark), now  # a paused process has not trained
            if self.step % 50 == 0:
                self.log(loss=round(sum(recent) / len(recent), 4))
                recent = []
            if self.seconds - saved_at > SAVE_SECONDS or self.seconds >= self.total:
                self.log(held_out=round(self.validate(held_out), 4))
                self.save()
                saved_at = self.seconds


def main() -> None:
    """Train, or resume training."""
    parser = argparse.ArgumentParser(description="train nano-base")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--long", action="store_true", help="longer clips and silences, for the later part")
    parser.add_argument("--cool", type=float, help="minutes of training a copy with a falling rate")
    args = parser.parse_args()
    Run(args.work, args.cool or args.minutes, args.rate, args.long, args.cool is not None).train()


if __name__ == "__main__":
    main()
