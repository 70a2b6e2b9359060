"""The training loop, top to bottom."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from linear_moe.config.load import save_config
from linear_moe.config.schema import Config
from linear_moe.config.vocabulary import embedding_rows
from linear_moe.layout.flops import flops_per_token
from linear_moe.options.errors import ConfigError
from linear_moe.training import parallel
from linear_moe.training.build import build_model
from linear_moe.training.checkpointing import imported_from, load_latest, save
from linear_moe.training.data import PreparedData, TrainLoader, validation_batches
from linear_moe.training.experts.routing import summary
from linear_moe.training.optimizer.build import build_optimizer
from linear_moe.training.optimizer.schedule import learning_rate, set_learning_rate
from linear_moe.training.step import Stepper
from linear_moe.training.supervision.faults import StopSignal, check_finite
from linear_moe.training.supervision.logging import Logger
from linear_moe.training.supervision.metrics import Throughput, memory_gib, peak_tflops, seconds_alive
from linear_moe.training.supervision.watch import mark


def train(config: Config, data: PreparedData) -> int:
    """Trains from the newest checkpoint, or from the start, to step `training.steps`. Returns the exit code."""
    stop = StopSignal()
    mark("meeting the other ranks")
    groups = parallel.initialize_groups(config)
    mark("building the model")
    model = build_model(config, embedding_rows(config.model, data.vocab_size), groups)
    optimizer = build_optimizer(model, config)
    run, training = Path(config.run), config.training
    mark("loading the checkpoint")
    step = load_latest(config, model, optimizer)
    if step > training.steps:
        fix = "raise training.steps, or choose another run folder"
        raise ConfigError("training.steps", training.steps, f"the run's checkpoint is at step {step}", fix=fix)

    log = Logger(run, training.steps, active=groups.rank == 0, tensorboard=config.logging.tensorboard, step=step)
    if groups.rank == 0:
        save_config(config, run / "config.yaml")
        data.save_tokenizer(run / "tokenizer")
    origin = None if step else imported_from(config)
    log.event(
        "start", step=step, world=groups.world, torch=torch.__version__, **({"imported": origin} if origin else {})
    )
    begun = f"starting with the weights of {origin} at" if origin else "resumed at" if step else "starting at"
    log.message(f"{begun} step {step} of {training.steps}: {run}")

    batches = TrainLoader(
        data, config, groups.data_rank, groups.data_size, step * training.global_batch, groups.sequence_rank
    )
    stepper = Stepper(config, model, optimizer, groups.device, stop)
    speed = Throughput(
        tokens_per_step=training.global_batch * training.sequence_length,
        flops_per_token=flops_per_token(config),
        devices=groups.world,
        peak=peak_tflops(config.logging.peak_tflops),
    )
    first_step = step + 1
    laps = 0
    stopped = False
    while step < training.steps and not stopped:
        step += 1
        laps += 1
        mark("reading data", step)
        lr = learning_rate(step, config)
        set_learning_rate(optimizer, lr)
        result = stepper.train(batches)
        check_finite(step, result.loss, result.gradient_norm)
        if step % config.logging.every == 0 or step in (first_step, training.steps):
            record = {"step": step, "loss": result.loss, "learning_rate": lr, "gradient_norm": result.gradient_norm}
            if step == first_step:
                record["first_step_seconds"] = seconds_alive()
            record |= speed.lap(laps, training.steps - step) | {"memory_gib": memory_gib()} | stepper.auxiliary_losses()
            laps = 0
            routing = stepper.routing()
            log.step(record | summary(routing, config.logging.dead_after))
            log.dead_experts(step, routing, config.logging.dead_after)
            if step % config.logging.routing_every == 0 or step in (first_step, training.steps):
                log.routing(step, routing)

        stopped = result.stop and step < training.steps
        last = step == training.steps and config.checkpoint.last
        with speed.paused():
            if last or stopped or (config.checkpoint.every and step % config.checkpoint.every == 0):
                mark("saving the checkpoint")
                path = save(config, step, model, optimizer, data=data.fingerprint)
                log.event("checkpoint", step=step, path=str(path))
            if training.eval_every and step % training.eval_every == 0 and step < training.steps:
                validate_model(step, config, data, groups, stepper, log)
    if stopped:
        log.event("stopped", step=step, signal=stop.received)
        log.message(f"stopped after step {step} on a signal; checkpoint saved. Rerun the same command to go on")
    else:
        validate_model(step, config, data, groups, stepper, log)
    log.close()
    mark("ending")
    dist.barrier()
    parallel.destroy()
    return 0


def validate_model(
    step: int, config: Config, data: PreparedData, groups: parallel.Groups, stepper: Stepper, log: Logger
) -> None:
    """Computes and logs the loss on the held-out sequences, if there are any. Collective."""
    mark("validation")
    if data.has_validation:
        batches = validation_batches(data, config, groups.data_rank, groups.data_size, groups.sequence_rank)
        result = stepper.validate(batches, config.training.eval_batches)
        log.validation(step, result.loss, result.tokens)
