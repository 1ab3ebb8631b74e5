"""The training loop: a configuration in, a run folder out.

Everything random is a function of (seed, position in the data), so a run is the same whether it goes straight
through or stops and resumes, and whatever the number of processes that share a global batch.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from cyclegan_fast.models import cost
from cyclegan_fast.roofline import measured
from cyclegan_fast.training import checkpoint as ckpt
from cyclegan_fast.training import elastic
from cyclegan_fast.training.build import build_networks, build_state, executed, resolved_impl
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
from cyclegan_fast.training.image_pool import ImagePool, pool_draws
from cyclegan_fast.training.monitor import SCALARS, History, Monitor
from cyclegan_fast.training.process import catch_signals, process_settings, stopped_by_signals
from cyclegan_fast.training.samples import Samples
from cyclegan_fast.training.schedule import lr_factor
from cyclegan_fast.training.step import train_step
from cyclegan_fast.version import __version__

logger = logging.getLogger("cyclegan_fast.train")

# Streams of random numbers beside those of the pools, which take 0 (domain A) and 1 (domain B).
_ALPHA_A, _ALPHA_B = 2, 3
# A resumed run may differ from its checkpoint in these; anything else would make it another experiment.
_FREE: tuple[str, ...] = (
    "name",
    "out",
    "data.root",
    "data.cache",
    "data.resident",
    "data.workers",
    "checkpoint.",
    "monitor.",
    *(f"training.{name}" for name in ("epochs", "steps", "batch", "accumulate", "precision", "channels_last")),
    *(f"training.{name}" for name in ("global_batch", "timeout")),
    *(f"training.{name}" for name in ("mode", "impl", "recompute", "streams", "deterministic", "device", "threads")),
    "training.compile",  # of checkpoints before there was training.mode
)


class RunExistsError(InputError):
    """The run folder holds a run already."""


class NonFiniteLossError(RuntimeError):
    """A loss or a weight is no longer a number; the message names step, losses and pictures."""


class Interrupted(Exception):  # noqa: N818 - it is not an error
    """A signal ended the run: after the step under way, with everything saved, or, without a step, at once."""

    def __init__(self, signum: int, step: int | None) -> None:
        when = "at once: what was saved before stands" if step is None else f"after step {step}"
        super().__init__(f"stopped by {signal.Signals(signum).name} {when}; continue with --resume")
        self.signum = signum


def train(config: Config, *, resume: bool = False) -> Path:
    """Train as configured and return the run folder.

    With ``resume`` an earlier run in that folder is continued, if there is one, and without it if this process is a
    worker that torchrun restarted. Raises RunExistsError when there is one and ``resume`` is off, NonFiniteLossError
    when the training blows up, Interrupted after SIGTERM or SIGINT, LostRankError when another process of the run ended
    or hangs, and what the configuration, the data and the checkpoints raise.
    """
    device = resolve_device(config.training.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", distributed.local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init(device, config.training.timeout)
    try:
        with stopped_by_signals(lambda signum: Interrupted(signum, None)), process_settings(config, device):
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
        found = _prepare_run(config, resume)
        config = elastic.partitioned(config, distributed.world_size(), found[1] if found else None)
        self.config = config
        self.data: TrainingData = open_training_data(
            config,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=device,
            progress=distributed.is_main() and config.monitor.progress,
        )
        self._digest = _digest(self.data)
        self.impl = resolved_impl(config, self.precision, device)
        self.modules = build_networks(config, self.impl, device)
        self.pools = {name: ImagePool(config.training.pool_size) for name in ("A", "B")}
        run = executed(config, self.modules, one_shape=self.data.loader.windows is not None)
        self.state = build_state(config, self.modules, run, self.pools, self.precision, device)
        self.samples = Samples(
            self.data.samples_A, self.data.samples_B, self.modules, self.state.objective, self.state.autocast
        )
        self.history = History()
        self.step = 0
        self.best = math.inf
        self._lr = config.training.lr
        if found is not None:
            self._load(*found)
        distributed.broadcast_parameters(self.modules.values())
        self._draws = Packed(draw_fields(*self._counts), device)
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

    def fit(self) -> None:
        """Run the remaining steps, with everything that happens between them."""
        first, total, votes = self.step, self.total_steps, distributed.StopVote()
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(catch_signals())
            monitor = stack.enter_context(contextlib.closing(self._open_monitor(total)))
            if self._graph is not None:
                stack.callback(self._graph.graph.release)  # before the process group goes
            batches = stack.enter_context(contextlib.closing(self._batches(total)))
            while self.step < total:
                # The first steps compile and record, which takes what it takes, on all ranks alike.
                distributed.doing(f"step {self.step + 1}", unbounded=self.step <= first + WARMUP)
                waited = time.perf_counter()
                batch = next(batches)
                monitor.waited(time.perf_counter() - waited)

                lr = self._learning_rate(batch.epoch)
                last = self.step + 1 == total
                reading = last or (self.step + 1) % self.config.monitor.log_every == 0
                self.history.append(self._take_step(batch, lr, measure=reading))
                self.step += 1
                monitor.step_done()

                if reading:
                    monitor.write(self.step, self._read(), lr)
                if last or self._due(self.config.monitor.images_every):
                    self._show_samples(monitor)
                if last or self._due(self.config.checkpoint.every_epochs) or self._milestone():
                    self._save(is_best=self._evaluate(monitor))
                outcome = votes.cast(votes.STOP if stop.signum is not None else self._overdue() * votes.SAVE)
                if outcome and not last:
                    self._save()
                if outcome == votes.STOP and not last:
                    raise Interrupted(stop.signum or signal.SIGTERM, self.step)
            votes.settle()
        distributed.doing("the end of the run", unbounded=True)
        if distributed.is_main() and (self.run_dir / SCALARS).stat().st_size:
            curves_figure(self.run_dir / SCALARS, self.run_dir / "training_curves.png")

    def _batches(self, total: int) -> Generator[Batch | Plan, None, None]:
        """What the remaining steps read: pictures, or, where a graph makes them, which pictures."""
        loader = self.data.loader
        yield from loader.iterate(self.step, total) if self._graph is None else loader.plans(self.step, total)

    def _take_step(self, batch: Batch | Plan, lr: float, *, measure: bool) -> dict[str, Tensor]:
        """One optimiser step; returns its scalars, on the device."""
        if self.config.model.dropout:  # the only use of torch's own generator in a step
            torch.manual_seed(hash((self.config.seed, self.step, distributed.rank())) & 0x7FFF_FFFF)
        draws = self._draw()
        if isinstance(batch, Plan):
            if self._graph is None:
                raise RuntimeError("a step without its pictures needs a graph that makes them")
            A, B = batch.A, batch.B
            return self._graph((A.places, B.places), (A.cut, B.cut), draws, lr, measure=measure)
        self._draws.load(draws._asdict())
        return train_step(self.state, step_batch(self._draws.views, batch.real_A, batch.real_B), measure=measure)

    def _learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, which the optimisers have from here on: a graph takes it with its inputs."""
        training = self.config.training
        self._lr = training.lr * lr_factor(epoch, training.epochs, training.epochs_decay)
        if self._graph is None:
            for optimizer in (self.state.optimizer_G, self.state.optimizer_D):
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
        return Draws(*pools, *alphas)

    def _read(self) -> dict[str, float]:
        """Mean scalars since the last reading, over steps and ranks; the one place where the host waits.

        Raises NonFiniteLossError at the first step with a loss that is no number.
        """
        steps = len(self.history)
        self.history.share(distributed.average)
        names, values, extra = self.history.take()
        finite = values.isfinite().all(dim=0)
        healthy = bool(finite.all())
        if distributed.any_rank(not healthy):  # all ranks stop together
            bad_rows = (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()
            self._report_non_finite(
                self.step - steps + (bad_rows[0] if bad_rows else 0),
                [name for name, good in zip(names, finite.tolist(), strict=True) if not good],
                together=True,
            )
        means = values.mean(dim=0).tolist()
        return dict(zip(names, means, strict=True)) | {name: float(value) for name, value in extra.items()}

    def _report_non_finite(self, step: int, names: list[str], *, together: bool) -> None:
        batch = self.data.loader.batch(step)
        names_A, names_B = self.data.loader.names_of(batch.index_A, batch.index_B)
        path = ckpt.checkpoint_dir(self.run_dir) / f"nonfinite-{step + 1:08d}.ckpt"
        if distributed.is_main():
            ckpt.write_checkpoint(path, self._content())
        if together:
            distributed.any_rank(True)  # no rank leaves before the file is whole: torchrun ends them all with the first
        which = ", ".join(names) if names else "a loss of another rank"
        raise NonFiniteLossError(
            f"{which} became infinite or NaN in step {step + 1} (epoch {batch.epoch}); the pictures of that step: "
            f"A {', '.join(names_A)}; B {', '.join(names_B)}. The state at the time of reading is in {path}; the "
            "checkpoints before it are untouched. A lower training.lr, or precision fp32, often helps"
        )

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

    def _evaluate(self, monitor: Monitor) -> bool:
        """Measure the fixed test samples; returns whether this is the best state so far."""
        if not distributed.is_main() or self.config.checkpoint.best == "none":
            return False
        measures = self.samples.measure()
        monitor.measured(self.step, measures)
        value = measures[f"test_{self.config.checkpoint.best}"]
        is_best = value < self.best
        self.best = min(value, self.best)
        return is_best

    def _save(self, is_best: bool = False) -> None:
        """Write the checkpoint of this step, keep it under its further names, drop old ones; all ranks call."""
        distributed.doing(f"step {self.step}, saving")
        self._saved_at = time.monotonic()
        self.history.share(distributed.average)
        if not distributed.is_main():
            return
        finite = [p.detach().isfinite().all() for module in self.modules.values() for p in module.parameters()]
        if not bool(torch.stack(finite).all()):
            self._report_non_finite(self.step - 1, ["a weight"], together=False)
        path = ckpt.step_path(self.run_dir, self.step)
        if self._saved_step != self.step or not path.exists():
            ckpt.write_checkpoint(path, self._content())
            self._saved_step = self.step
        if is_best:
            ckpt.keep_also_as(path, ckpt.checkpoint_dir(self.run_dir) / "best.ckpt")
        if (epoch := self._milestone()) is not None:
            ckpt.keep_also_as(path, ckpt.milestone_path(self.run_dir, epoch))
        ckpt.prune(self.run_dir, self.config.checkpoint.keep)

    def _content(self) -> dict[str, Any]:
        """All that a run consists of at this moment."""
        loader = self.data.loader
        return {
            "config": to_dict(self._given),
            **{name: module.state_dict() for name, module in self.modules.items()},
            "optimizer_G": _portable(self.state.optimizer_G, self._lr),
            "optimizer_D": _portable(self.state.optimizer_D, self._lr),
            "scaler": self.state.scaler.state_dict(),
            "pools": {name: pool.state_dict() for name, pool in self.pools.items()},
            "position": {
                "step": self.step,
                "epoch": self.step / loader.steps_per_epoch,
                "steps_per_epoch": loader.steps_per_epoch,
                "pairs_per_step": self.pairs_per_step,
            },
            "best": self.best,
            "history": self.history.state_dict(),
            "data": self._digest,
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

    def _load(self, path: Path, content: dict[str, Any]) -> None:
        """Take over a checkpoint's state. Raises CheckpointError or ConfigError saying what does not fit."""
        _check_same_experiment(self.config, content["config"], path)
        missing = [name for name in ("position", "data", "history", "best") if name not in content]
        if missing:
            raise ckpt.CheckpointError(
                f"{path} holds no {', '.join(missing)}: it can translate, but a run cannot be continued from it"
            )
        position = content["position"]
        if content["data"] != self._digest:
            raise ckpt.CheckpointError(
                f"the pictures are not those that {path} was trained on ({_digest_words(content['data'])} then, "
                f"{_digest_words(self._digest)} now): restore them, or start a new run"
            )
        if position["pairs_per_step"] != self.pairs_per_step:
            raise ConfigError(
                f"{path} took {position['pairs_per_step']} pairs a step; training.batch x training.accumulate x "
                f"processes is now {self.pairs_per_step}: choose them so that the product stays the same "
                f"({elastic.shares(position['pairs_per_step'], distributed.world_size())})"
            )
        try:
            for name, module in self.modules.items():
                module.load_state_dict(content[name])
            self.state.optimizer_G.load_state_dict(content["optimizer_G"])
            self.state.optimizer_D.load_state_dict(content["optimizer_D"])
            self.state.scaler.load_state_dict(content["scaler"])
            for name, pool in self.pools.items():
                pool.load_state_dict(content["pools"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ckpt.CheckpointError(f"{path} does not fit this configuration: {error}") from error
        self.history.load_state_dict(content["history"], self.device)
        self.step, self.best = position["step"], content["best"]
        if distributed.is_main():
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
        """What one step of this process asks of the device, or None where pictures have several sizes."""
        windows = self.data.loader.windows
        if windows is None or windows[0][:2] != windows[1][:2]:
            return None
        height, width, _ = windows[0]
        step = cost.configured(self.config, height, width, precision=self.precision, fused=self.impl == "fused")
        return cost.training_step(step) + cost.weights(step) + cost.optimiser(step)


def _prepare_run(config: Config, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """Make the run folder and find what to resume from. Raises RunExistsError, ConfigError, CheckpointError."""
    run_dir = config.run_dir
    if not resume and distributed.any_rank(distributed.is_main() and elastic.begun_by_this_launch(run_dir)):
        logger.info("a restarted worker: continuing the run that this launch began")
        resume = True
    with distributed.main_first():
        found = ckpt.read_latest(run_dir) if resume else None
        if not distributed.is_main():
            return found
        if not resume and ckpt.checkpoint_dir(run_dir).is_dir() and any(ckpt.checkpoint_dir(run_dir).iterdir()):
            raise RunExistsError(
                f"{run_dir} holds a run already: continue it with --resume, or choose another `name` or `out`"
            )
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            elastic.sign(run_dir)
        except OSError as error:
            raise ConfigError(f"out = {config.out!r}: cannot write the folder {run_dir}: {error.strerror}") from error
    return found


def _recorder(device: torch.device) -> Recorder | None:
    return CudaRecorder(device) if device.type == "cuda" else None


def _portable(optimizer: torch.optim.Optimizer, lr: float) -> dict[str, Any]:
    """The optimiser's state as mode eager has it, whatever the mode: a graph keeps its learning rate in a tensor."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": lr, "capturable": False} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _check_same_experiment(config: Config, saved: dict[str, Any], path: Path) -> None:
    now, then = _flat(to_dict(config)), _flat(saved)
    changed = [
        f"{name} was {then.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name) and not name.startswith(_FREE)
    ]
    if changed:
        raise ConfigError(f"cannot resume {path} with another configuration: {'; '.join(changed)}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _digest(data: TrainingData) -> dict[str, Any]:
    """What tells whether the pictures are the same: their number and, hashed, their names in order."""
    names_A, names_B = data.loader.names
    text = "\0".join([*names_A, "", *names_B])
    return {
        "count_A": len(names_A),
        "count_B": len(names_B),
        "names": hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(),
    }


def _digest_words(digest: dict[str, Any]) -> str:
    return f"{digest['count_A']} of A and {digest['count_B']} of B, list {digest['names'][:8]}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
