"""The training loop: a configuration in, a run folder out.

Everything random is a function of (seed, position in the data), so a run is the same whether it goes straight
through or stops and resumes, and whatever the number of processes that share a global batch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cyclegan_fast import distributed
from cyclegan_fast.config import Config, ConfigError, to_dict, to_yaml
from cyclegan_fast.data.loader import Batch, Plan, TrainingData, open_training_data
from cyclegan_fast.device import resolve_device, resolve_precision
from cyclegan_fast.errors import InputError
from cyclegan_fast.evaluation.figures import curves_figure
from cyclegan_fast.inference.weights import initialise
from cyclegan_fast.models import cost
from cyclegan_fast.roofline import measured
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training import elastic, experiment, run_folder
from cyclegan_fast.training.best import Best
from cyclegan_fast.training.build import build_networks, build_samples, build_state, executed, resolved_impl
from cyclegan_fast.training.ema import averaged, preferred
from cyclegan_fast.training.familiar import references
from cyclegan_fast.training.graph import (
    WARMUP,
    CudaRecorder,
    Draws,
    GraphStep,
    Packed,
    Recorder,
    draw_fields,
    step_batch,
)
from cyclegan_fast.training.health import Health, is_norm
from cyclegan_fast.training.image_pool import ImagePool, pool_draws
from cyclegan_fast.training.latents import latent_draws
from cyclegan_fast.training.measures import Measures, open_measures
from cyclegan_fast.training.monitor import SCALARS, History, Monitor
from cyclegan_fast.training.process import catch_signals, process_settings, stopped_by_signals
from cyclegan_fast.training.replicas import Replicas
from cyclegan_fast.training.schedule import lr_factor, lr_scale
from cyclegan_fast.training.state import RunState
from cyclegan_fast.training.step import train_step
from cyclegan_fast.version import __version__

logger = logging.getLogger("cyclegan_fast.train")

# Streams of random numbers beside those of the pools, which take 0 (domain A) and 1 (domain B).
_ALPHA_A, _ALPHA_B = 2, 3


class Interrupted(Exception):  # noqa: N818 - it is not an error
    """A signal ended the run: after the step under way, with everything saved, or, without a step, at once."""

    def __init__(self, signum: int, step: int | None) -> None:
        when = "at once: what was saved before stands" if step is None else f"after step {step}"
        super().__init__(f"stopped by {signal.Signals(signum).name} {when}; continue with --resume")
        self.signum = signum


def train(config: Config, *, resume: bool = False) -> Path:
    """Train as configured and return the run folder.

    With ``resume`` an earlier run in that folder is continued, if there is one, and without it if this process is a
    worker that torchrun restarted. Raises RunExistsError when there is one and ``resume`` is off, RunLockedError when
    another process is at work there, NonFiniteLossError when the training blows up, ReplicaError when the processes do
    not hold the same state, LostRankError when another process of the run ended or hangs, Interrupted after SIGTERM or
    SIGINT, and what the configuration, the data and the checkpoints raise.
    """
    device = resolve_device(config.training.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", distributed.local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init(device, config.training.timeout)
    try:
        with (
            stopped_by_signals(lambda signum: Interrupted(signum, None)),
            process_settings(config, device),
            run_folder.locked(config),
        ):
            trainer = Trainer(config, device, resume=resume)
            trainer.fit()
        return config.run_dir
    except BaseException as error:
        distributed.ended(error)
        raise
    finally:
        distributed.shutdown()


class Trainer:
    """One run: its data, its state and the loop over its steps."""

    def __init__(self, config: Config, device: torch.device, *, resume: bool = False) -> None:
        self._given, self.device = config, device
        self.run_dir = config.run_dir
        self.precision = resolve_precision(config.training.precision, device)
        found = run_folder.prepare(config, resume)
        config = elastic.partitioned(config, distributed.world_size(), found[1] if found else None)
        self.config = config
        self.data: TrainingData = open_training_data(
            config,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=device,
            progress=distributed.is_main() and config.monitor.progress,
        )
        self._digest = experiment.digest(self.data.loader)
        self.impl = resolved_impl(config, self.precision, device)
        self.modules = build_networks(config, self.impl, device)
        if found is None and config.model.init_from is not None:
            self._begin_from(config.model.init_from)
        pools = {name: ImagePool(config.training.pool_size) for name in ("A", "B")}
        run = executed(config, self.modules, one_shape=self.data.loader.windows is not None)
        self.state = build_state(config, self.modules, run, pools, self.precision, device)
        if config.training.ema:
            self.modules = self.modules | averaged(self.modules, self.state.optimizer_G, config.training.ema)
        self.run_state = RunState(self.modules, pools, self.state)
        self._replicas = Replicas(self.run_state.replicated, every=config.distributed.check_every)
        self.samples = build_samples(self.data.samples_A, self.data.samples_B, preferred(self.modules), self.state)
        self.measures: Measures | None = None
        with distributed.main_first():
            if distributed.is_main():
                self.measures = open_measures(config, self.data.scans, self.samples)
        self.history = History()
        self._health = Health(self.run_dir, self.run_state, self.history, self.data.loader, self._content)
        self.step = 0
        self.best = Best(config)
        self._familiarity: dict[str, Any] = {}  # of rank 0, which writes the checkpoints
        self._monitor: Monitor | None = None
        self._lr = config.training.lr
        if found is not None:
            self._load(*found)
        if distributed.is_main():
            run_folder.write_config(config)
        with distributed.main_first():
            if distributed.is_main():
                self._familiarity = references(self.data, found[1].get("familiarity") if found else None)
        distributed.broadcast_parameters(self.modules.values())
        self._replicas.check(self.step)
        self._draws = Packed(draw_fields(*self._counts, self._latent), device)
        self._graph = self._open_graph() if config.training.mode == "graph" else None
        self._saved_at = time.monotonic()
        self._saved_step = self.step

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        training = self.config.training
        steps = (training.epochs + training.epochs_decay) * self.data.loader.steps_per_epoch
        return steps if training.steps is None else min(steps, training.steps)

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimiser step over all processes."""
        return self.config.training.batch * self.config.training.accumulate * distributed.world_size()

    @property
    def _counts(self) -> tuple[int, int, int]:
        """Micro-batches of a step, this process's pairs in one, and all processes' pairs in one, which share a pool."""
        training = self.config.training
        return training.accumulate, training.batch, training.batch * distributed.world_size()

    @property
    def _latent(self) -> int:
        """Numbers in a latent code, 0 for methods without."""
        return self.config.model.latent if self.config.model.method == "augmented" else 0

    def fit(self) -> None:
        """Run the remaining steps, with everything that happens between them."""
        first, total, votes = self.step, self.total_steps, distributed.StopVote()
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(catch_signals())
            self._monitor = monitor = stack.enter_context(contextlib.closing(self._open_monitor(total)))
            if self._graph is not None:
                stack.callback(self._graph.graph.release)  # before the process group goes
            batches = stack.enter_context(contextlib.closing(self._batches(total)))
            while self.step < total and not self.best.enough:
                # The first steps compile and record, which takes what it takes, on all ranks alike.
                distributed.doing(f"step {self.step + 1}", unbounded=self.step <= first + WARMUP)
                waited = time.perf_counter()
                batch = next(batches)
                monitor.waited(time.perf_counter() - waited)

                lr = self._learning_rate(batch.epoch)
                self.history.append(self._take_step(batch, lr))
                self.step += 1
                monitor.step_done()
                saving = self._due(self.config.checkpoint.every_epochs) or self._milestone() is not None
                scheduled = saving or self._every(self.config.monitor.metrics_every)
                if scheduled or self.step == total:
                    self._measure(monitor, counts=scheduled)
                last = self.step == total or self.best.enough
                if self._replicas.due(self.step, last=last):  # before anything is saved
                    self._replicas.check(self.step)

                if last or self._every(self.config.monitor.log_every):
                    monitor.write(self.step, self._read(), lr)
                if last or self._due(self.config.monitor.images_every):
                    self._show_samples(monitor)
                if last or saving or self.best.step == self.step:
                    self._save()
                outcome = votes.cast(votes.STOP if stop.signum is not None else self._overdue() * votes.SAVE)
                if outcome and not last:
                    self._save()
                if outcome == votes.STOP and not last:
                    raise Interrupted(stop.signum or signal.SIGTERM, self.step)
            votes.settle()
        distributed.doing("the end of the run", unbounded=True)
        if distributed.is_main():
            if self.best.enough and self.step < total:
                logger.info("stopped early, after step %d of %d: %s", self.step, total, self.best.why)
            self._draw_curves()

    def _draw_curves(self) -> None:
        """The training curves, if there are records: a picture is not worth a run that is done."""
        scalars = self.run_dir / SCALARS
        with contextlib.suppress(OSError):
            if scalars.stat().st_size == 0:
                return
        try:
            curves_figure(scalars, self.run_dir / "training_curves.png")
        except (InputError, OSError) as error:
            logger.warning("no training curves: %s", error)

    def _batches(self, total: int) -> Generator[Batch | Plan, None, None]:
        """What the remaining steps read: pictures, or, where a graph makes them, which pictures."""
        loader = self.data.loader
        yield from loader.iterate(self.step, total) if self._graph is None else loader.plans(self.step, total)

    def _take_step(self, batch: Batch | Plan, lr: float) -> dict[str, Tensor]:
        """One optimiser step; returns its scalars, on the device.

        The gradients' norms are always among them: they are how a gradient that is no number is seen, at the next
        reading and in the step in which it came up, for one reading of the gradients and no wait.
        """
        if self.config.model.dropout:  # the only use of torch's own generator in a step
            torch.manual_seed(hash((self.config.seed, self.step, distributed.rank())) & 0x7FFF_FFFF)
        draws = self._draw()
        if isinstance(batch, Plan):
            if self._graph is None:
                raise RuntimeError("a step without its pictures needs a graph that makes them")
            A, B = batch.A, batch.B
            return self._graph((A.places, B.places), (A.cut, B.cut), draws, lr, measure=True)
        self._draws.load(draws._asdict())
        return train_step(self.state, step_batch(self._draws.views, batch.real_A, batch.real_B), measure=True)

    def _learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, which the optimisers have from here on: a graph takes it with its inputs."""
        training = self.config.training
        factor = lr_factor(epoch, training.epochs, training.epochs_decay)
        self._lr = training.lr * lr_scale(training.lr_scaling, self.pairs_per_step) * factor
        if self._graph is None:
            for optimizer in self.run_state.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = self._lr
        return self._lr

    def _draw(self) -> Draws:
        """The step's random numbers, from the position in the data."""
        count, batch, per_pass = self._counts
        positions = self.step * self.pairs_per_step + np.arange(self.pairs_per_step)
        own = positions.reshape(count, distributed.world_size(), batch)[:, distributed.rank()].reshape(-1)
        seed, size = self.config.seed, self.config.training.pool_size
        pools = [
            draw.reshape(count, per_pass) for domain in (0, 1) for draw in pool_draws(seed, positions, size, domain)
        ]
        alphas = [pool_draws(seed, own, 1, stream)[0].reshape(count, batch) for stream in (_ALPHA_A, _ALPHA_B)]
        latents = [
            latent_draws(seed, own, self._latent, domain).reshape(count, batch, self._latent) for domain in (0, 1)
        ]
        return Draws(*pools, *alphas, *latents)

    def _read(self) -> dict[str, float]:
        """Scalars since the last reading; the one place where the host waits.

        They are means over steps and ranks, but the gradients' norms those of the last step. Raises NonFiniteLossError
        at the first step with a loss or a gradient that is no number.
        """
        self.history.share(distributed.average)
        self._health.check_scalars(self.step)
        names, values, extra = self.history.take()
        means = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        last = dict(zip(names, values[-1].tolist(), strict=True)) | {
            name: float(value) for name, value in extra.items()
        }
        return means | {name: value for name, value in last.items() if is_norm(name)}

    def _every(self, steps: int) -> bool:
        """Whether the step just done completes another so many; never for 0."""
        return bool(steps) and self.step % steps == 0

    def _due(self, every_epochs: float) -> bool:
        """Whether the step just done completes another ``every_epochs`` epochs."""
        if not every_epochs:
            return False
        length = every_epochs * self.data.loader.steps_per_epoch
        return math.floor(self.step / length + 1e-9) > math.floor((self.step - 1) / length + 1e-9)

    def _milestone(self) -> int | None:
        """The milestone epoch that the step just done completes, if any."""
        epoch, rest = divmod(self.step, self.data.loader.steps_per_epoch)
        return epoch if rest == 0 and epoch in self.config.checkpoint.milestones else None

    def _overdue(self) -> bool:
        """Whether it is time to save again, by rank 0's clock; true once, as saving takes a vote."""
        minutes = self.config.checkpoint.every_minutes
        overdue = bool(minutes) and distributed.is_main() and time.monotonic() - self._saved_at > 60 * minutes
        if overdue:
            self._saved_at = time.monotonic()
        return overdue

    def _show_samples(self, monitor: Monitor) -> None:
        if distributed.is_main():
            epoch = self.step / self.data.loader.steps_per_epoch
            for name, image in self.samples.grids(f"{self.config.name}, epoch {epoch:.2f}, step {self.step}"):
                monitor.picture(self.step, name, image)

    def _measure(self, monitor: Monitor, *, counts: bool) -> None:
        """Measure the fixed test pictures, on rank 0, and remember it if this is the best state so far; all ranks call.

        What is no number ends the run before it is measured, on all ranks together.
        """
        if self.best.wanted == "none" and not self.config.monitor.metrics_samples:
            return
        distributed.doing(f"step {self.step}, measuring the test pictures")
        self.history.share(distributed.average)
        self._health.check_scalars(self.step)
        value = math.nan
        if self.measures is not None:
            self._health.check_state(self.step)
            measured = self.measures.measure()
            monitor.measured(self.step, measured)
            value = self.measures.best(measured)
        if self.best.wanted != "none":
            self.best.update(distributed.told(value), self.step, counts=counts)

    def _save(self) -> None:
        """Write the checkpoint of this step, keep it under its further names, drop old ones; all ranks call."""
        distributed.doing(f"step {self.step}, saving")
        self._saved_at = time.monotonic()
        self.history.share(distributed.average)
        if not distributed.is_main():
            return
        self._health.check_state(self.step)
        if self._monitor is not None:
            self._monitor.flush()
        path = ckpt.step_path(self.run_dir, self.step)
        if self._saved_step != self.step or not path.exists():
            ckpt.write_checkpoint(path, self._content())
            self._saved_step = self.step
        self._keep_also(path)
        ckpt.prune(self.run_dir, self.config.checkpoint.keep)

    def _keep_also(self, path: Path) -> None:
        """Keep the checkpoint of this step under its further names: also when resumed from, in case that was lost."""
        if self.best.step == self.step and self.step:
            ckpt.keep_also_as(path, ckpt.checkpoint_dir(self.run_dir) / "best.ckpt")
        if (epoch := self._milestone()) is not None:
            ckpt.keep_also_as(path, ckpt.milestone_path(self.run_dir, epoch))

    def _content(self) -> dict[str, Any]:
        """All that a run consists of at this moment."""
        loader = self.data.loader
        return {
            "config": to_dict(self._given),
            **self.run_state.state_dict(self._lr),
            "position": {
                "step": self.step,
                "epoch": self.step / loader.steps_per_epoch,
                "steps_per_epoch": loader.steps_per_epoch,
                "pairs_per_step": self.pairs_per_step,
            },
            **self.best.state_dict(),
            "history": self.history.state_dict(),
            "data": self._digest,
            "familiarity": self._familiarity,
            "provenance": {
                "version": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
                "device": _device_name(self.device),
                "precision": self.precision,
                "world_size": distributed.world_size(),
                "time": time.time(),
            },
        }

    def _begin_from(self, source: str) -> None:
        """Take over the weights of another model. Raises WeightsError or CheckpointError saying what does not fit."""
        taken = initialise(self.modules, source)
        rest = [name for name in self.modules if name not in taken]
        if distributed.is_main():
            logger.info("weights of %s from %s; %s start anew", ", ".join(taken), source, ", ".join(rest) or "none")

    def _load(self, path: Path, content: dict[str, Any]) -> None:
        """Take over a checkpoint's state. Raises CheckpointError or ConfigError saying what does not fit."""
        experiment.check_same_settings(self.config, content["config"], path)
        missing = [name for name in ("position", "data", "history", "best") if name not in content]
        if missing:
            raise ckpt.CheckpointError(
                f"{path} holds no {', '.join(missing)}: it can translate, but a run cannot be continued from it"
            )
        experiment.check_same_pictures(content["data"], self._digest, self.data.loader, path)
        position = content["position"]
        if position["pairs_per_step"] != self.pairs_per_step:
            raise ConfigError(
                f"{path} took {position['pairs_per_step']} pairs a step; training.batch x training.accumulate x "
                f"processes is now {self.pairs_per_step}: choose them so that the product stays the same "
                f"({elastic.shares(position['pairs_per_step'], distributed.world_size())})"
            )
        self.run_state.load_state_dict(content, path)
        self.history.load_state_dict(content["history"], self.device)
        self.best.load_state_dict(content)
        self.step = position["step"]
        if distributed.is_main():
            self._keep_also(path)
            logger.info("resumed from %s: step %d of %d", path, self.step, self.total_steps)
            if self.config != self._given:
                count, batch, together = self._counts
                logger.info("a step's %d pairs: %d at a time, training.batch %d", together * count, together, batch)

    def _open_graph(self) -> GraphStep | None:
        """The step as a graph, or None where its shapes vary. It runs eagerly where there is nothing to record it."""
        loader = self.data.loader
        recorder = _recorder(self.device)
        obstacle = None if recorder else f"it needs a CUDA device, not {self.device.type}"
        if loader.windows is None:
            obstacle = "whole pictures of several sizes cannot share a recording (data.preprocess with a crop can)"
        if obstacle and distributed.is_main():
            logger.warning("training.mode=graph: the step runs eagerly: %s", obstacle)
        if loader.windows is None:
            return None
        count, batch, per_pass = self._counts
        return GraphStep(
            self.state,
            loader.windows,
            loader.images,
            accumulate=count,
            batch=batch,
            pooled=per_pass,
            latent=self._latent,
            device=self.device,
            recorder=recorder,
            agree=distributed.any_rank,
        )

    def _open_monitor(self, total: int) -> Monitor:
        monitor = Monitor(
            self.run_dir,
            step=self.step,
            total_steps=total,
            steps_per_epoch=self.data.loader.steps_per_epoch,
            pairs_per_step=self.pairs_per_step,
            tensorboard=self.config.monitor.tensorboard,
            progress=self.config.monitor.progress,
            active=distributed.is_main(),
            work=self._work(),
            roofline=measured(self.device),
            precision=self.precision,
        )
        monitor.text("config", to_yaml(self.config))
        return monitor

    def _work(self) -> cost.Work | None:
        """What one step of this process asks of the device, or None where it is not known."""
        windows = self.data.loader.windows
        if windows is None or windows[0][:2] != windows[1][:2]:
            return None
        height, width, _ = windows[0]
        if self.config.model.method == "augmented":  # not counted
            return None
        step = cost.configured(self.config, height, width, precision=self.precision, fused=self.impl == "fused")
        return cost.training_step(step) + cost.weights(step) + cost.optimiser(step)


def _recorder(device: torch.device) -> Recorder | None:
    return CudaRecorder(device) if device.type == "cuda" else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
