"""The training loop: AdamW on a student, its moving average, checkpoints, and what is said about them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError, WorkError
from ..heap import keep_freed_memory
from ..models.student import Student
from ..pairs import Pairs
from ..pictures import grid
from ..records import differences
from .checkpoint import load_checkpoint, save_checkpoint, steps_saved, tidy
from .config import Run, TrainConfig
from .memory import TO_COME, check_disk, check_memory, saved_bytes
from .monitor import Monitor, flops_a_pair, peak_flops
from .objective import Losses, Objective
from .parallel import Ranks, assign, drop_gathered, last_of_several, local, parallelise, whole
from .source import Source, draw_timesteps

FIGURES = ("loss", "distance", "cross_entropy", "agreement")


class Report(Protocol):
    """Is told how training goes, on the first rank."""

    def step(self, step: int, figures: dict[str, float]) -> None:
        """``step`` steps are done; ``figures`` are of the latest logged ones."""

    def say(self, text: str) -> None:
        """A line for people."""


class Trainer:
    """Trains one student, from the newest checkpoint in the folder where there is one.

    Args:
        folder: of the run.
        identity: JSON-able facts that decide the student beside ``config``: its pairs and teacher.
        images: embeddings [B, L, C] to images [B, 3, H, W] in [0, 1].
        keep_student: writes the average's weights (by name) of a step where users load students from.
    Raises:
        UserError: the folder holds a run of another configuration, or a damaged checkpoint; nothing was written.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        run: Run,
        student: Student,
        source: Source,
        objective: Objective,
        identity: dict[str, Any],
        *,
        images: Callable[[Tensor], Tensor],
        keep_student: Callable[[dict[str, Tensor], int], None],
        ranks: Ranks,
        report: Report,
    ) -> None:
        config.check_timesteps(student.groups)
        self.micro, self.accumulate = run.pieces(config.batch, ranks.world)
        self.folder, self.config, self.run, self.ranks, self.report = folder, config, run, ranks, report
        self.student, self.source, self.objective = student, source, objective
        self.identity = identity | {"config": config.to_dict()}
        self.how = {
            "precision": run.precision,
            "micro_batch": self.micro,
            "ranks": ranks.world,
            "parallel": run.parallel,
        }
        self.images, self.keep_student = images, keep_student
        self.device = next(student.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype: torch.dtype = getattr(torch, run.precision)
        self.flops = flops_a_pair(student)
        student.activation_checkpointing = run.activation_checkpointing
        if run.compile:
            for block in student.stack:
                block.compile()
        self.model = parallelise(student, run.parallel, ranks, bool(config.distance_weight and config.ce_weight))
        self.parameters = dict(student.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = self._adamw()
        self.window = torch.zeros(len(FIGURES) + 1, dtype=torch.float64, device=self.device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self.asked: list[bool] = []  # filled when someone asks to stop
        self.told = torch.zeros((), device=self.device)  # on how many ranks that was so in the last step
        self.done = self.resume()

    def check_room(self) -> None:
        """Raise UserError where a step does not fit in memory, or what the run leaves on the disk."""
        owned = {local(p).untyped_storage().data_ptr() for p in self.parameters.values()}
        one = self.source.holdout(range(1))
        self.student.train()

        def losses(count: int) -> Losses:
            pairs = Pairs(*(t.expand(count, *t.shape[1:]).contiguous() for t in one))
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return self.objective(self.student, pairs, torch.zeros_like(pairs.labels))

        if self.done < self.config.steps:
            first, third = (saved_bytes(partial(losses, count), owned) for count in (1, 3))
            pair = (third - first) // 2
            here = sum(local(p).numel() for p in self.parameters.values())
            fixed = max(0, first - pair) + TO_COME * here
            check_memory(pair, fixed, self.micro, self.micro * self.accumulate, self.device)
        if self.ranks.first:
            check_disk(self.folder, sum(p.numel() for p in self.parameters.values()), self.run.keep)

    def _adamw(self) -> torch.optim.AdamW:
        """Matrices of linear layers decay; vectors, embeddings and positions do not."""
        linear = {id(m.weight) for m in self.student.modules() if isinstance(m, nn.Linear)}
        groups = [
            {
                "params": [p for p in self.parameters.values() if (id(p) in linear) == decays],
                "weight_decay": self.config.weight_decay * decays,
            }
            for decays in (True, False)
        ]
        return torch.optim.AdamW(groups, lr=self.config.peak_lr, betas=self.config.betas, fused=True)

    def train(self) -> dict[str, float]:
        """Run the steps that are left; returns the last measurement on the holdout.

        Raises:
            WorkError: a loss or gradient is not finite; the error names the step, and the checkpoints before it stay.
            KeyboardInterrupt: after a first Ctrl-C or SIGTERM, with everything saved.
        """
        step, config = self.done, self.config
        if step == config.steps:
            return self.measure(step, None)
        monitor = Monitor(self.folder, step) if self.ranks.first else None
        try:
            return self.go_on(step, monitor)
        finally:
            if monitor is not None:
                monitor.close()

    def go_on(self, step: int, monitor: Monitor | None) -> dict[str, float]:
        """The steps from ``step`` on; the last measurement."""
        config, run = self.config, self.run
        peak, source = peak_flops(self.device, self.dtype)
        self.report.say(f"{self.flops / 1e9:.4g} GFLOP a pair; peak {peak / 1e12:.4g} TFLOP/s ({source})")
        figures: dict[str, float] = {}
        measured: dict[str, float] = {}
        begin, since = time.perf_counter(), step
        with stopping() as self.asked:
            while step < config.steps:
                told = self.told
                self.step(step)
                step += 1
                last = step == config.steps
                # Ranks agree by the sum of the step before, which waits for no more than that.
                stop = bool(self.asked) if self.ranks.world == 1 else bool(told)
                if step == self.done + 1:
                    begin, since = time.perf_counter(), step  # the first step compiles and warms up
                if step % run.log_every == 0 or last:
                    figures = self.figures(step)
                    if step > since:
                        figures["pairs_per_s"] = (step - since) * config.batch / (time.perf_counter() - begin)
                        figures["mfu"] = figures["pairs_per_s"] * self.flops / (peak * self.ranks.world)
                    if monitor is not None:
                        monitor.scalars(step, **figures)
                    begin, since = time.perf_counter(), step
                self.report.step(step, figures)
                if step % run.eval_every == 0 or last:
                    measured = self.measure(step, monitor)
                if step % run.save_every == 0 or last or stop:
                    self.save(step, monitor)
                    if stop and not last:
                        raise KeyboardInterrupt
                if step % run.eval_every == 0 or step % run.save_every == 0:
                    begin, since = time.perf_counter(), step  # speed is that of steps alone
        return measured

    def step(self, step: int) -> None:
        """One optimiser step on step ``step``'s batch; waits for no device, unless the teacher makes the pairs."""
        config, ranks = self.config, self.ranks
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        t_all, mine = draw_timesteps(config, step), ranks.part(config.batch)
        sums = torch.zeros(len(FIGURES) + 1, device=self.device)
        sums[-1] = float(bool(self.asked))
        for i in range(self.accumulate):
            part = range(mine.start + i * self.micro, mine.start + (i + 1) * self.micro)
            pairs = self.source.batch(step, part)
            t_B = t_all[part.start : part.stop].to(self.device, non_blocking=True)
            with last_of_several(self.model, i == self.accumulate - 1):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    losses = self.objective(self.model, pairs, t_B)
                (losses.total.sum() * (ranks.world / config.batch)).backward()
            sums[:-1] += losses.sums()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.clip_grad_norm)
        self.norm = whole(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(step)
        self.optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in self.parameters.items():
                self.ema[name].lerp_(p, 1 - decay)
        sums, self.told = ranks.total(sums)[:-1], sums[-1]
        fine = sums.isfinite().all() & self.norm.isfinite()
        self.first_bad.masked_fill_((self.first_bad < 0) & ~fine, step + 1)
        self.window[:-1] += sums
        self.window[-1] += config.batch

    def figures(self, step: int) -> dict[str, float]:
        """Means since they were last asked for, the learning rate and the norm of the last gradient."""
        self.check_finite()
        *sums, count = self.window.tolist()
        self.window.zero_()
        means = {name: value / count for name, value in zip(FIGURES, sums, strict=True)}
        return means | {"lr": self.config.rate(step - 1), "grad_norm": float(self.norm)}

    def check_finite(self) -> None:
        """WorkError with the first step whose loss or gradient was not finite."""
        bad = int(self.first_bad)
        if bad >= 0:
            saved = steps_saved(self.folder)
            rest = f"the checkpoint of step {saved[-1]} is sound" if saved else "no checkpoint was written yet"
            raise WorkError(
                f"the loss or its gradient is not finite at step {bad}; {rest}. Go on from there with --precision "
                "float32, or begin in another --out with a smaller --lr or a longer --warmup"
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A scope in which the student has its average's weights."""
        self._swap()
        self.student.eval()
        try:
            yield
        finally:
            self._swap()
            drop_gathered(self.model)

    @torch.no_grad()
    def _swap(self) -> None:
        """Weights and average change places, one at a time."""
        for name, p in self.parameters.items():
            own = p.detach().clone()
            p.copy_(self.ema[name])
            self.ema[name].copy_(own)

    @torch.no_grad()
    def measure(self, step: int, monitor: Monitor | None) -> dict[str, float]:
        """Cross entropy and token agreement of the average on the holdout, from each timestep; a grid of samples."""
        self.check_finite()
        figures: dict[str, float] = {}
        count, ranks = self.config.holdout, self.ranks
        mine = range(ranks.rank * count // ranks.world, (ranks.rank + 1) * count // ranks.world)
        with self.averaged():
            sums = torch.zeros(len(self.config.timesteps), len(FIGURES), dtype=torch.float64, device=self.device)
            for first in range(0, -(-count // ranks.world), self.micro):  # as often on every rank: a pass may wait
                part = mine[first : first + self.micro]
                pairs = self.source.holdout(part or range(1))
                for k, t in enumerate(self.config.timesteps):
                    with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                        losses = self.objective(self.model, pairs, torch.full_like(pairs.labels, t))
                    if part:
                        sums[k] += losses.sums()
            for t, row in zip(self.config.timesteps, (ranks.total(sums) / count).tolist(), strict=True):
                for name, value in zip(FIGURES, row, strict=True):
                    figures[f"holdout/{name}_t{t}"] = value
            self.show(step, monitor)
        if monitor is not None:
            monitor.scalars(step, **figures)
        said = ", ".join(
            f"from {t}: {figures[f'holdout/agreement_t{t}']:.1%} of tokens, "
            f"cross entropy {figures[f'holdout/cross_entropy_t{t}']:.3f}"
            for t in self.config.timesteps
        )
        self.report.say(f"step {step}, holdout: {said}")
        return figures

    def show(self, step: int, monitor: Monitor | None) -> None:
        """The teacher's and the student's one-step images of the same noise, row above row."""
        count = min(self.run.samples, self.config.holdout)
        pairs = self.source.holdout(range(count))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embeddings, logits = self.model(pairs.labels, pairs.noise, 0)
        if monitor is None:
            return
        codebook, starts = self.objective.codebook, self.student.starts()
        split = starts[self.config.split_of(self.student.groups)]
        x = torch.cat([codebook[logits[:, :split].argmax(-1)], embeddings[:, split:].float()], dim=1)
        teacher, student = self.images(codebook[pairs.tokens]), self.images(x)
        columns = min(count, 8)
        rows, captions = [], []
        for first in range(0, count, columns):
            part = slice(first, first + columns)
            rows += [teacher[part], student[part]]
            labels = [str(label) for label in pairs.labels[part].tolist()]
            captions += [f"{label} teacher" for label in labels] + [f"{label} student" for label in labels]
        path = self.folder / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(torch.cat(rows).cpu(), captions, columns, path)
        both = torch.stack([teacher, student], dim=1).flatten(0, 1).cpu()
        monitor.picture(step, "teacher above student", torch.cat(list(both), dim=2))

    def save(self, step: int, monitor: Monitor | None) -> None:
        """The average as a student of its own, and then a checkpoint: no checkpoint is newer than the student."""
        self.check_finite()
        moments = {name: self.optimizer.state[p] for name, p in self.parameters.items()}
        state: dict[str, dict[str, Tensor]] = {"model": dict(self.parameters), "ema": dict(self.ema)}
        for part in ("exp_avg", "exp_avg_sq"):  # a head that the loss does not read has none
            state[part] = {
                name: moments[name][part] if part in moments[name] else torch.zeros_like(p)
                for name, p in self.parameters.items()
            }
        if self.run.parallel == "fsdp":
            for named in state.values():
                for name, t in named.items():
                    full = whole(t)
                    named[name] = full.cpu() if monitor is not None else full.new_empty(0)
        if monitor is not None:
            monitor.sync()
            window = self.window.tolist()
            self.keep_student({name: t.detach() for name, t in state["ema"].items()}, step)
            save_checkpoint(self.folder, step, self.identity, self.how, window, state, self.run.keep)
        self.ranks.wait()

    def resume(self) -> int:
        """Take over the newest checkpoint, if there is one; returns the steps that are done."""
        step = max(steps_saved(self.folder), default=0)
        here = torch.tensor([step, -step], device=self.device)
        if self.ranks.most(here).tolist() != [step, -step]:
            raise UserError(f"the ranks see different checkpoints in {self.folder}; --out must be a folder they share")
        if not step:
            return 0
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        state, window, how = load_checkpoint(self.folder, step, self.identity, shapes)
        for name, p in self.parameters.items():
            assign(p, state["model"][name])
            assign(self.ema[name], state["ema"][name])
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for part, t in moments.items():
                assign(t, state[part][name])
            count = torch.tensor(float(step), device=p.device)
            self.optimizer.state[p] = {"step": count, **moments}
        self.window.copy_(torch.tensor(window, dtype=torch.float64))
        if self.ranks.first:
            tidy(self.folder, self.run.keep)
        changed = "".join(f"; {line}, so sums are rounded otherwise" for line in differences(how, self.how))
        self.report.say(f"going on from step {step}{changed}")
        return step

    def memory(self) -> str:
        """The most that this process has held."""
        if self.device.type == "cuda":
            return f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.2f} GiB on the GPU"
        import resource  # of Unix

        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


@contextmanager
def stopping() -> Iterator[list[bool]]:
    """A scope in which a first SIGINT or SIGTERM fills the list it yields, and a second one acts as always."""
    asked: list[bool] = []
    before: dict[int, Any] = {}

    def ask(number: int, _frame: object) -> None:
        asked.append(True)
        signal.signal(number, before[number])

    try:
        for chosen in (signal.SIGINT, signal.SIGTERM):
            before[chosen] = signal.signal(chosen, ask)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
