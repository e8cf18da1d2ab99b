"""Trains a colorizer.

    torchrun --nproc_per_node=2 -m dist_colorize.train                                   # the quickstart
    torchrun --nproc_per_node=8 -m dist_colorize.train --config configs/final.yaml data.root=/photos
    torchrun --nproc_per_node=8 -m dist_colorize.train --config RUN/config.yaml run.dir=RUN  # goes on where RUN stopped

Exit codes of a rank: 0 finished, 75 interrupted by a signal and resumable, 1 failed, 2 bad usage. torchrun itself
returns 1 for all but the first, and prints the rank's code as `exitcode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_colorize import config
from dist_colorize.checkpoint import load_module
from dist_colorize.color.gamut import BINS
from dist_colorize.color.rebalance import class_weights, prior
from dist_colorize.data import Loader, Order, evaluation_batches, open_photographs
from dist_colorize.data.histogram import count_colours
from dist_colorize.data.loader import Replaced
from dist_colorize.data.preflight import decoding_device
from dist_colorize.distributed import LateAgreement, World, session
from dist_colorize.errors import Interrupted, RunFailed, run_command
from dist_colorize.evaluation import FINAL, Evaluation, evaluate, protocol, write_evaluation
from dist_colorize.models import METHODS, TrainingModule, build, initialise
from dist_colorize.optimisation import Optimisation
from dist_colorize.postprocess.stages import load_preset
from dist_colorize.profiling import traced
from dist_colorize.progress import Meter, Progress
from dist_colorize.recipe import Recipe, load_recipe
from dist_colorize.replacements import Replacements
from dist_colorize.resume import Checkpoints, check_same_run, newest_checkpoint
from dist_colorize.stopping import StopFlag
from dist_colorize.tracking import Run, open_run

CALIBRATION = 32
"""Photographs on which an encoder trained from scratch measures its BatchNorm statistics."""


def main(argv: Sequence[str] | None = None) -> None:
    recipe = load_recipe(__doc__ or "", argv)
    with (
        session(recipe.distributed) as world,
        StopFlag() as stop,
        open_run(recipe.run, world, config.dump(recipe)) as run,
    ):
        train(recipe, world, run, stop)


def train(recipe: Recipe, world: World, run: Run, stop: StopFlag) -> Evaluation:
    """One training run, from its photographs to its evaluation; goes on from the run folder's newest checkpoint."""
    settings = recipe.train
    torch.manual_seed(settings.seed)
    local_batch = settings.local_batch(world.size)
    preset = load_preset(recipe.evaluate.preset)
    state = newest_checkpoint(run, world)
    begun_with = state["indexes"] if state else (None, None)
    training, validation = open_photographs(recipe.data, world, stop, begun_with)
    if state:
        check_same_run(state, recipe, training.fingerprint)
    data = decoding_device(recipe.data, world, stop)
    photographs = len(training) + (len(validation) if validation is not training else 0)
    replacements = Replacements(run, world)
    unusable: list[Replaced] = []  # what this rank meets outside the training stream

    # What the network is to learn: which colours are rare among these photographs.
    if state:
        weights = state["class_weights"]
    elif not METHODS[recipe.model.method].rebalances:
        weights = torch.ones(BINS)
    else:
        cells = count_colours(training, data, recipe.loss.sample, world, stop, unusable)
        weights = class_weights(prior(cells, recipe.loss), recipe.loss.rebalance)

    # The network, and the optimizer around it.
    order = Order(len(training), training.fingerprint, settings.seed)
    loader = Loader(training, data, order, world, local_batch)
    network = build(recipe.model)
    if state:
        load_module(network, state["model"], run.checkpoints)
    else:
        initialise(network, recipe.model, loader.first(CALIBRATION).L.cpu())
    module = TrainingModule(network, METHODS[recipe.model.method](weights)).to(world.device)
    optimisation = Optimisation(module, settings, world)
    facts = {
        "class_weights": weights,
        "fingerprint": training.fingerprint,
        "indexes": (training.index, validation.index),
    }
    checkpoints = Checkpoints(recipe, run, world, optimisation, facts)
    step = checkpoints.restore(state) if state else 0

    def validate() -> Evaluation:
        batches = evaluation_batches(validation, data, world, recipe.evaluate.batch, unusable)
        result = evaluate(optimisation.network, batches, preset, world, recipe.evaluate.pictures, stop)
        run.validation(step, result.scores, result.panel() if result.pictures else None)
        checkpoints.keep_if_best(step, result.scores[FINAL]["psnr"])
        return result

    # The steps. The stop flags of a step travel during the next one, so that no rank waits for the answer; all ranks
    # stop after the same step. What is due before the step that would follow is done by the run that is resumed.
    run.resume(step)
    meter = Meter()
    with (
        checkpoints,
        loader,
        Progress("train", world, settings.steps, step) as progress,
        traced(run.path / "profile", settings.profile, world.rank) as step_is_traced,
        LateAgreement(world) as agree,
    ):
        batches = loader.batches(step)
        try:
            stopping = world.agree(stop.requested)
            while step < settings.steps and not stopping:
                if settings.validate_every and step and step % settings.validate_every == 0:
                    validate()
                    meter.restart()
                with meter.waiting():
                    batch = next(batches)
                loss = optimisation.step(step, batch.L, batch.ab)
                stopping = agree(stop.requested)
                step_is_traced()
                step += 1
                run.alive(step)
                meter.count(settings.global_batch)
                progress.update(settings.global_batch, loss=loss, data_wait=meter.data_wait)
                if step % settings.log_every == 0 or step in (1, settings.steps):
                    replaced = replacements.share(step, loader.replaced + unusable)
                    skipped, in_a_row = optimisation.skipped.tolist()  # waits for the GPU
                    run.log(
                        step,
                        loss=loss.item(),
                        learning_rate=settings.learning_rate(step - 1),
                        skipped=skipped,
                        replaced=replaced,
                        save_stall=checkpoints.read_stall(),
                        **meter.read(),
                    )
                    check_health(recipe, in_a_row, replaced, photographs)
                if step % recipe.checkpoint.every == 0 or step == settings.steps:
                    checkpoints.save(step)
            if stopping:
                raise Interrupted(f"after step {step} of {settings.steps}; run.dir={run.path} goes on from there")
            result = validate()
        except (Interrupted, RunFailed) as reason:
            if reason.shared:
                replacements.share(step, loader.replaced + unusable)
                checkpoints.save_before_leaving(step)
            raise
    replacements.share(step, unusable)

    if world.is_leader:
        write_evaluation(run.path, result, protocol(recipe.data, recipe.evaluate.preset))
        print(f"{result.count} photographs:\n{result.table()}\npictures: {run.panels / 'final.png'}", flush=True)
    checkpoints.finish()
    return result


def check_health(recipe: Recipe, skipped_in_a_row: int, replaced: int, photographs: int) -> None:
    """Raises RunFailed, on all ranks, where to go on makes no sense. The weights are those of the last good step."""
    if skipped_in_a_row > recipe.train.max_skipped:
        raise RunFailed(
            f"{skipped_in_a_row} steps in a row had a loss or gradient that is not finite, more than train.max_skipped="
            f"{recipe.train.max_skipped}; the checkpoint holds the last good weights: try train.precision=fp32 with "
            "it, or a lower train.lr in a new run",
            shared=True,
        )
    if replaced > max(1, recipe.data.max_bad * photographs):
        raise RunFailed(
            f"{replaced} of {photographs} photographs cannot be used any more, more than data.max_bad="
            f"{recipe.data.max_bad:g}; see replaced.jsonl in the run folder, then mend data.root={recipe.data.root}, "
            "or raise data.max_bad",
            shared=True,
        )


if __name__ == "__main__":
    run_command(main)
